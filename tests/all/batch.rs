//! Jobs whose regions run one after the other, over result partitions on disk.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cofferdam_core::job::Outcome;
use cofferdam_engine::{job::Job, progress::Progress};
use cofferdam_tests::{
    guest,
    job::{Ran, check_counts, committed, run_manifest},
};

const COUNT: u64 = 60_000;

/// Three regions over exchanges of a type: numbers, words and counts, with what the counters do.
#[derive(Clone)]
struct Batch {
    exchange: &'static str,
    parallelism: u32,
    config: String,
    attempts: u32,
    rate: Option<u32>,
}

impl Default for Batch {
    fn default() -> Self {
        let (exchange, config) = ("blocking", String::new());
        Self { exchange, parallelism: 2, config, attempts: 100, rate: None }
    }
}

impl Batch {
    fn write(&self, dir: &Path) -> PathBuf {
        let Self { exchange, parallelism, config, attempts, rate } = self;
        let component = guest::probe();
        let rate = rate.map_or(String::new(), |rate| format!("rate = {rate}"));
        let text = format!(
            r#"
[job]
name = "batch"
parallelism = {parallelism}

[restart-strategy]
type = "fixed-delay"
fixed-delay = {{ attempts = {attempts}, delay = "0s" }}

[[source]]
name = "words"
connector = "generator"
vocabulary = 500
seed = 5
count = {COUNT}
timestamps = true
{rate}

[[operator]]
name = "first"
component = {component:?}
inputs = [{{ from = "words", partition = "hash", exchange = "{exchange}" }}]

[[operator]]
name = "second"
component = {component:?}
inputs = [{{ from = "first", partition = "rebalance", exchange = "{exchange}" }}]
config = {{ {config} }}

[[sink]]
name = "out"
connector = "file"
inputs = [{{ from = "second", partition = "forward", exchange = "pipelined" }}]
path = "output"

[[sink]]
name = "firsts"
connector = "file"
inputs = [{{ from = "first", partition = "forward", exchange = "pipelined" }}]
path = "firsts"
"#
        );
        let path = dir.join("job.toml");
        fs::write(&path, text).expect("written");
        path
    }

    fn run_in(&self, dir: &Path, with: impl FnOnce(&Job)) -> Ran {
        run_manifest(&self.write(dir), with)
    }
}

/// What the first counters have written, and what the second ones: each word once for each record.
fn check(dir: &Path, story: &str) {
    check_counts(&committed(&dir.join("firsts")), COUNT).expect(story);
    let words: Vec<String> = committed(&dir.join("output"));
    assert_eq!(words.len() as u64, COUNT, "{story}");
}

/// The tasks of each restart, by operator.
fn restarted(ran: &Ran) -> Vec<Vec<String>> {
    let of = |progress: &Progress| match progress {
        Progress::Restarting { restarting, .. } => Some(restarting.keys().cloned().collect()),
        _ => None,
    };
    ran.progress.iter().filter_map(of).collect()
}

#[test]
fn every_exchange_gives_every_record_once() {
    for exchange in ["blocking", "blocking-persistent", "hybrid-full", "hybrid-selective"] {
        for parallelism in [1, 3] {
            let dir = tempfile::tempdir().expect("a directory");
            let batch = Batch { exchange, parallelism, ..Batch::default() };
            let ran = batch.run_in(dir.path(), |_| {});
            assert_eq!(ran.outcome, Ok(Outcome::Finished), "{exchange}");
            check(dir.path(), exchange);
            let left = fs::read_dir(dir.path().join("batch.cofferdam")).expect("listed").flatten();
            let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
            assert_eq!(left, ["LOCK"], "{exchange}: nothing is left");
        }
    }
}

#[test]
fn a_trap_in_one_region_leaves_the_finished_ones_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = r#"do = "trap", at = 5000, attempts = 3"#.to_owned();
    let ran = Batch { config, ..Batch::default() }.run_in(dir.path(), |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    check(dir.path(), "traps");
    let restarted = restarted(&ran);
    assert!(3 <= restarted.len(), "{restarted:?}");
    for tasks in restarted {
        let is_theirs = |task: &String| task.starts_with("second/") || task.starts_with("out/");
        assert!(tasks.iter().all(is_theirs), "{tasks:?}");
        assert_eq!(tasks.len(), 2, "one pipeline of a counter and its sink: {tasks:?}");
    }
}
