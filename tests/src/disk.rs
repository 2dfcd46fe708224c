//! A job whose files lie on a disk of its own: the program runs with a library between it and its C
//! library, which makes one call fail or records all of them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use cofferdam_core::random::Random;

use crate::{cargo::cargo, guest, job::committed, keyed};

const LINES: u64 = 12_000;
const RATE: u64 = 40_000;
/// No run takes longer than this, whatever its disk does.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a run says that finds its job at the end.
const FINISHED: &str = "has finished; there is nothing to do";

/// The library that is preloaded.
///
/// # Panics
/// If it cannot be built.
#[must_use]
pub fn library() -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut build = cargo(guest::root());
        build.args(["build", "--quiet", "--package", "cofferdam-disk"]);
        assert!(build.status().expect("run cargo").success(), "build the library");
    });
    guest::program().with_file_name("libcofferdam_disk.so")
}

/// What a run says whose job was stopped with a savepoint.
pub const STOPPED: &str = "error[C0036]";

/// A job in a directory of its own. Everything that it writes lies in the folder `disk`.
#[derive(Debug)]
pub struct DiskJob {
    dir: tempfile::TempDir,
    text: String,
    /// How it is set up, for messages.
    pub variant: String,
}

impl DiskJob {
    /// A job with a random storage, backend, snapshot, and way to roll.
    ///
    /// # Errors
    /// Where its files cannot be written.
    pub fn new(random: &mut Random) -> Result<Self> {
        let mut choose =
            |from: &[&'static str]| from[random.between(0, from.len() as u64 - 1) as usize];
        let storage = choose(&["", "storage = \"filesystem\"\ndir = \"disk/checkpoints\"\n"]);
        let backend = choose(&["hashmap", "sled"]);
        let snapshot = match backend {
            "hashmap" => choose(&["declared", "both", "memory"]),
            _ => "declared",
        };
        let rolling = choose(&["", "roll-size = \"20KiB\"\n", "roll-interval = \"100ms\"\n"]);
        let parallelism = choose(&["1", "2"]);
        let config = choose(&["", "do = \"trap\", at = 2000, attempts = 2"]);
        let (component, source) = (guest::probe(), keyed::source(RATE));
        let mut dir = tempfile::tempdir().context("a directory")?;
        // To look at what a test has left.
        dir.disable_cleanup(std::env::var_os("KEEP").is_some());
        fs::create_dir(dir.path().join("disk"))?;
        let manifest = format!(
            r#"
[job]
name = "disk"
parallelism = {parallelism}
[execution.checkpointing]
interval = "20ms"
externalized-checkpoint-retention = "RETAIN_ON_CANCELLATION"
{storage}[state.backend]
type = "{backend}"
[restart-strategy]
type = "fixed-delay"
fixed-delay = {{ attempts = 3, delay = "0s" }}
{source}[[operator]]
name = "count"
component = {component:?}
snapshot = "{snapshot}"
config = {{ {config} }}
inputs = [{{ from = "in", partition = "hash" }}]
[[sink]]
name = "out"
connector = "file"
path = "disk/out"
{rolling}inputs = ["count"]
"#
        );
        fs::write(dir.path().join("job.toml"), manifest)?;
        let text = keyed::input(LINES);
        fs::write(dir.path().join("in.txt"), &text)?;
        let variant = [storage, backend, snapshot, rolling, parallelism, config].join(" ");
        Ok(Self { dir, text, variant: variant.replace('\n', " ") })
    }

    /// The folder in which everything lies that it writes.
    ///
    /// # Panics
    /// If it is gone.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.dir.path().canonicalize().expect("there").join("disk")
    }

    /// A file beside the disk.
    #[must_use]
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command of the program in the directory of the job.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = guest::command(self.dir.path(), arguments);
        command.stdout(Stdio::piped());
        command
    }

    /// The command that runs it.
    #[must_use]
    pub fn run(&self) -> Command {
        let mut command = self.command(&["run", "job.toml", "--state-dir", "disk/state"]);
        command.args(["--no-progress", "--log", "info"]);
        command
    }

    /// Runs it with the library in between.
    #[must_use]
    pub fn run_on_disk(&self) -> Command {
        let mut command = self.run();
        command.env("LD_PRELOAD", library()).env("DISK_ROOT", self.disk());
        command
    }

    /// Stops a run with a savepoint after some time; gives what came of the run.
    ///
    /// # Errors
    /// Where a process cannot be started, or does not end.
    pub fn stop_after(&self, run: Child, after: Duration) -> Result<Output> {
        std::thread::sleep(after);
        let mut stop = self.command(&["stop", "disk/state", "-p", "disk/saved"]);
        // It may have ended before, or fail with its disk.
        stop.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        wait(run)
    }

    /// Kills a run after some time.
    ///
    /// # Errors
    /// Where a process cannot be started, or does not end.
    pub fn kill_after(&self, mut run: Child, after: Duration) -> Result<Output> {
        std::thread::sleep(after);
        // It may have ended before.
        let _ = run.kill();
        wait(run)
    }

    /// Runs it to its end on a good disk, from the savepoint of a stop where there is one, and checks that
    /// every record was committed once, and that it knows that it has finished.
    ///
    /// # Errors
    /// Where that is not so.
    pub fn finish(&self) -> Result<()> {
        let mut run = self.run();
        let mut last = wait(run.spawn()?)?;
        if said(&last).contains(STOPPED) {
            let saved = fs::read_dir(self.disk().join("saved"))
                .with_context(|| format!("the savepoints: {}", said(&last)))?;
            let names = saved.flatten().map(|entry| entry.path());
            let mut whole = names.filter(|path| !path.to_string_lossy().contains("unfinished"));
            let savepoint = whole.next().with_context(|| format!("none: {}", said(&last)))?;
            run.arg("--from").arg(savepoint);
            last = wait(run.spawn()?)?;
        }
        ensure!(last.status.success(), "the last run: {}", said(&last));
        let again = wait(run.spawn()?)?;
        ensure!(
            again.status.success() && said(&again).contains(FINISHED),
            "the run after the last: {}",
            said(&again)
        );
        keyed::check(&committed(&self.disk().join("out")), &keyed::counted(&self.text))
            .with_context(|| said(&last))
    }
}

/// How a process has ended, and what it has said.
#[must_use]
pub fn said(output: &Output) -> String {
    format!("{}\n{}", output.status, String::from_utf8_lossy(&output.stderr))
}

/// Waits for a process to end.
///
/// # Errors
/// Where it does not.
pub fn wait(mut child: Child) -> Result<Output> {
    let began = Instant::now();
    while child.try_wait().context("wait")?.is_none() {
        if PATIENCE < began.elapsed() {
            child.kill().context("kill")?;
            let output = child.wait_with_output()?;
            anyhow::bail!("it did not end within {PATIENCE:?}: {}", said(&output));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().context("wait")
}

/// Copies a directory with everything in it.
///
/// # Errors
/// Where something cannot be read or written.
pub fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else if kind.is_file() {
            // A socket that a killed run has left is nothing to copy.
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
