//! Keyed word count end to end: records a second and core, with and without checkpoints every
//! second, and the same pipeline in native Rust.

use std::{
    sync::mpsc::{SyncSender, sync_channel},
    time::Instant,
};

use anyhow::Result;
use cofferdam_connectors::{GeneratorContent, GeneratorSpec, generate};
use cofferdam_contract::Batch;
use cofferdam_core::{
    key_group::{key_group, task_index},
    random::Random,
};
use cofferdam_sdk::runtime::Task;
use cofferdam_tests::{guest, job::run_manifest};
use counter::Counter;

use crate::support::{cpu_time, median, native_batch};

const RECORDS: u64 = 60_000_000;
/// The generator's default.
const VOCABULARY: u32 = 10_000;
const PARALLELISM: u32 = 2;
const ROUNDS: usize = 3;
const BATCH_RECORDS: usize = 1024;

/// Seconds of wall clock and of processor time.
type Figure = (f64, f64);

pub(crate) fn run() -> Result<()> {
    println!(
        "{RECORDS} words from {VOCABULARY} by Zipf's law, 2 sources, hash, 2 counters, discarded; median of {ROUNDS} rounds\n"
    );
    let mut figures: [Vec<Figure>; 3] = Default::default();
    // In turns, in an order that changes: the machine's moods fall on all alike.
    let mut random = Random::new(1);
    for _ in 0..ROUNDS {
        let mut order = [0usize, 1, 2];
        order.swap(0, random.between(0, 2) as usize);
        for kind in order {
            figures[kind].push(match kind {
                0 => native(),
                1 => job(None)?,
                _ => job(Some(1_000))?,
            });
        }
    }
    println!(
        "| pipeline | wall | M records/s a core (wall) | M records/s a core (processor time) | processor time / native |"
    );
    println!("|---|---|---|---|---|");
    let native_cpu = median(figures[0].iter().map(|figure| figure.1).collect());
    let names = ["native Rust", "Cofferdam, no checkpoints", "Cofferdam, checkpoints every second"];
    for (name, figures) in names.iter().zip(&figures) {
        let wall = median(figures.iter().map(|figure| figure.0).collect());
        let cpu = median(figures.iter().map(|figure| figure.1).collect());
        let millions = RECORDS as f64 / 1e6;
        println!(
            "| {name} | {wall:.2} s | {:.1} | {:.1} | {:.2} |",
            millions / wall / f64::from(PARALLELISM),
            millions / cpu,
            cpu / native_cpu,
        );
    }
    Ok(())
}

fn spec() -> GeneratorSpec {
    GeneratorSpec {
        content: GeneratorContent::Words { vocabulary: VOCABULARY, exponent: 1.0 },
        count: Some(RECORDS),
        rate: None,
        seed: 1,
        has_timestamps: false,
    }
}

fn timed(work: impl FnOnce()) -> Figure {
    let (began, cpu) = (Instant::now(), cpu_time());
    work();
    (began.elapsed().as_secs_f64(), (cpu_time() - cpu).as_secs_f64())
}

fn job(interval_ms: Option<u64>) -> Result<Figure> {
    let dir = tempfile::tempdir_in(guest::root().join("target"))?;
    let checkpointing = interval_ms
        .map_or(String::new(), |ms| format!("[execution.checkpointing]\ninterval = \"{ms}ms\"\n"));
    let manifest = dir.path().join("job.toml");
    let text = format!(
        "[job]\nname = \"bench\"\nparallelism = {PARALLELISM}\n{checkpointing}\n\
         [[source]]\nname = \"words\"\nconnector = \"generator\"\nvocabulary = {VOCABULARY}\nseed = 1\ncount = {RECORDS}\n\
         [[operator]]\nname = \"count\"\ncomponent = {:?}\ninputs = [{{ from = \"words\", partition = \"hash\" }}]\n\
         [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"count\"]\n",
        guest::counter()
    );
    std::fs::write(&manifest, text)?;
    let mut outcome = None;
    let figure = timed(|| outcome = Some(run_manifest(&manifest, |_| {}).outcome));
    if let Some(Err(problem)) = outcome {
        anyhow::bail!("{problem}");
    }
    Ok(figure)
}

/// What somebody would write without a framework: threads, channels of batches, the same operator.
fn native() -> Figure {
    timed(|| {
        std::thread::scope(|scope| {
            let (senders, receivers): (Vec<_>, Vec<_>) =
                (0..PARALLELISM).map(|_| sync_channel::<Batch>(16)).unzip();
            for receiver in receivers {
                scope.spawn(move || {
                    let mut task = Task::<Counter>::default();
                    for batch in receiver {
                        let batch = native_batch(&batch);
                        drop(std::hint::black_box(task.process(0, &batch)));
                    }
                });
            }
            for index in 0..PARALLELISM {
                let senders = senders.clone();
                scope.spawn(move || produce(index, &senders));
            }
            drop(senders);
        });
    })
}

fn produce(index: u32, senders: &[SyncSender<Batch>]) {
    let mut outgoing: Vec<Batch> = senders.iter().map(|_| Batch::empty()).collect();
    for batch in generate(&spec(), index, PARALLELISM) {
        for record in batch.records() {
            let group = key_group(record.key.unwrap_or_default(), 128);
            let to = task_index(group, PARALLELISM, 128) as usize;
            outgoing[to].push(record);
            if outgoing[to].record_count() == BATCH_RECORDS {
                let full = std::mem::replace(&mut outgoing[to], Batch::empty());
                if senders[to].send(full).is_err() {
                    return;
                }
            }
        }
    }
    for (sender, rest) in senders.iter().zip(outgoing) {
        let _ = sender.send(rest);
    }
}
