//! The harness of the tests: guests built on demand, a host that records, jobs that can be run to
//! their end in this process or killed in another.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a harness fails by a panic"
)]

pub mod archive;
pub mod attack;
#[path = "../../xtask/src/cargo.rs"]
mod cargo;
pub mod crash;
pub mod disk;
pub mod faults;
pub mod flights;
pub mod guest;
pub mod host;
pub mod job;
pub mod keyed;
pub mod power;
pub mod world;
