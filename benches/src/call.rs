//! What a record costs to cross the wall, against the same operator without one.

use std::time::Instant;

use anyhow::Result;
use cofferdam_connectors::{GeneratorContent, GeneratorSpec};
use cofferdam_contract::Batch;
use cofferdam_sdk::runtime::Task;
use cofferdam_tests::guest;
use counter::Counter;

use crate::support::{block_on, load, median, native_batch, open, sandbox};

const RECORDS: usize = 1 << 20;
const ROUNDS: usize = 7;

pub(crate) fn run() -> Result<()> {
    let sandbox = sandbox()?;
    let component = load(&sandbox, &guest::counter())?;
    println!(
        "keyed running count, 10,000 words by Zipf's law, median of {ROUNDS} rounds of {RECORDS} records\n"
    );
    println!("| records a batch | guest ns/record | native ns/record | ratio |");
    println!("|---|---|---|---|");
    for size in [1usize, 16, 128, 1024, 8192] {
        let records = if size == 1 { RECORDS / 16 } else { RECORDS };
        let batches = batches(size, records);
        let natives: Vec<_> = batches.iter().map(native_batch).collect();
        let mut guest_ns = Vec::new();
        let mut native_ns = Vec::new();
        for _ in 0..ROUNDS {
            guest_ns.push(block_on(async {
                let mut instance = open(&component, &[]).await?;
                let began = Instant::now();
                for batch in &batches {
                    std::hint::black_box(instance.process(0, batch).await?);
                }
                anyhow::Ok(began.elapsed().as_nanos() as f64 / records as f64)
            })??);
            let mut task = Task::<Counter>::default();
            let began = Instant::now();
            for batch in &natives {
                let emitted = task.process(0, batch);
                std::hint::black_box(
                    emitted.map_err(|error| anyhow::anyhow!("{}", error.message))?,
                );
            }
            native_ns.push(began.elapsed().as_nanos() as f64 / records as f64);
        }
        let (guest, native) = (median(guest_ns), median(native_ns));
        println!("| {size} | {guest:.1} | {native:.1} | {:.2} |", guest / native);
    }
    Ok(())
}

fn batches(size: usize, records: usize) -> Vec<Batch> {
    let spec = GeneratorSpec {
        content: GeneratorContent::Words { vocabulary: 10_000, exponent: 1.0 },
        count: Some(records as u64),
        rate: None,
        seed: 1,
        has_timestamps: false,
    };
    let mut out = Vec::new();
    let mut current = Batch::empty();
    for batch in cofferdam_connectors::generate(&spec, 0, 1) {
        for record in batch.records() {
            current.push(record);
            if current.record_count() == size {
                out.push(std::mem::replace(&mut current, Batch::empty()));
            }
        }
    }
    out
}
