//! `cofferdam run`: a job from its start, or from its newest checkpoint, to its end.

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use cofferdam_connector::catalog::Conflicts;
use cofferdam_connectors::builtin;
use cofferdam_engine::{
    Engine, JobHandle,
    job::JobOptions,
    problem::{Code, Problem},
    restore::RestoreFrom,
    socket::Server,
};
use cofferdam_spec::JobSpec;
use indicatif::MultiProgress;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    task::JoinHandle,
};
use tracing_subscriber::EnvFilter;

use crate::{
    args::{ClaimMode, RunArguments},
    report,
    watch::{Mode, View, Watcher},
};

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
    if spec.grants.is_none() {
        tracing::info!(
            "the job may open whatever its manifest names: no host's file has [grants.default]"
        );
    }
    let (begins, begun) = oneshot::channel();
    tokio::spawn(obey_interrupts(Signals::catch(), begun));
    let engine = Engine::new(arguments.cache.engine())?;
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
    let job = engine.submit_observed(checked, options, Arc::new(Watcher(mode))).await?;

    let view = View::new(&job, mode, &screen);
    // The task waits for it.
    let _ = begins.send(job.clone());
    let requests = serve_requests(&job);
    let watching = view.clone().watch();
    let outcome = job.ended().await;
    if let Some((ended, requests)) = requests {
        // The caller that ended the job still gets the answer.
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
            // Nothing is lost: what was acked is durable, and the next run resumes from it.
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
