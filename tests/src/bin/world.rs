//! Lives through as many random histories of a job as its argument says.

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let worlds: u64 = std::env::args().nth(1).context("usage: world HISTORIES")?.parse()?;
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let tally = cofferdam_tests::world::run(worlds, seed, |tally| {
        eprintln!("{} histories: {:?}", tally.worlds, tally.events);
    })?;
    println!("{} histories: every verdict as predicted, nothing lost, nothing twice", tally.worlds);
    Ok(())
}
