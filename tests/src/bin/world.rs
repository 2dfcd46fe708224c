//! Lives through as many random histories of a job as its argument says. Without `SEED` it continues where the
//! run before has ended, and what both have seen is counted together, in `target/world.json`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it reports on standard output")]

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use cofferdam_tests::{guest, world};
use serde_json::{Value, json};

/// Steps that have to be part of enough histories, once there are many.
const WANTED: [&str; 5] = ["rescales", "upgrades", "renames", "other paths", "moved directories"];
const WANTED_TIMES: u64 = 50;
const MANY: u64 = 2_000;

type Counts = BTreeMap<String, u64>;

/// What all runs have seen.
#[derive(Default)]
struct Seen {
    worlds: u64,
    next_seed: u64,
    events: Counts,
    exact: Counts,
    refusals: Counts,
}

impl Seen {
    fn read(path: &PathBuf) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let number = |name: &str| value[name].as_u64().unwrap_or(0);
        let counts = |name: &str| {
            let counts = value[name].as_object().into_iter().flatten();
            counts.map(|(name, count)| (name.clone(), count.as_u64().unwrap_or(0))).collect()
        };
        Self {
            worlds: number("worlds"),
            next_seed: number("next_seed").max(1),
            events: counts("events"),
            exact: counts("exact"),
            refusals: counts("refusals"),
        }
    }

    fn write(&self, path: &PathBuf) -> Result<()> {
        let Self { worlds, next_seed, events, exact, refusals } = self;
        let value = json!({
            "worlds": worlds,
            "next_seed": next_seed,
            "events": events,
            "exact": exact,
            "refusals": refusals,
        });
        fs::write(path, serde_json::to_string_pretty(&value)?).context("keep the counts")
    }

    fn add(&mut self, tally: &world::Tally) {
        self.worlds += tally.worlds;
        self.next_seed += tally.worlds;
        for (into, from) in [
            (&mut self.events, &tally.events),
            (&mut self.exact, &tally.exact),
            (&mut self.refusals, &tally.refusals),
        ] {
            from.iter()
                .for_each(|(name, count)| *into.entry((*name).to_owned()).or_default() += count);
        }
    }
}

fn main() -> Result<()> {
    let worlds: u64 = std::env::args().nth(1).context("usage: world HISTORIES")?.parse()?;
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let path = guest::root().join("target/world.json");
    let mut seen = match seed {
        Some(next_seed) => Seen { next_seed, ..Seen::default() },
        None => Seen::read(&path),
    };
    // One after the other: what a run that is stopped has seen counts.
    for world in 1..=worlds {
        seen.add(&world::run(1, seen.next_seed, |_| {})?);
        if seed.is_none() {
            seen.write(&path)?;
        }
        if world.is_multiple_of(20) {
            eprintln!("{} histories: {:?}", seen.worlds, seen.events);
        }
    }
    println!("{} histories: every verdict as predicted, nothing lost, nothing twice", seen.worlds);
    println!("{:<26} {:>6} {:>22}", "step", "times", "in histories, exact");
    for (name, times) in &seen.events {
        println!("{name:<26} {times:>6} {:>22}", seen.exact.get(name).unwrap_or(&0));
    }
    println!("refused as predicted: {:?}", seen.refusals);
    if MANY <= seen.worlds {
        for step in WANTED {
            let exact = seen.exact.get(step).copied().unwrap_or(0);
            ensure!(WANTED_TIMES <= exact, "{step}: only {exact} histories with it ended right");
        }
    }
    Ok(())
}
