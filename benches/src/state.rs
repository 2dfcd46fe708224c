//! Keyed counts whose state is in the guest, or kept by the host: records a second, the memory of the
//! process, and the way back after a trap.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result};
use cofferdam_connectors::{GeneratorContent, GeneratorSpec, generate};
use cofferdam_core::random::Random;
use cofferdam_tests::{guest, job::run_manifest};

use crate::support::{after_restarts, median};

const RECORDS: u64 = 1_000_000;
/// Different words: some 100 MB of state, most of it the bookkeeping of its entries.
const VOCABULARY: u32 = 1_000_000;
const ROUNDS: usize = 3;

/// A way to keep the state: its name, and lines of the manifest.
const WAYS: [(&str, &str); 3] = [
    ("hashmap", ""),
    (
        "sled, all of it in the guest's cache",
        "[state.backend]\ntype = \"sled\"\nsled = { guest-cache = \"256MiB\" }\n",
    ),
    (
        "sled, 4 MiB in the guest's cache",
        "[state.backend]\ntype = \"sled\"\nsled = { guest-cache = \"4MiB\" }\n",
    ),
];

pub(crate) fn run() -> Result<()> {
    println!(
        "{RECORDS} words of {VOCABULARY}, one counter, checkpoints every second; median of {ROUNDS} rounds\n"
    );
    println!(
        "| state | words by Zipf's law, thousand records/s | all words alike, thousand records/s |"
    );
    println!("|---|---|---|");
    let mut figures = vec![[Vec::new(), Vec::new()]; WAYS.len() + 1];
    for _ in 0..ROUNDS {
        for (way, (_, lines)) in WAYS.iter().enumerate() {
            for (law, exponent) in [1.0, 0.0].into_iter().enumerate() {
                figures[way][law].push(job(lines, exponent)?);
            }
        }
        for (law, exponent) in [1.0, 0.0].into_iter().enumerate() {
            figures[WAYS.len()][law].push(native(exponent)?);
        }
    }
    let names =
        WAYS.iter().map(|(name, _)| *name).chain(["native Rust, a BTreeMap and no checkpoints"]);
    for (name, [zipf, alike]) in names.zip(figures) {
        println!("| {name} | {:.0} | {:.0} |", median(zipf), median(alike));
    }
    println!("\n| state | trap to next record | resident |");
    println!("|---|---|---|");
    for (name, lines) in WAYS {
        let (recovery_ms, resident) = recovery(lines)?;
        println!("| {name} | {recovery_ms:.2} ms | {resident} MiB |");
    }
    Ok(())
}

fn manifest(lines: &str, exponent: f64, component: &str, rest: &str, source: &str) -> String {
    format!(
        "[job]\nname = \"bench\"\n[execution.checkpointing]\ninterval = \"1s\"\n{lines}\n\
         [restart-strategy]\ntype = \"fixed-delay\"\nfixed-delay = {{ attempts = 1000, delay = \"0s\" }}\n\
         [[source]]\nname = \"words\"\nconnector = \"generator\"\nvocabulary = {VOCABULARY}\nexponent = {exponent}\nseed = 1\n{source}\n\
         [[operator]]\nname = \"count\"\ncomponent = {component:?}\ninputs = [\"words\"]\n\
         limits = {{ memory = \"2GiB\", call = \"60s\" }}\n{rest}\n\
         [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"count\"]\n",
    )
}

/// Thousand records a second.
fn job(lines: &str, exponent: f64) -> Result<f64> {
    let dir = tempfile::tempdir_in(guest::root().join("target"))?;
    let path = dir.path().join("job.toml");
    let component = guest::counter().display().to_string();
    let count = format!("count = {RECORDS}");
    fs::write(&path, manifest(lines, exponent, &component, "", &count))?;
    let began = Instant::now();
    if let Err(problem) = run_manifest(&path, |_| {}).outcome {
        anyhow::bail!("{problem}");
    }
    Ok(RECORDS as f64 / began.elapsed().as_secs_f64() / 1e3)
}

/// The same words in a sorted map, which is what state on disk has to be compared with.
fn native(exponent: f64) -> Result<f64> {
    let spec = GeneratorSpec {
        content: GeneratorContent::Words { vocabulary: VOCABULARY, exponent },
        count: Some(RECORDS),
        rate: None,
        seed: 1,
        has_timestamps: false,
    };
    let began = Instant::now();
    let mut counts = std::collections::BTreeMap::<Vec<u8>, u64>::new();
    for batch in generate(&spec, 0, 1) {
        for record in batch.records() {
            let key = record.key.context("a word has a key")?;
            match counts.get_mut(key) {
                Some(count) => *count += 1,
                None => {
                    counts.insert(key.to_vec(), 1);
                }
            }
        }
    }
    std::hint::black_box(&counts);
    Ok(RECORDS as f64 / began.elapsed().as_secs_f64() / 1e3)
}

/// Milliseconds from a trap to the next record, and the memory of the process in MiB, in a job that
/// has seen most of its words.
fn recovery(lines: &str) -> Result<(f64, u64)> {
    let dir = tempfile::tempdir_in(guest::root().join("target"))?;
    let path = dir.path().join("job.toml");
    let at = Random::new(1).between(600_000, 600_100);
    let config = format!(
        "config = {{ do = \"trap\", at = {at}, step = 20000, attempts = 12, quiet = true }}"
    );
    let component = guest::probe().display().to_string();
    fs::write(&path, manifest(lines, 0.0, &component, &config, "rate = 400000"))?;
    let resident = Arc::new(AtomicU64::new(0));
    let ran = run_manifest(&path, |job| {
        let (handle, resident) = (job.control(), resident.clone());
        after_restarts(job, 12, move || {
            resident.store(resident_mib().unwrap_or(0), Ordering::Relaxed);
            handle.cancel();
        });
    });
    ran.outcome.as_ref().map_err(|problem| anyhow::anyhow!("{problem}"))?;
    Ok((median(ran.recoveries_ms()), resident.load(Ordering::Relaxed)))
}

fn resident_mib() -> Result<u64> {
    let text = fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split(' ').nth(1).context("statm has a second field")?.parse()?;
    Ok((pages * 4096) >> 20)
}
