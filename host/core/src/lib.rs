//! Decides everything a Cofferdam job does about checkpoints, alignment, restarts and failover.
//!
//! Nothing in this crate performs anything: no I/O, no clock, no threads, no dependencies. An
//! [`job::Event`] goes in, [`job::Effect`]s come out, and time is an argument, so a schedule that
//! breaks a promise can be found by trying thousands of seeds and replayed from one of them.

pub mod align;
pub mod call_size;
pub mod channel;
pub mod checkpoint;
pub mod exchange;
pub mod failover;
pub mod failure;
pub mod fit;
pub mod graph;
pub mod ids;
pub mod isolate;
pub mod job;
pub mod key_group;
pub mod origin;
pub mod random;
pub mod redistribute;
pub mod restart;
pub mod share;
pub mod shuffle;
pub mod watermark;
