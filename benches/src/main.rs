//! Measures what Cofferdam promises, each figure beside its native counterpart in the same run.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints what it measures"
)]

mod call;
mod checkpoint;
mod failover;
mod hotstate;
mod neighbours;
mod recovery;
mod state;
mod support;
mod wordcount;

use anyhow::{Result, bail};

/// The program's.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("call") => call::run(),
        Some("recovery") => recovery::run(),
        Some("checkpoint") => checkpoint::run(),
        Some("failover") => failover::run(),
        Some("hotstate") => hotstate::run(),
        Some("neighbours") => neighbours::run(),
        Some("state") => state::run(),
        Some("wordcount") => wordcount::run(),
        other => bail!(
            "which benchmark: call, recovery, checkpoint, failover, hotstate, neighbours, state or wordcount? (not {other:?})"
        ),
    }
}
