//! Kills a running job with SIGKILL as often as its argument says.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it reports on standard output")]

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let rounds: u64 = std::env::args().nth(1).context("usage: crash ROUNDS")?.parse()?;
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let tally = cofferdam_tests::crash::run(rounds, seed, |tally| {
        eprintln!(
            "{} kills, {} resumed from a checkpoint, {} jobs finished and right",
            tally.kills, tally.resumed, tally.jobs
        );
    })?;
    println!(
        "{} kills by SIGKILL, {} jobs: nothing lost, nothing twice (SEED={seed})",
        tally.kills, tally.jobs
    );
    Ok(())
}
