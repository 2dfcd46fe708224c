//! `cofferdam run`: a job from its start, or from its newest checkpoint, to its end.

use std::{
    convert::Infallible,
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use cofferdam_connector::catalog::Conflicts;
use cofferdam_connectors::builtin;
use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    Engine, EngineOptions, JobHandle,
    job::JobOptions,
    metrics::{Metrics, Reading},
    problem::{Code, Problem},
    progress::{FailureFacts, Observer, Progress, Restart},
    restore::RestoreFrom,
    socket::Server,
};
use cofferdam_spec::{JobSpec, NodeKind};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    task::JoinHandle,
};
use tracing_subscriber::EnvFilter;

use crate::{
    args::{ClaimMode, RunArguments},
    report,
};

/// How often the line of a terminal is drawn anew.
const REDRAW: Duration = Duration::from_millis(200);
/// How often figures are given out elsewhere.
const REPORT: Duration = Duration::from_secs(1);

pub(crate) async fn run(arguments: RunArguments, is_json: bool) -> Result<(), Problem> {
    let is_live = !is_json && !arguments.no_progress && io::stderr().is_terminal();
    let screen = if is_live {
        MultiProgress::new()
    } else {
        MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden())
    };
    start_log(arguments.log.as_deref(), is_json, &screen)?;
    let host = arguments.host.read()?;
    let spec = JobSpec::read_with(&arguments.manifest, host.as_ref(), &builtin())?;
    for warning in &spec.warnings {
        tracing::warn!("{warning}");
    }
    let (begins, begun) = oneshot::channel();
    tokio::spawn(obey_interrupts(Signals::catch(), begun));
    let engine = Engine::new(EngineOptions { cache_dir: arguments.cache.dir() })?;
    let checked = engine.check(spec).await?;
    for warning in checked.warnings() {
        tracing::warn!("{warning}");
    }
    let from = arguments.from.map(|dir| RestoreFrom {
        dir,
        claim: arguments.claim_mode == ClaimMode::Claim,
        ignore_unclaimed_state: arguments.ignore_unclaimed_state,
    });
    let options = JobOptions {
        state_dir: arguments.state_dir,
        seed: seed(),
        from,
        again: arguments.again,
        conflicts: Conflicts {
            discard_output: arguments.discard_output,
            assume_committed: arguments.assume_committed,
        },
        ..JobOptions::default()
    };
    let mode = if is_json {
        Mode::Json
    } else if is_live {
        Mode::Live
    } else {
        Mode::Log
    };
    let job = engine.submit_observed(checked, options, Arc::new(Watcher { mode })).await?;

    let view = View::new(&job, mode, &screen);
    // The task waits for it.
    let _ = begins.send(job.clone());
    let requests = serve_requests(&job);
    let watching = view.clone().watch();
    let outcome = job.ended().await;
    if let Some((ended, requests)) = requests {
        // Whoever asked for what ended the job still gets the answer.
        drop(ended);
        let _ = requests.await;
    }
    drop(watching);
    if !screen.is_hidden() {
        let _ = screen.clear();
    }
    view.summarise(&outcome);
    outcome.map(|_| ())
}

/// Answers `savepoint`, `stop` and `cancel`, if there is a directory for the socket, until what is
/// given back first is dropped.
fn serve_requests(job: &JobHandle) -> Option<(oneshot::Sender<()>, JoinHandle<()>)> {
    // The folder of the socket may be the next run's by now.
    if job.has_ended() {
        return None;
    }
    match Server::bind(job.state_dir()?) {
        Ok(server) => {
            let (sender, ended) = oneshot::channel();
            Some((sender, tokio::spawn(server.serve(job.clone(), ended))))
        }
        Err(error) => {
            tracing::warn!(%error, "no control socket: savepoint, stop and cancel cannot reach this job");
            None
        }
    }
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_nanos() as u64)
}

