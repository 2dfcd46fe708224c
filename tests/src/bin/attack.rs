//! Attacks a host in every way that is known, beside a neighbour; with `BLESS=1` the table goes into docs/security.md.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it reports on standard output")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cofferdam_tests::attack::{Arena, all, table};

const BEGIN: &str = "<!-- attacks -->\n";
const END: &str = "<!-- end of attacks -->";

fn main() -> Result<()> {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let attacks = all();
    let attacks: Vec<_> = attacks
        .into_iter()
        .filter(|it| format!("{} {} {}", it.category, it.deed, it.place).contains(&wanted))
        .collect();
    ensure!(!attacks.is_empty(), "no attack has {wanted:?} in its name");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (mut struck, mut failures, mut slowest) = (Vec::new(), Vec::new(), Vec::new());
    let records = runtime.block_on(async {
        let arena = Arena::new().await?;
        for (number, attack) in (1..).zip(&attacks) {
            let one = arena
                .strike(attack, Duration::from_millis(300))
                .await
                .with_context(|| attack.deed.clone())?;
            let (count, ms) = (attacks.len(), one.took.as_millis());
            eprintln!(
                "{number}/{count} {} ({}): {} in {ms} ms, neighbour at {:.0} %",
                attack.deed,
                attack.place,
                one.ended,
                100.0 * one.neighbour
            );
            failures.extend(attack.failure(&one));
            slowest.push((one.neighbour, format!("{} ({})", attack.deed, attack.place)));
            struck.push(one);
        }
        arena.end().await
    })?;
    failures.iter().for_each(|failure| println!("{failure}\n"));
    slowest.sort_by(|left, right| left.0.total_cmp(&right.0));
    let median = slowest[slowest.len() / 2].0;
    println!(
        "{} attacks, {} not stopped as they must be; the neighbour had its rate to {:.0} % in the median, {:.0} % at worst ({}), and each of its {records} records once",
        attacks.len(),
        failures.len(),
        100.0 * median,
        100.0 * slowest[0].0,
        slowest[0].1
    );
    ensure!(failures.is_empty(), "{} attacks were not stopped as they must be", failures.len());
    ensure!(0.9 <= median, "the neighbour was held up");
    if wanted.is_empty() && std::env::var_os("BLESS").is_some() {
        write(&table(&attacks, &struck))?;
    }
    Ok(())
}

/// The table in the docs is that of this run.
fn write(table: &str) -> Result<()> {
    let path = cofferdam_tests::guest::root().join("docs/security.md");
    let text = std::fs::read_to_string(&path)?;
    let (before, rest) = text.split_once(BEGIN).context("where the table begins")?;
    let (_, after) = rest.split_once(END).context("where the table ends")?;
    Ok(std::fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}"))?)
}
