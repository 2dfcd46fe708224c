//! Eight jobs over the flights of a year, or one of them: `flights [JOB]`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it reports on standard output")]

use anyhow::Result;

fn main() -> Result<()> {
    let only = std::env::args().nth(1);
    let runs = cofferdam_tests::flights::run(only.as_deref(), |job, way| {
        eprintln!("{job}, way {way}: exact");
    })?;
    println!("{runs} times every line as computed");
    Ok(())
}
