//! Makes as many calls of the program's disk fail as its argument says.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it reports on standard output")]

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let faults: u64 = std::env::args().nth(1).context("usage: faults FAULTS")?.parse()?;
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let tally = cofferdam_tests::faults::run(faults, seed, |tally| {
        if tally.faults % 20 == 0 {
            eprintln!("{} faults, {} survived: {:?}", tally.faults, tally.survived, tally.calls);
        }
    })?;
    println!(
        "{} calls failed beneath the program, {} of the runs survived: nothing lost, nothing twice; {:?}",
        tally.faults, tally.survived, tally.calls
    );
    Ok(())
}
