//! Writes what this version writes into `tests/archive`.

use anyhow::Result;

fn main() -> Result<()> {
    let folder = cofferdam_tests::archive::write()?;
    println!("{}", folder.display());
    Ok(())
}
