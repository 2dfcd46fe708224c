//! Runs jobs in this process and collects what they commit.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use cofferdam_connector::Catalog;
use cofferdam_connectors::builtin;
use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    control::JobControl,
    job::{CheckedJob, Job, JobOptions},
    problem::Problem,
    progress::{Observer, Progress, Restart},
};
use cofferdam_sandbox::{Sandbox, SandboxOptions};
use cofferdam_spec::JobSpec;
use cofferdam_store::metadata::TaskIdentity;

use crate::guest;

/// The sandbox of all tests, with a cache of its own.
///
/// # Panics
/// If it cannot be set up.
pub fn sandbox() -> &'static Sandbox {
    static SANDBOX: OnceLock<Sandbox> = OnceLock::new();
    SANDBOX.get_or_init(|| {
        let cache_dir = Some(guest::root().join("target/tests-cache"));
        Sandbox::new(SandboxOptions { cache_dir, ..SandboxOptions::default() }).expect("a sandbox")
    })
}

/// Lines after those of `[execution.checkpointing]`: declared state is kept by the host, with so
/// little room for it in memory that most of it is on disk.
pub const HOST_STATE: &str = r#"
[state.backend]
type = "sled"
sled = { cache = "1MiB", write-buffer = "8KiB", guest-cache = "4KiB" }
"#;

/// A job that counts words with the probe, in a directory of its own.
#[derive(Debug, Clone)]
pub struct Harness {
    /// How many words.
    pub count: u64,
    /// Words a second; as fast as possible if `None`.
    pub rate: Option<u64>,
    /// Tasks of each node.
    pub parallelism: u32,
    /// Between checkpoints.
    pub interval_ms: u64,
    /// What a checkpoint holds.
    pub snapshot: &'static str,
    /// Restarts allowed.
    pub attempts: u64,
    /// What the probe does, as the `config` table.
    pub config: String,
    /// How many different words.
    pub vocabulary: u64,
    /// The edge from the source to the probe.
    pub partition: &'static str,
    /// Further lines of `[execution.checkpointing]`.
    pub checkpointing: String,
}

impl Default for Harness {
    fn default() -> Self {
        Self {
            count: 60_000,
            rate: None,
            parallelism: 2,
            interval_ms: 20,
            snapshot: "both",
            attempts: 1_000,
            config: String::new(),
            vocabulary: 500,
            partition: "hash",
            checkpointing: r#"externalized-checkpoint-retention = "RETAIN_ON_CANCELLATION""#
                .to_owned(),
        }
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Ran {
    /// How it ended.
    pub outcome: Result<Outcome, Problem>,
    /// What it told.
    pub progress: Vec<Progress>,
}

impl Ran {
    /// The tasks of each restart.
    #[must_use]
    pub fn restarted(&self) -> Vec<Vec<String>> {
        let of = |progress: &Progress| match progress {
            Progress::Restarting(Restart { restarting, .. }) => {
                Some(restarting.keys().cloned().collect())
            }
            _ => None,
        };
        self.progress.iter().filter_map(of).collect()
    }

    /// How often the tasks were restarted.
    #[must_use]
    pub fn restart_count(&self) -> usize {
        self.restarted().len()
    }

    /// From each failure to the next records processed, in milliseconds.
    #[must_use]
    pub fn recoveries_ms(&self) -> Vec<f64> {
        let of = |progress: &Progress| match progress {
            Progress::Recovered { recovery_us } => Some(*recovery_us as f64 / 1e3),
            _ => None,
        };
        self.progress.iter().filter_map(of).collect()
    }

    /// The checkpoints that tasks were started from.
    #[must_use]
    pub fn restored(&self) -> Vec<u64> {
        let of = |progress: &Progress| match progress {
            Progress::Started { restored_from, .. } => *restored_from,
            _ => None,
        };
        self.progress.iter().filter_map(of).collect()
    }

    /// Its warnings.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let of = |progress: &Progress| match progress {
            Progress::Warning { message } => Some(message.clone()),
            _ => None,
        };
        self.progress.iter().filter_map(of).collect()
    }
}

