//! Readers that do not read: a pipe that nobody empties holds up neither the job, nor what it is asked, nor its
//! end.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cofferdam_tests::{
    guest,
    job::{Harness, check_counts, committed},
};

/// The program with pipes that nobody reads; killed if the test fails.
struct Unread(Child);

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Unread {
    fn run(arguments: &[&str], manifest: &Path) -> Self {
        let mut command = Command::new(guest::program());
        command.arg("run").args(arguments).arg(manifest);
        Self(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs"))
    }

    fn interrupt(&self) {
        let pid = self.0.id().to_string();
        let sent = Command::new("kill").args(["-INT", &pid]).status().expect("kill runs");
        assert!(sent.success());
    }

    /// Whether it has ended after at most so long, and how.
    fn ends_within(&mut self, limit: Duration) -> Option<i32> {
        let began = Instant::now();
        while began.elapsed() < limit {
            if let Some(status) = self.0.try_wait().expect("a child") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }

    /// Waits until a thread of it is held by a pipe.
    fn wait_until_held(&self) {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.0.id()));
        let began = Instant::now();
        loop {
            let threads = fs::read_dir(&tasks).expect("it runs").flatten();
            let waits_in =
                threads.filter_map(|it| fs::read_to_string(it.path().join("wchan")).ok());
            if waits_in.into_iter().any(|place| place.contains("pipe")) {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "no pipe is full");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn printing(dir: &Path) -> PathBuf {
    let manifest = dir.join("job.toml");
    let text = r#"
[job]
name = "numbers"
parallelism = 4

[execution.checkpointing]
interval = "200ms"

[[source]]
name = "numbers"
connector = "generator"
content = "sequence"

[[sink]]
name = "out"
connector = "stdout"
inputs = ["numbers"]
"#;
    fs::write(&manifest, text).expect("written");
    manifest
}

/// Every thread of the runtime used to wait for the pipe, so neither signal did anything.
#[test]
fn a_sink_whose_reader_sleeps_does_not_keep_the_program_from_ending() {
    for arguments in [&[][..], &["--json"]] {
        let dir = tempfile::tempdir().expect("a directory");
        let mut job = Unread::run(arguments, &printing(dir.path()));
        job.wait_until_held();
        job.interrupt();
        // It has asked for a last checkpoint, which the sink cannot take.
        assert_eq!(job.ends_within(Duration::from_millis(500)), None);
        job.interrupt();
        assert_eq!(job.ends_within(Duration::from_secs(10)), Some(130), "{arguments:?}");
    }
}

#[test]
fn a_job_asks_for_nothing_where_nobody_reads_its_events() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = r#"do = "trap", at = 3000, attempts = 3"#.to_owned();
    let harness = Harness { config, count: 400_000, interval_ms: 10, ..Harness::default() };
    let manifest = harness.write(dir.path());
    let mut job = Unread::run(&["--json", "--log", "trace"], &manifest);
    assert_eq!(job.ends_within(Duration::from_secs(120)), Some(0));
    check_counts(&committed(&dir.path().join("output")), 400_000).expect("exactly once");
}
