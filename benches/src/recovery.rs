//! From a trap to the next record processed, at every size of guest memory; and from a process
//! restart, out of sled.

use std::{path::Path, time::Instant};

use anyhow::{Result, ensure};
use cofferdam_engine::restore::open_named;
use cofferdam_sandbox::Image;
use cofferdam_tests::{
    guest,
    job::{Harness, run_manifest},
};

use crate::support::{after_restarts, block_on, load, median, open, percentile_99, sandbox};

const TRAPS: u64 = 40;

pub(crate) fn run() -> Result<()> {
    println!("a job of 1 source, 1 operator, 1 sink; {TRAPS} traps each; one region, delay 0;");
    println!("from the trap to the first batch processed by the restored instance\n");
    println!(
        "| guest memory | recovery, median | 99th percentile | from sled: load | rate | restore |"
    );
    println!("|---|---|---|---|---|---|");
    for mib in [1u64, 16, 64, 256, 1024] {
        let dir = tempfile::tempdir()?;
        let recoveries = recoveries(dir.path(), mib << 20)?;
        let (load_ms, bytes, restore_ms) = from_sled(dir.path())?;
        println!(
            "| {mib} MiB | {:.2} ms | {:.2} ms | {load_ms:.0} ms | {:.0} MB/s | {restore_ms:.2} ms |",
            median(recoveries.clone()),
            percentile_99(recoveries),
            bytes as f64 / 1e3 / load_ms,
        );
    }
    Ok(())
}

fn harness(ballast: u64, deed: &str) -> Harness {
    let config = format!(
        "ballast = {ballast}, dirty = 1, quiet = true, {deed} }}\nlimits = {{ memory = \"3GiB\", call = \"60s\""
    );
    Harness {
        count: 1_000_000,
        rate: Some(2_000),
        parallelism: 1,
        interval_ms: 200,
        snapshot: "memory",
        config,
        ..Harness::default()
    }
}

/// Milliseconds from each trap to the next record processed. Leaves a checkpoint behind.
fn recoveries(dir: &Path, ballast: u64) -> Result<Vec<f64>> {
    // The first trap comes after the first checkpoint, which writes the whole memory; each other
    // one 200 ms after the one before, so that a batch lies between.
    let at = 1_200.max(30 * (ballast >> 20));
    let deed = format!("do = \"trap\", at = {at}, step = 400, attempts = {TRAPS}");
    let manifest = harness(ballast, &deed).write(dir);
    let ran = run_manifest(&manifest, |job| {
        let handle = job.control();
        after_restarts(job, TRAPS, move || handle.stop());
    });
    ran.outcome.as_ref().map_err(|problem| anyhow::anyhow!("{problem}"))?;
    let recoveries = ran.recoveries_ms();
    // A trap in the very first batch after a restore leaves nothing to measure.
    ensure!(10 <= recoveries.len(), "only {} recoveries", recoveries.len());
    Ok(recoveries)
}

/// Milliseconds to load the operator's state, its bytes, and milliseconds to restore an instance.
fn from_sled(dir: &Path) -> Result<(f64, u64, f64)> {
    let began = Instant::now();
    let (store, manifest) = open_named(&dir.join("probe.cofferdam"))?;
    let loaded = store.load(1, manifest.checkpoint)?;
    let mut image = Image::new();
    loaded.memory.iter().try_for_each(|snapshot| image.apply(snapshot))?;
    let load_ms = began.elapsed().as_secs_f64() * 1e3;
    let sandbox = sandbox()?;
    let component = load(&sandbox, &guest::probe())?;
    let restore_ms = block_on(async {
        let began = Instant::now();
        let mut instance = open(&component, &[]).await?;
        instance.restore(&image).await?;
        anyhow::Ok(began.elapsed().as_secs_f64() * 1e3)
    })??;
    Ok((load_ms, loaded.bytes, restore_ms))
}