/// The signals that end a run in good order.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    /// Catches them from now on.
    fn catch() -> Option<Self> {
        let (Ok(interrupt), Ok(terminate), Ok(hangup)) = (
            signal(SignalKind::interrupt()),
            signal(SignalKind::terminate()),
            signal(SignalKind::hangup()),
        ) else {
            tracing::warn!("signals cannot be caught: Ctrl-C ends at once");
            return None;
        };
        Some(Self { interrupt, terminate, hangup })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            // The terminal is gone: nobody is left to ask twice.
            _ = self.hangup.recv() => {}
        }
    }
}

/// Whether the job has ended, and nothing is left to stop in good order.
static HAS_ENDED: AtomicBool = AtomicBool::new(false);

/// The job has ended: the next signal ends the program at once.
pub(crate) fn end_at_next_signal() {
    HAS_ENDED.store(true, Ordering::Release);
}

/// The first signal stops in good order, the second one at once; and one that comes before there is a job.
async fn obey_interrupts(signals: Option<Signals>, begun: oneshot::Receiver<JobHandle>) {
    let Some(mut signals) = signals else { return };
    let job = tokio::select! {
        job = begun => job,
        () = signals.next() => {
            tracing::info!("interrupted before the job started");
            std::process::exit(130);
        }
    };
    for is_second in [false, true] {
        signals.next().await;
        let Ok(job) = &job else { std::process::exit(130) };
        if is_second || HAS_ENDED.load(Ordering::Acquire) {
            // Nothing is lost: what was acked is durable, and the next run goes on from it.
            std::process::exit(130);
        }
        tracing::info!("stopping after a final checkpoint; press Ctrl-C again to quit now");
        job.stop();
    }
}

/// The log, a line at a time.
struct LogLine;

