//! Two jobs in one engine: one runs to its end. The other is watched, asked for checkpoints, for a savepoint and for its
//! figures, rescaled while it runs, and stopped with a savepoint.
//!
//! `cargo run -p cofferdam-engine --example two_jobs`

#![allow(clippy::print_stdout, reason = "an example prints what it does")]

use std::{collections::BTreeMap, fs, path::Path};

use cofferdam_connectors::builtin;
use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    Engine, EngineOptions, JobHandle, events::JobEvent, job::JobOptions, progress::Progress,
};
use cofferdam_settings::Problem;
use cofferdam_spec::JobSpec;

/// A job that makes numbers up and writes them to files. An operator of your own would stand between both.
fn manifest(name: &str, count: &str, rate: u64) -> String {
    format!(
        r#"
[job]
name = "{name}"

[execution.checkpointing]
interval = "200ms"

[[source]]
name = "numbers"
connector = "generator"
content = "sequence"
rate = {rate}
{count}

[[sink]]
name = "parts"
connector = "file"
path = "{name}-out"
inputs = ["numbers"]
"#
    )
}

async fn submit(
    engine: &Engine,
    dir: &Path,
    name: &str,
    text: String,
) -> Result<JobHandle, Problem> {
    let path = dir.join(format!("{name}.toml"));
    let spec = JobSpec::parse(&path, &text, None, &builtin())?;
    let checked = engine.check(spec).await?;
    engine.submit(checked, JobOptions::default()).await
}

/// Runs both jobs; gives the number of records that each has committed.
pub(crate) async fn two_jobs(dir: &Path) -> Result<(u64, u64), Problem> {
    let engine = Engine::new(EngineOptions::default())?;
    let short = manifest("short", "count = 20_000", 40_000);
    let short = submit(&engine, dir, "short", short).await?;
    let long = submit(&engine, dir, "long", manifest("long", "", 5_000)).await?;
    println!("running: {:?}", engine.jobs().iter().map(JobHandle::name).collect::<Vec<_>>());

    let mut events = long.subscribe();
    let checkpoint = loop {
        if let Some(JobEvent::Progress(event)) = events.next().await
            && let Progress::CheckpointCompleted { checkpoint, .. } = &*event
        {
            break *checkpoint;
        }
    };
    println!("long has completed checkpoint {checkpoint}");
    let requested = long.checkpoint().await?;
    for task in long.checkpoint_tasks(requested).await? {
        println!("  checkpoint {requested} of {}: {} bytes of state", task.name, task.state_bytes);
    }
    long.rescale(&BTreeMap::from([("numbers".to_owned(), 3), ("parts".to_owned(), 3)])).await?;
    long.running().await?;
    println!("long is {:?}", long.status());
    for operator in long.metrics().read_operators() {
        println!("  {}: {} in, {} out", operator.name, operator.records_in, operator.records_out);
    }
    let saved = long.savepoint(dir.join("copies")).await?;
    println!(
        "long has written savepoint {saved}, and keeps {} checkpoints",
        long.checkpoints().len()
    );

    assert_eq!(short.ended().await?, Outcome::Finished);
    println!("short is {:?}", short.status().state);
    let savepoint = long.stop_with_savepoint(dir.join("savepoint"), false).await?;
    long.ended().await?;
    println!("long is {:?} with savepoint {savepoint}", long.status().state);
    for failure in long.failures() {
        println!("  at {} ms: {}", failure.at_ms, failure.event);
    }
    println!("its guests have logged {} lines", long.logs().len());
    Ok((committed(&dir.join("short-out")), committed(&dir.join("long-out"))))
}

/// How many lines the visible parts of a sink have.
fn committed(dir: &Path) -> u64 {
    let parts = fs::read_dir(dir).into_iter().flatten().flatten();
    let parts = parts.filter(|part| part.file_name().to_string_lossy().starts_with("part-"));
    parts
        .filter_map(|part| fs::read_to_string(part.path()).ok())
        .map(|it| it.lines().count() as u64)
        .sum()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let (short, long) = two_jobs(dir.path()).await.map_err(|problem| problem.to_string())?;
    println!("committed: {short} records of short, {long} of long");
    Ok(())
}
