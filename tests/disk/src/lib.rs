//! Stands between a program and its C library (`LD_PRELOAD`), for the files below one directory: makes
//! one call fail, as a bad disk does, or records every change and every sync, so that the disk as a power
//! cut leaves it can be made afterwards.
//!
//! The environment says what to do:
//!
//! | variable | meaning |
//! |---|---|
//! | `DISK_ROOT` | the directory, as an absolute path without links; nothing is done without it |
//! | `DISK_FAIL` | the number of the call that fails, counted from 1 |
//! | `DISK_MODE` | `once` (the default); `reopen`: all that is open stays broken; `gone`: everything fails from then on; `torn`: a write writes half before it fails, other calls as `once` |
//! | `DISK_ERRNO` | the number of the error; 5 (EIO) by default |
//! | `DISK_REPORT` | a file that gets a line for the call that was made to fail, and the number of calls at the end |
//! | `DISK_CLOCK` | `SECONDS@CALL`: from that question for the time of day on, counted from 0, the answer is so much later, or earlier; needs no root |
//! | `DISK_TRACE` | a file that gets every change, in the format of [`trace`] |
//!
//! Calls that are made to fail: open, read, write, sync, truncate, allocate, stat, rename, link, unlink and
//! the making of directories. A listing of a directory fails where it is opened with `open`.

#![allow(unsafe_code)]

mod clock;
mod hooks;
mod state;
mod trace;
