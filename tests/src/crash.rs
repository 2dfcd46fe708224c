//! Kills a running job with SIGKILL at random moments and runs it again, until it finishes.

use std::{
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use cofferdam_core::random::Random;

use crate::{
    guest,
    job::{HOST_STATE, Harness, check_counts, committed},
};

const SIGKILL: i32 = 9;
/// The longest that a job is let run on when nobody kills it.
const PATIENCE: Duration = Duration::from_secs(60);
/// A kill comes within so many milliseconds; on a machine that needs longer for a first checkpoint,
/// within more.
const KILLED_WITHIN_MS: std::ops::RangeInclusive<u64> = 600..=6_000;

/// What the rounds have shown.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    /// Kills that struck a running job.
    pub kills: u64,
    /// Kills after which the job went on from a checkpoint.
    pub resumed: u64,
    /// Jobs that were killed until they finished, each with the right output.
    pub jobs: u64,
    /// Within how many milliseconds the next kill comes.
    within_ms: u64,
}

/// How checkpoints are taken, job by job.
const MODES: [&str; 5] = [
    "",
    "unaligned.enabled = true",
    "max-concurrent-checkpoints = 2\nnum-retained = 2\nsnapshot-compression = true",
    "unaligned.enabled = true\naligned-checkpoint-timeout = \"3ms\"",
    HOST_STATE,
];

/// The job that is killed: keyed counts, exactly once, a checkpoint every 30 ms.
fn harness() -> Harness {
    Harness { count: 150_000, rate: Some(150_000), interval_ms: 30, ..Harness::default() }
}

/// The job in one of the modes; where barriers overtake, there is something to overtake.
fn harness_in(mode: &str) -> Harness {
    let harness = Harness { checkpointing: mode.to_owned(), ..harness() };
    match mode.contains("unaligned") {
        true => {
            Harness { rate: None, config: "ballast = 1048576, dirty = 400".to_owned(), ..harness }
        }
        false => harness,
    }
}

/// Kills until `rounds` kills have struck, and lets the last job finish.
///
/// # Errors
/// Where a record was lost or came twice, with the seed that chose the moments.
pub fn run(rounds: u64, seed: u64, mut on_job: impl FnMut(&Tally)) -> Result<Tally> {
    let (golden, lines) = Harness { rate: None, ..harness() }.run();
    golden.outcome.map_err(|problem| anyhow::anyhow!("{problem}")).context("the golden run")?;
    check_counts(&lines, harness().count).map_err(anyhow::Error::msg).context("the golden run")?;
    let mut random = Random::new(seed);
    let mut tally = Tally { within_ms: *KILLED_WITHIN_MS.start(), ..Tally::default() };
    while tally.kills < rounds {
        let dir = tempfile::tempdir().context("a directory")?;
        let mode = MODES[tally.jobs as usize % MODES.len()];
        kill_until_finished(dir.path(), mode, rounds, &mut random, &mut tally)
            .with_context(|| format!("SEED={seed}, job {}, {mode:?}", tally.jobs))?;
        let found = committed(&dir.path().join("output"));
        check_counts(&found, harness().count).map_err(anyhow::Error::msg).with_context(|| {
            format!("SEED={seed}, job {}, {mode:?}: the output is wrong", tally.jobs)
        })?;
        ensure!(
            found == lines,
            "SEED={seed}, job {}: the output is not the golden run's",
            tally.jobs
        );
        tally.jobs += 1;
        on_job(&tally);
    }
    Ok(tally)
}

fn kill_until_finished(
    dir: &Path,
    mode: &str,
    rounds: u64,
    random: &mut Random,
    tally: &mut Tally,
) -> Result<()> {
    let manifest = harness_in(mode).write(dir);
    let mut was_killed = false;
    loop {
        let child = start(&manifest)?;
        let after = (tally.kills < rounds)
            .then(|| Duration::from_millis(random.between(20, tally.within_ms)));
        let (status, log) = wait_or_kill(child, after)?;
        if was_killed && log.contains("from checkpoint") {
            tally.resumed += 1;
        }
        // A kill may come between the end of the job and the end of the process: the next run says that
        // there is nothing left to do.
        if status.success() {
            return Ok(());
        }
        if status.signal() != Some(SIGKILL) {
            bail!("the job ended with {status}:\n{log}");
        }
        was_killed = true;
        tally.kills += 1;
        let within_ms = match log.contains("INFO checkpoint ") {
            true => tally.within_ms * 9 / 10,
            false => tally.within_ms * 5 / 4,
        };
        tally.within_ms = within_ms.clamp(*KILLED_WITHIN_MS.start(), *KILLED_WITHIN_MS.end());
    }
}

fn start(manifest: &Path) -> Result<Child> {
    Command::new(guest::program())
        .arg("run")
        .arg(manifest)
        .arg("--cache-dir")
        .arg(guest::root().join("target/tests-cache"))
        .args(["--no-progress", "--log", "info"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run cofferdam")
}

fn wait_or_kill(mut child: Child, after: Option<Duration>) -> Result<(ExitStatus, String)> {
    // The moment of the kill is the point of the exercise: it has to be waited for. A job that
    // is left alone and does not end is killed as well, and then told from the others.
    let patience = after.unwrap_or(PATIENCE);
    let began = Instant::now();
    while child.try_wait().context("wait")?.is_none() {
        if patience <= began.elapsed() {
            child.kill().context("kill")?;
            ensure!(after.is_some(), "the job did not end within {} s", PATIENCE.as_secs());
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().context("wait")?;
    Ok((output.status, String::from_utf8_lossy(&output.stderr).into_owned()))
}