#[derive(Default)]
struct Recorder(Mutex<Vec<Progress>>);

impl Observer for Recorder {
    fn observe(&self, progress: Progress) {
        self.0.lock().expect("no panic while recording").push(progress);
    }
}

impl Harness {
    /// Writes the manifest into `dir`; gives its path.
    ///
    /// # Panics
    /// If it cannot be written.
    #[must_use]
    pub fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("job.toml");
        fs::write(&path, self.manifest()).expect("written");
        path
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> String {
        let Self {
            count,
            parallelism,
            interval_ms,
            snapshot,
            attempts,
            config,
            vocabulary,
            partition,
            checkpointing,
            ..
        } = self;
        let (job, words) =
            (job_with_restarts("probe", *parallelism, *attempts), words(*vocabulary, *count));
        let mut text = format!(
            r#"{job}
[execution.checkpointing]
interval = "{interval_ms}ms"
{checkpointing}
{words}
"#
        );
        if let Some(rate) = self.rate {
            let _ = writeln!(text, "rate = {rate}");
        }
        let component = guest::probe();
        let _ = write!(
            text,
            r#"
[[operator]]
name = "count"
component = {component:?}
inputs = [{{ from = "words", partition = "{partition}" }}]
snapshot = "{snapshot}"
config = {{ {config} }}

[[sink]]
name = "out"
connector = "file"
inputs = ["count"]
path = "output"
"#
        );
        text
    }

    /// Runs the job to its end, in `dir`, which may hold the state of an earlier run.
    ///
    /// # Panics
    /// If the runtime cannot be made.
    #[must_use]
    pub fn run_in(&self, dir: &Path) -> Ran {
        let manifest = self.write(dir);
        run_manifest(&manifest, |_| {})
    }

    /// Runs the job to its end in a directory of its own; gives the committed lines, sorted.
    ///
    /// # Panics
    /// If the directory cannot be made.
    #[must_use]
    pub fn run(&self) -> (Ran, Vec<String>) {
        let dir = tempfile::tempdir().expect("a directory");
        let ran = self.run_in(dir.path());
        let lines = committed(&dir.path().join("output"));
        (ran, lines)
    }
}

/// How a manifest begins: a job that restarts at once, so many times.
#[must_use]
pub fn job_with_restarts(name: &str, parallelism: u32, attempts: u64) -> String {
    format!(
        r#"
[job]
name = "{name}"
parallelism = {parallelism}

[restart-strategy]
type = "fixed-delay"
fixed-delay = {{ attempts = {attempts}, delay = "0s" }}
"#
    )
}

/// A source of words; lines that follow belong to it.
#[must_use]
pub fn words(vocabulary: u64, count: u64) -> String {
    format!(
        r#"
[[source]]
name = "words"
connector = "generator"
vocabulary = {vocabulary}
seed = 5
count = {count}"#
    )
}

/// What an undisturbed run of the usual job commits.
///
/// # Panics
/// If it does not finish.
pub fn golden() -> &'static [String] {
    static GOLDEN: OnceLock<Vec<String>> = OnceLock::new();
    GOLDEN.get_or_init(|| {
        let (ran, lines) = Harness::default().run();
        assert_eq!(ran.outcome, Ok(Outcome::Finished));
        check_counts(&lines, Harness::default().count).expect("a right golden run");
        lines
    })
}

/// Runs the job of a manifest; `with` gets it before it starts.
///
/// # Panics
/// If the runtime cannot be made.
#[must_use]
pub fn run_manifest(manifest: &Path, with: impl FnOnce(&Job)) -> Ran {
    run_with(manifest, &JobOptions::default(), with)
}

/// Runs the job of a manifest with options; `with` gets it before it starts.
///
/// # Panics
/// If the runtime cannot be made.
#[must_use]
pub fn run_with(manifest: &Path, options: &JobOptions, with: impl FnOnce(&Job)) -> Ran {
    run_with_catalog(manifest, options, &builtin(), with)
}

