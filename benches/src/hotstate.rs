//! State that changes everywhere: 2,000,000 words all alike, checkpoints every second, with the memory and its
//! declared state in them, beside the same job without periodic checkpoints.

use std::{
    fs,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use cofferdam_engine::progress::Progress;
use cofferdam_tests::{guest, job::run_manifest};

use crate::support::median;

const RECORDS: u64 = 40_000_000;
const VOCABULARY: u32 = 2_000_000;
const WINDOW: Duration = Duration::from_secs(10);

/// One run.
struct Ran {
    seconds: f64,
    state_mib: f64,
    pauses_ms: Vec<f64>,
    durations_ms: Vec<f64>,
    /// The fewest checkpoints that were completed in any ten seconds of it.
    in_ten_seconds: Option<usize>,
    restarts: usize,
}

pub(crate) fn run() -> Result<()> {
    let rounds: usize =
        std::env::var("HOTSTATE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    println!(
        "{RECORDS} words of {VOCABULARY}, all alike, parallelism 2; {rounds} rounds in turns\n"
    );
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        without.push(job("")?);
        with.push(job("[execution.checkpointing]\ninterval = \"1s\"\n")?);
    }
    let seconds = |runs: &[Ran]| median(runs.iter().map(|run| run.seconds).collect());
    let (plain, hot) = (seconds(&without), seconds(&with));
    let all =
        |of: fn(&Ran) -> &Vec<f64>| with.iter().flat_map(|run| of(run).clone()).collect::<Vec<_>>();
    let pauses = all(|run| &run.pauses_ms);
    let longest = pauses.iter().copied().fold(0.0, f64::max);
    let fewest = with.iter().filter_map(|run| run.in_ten_seconds).min();
    println!("| | |\n|---|---|");
    println!("| state | {:.0} MiB |", median(with.iter().map(|run| run.state_mib).collect()));
    println!("| without checkpoints | {:.2} M records/s |", RECORDS as f64 / plain / 1e6);
    println!("| checkpoints every second | {:.2} M records/s |", RECORDS as f64 / hot / 1e6);
    println!("| throughput lost | {:.0} % |", 100.0 * (1.0 - plain / hot));
    println!("| pause, median and longest | {:.1} ms, {longest:.1} ms |", median(pauses));
    println!("| a checkpoint takes, median | {:.0} ms |", median(all(|run| &run.durations_ms)));
    println!(
        "| fewest checkpoints in any ten seconds | {} |",
        fewest.map_or_else(|| "no run was that long".to_owned(), |fewest| fewest.to_string())
    );
    println!("| restarts | {} |", with.iter().map(|run| run.restarts).sum::<usize>());
    Ok(())
}

fn job(checkpointing: &str) -> Result<Ran> {
    let dir = tempfile::tempdir_in(guest::root().join("target"))?;
    let path = dir.path().join("job.toml");
    let component = guest::counter().display().to_string();
    fs::write(
        &path,
        format!(
            "[job]\nname = \"bench\"\nparallelism = 2\n{checkpointing}\
             [restart-strategy]\ntype = \"fixed-delay\"\nfixed-delay = {{ attempts = 1000, delay = \"0s\" }}\n\
             [[source]]\nname = \"words\"\nconnector = \"generator\"\nvocabulary = {VOCABULARY}\nexponent = 0\n\
             seed = 1\ncount = {RECORDS}\n\
             [[operator]]\nname = \"count\"\ncomponent = {component:?}\nsnapshot = \"both\"\n\
             inputs = [{{ from = \"words\", partition = \"hash\" }}]\n\
             [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"count\"]\n"
        ),
    )?;
    let completed = Arc::new(Mutex::new(Vec::new()));
    let began = Instant::now();
    let ran = run_manifest(&path, |job| {
        let (metrics, completed) = (job.metrics(), Arc::downgrade(&completed));
        std::thread::spawn(move || {
            let mut known = 0;
            while let Some(completed) = completed.upgrade() {
                let now = metrics.checkpoints.load(Ordering::Relaxed);
                for _ in known..now {
                    completed.lock().expect("no panic").push(began.elapsed());
                }
                known = now;
                drop(completed);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
    });
    let seconds = began.elapsed().as_secs_f64();
    ran.outcome.as_ref().map_err(|problem| anyhow::anyhow!("{problem}"))?;
    let mut state_mib = 0.0;
    let (mut pauses_ms, mut durations_ms) = (Vec::new(), Vec::new());
    for progress in &ran.progress {
        if let Progress::CheckpointCompleted { duration_ms, pause_ms, state_bytes, .. } = progress {
            pauses_ms.push(*pause_ms);
            durations_ms.push(*duration_ms);
            state_mib = (*state_bytes as f64 / f64::from(1 << 20)).max(state_mib);
        }
    }
    let completed = std::mem::take(&mut *completed.lock().expect("no panic"));
    let end = completed.last().copied().unwrap_or_default();
    // Windows that begin with a checkpoint, or right behind one, have the fewest.
    let windows = completed.iter().filter(|begin| **begin + WINDOW <= end).map(|begin| {
        completed.iter().filter(|at| *begin < **at && **at <= *begin + WINDOW).count()
    });
    Ok(Ran {
        seconds,
        state_mib,
        pauses_ms,
        durations_ms,
        in_ten_seconds: windows.min(),
        restarts: ran.restart_count(),
    })
}
