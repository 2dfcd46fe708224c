//! The program as its users run it: `run` in one process, `savepoint`, `stop` and `cancel` in others.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use cofferdam_tests::{
    guest,
    job::{Harness, wait_for_lines},
};
use serde_json::Value;

fn call(arguments: &[&str]) -> Output {
    Command::new(guest::program()).args(arguments).output().expect("the program runs")
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {text} {output:?}"))
}

/// A job that is running; killed if the test fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(manifest: &Path) -> Self {
        let child = Command::new(guest::program())
            .args(["run", "--json"])
            .arg(manifest)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program runs");
        let dir = manifest.parent().expect("a directory");
        wait_for_lines(&dir.join("output"), 1);
        Self(child)
    }

    fn wait(mut self) -> i32 {
        self.0.wait().expect("ended").code().expect("a code")
    }
}

fn endless(dir: &Path) -> PathBuf {
    Harness { count: u64::MAX >> 1, rate: Some(20_000), ..Harness::default() }.write(dir)
}

#[test]
fn running_job_gives_savepoints_and_stops_with_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = endless(dir.path());
    let (job, target) = (manifest.to_str().expect("text"), dir.path().join("savepoints"));
    let target = target.to_str().expect("text");
    let running = Running::start(&manifest);

    let refused = call(&["savepoint", job]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("savepoint-dir"), "{refused:?}");
    let kept = json(&call(&["--json", "checkpoints", "list", job]));
    assert_eq!((kept["job"].as_str(), kept["tasks"].as_u64()), (Some("probe"), Some(6)), "{kept}");
    let used = call(&["checkpoints", "verify", job]);
    assert_eq!(used.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&used.stderr).contains("C0019"), "{used:?}");

    let saved = json(&call(&["--json", "savepoint", job, target]));
    let savepoint = saved["savepoint"].as_str().expect("a path").to_owned();
    assert!(Path::new(&savepoint).is_dir());
    let stopped = json(&call(&["--json", "stop", job, "--savepoint-path", target]));
    assert!(saved["checkpoint"].as_u64() < stopped["checkpoint"].as_u64());
    assert_eq!(running.wait(), 0);

    let listed = json(&call(&["--json", "checkpoints", "list", &savepoint]));
    assert_eq!(listed["checkpoint"], saved["checkpoint"]);
    let inspected = json(&call(&["--json", "checkpoints", "inspect", &savepoint]));
    assert_eq!(inspected["tasks"][2]["task"], "count/0");
    assert!(1 << 16 <= inspected["tasks"][2]["memory_bytes"].as_u64().expect("a number"));
    let verified = json(&call(&["--json", "checkpoints", "verify", &savepoint]));
    assert_eq!(verified["whole"], true);

    let gone = call(&["cancel", job]);
    assert_eq!(gone.status.code(), Some(2), "{gone:?}");
    assert!(String::from_utf8_lossy(&gone.stderr).contains("C0026"), "{gone:?}");
}

#[test]
fn cancelled_job_ends_at_once_and_keeps_what_its_policy_says() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = endless(dir.path());
    let job = manifest.to_str().expect("text");
    let running = Running::start(&manifest);
    assert_eq!(json(&call(&["--json", "cancel", job]))["accepted"], true);
    assert_eq!(running.wait(), 0);
    // A checkpoint that completes just as the job is cancelled has not subsumed the one before it yet.
    let mut kept = 0;
    while call(&["checkpoints", "list", job]).status.code() == Some(0) {
        let listed = json(&call(&["--json", "checkpoints", "list", job]));
        let id = listed["checkpoint"].as_u64().expect("a number").to_string();
        let deleted = json(&call(&["--json", "checkpoints", "delete", job, "--id", &id]));
        assert_eq!(deleted["deleted"], listed["checkpoint"]);
        kept += 1;
    }
    assert!((1..=2).contains(&kept), "{kept} checkpoints were retained");
    assert_eq!(call(&["checkpoints", "list", job]).status.code(), Some(2), "nothing is left");
}

