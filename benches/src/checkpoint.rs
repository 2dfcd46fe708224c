//! The pause of a task, and what a checkpoint writes, against the share of memory that changed.

use std::{fs::File, io::Write, sync::Arc, time::Instant};

use anyhow::Result;
use cofferdam_contract::{Batch, RecordRef};
use cofferdam_sandbox::MemorySnapshot;
use cofferdam_store::{SnapshotStore, sled::SledStorage, snapshot::TaskSnapshot};
use cofferdam_tests::{guest, job::lone_task};

use crate::support::{block_on, disk_bytes, load, median, open, sandbox};

const ROUNDS: usize = 9;
const PAGE: u64 = 4096;
const COUNTED_WORDS: u32 = 500_000;

/// Pause in us, changed bytes, seconds into sled, bytes stored, bytes on disk, seconds into a file.
type Row = (f64, f64, f64, f64, f64, f64);

pub(crate) fn run() -> Result<()> {
    let sandbox = sandbox()?;
    println!(
        "pages are found by {}; median of {ROUNDS} checkpoints; a plain file with fsync beside it\n",
        sandbox.tracking().name()
    );
    println!(
        "| memory | dirty | changed pages | task pause | write + flush | bytes stored / changed | bytes on disk / changed | sled MB/s | file MB/s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let component = load(&sandbox, &guest::probe())?;
    for mib in [256u64, 1024] {
        for per_mille in [1u64, 10, 100] {
            let ballast = mib << 20;
            let pages = ballast / PAGE * per_mille / 1000;
            let config = [
                ("ballast", ballast.to_string()),
                ("dirty", pages.to_string()),
                ("quiet", "true".to_owned()),
            ];
            let config: Vec<(&str, &str)> =
                config.iter().map(|(key, value)| (*key, value.as_str())).collect();
            block_on(measure(&component, &config, mib, per_mille))??;
        }
    }
    block_on(compress(&load(&sandbox, &guest::counter())?))?
}

/// What compression costs and saves: the state of a counter of words, written whole.
async fn compress(component: &cofferdam_sandbox::Component) -> Result<()> {
    println!(
        "\n| words counted | state | compressed | write + flush | bytes stored | of the state |"
    );
    println!("|---|---|---|---|---|---|");
    let mut instance = open(component, &[]).await?;
    let mut words = Batch::empty();
    for number in 0..COUNTED_WORDS {
        // As long as words are, and no two alike.
        let word = format!("word-{:x}", number.wrapping_mul(0x9e37_79b9));
        words.push(RecordRef { key: Some(word.as_bytes()), value: b"", timestamp: None });
        if words.record_count() == 1024 {
            instance.process(0, &std::mem::replace(&mut words, Batch::empty())).await?;
        }
    }
    instance.process(0, &words).await?;
    let memory = instance.snapshot().await?;
    let state = memory.changed_bytes();
    let snapshot =
        Arc::new(TaskSnapshot { memory: Some(memory.into()), ..TaskSnapshot::default() });
    let mut rows = [Vec::new(), Vec::new()];
    // In turn, so that both meet the same disk.
    for _ in 0..ROUNDS {
        for (is_compressing, row) in [false, true].into_iter().zip(&mut rows) {
            let dir = tempfile::tempdir_in(guest::root().join("target"))?;
            let storage = Box::new(SledStorage::new(dir.path().to_owned()));
            let (mut store, _) = SnapshotStore::open(storage, "bench", vec![lone_task("count")])?;
            store.compress(is_compressing);
            let began = Instant::now();
            let bytes = store.write(vec![(0, 1, snapshot.clone())])?[0];
            row.push((began.elapsed().as_secs_f64() * 1e3, bytes as f64));
        }
    }
    for (name, row) in ["no", "LZ4"].into_iter().zip(rows) {
        let bytes = median(row.iter().map(|(_, bytes)| *bytes).collect());
        println!(
            "| {COUNTED_WORDS} | {:.1} MB | {name} | {:.1} ms | {:.1} MB | {:.2} |",
            state as f64 / 1e6,
            median(row.iter().map(|(ms, _)| *ms).collect()),
            bytes / 1e6,
            bytes / state as f64,
        );
    }
    Ok(())
}

async fn measure(
    component: &cofferdam_sandbox::Component,
    config: &[(&str, &str)],
    mib: u64,
    per_mille: u64,
) -> Result<()> {
    let dir = tempfile::tempdir_in(guest::root().join("target"))?;
    let (mut store, _) = SnapshotStore::open(
        Box::new(SledStorage::new(dir.path().to_owned())),
        "bench",
        vec![lone_task("probe")],
    )?;
    let mut plain = File::create(dir.path().join("plain"))?;
    let mut instance = open(component, config).await?;
    let mut record = Batch::empty();
    record.push(RecordRef { key: Some(b"key"), value: b"", timestamp: None });
    let mut rows = Vec::new();
    for round in 0..=ROUNDS as u64 {
        instance.process(0, &record).await?;
        let began = Instant::now();
        let memory = instance.snapshot().await?;
        let pause_us = began.elapsed().as_secs_f64() * 1e6;
        let changed = memory.changed_bytes();
        let file_s = write_plainly(&mut plain, &memory)?;
        let snapshot =
            Arc::new(TaskSnapshot { memory: Some(memory.into()), ..TaskSnapshot::default() });
        let disk_before = disk_bytes();
        let began = Instant::now();
        let stored = store.write(vec![(0, round + 1, snapshot)])?[0];
        store.complete(round + 1, 0)?;
        let sled_s = began.elapsed().as_secs_f64();
        let on_disk = disk_bytes() - disk_before;
        // The first one writes the whole memory.
        if 0 < round {
            rows.push((pause_us, changed as f64, sled_s, stored as f64, on_disk as f64, file_s));
        }
    }
    let of = |pick: &dyn Fn(&Row) -> f64| median(rows.iter().map(pick).collect());
    println!(
        "| {mib} MiB | {:.1} % | {:.0} | {:.0} us | {:.1} ms | {:.3} | {:.3} | {:.0} | {:.0} |",
        per_mille as f64 / 10.0,
        of(&|row| row.1 / PAGE as f64),
        of(&|row| row.0),
        of(&|row| row.2 * 1e3),
        of(&|row| row.3 / row.1),
        of(&|row| row.4 / row.1),
        of(&|row| row.1 / row.2 / 1e6),
        of(&|row| row.1 / row.5 / 1e6),
    );
    Ok(())
}

/// The yardstick: the same pages appended to a file and synced.
fn write_plainly(file: &mut File, memory: &MemorySnapshot) -> Result<f64> {
    let began = Instant::now();
    let mut buffer = Vec::with_capacity(1 << 20);
    for (_, page) in memory.memories.iter().flat_map(|delta| delta.pages()) {
        buffer.extend_from_slice(page);
        if buffer.len() == buffer.capacity() {
            file.write_all(&buffer)?;
            buffer.clear();
        }
    }
    file.write_all(&buffer)?;
    file.sync_data()?;
    Ok(began.elapsed().as_secs_f64())
}