impl Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        report::log(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn start_log(filter: Option<&str>, is_json: bool, screen: &MultiProgress) -> Result<(), Problem> {
    let screen = screen.clone();
    // Log lines go above the line of progress, not through it. Their reader may be gone, or its disk full: the
    // job continues without it.
    let write = move |line: &[u8]| {
        let write = || io::stderr().write_all(line);
        // Without a line of progress nobody but this thread may have to wait for the reader.
        let _ = if screen.is_hidden() { write() } else { screen.suspend(write) };
    };
    report::never_block(write).map_err(|error| {
        Problem::new(Code::CannotStart, "cannot start a thread for the log").because(&error)
    })?;
    let filter = EnvFilter::try_new(filter.unwrap_or("info")).map_err(|error| {
        Problem::new(Code::BadValue, "the log filter cannot be read")
            .because(&error)
            .hint("for example --log debug, or --log info,guest=debug")
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(|| LogLine);
    if is_json {
        builder.json().init()
    } else {
        builder.with_target(false).init()
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Events and figures as JSON on standard output.
    Json,
    /// One line that is drawn anew, and log lines above it.
    Live,
    /// Log lines.
    Log,
}

/// Says what happens.
struct Watcher {
    mode: Mode,
}

impl Observer for Watcher {
    fn observe(&self, progress: Progress) {
        if self.mode == Mode::Json {
            match serde_json::to_value(&progress) {
                Ok(value) => report::line(&value),
                Err(error) => tracing::error!(%error, "cannot serialize an event"),
            }
            return;
        }
        match progress {
            Progress::Started { attempt, restored_from, tasks } => match restored_from {
                Some(checkpoint) => {
                    tracing::info!("attempt {attempt}: {tasks} tasks, from checkpoint {checkpoint}")
                }
                None => tracing::info!("attempt {attempt}: {tasks} tasks, from the beginning"),
            },
            Progress::CheckpointCompleted {
                checkpoint,
                duration_ms,
                pause_ms,
                bytes,
                alignment_ms,
                in_flight_bytes,
                ..
            } => {
                let size = report::bytes(bytes);
                let in_flight = match in_flight_bytes {
                    0 => String::new(),
                    bytes => format!(", {} in flight", report::bytes(bytes)),
                };
                let text = format!(
                    "checkpoint {checkpoint}: {duration_ms:.1} ms, alignment {alignment_ms:.1} ms, \
                     pause {pause_ms:.2} ms, {size}{in_flight}"
                );
                // On a terminal the line of progress says so already.
                match self.mode {
                    Mode::Live => tracing::debug!("{text}"),
                    Mode::Json | Mode::Log => tracing::info!("{text}"),
                }
            }
            Progress::Running { tasks } => tracing::debug!("all {tasks} tasks run"),
            Progress::Restoring { checkpoint, step } => {
                tracing::info!("checkpoint {checkpoint}: {step}");
            }
            Progress::CheckpointFailed { checkpoint, reason, .. } => {
                tracing::warn!("checkpoint {checkpoint} given up: {reason}");
            }
            Progress::Restarting(restart) => log_restart(restart),
            // The summary says so, with what to do next.
            Progress::Failed { .. } => {}
            Progress::Recovered { recovery_us } => {
                tracing::info!("recovered in {:.2} ms", recovery_us as f64 / 1e3);
            }
            Progress::DeadLetter { task, failure, traps, isolation_us } => {
                let FailureFacts { class, message, .. } = failure;
                let took = report::micros(isolation_us);
                tracing::warn!(
                    "{task}: a record went to the dead letters after {traps} failures, found in \
                     {took}: {class}: {message}"
                );
            }
            Progress::RecordsLost { from, to, lost, regained, is_exact } => {
                log_losses(&from, &to, lost, regained, is_exact);
            }
            Progress::Warning { message } => tracing::warn!("{message}"),
            other => tracing::info!("{other:?}"),
        }
    }
}

/// The figures of a running job.
#[derive(Clone)]
struct View {
    mode: Mode,
    job: String,
    metrics: Arc<Metrics>,
    /// Which operators are sources and which are sinks.
    kinds: Arc<Vec<(bool, bool)>>,
    bar: ProgressBar,
    started: Instant,
}

impl View {
    fn new(job: &JobHandle, mode: Mode, screen: &MultiProgress) -> Self {
        let is = |kind: &NodeKind| {
            (matches!(kind, NodeKind::Source(_)), matches!(kind, NodeKind::Sink(_)))
        };
        let kinds = job.spec().nodes.iter().map(|node| is(&node.kind)).collect();
        let bar = screen.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        let job_name = job.spec().name.clone();
        Self {
            mode,
            job: job_name,
            metrics: job.metrics(),
            kinds: Arc::new(kinds),
            bar,
            started: Instant::now(),
        }
    }

    fn read(&self) -> Reading {
        self.metrics.read(|index| self.kinds[index].0, |index| self.kinds[index].1)
    }

    /// Shows figures, until what it gives back is dropped. On a thread of its own: a terminal may be held.
    fn watch(self) -> mpsc::Sender<Infallible> {
        let (watched, ended) = mpsc::channel();
        std::thread::spawn(move || self.show_until(&ended));
        watched
    }

    fn show_until(&self, ended: &mpsc::Receiver<Infallible>) {
        let period = if self.mode == Mode::Live { REDRAW } else { REPORT };
        let mut before = (Instant::now(), self.read());
        while ended.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
            let now = (Instant::now(), self.read());
            let seconds = now.0.duration_since(before.0).as_secs_f64();
            let rate = |new: u64, old: u64| (new.saturating_sub(old) as f64 / seconds) as u64;
            let read = rate(now.1.records_read, before.1.records_read);
            let written = rate(now.1.records_written, before.1.records_written);
            before = now;
            self.show(&now.1, read, written);
        }
    }

    fn show(&self, reading: &Reading, read: u64, written: u64) {
        match self.mode {
            Mode::Json => report::line(&json!({
                "event": "progress",
                "elapsed_ms": self.started.elapsed().as_millis() as u64,
                "records_read": reading.records_read,
                "records_written": reading.records_written,
                "records_read_per_second": read,
                "records_written_per_second": written,
                "checkpoints": reading.checkpoints,
                "restarts": reading.restarts,
                "records_lost": reading.records_lost,
                "watermark": reading.watermark,
                "operators": self.metrics.read_operators(),
            })),
            Mode::Live => {
                let watermark = reading.watermark.filter(|at| *at != i64::MAX);
                self.bar.tick();
                self.bar.set_message(format!(
                    "{} | in {}/s, out {}/s | {} read | checkpoint {} | restarts {}{}",
                    self.job,
                    report::count(read),
                    report::count(written),
                    report::count(reading.records_read),
                    reading.checkpoints,
                    reading.restarts,
                    watermark.map_or(String::new(), |at| format!(" | watermark {at}")),
                ));
            }
            Mode::Log => {}
        }
    }

    fn summarise(&self, outcome: &Result<Outcome, Problem>) {
        let reading = self.read();
        let seconds = self.started.elapsed().as_secs_f64();
        let (word, checkpoint) = match outcome {
            Ok(Outcome::Finished) => ("finished", None),
            Ok(Outcome::Stopped { checkpoint, .. }) => ("stopped", *checkpoint),
            Ok(Outcome::Canceled { checkpoint }) => ("canceled", *checkpoint),
            Ok(Outcome::Failed { checkpoint, .. }) => ("failed", *checkpoint),
            Err(_) => ("failed", None),
        };
        let checkpoint = checkpoint.map(|checkpoint| checkpoint.0);
        if self.mode == Mode::Json {
            report::line(&json!({
                "event": "summary",
                "job": self.job,
                "outcome": word,
                "checkpoint": checkpoint,
                "elapsed_ms": (seconds * 1e3) as u64,
                "records_read": reading.records_read,
                "records_written": reading.records_written,
                "checkpoints": reading.checkpoints,
                "restarts": reading.restarts,
                "records_lost": reading.records_lost,
                "bad_records": reading.bad_records,
                "operators": self.metrics.read_operators(),
            }));
            return;
        }
        let lost = match reading.records_lost {
            0 => String::new(),
            lost => format!(", {} records lost", report::count(lost)),
        };
        let bad = match reading.bad_records {
            0 => String::new(),
            bad => format!(", {} bad records left out", report::count(bad)),
        };
        say_aside!(
            "{} {word} after {seconds:.2} s: {} records read, {} written, {} checkpoints, {} restarts{lost}{bad}",
            self.job,
            report::count(reading.records_read),
            report::count(reading.records_written),
            reading.checkpoints,
            reading.restarts,
        );
        for operator in self.metrics.read_operators() {
            if !operator.metrics.is_empty() {
                let each = |(name, value): (&String, &f64)| format!("{name} {value}");
                let metrics: Vec<String> = operator.metrics.iter().map(each).collect();
                say_aside!("  {} counted: {}", operator.name, metrics.join(", "));
            }
        }
        if let Ok(Outcome::Stopped { is_last, has_savepoint: false, .. }) = outcome {
            match (checkpoint, is_last) {
                (Some(id), true) => say_aside!("run it again to resume from checkpoint {id}"),
                (Some(id), false) => {
                    say_aside!(
                        "the last checkpoint failed: run it again to resume from checkpoint {id}"
                    );
                }
                (None, _) => {
                    say_aside!("no checkpoint completed; the next run starts from the beginning")
                }
            }
        }
    }
}

/// Says that tasks restart, and why.
fn log_restart(restart: Restart) {
    let Restart { task, failure, delay_ms, new_attempt, remaining_attempts, restarting, tasks } =
        restart;
    let FailureFacts { class, message, backtrace, .. } = failure;
    let who = task.unwrap_or_else(|| "the job".to_owned());
    tracing::warn!("{who}: {class}: {message}");
    backtrace.iter().for_each(|frame| tracing::warn!("  in {frame}"));
    let left = remaining_attempts.map_or(String::new(), |left| format!(", {left} more allowed"));
    let counted = if new_attempt { "" } else { ", counted together with the previous failure" };
    let count = restarting.len();
    tracing::warn!("restarting {count} of {tasks} tasks in {delay_ms} ms{left}{counted}");
}

/// Says how many records an approximate exchange has lost, or will send again after all.
fn log_losses(from: &str, to: &str, lost: u64, regained: u64, is_exact: bool) {
    let at_most = if is_exact { "" } else { "at most " };
    if 0 < regained {
        tracing::warn!(
            "{at_most}{regained} records from {from} to {to} will be sent again: {from} was rewound too"
        );
    }
    if 0 < lost {
        tracing::warn!(
            "{at_most}{lost} records from {from} to {to} are lost: {to} has restarted without all of {from}"
        );
    }
}