#[test]
fn history_says_what_failed_and_what_was_done_about_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = r#"do = "trap", at = 3000, attempts = 1"#.to_owned();
    let manifest = Harness { config, count: 20_000, ..Harness::default() }.write(dir.path());
    let job = manifest.to_str().expect("text");
    assert_eq!(call(&["run", job]).status.code(), Some(0));
    let entry = json(&call(&["--json", "history", job]));
    assert_eq!(entry["event"], "restarting");
    assert_eq!(entry["class"], "trap");
    assert!(entry["message"].as_str().is_some_and(|text| text.contains("one too many")), "{entry}");
    assert!(entry["backtrace"].as_array().is_some_and(|frames| !frames.is_empty()));
    let task = entry["task"].as_str().expect("a task");
    assert_eq!(entry["restarting"][task], "it failed");
    assert_eq!(entry["restarting"].as_object().map(serde_json::Map::len), Some(6));
    assert!(entry["remaining_attempts"].as_u64().is_some_and(|left| 990 < left), "{entry}");
    let text = call(&["history", job]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("restarted 6 of 6 tasks"), "{text:?}");
}

#[test]
fn what_guests_count_is_in_the_summary() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = r#"do = "count", at = 100"#.to_owned();
    let harness = Harness { config, count: 20_000, parallelism: 2, ..Harness::default() };
    let manifest = harness.write(dir.path());
    let job = manifest.to_str().expect("text");
    let summary = json(&call(&["--json", "run", job]));
    let operator = &summary["operators"][1];
    assert_eq!((&summary["event"], &operator["name"]), (&"summary".into(), &"count".into()));
    assert_eq!(operator["records_in"], 20_000);
    assert_eq!(operator["metrics"], serde_json::json!({ "reached": 2.0, "at": 100.0 }));
    let dir = tempfile::tempdir().expect("a directory");
    let told = call(&["run", harness.write(dir.path()).to_str().expect("text")]);
    let told = String::from_utf8_lossy(&told.stderr);
    assert!(told.contains("  count counted: at 100, reached 2\n"), "{told}");
}

#[test]
fn settings_come_from_the_job_then_the_host_then_the_defaults() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = Harness::default().write(dir.path());
    let host = dir.path().join("flink-conf.yaml");
    std::fs::write(
        &host,
        "state.checkpoints.num-retained: 4\nexecution.checkpointing.interval: 9 s\nrest.port: 1\n",
    )
    .expect("written");
    let (job, host) = (manifest.to_str().expect("text"), host.to_str().expect("text"));
    let checked = call(&["--json", "check", job, "--effective", "--host-config", host]);
    let rows: Vec<Value> = String::from_utf8_lossy(&checked.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let of = |key: &str| {
        let key = format!("execution.checkpointing.{key}");
        rows.iter().find(|row| row["key"] == key.as_str()).expect("listed").clone()
    };
    assert_eq!(of("interval")["value"], "20 ms");
    assert!(of("interval")["from"].as_str().is_some_and(|from| from.contains("job.toml")));
    assert_eq!(of("num-retained")["value"], "4");
    assert!(of("num-retained")["from"].as_str().is_some_and(|from| from.contains("flink-conf")));
    assert_eq!(of("timeout")["from"], Value::Null);
    assert!(String::from_utf8_lossy(&checked.stderr).contains("rest.port"), "{checked:?}");
}

#[test]
fn explain_answers_without_a_component() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = dir.path().join("job.toml");
    let text = r#"
[job]
name = "explained"

[[source]]
name = "v1"
connector = "generator"

[[operator]]
name = "v2"
component = "nowhere.wasm"
inputs = [{ from = "v1", exchange = "blocking" }]

[[sink]]
name = "v3"
connector = "discard"
inputs = ["v2"]
"#;
    std::fs::write(&manifest, text).expect("written");
    let job = manifest.to_str().expect("text");
    let answer = json(&call(&[
        "explain", "failover", job, "--fail", "v3/0", "--lost", "v1/0->v2", "--json",
    ]));
    assert_eq!(answer["strategy"], "region");
    assert_eq!(answer["regions"], serde_json::json!([["v1/0"], ["v2/0", "v3/0"]]));
    assert_eq!(answer["restart"], serde_json::json!(["v1/0", "v2/0", "v3/0"]));
    assert_eq!(answer["because"]["v3/0"], "it failed");
    let refused = call(&["run", job]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("C0012"), "{refused:?}");

    let restarts = call(&[
        "explain",
        "restarts",
        "--set",
        "restart-strategy.type=fixed-delay",
        "--set",
        "restart-strategy.fixed-delay.attempts=1",
        "--failures",
        "0,7",
        "--json",
    ]);
    let lines: Vec<Value> = String::from_utf8_lossy(&restarts.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let expected = |at: u64, can: bool| serde_json::json!({ "at_ms": at, "new_attempt": true, "can_restart": can, "backoff_ms": 1000 });
    assert_eq!(lines, [expected(0, true), expected(7, false)]);
}
