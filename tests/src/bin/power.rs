//! Cuts the power of the program's disk as often as its argument says.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it reports on standard output")]

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let cuts: u64 = std::env::args().nth(1).context("usage: power CUTS")?.parse()?;
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let tally = cofferdam_tests::power::run(cuts, seed, |tally| {
        if tally.cuts % 20 == 0 {
            eprintln!("{} power cuts, {} of them lost something", tally.cuts, tally.lossy);
        }
    })?;
    println!(
        "{} power cuts, {} of them lost something that was not synced, {} jobs resumed: nothing lost, nothing twice",
        tally.cuts, tally.lossy, tally.resumed
    );
    Ok(())
}