/// The same with the connectors of a catalog.
///
/// # Panics
/// If the runtime cannot be made.
#[must_use]
pub fn run_with_catalog(
    manifest: &Path,
    options: &JobOptions,
    catalog: &Catalog,
    with: impl FnOnce(&Job),
) -> Ran {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let recorder = Arc::new(Recorder::default());
    let outcome = runtime.block_on(async {
        let checked =
            CheckedJob::new(JobSpec::read_with(manifest, None, catalog)?, sandbox()).await?;
        let job = Job::prepare(checked, options, recorder.clone())?;
        with(&job);
        job.run().await
    });
    drop(runtime);
    let progress = std::mem::take(&mut *recorder.0.lock().expect("no panic while recording"));
    Ran { outcome, progress }
}

/// Waits for a future on a runtime of its own.
///
/// # Panics
/// If the runtime cannot be made.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(future)
}

/// Calls `then` on a thread of its own as soon as `is_time`, or after a minute.
pub fn when(is_time: impl Fn() -> bool + Send + 'static, then: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_time() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        then();
    });
}

/// Calls `then` on a thread of its own once so many records were read.
pub fn after_records(job: &Job, records: u64, then: impl FnOnce(JobControl) + Send + 'static) {
    let (handle, metrics) = (job.control(), job.metrics());
    let read = move || metrics.read(|index| index == 0, |_| false).records_read;
    when(move || records <= read(), move || then(handle));
}

/// Calls `then` on a thread of its own once so many checkpoints are complete.
pub fn after_checkpoints(job: &Job, count: u64, then: impl FnOnce(JobControl) + Send + 'static) {
    let (handle, metrics) = (job.control(), job.metrics());
    let completed = move || metrics.read(|_| false, |_| false).checkpoints;
    when(move || count <= completed(), move || then(handle));
}

/// What the checkpoints of a lone task without declared state belong to.
#[must_use]
pub fn lone_task(operator: &str) -> TaskIdentity {
    TaskIdentity {
        operator: operator.to_owned(),
        index: 0,
        parallelism: 1,
        max_parallelism: 128,
        digest: None,
        has_memory: true,
        has_declared: false,
        has_host_state: false,
        uid: operator.to_owned(),
        is_sink: false,
        connector: None,
        directories: None,
        config: 0,
        is_keyed: true,
        states: Vec::new(),
    }
}

/// The lines of all committed parts, sorted.
///
/// # Panics
/// If a part cannot be read.
#[must_use]
pub fn committed(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut lines: Vec<String> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("part-"))
        })
        .flat_map(|path| {
            let text = fs::read_to_string(path).expect("a part can be read");
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    lines.sort_unstable();
    lines
}

/// Waits until a job that runs elsewhere has committed so many lines.
///
/// # Panics
/// If it has not within a minute.
pub fn wait_for_lines(dir: &Path, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while committed(dir).len() < count {
        assert!(Instant::now() < deadline, "{count} lines were not committed");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// How often to do something: an environment variable, or what is right for every run of the tests.
#[must_use]
pub fn rounds(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Whether every word has each of the counts from 1 to its last one, once: then nothing was lost
/// and nothing came twice, whatever the golden run says.
///
/// # Errors
/// The first line that is wrong.
pub fn check_counts(lines: &[String], total: u64) -> Result<(), String> {
    let mut counts = std::collections::BTreeMap::<&str, Vec<u64>>::new();
    for line in lines {
        let mut words = line.split(' ');
        let (Some(word), Some(count)) = (words.next(), words.next()) else {
            return Err(format!("a torn line: {line:?}"));
        };
        let count = count.parse().map_err(|_| format!("a torn line: {line:?}"))?;
        counts.entry(word).or_default().push(count);
    }
    for (word, seen) in &mut counts {
        seen.sort_unstable();
        if !seen.iter().copied().eq(1..=seen.len() as u64) {
            return Err(format!("the counts of {word:?} are not 1 to {}", seen.len()));
        }
    }
    let seen: usize = counts.values().map(Vec::len).sum();
    if seen as u64 == total { Ok(()) } else { Err(format!("{seen} records, {total} expected")) }
}
