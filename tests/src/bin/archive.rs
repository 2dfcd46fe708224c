//! Writes what this version writes into `tests/archive`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it reports on standard output")]

use anyhow::Result;

fn main() -> Result<()> {
    let folder = cofferdam_tests::archive::write()?;
    println!("{}", folder.display());
    Ok(())
}
