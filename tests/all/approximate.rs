//! Exchanges whose readers restart alone: what they lose is counted, and nothing else changes.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use cofferdam_core::{job::Outcome, random::Random};
use cofferdam_engine::progress::Progress;
use cofferdam_tests::{
    guest,
    job::{Ran, committed, job_with_restarts, run_manifest, when, words},
};

const COUNT: u64 = 60_000;
/// The place of the last sink: behind a source, two operators and a sink.
const OUT: usize = 4;

/// Words that one operator counts and, over an approximate exchange, another one.
#[derive(Clone)]
struct Approximate {
    first: String,
    second: String,
    checkpointing: &'static str,
    escalation: &'static str,
    attempts: u64,
    inputs: &'static str,
    /// Between the source and the first operator.
    partition: &'static str,
    snapshot: &'static str,
    rate: u32,
}

impl Default for Approximate {
    fn default() -> Self {
        Self {
            first: String::new(),
            second: String::new(),
            checkpointing: "interval = \"10ms\"",
            escalation: "",
            attempts: 1_000,
            inputs: r#"{ from = "first", partition = "hash", exchange = "pipelined-approximate" }"#,
            partition: "hash",
            snapshot: "both",
            rate: 200_000,
        }
    }
}

impl Approximate {
    fn write(&self, dir: &Path) -> PathBuf {
        let Self { first, second, checkpointing, escalation, attempts, .. } = self;
        let Self { inputs, partition, snapshot, rate, .. } = self;
        let component = guest::probe();
        let (job, words) = (job_with_restarts("approximate", 2, *attempts), words(500, COUNT));
        let text = format!(
            r#"{job}
[execution.checkpointing]
{checkpointing}

{escalation}
{words}
rate = {rate}
timestamps = true

[[operator]]
name = "first"
component = {component:?}
snapshot = "{snapshot}"
inputs = [{{ from = "words", partition = "{partition}" }}]
config = {{ {first} }}

[[sink]]
name = "firsts"
connector = "file"
inputs = [{{ from = "first", partition = "forward" }}]
path = "firsts"

[[operator]]
name = "second"
component = {component:?}
snapshot = "{snapshot}"
inputs = [{inputs}]
config = {{ {second} }}

[[sink]]
name = "out"
connector = "file"
inputs = [{{ from = "second", partition = "forward" }}]
path = "output"
"#
        );
        let path = dir.join("job.toml");
        fs::write(&path, text).expect("written");
        path
    }

    fn run_in(&self, dir: &Path) -> Ran {
        run_manifest(&self.write(dir), |_| {})
    }
}

/// How many records are lost in the end, by what the job has said; and in between.
fn losses(ran: &Ran) -> (u64, u64) {
    let (mut lost, mut regained) = (0, 0);
    for progress in &ran.progress {
        if let Progress::RecordsLost { from, to, lost: more, regained: again, is_exact } = progress
        {
            assert_eq!((from.as_str(), to.as_str(), *is_exact), ("first", "second", true));
            (lost, regained) = (lost + more, regained + again);
        }
    }
    (lost - regained, lost)
}

fn lost(ran: &Ran) -> u64 {
    losses(ran).0
}

/// Everything that is not lost has been counted once.
fn check(dir: &Path, lost: u64, story: &str) {
    assert_eq!(committed(&dir.join("firsts")).len() as u64, COUNT, "{story}");
    let counted = committed(&dir.join("output")).len() as u64;
    assert_eq!(counted + lost, COUNT, "{story}: {counted} counted and {lost} lost");
}

/// The operators of each restart.
fn restarted(ran: &Ran) -> Vec<BTreeSet<String>> {
    let operator = |task: &String| task.split('/').next().unwrap_or_default().to_owned();
    ran.restarted().iter().map(|tasks| tasks.iter().map(operator).collect()).collect()
}

#[test]
fn reader_restarts_alone_from_its_checkpoint_and_says_what_it_has_lost() {
    let (mut total, mut restores) = (0, 0);
    for seed in 0..6 {
        let mut random = Random::new(seed);
        let (at, attempts) = (random.between(500, 25_000), random.between(1, 5));
        let step = random.between(0, 800);
        let second = format!(r#"do = "trap", at = {at}, attempts = {attempts}, step = {step}"#);
        let dir = tempfile::tempdir().expect("a directory");
        let ran =
            Approximate { second: second.clone(), ..Approximate::default() }.run_in(dir.path());
        let story = format!("SEED={seed} {second}");
        assert_eq!(ran.outcome, Ok(Outcome::Finished), "{story}");
        let restarted = restarted(&ran);
        assert!(!restarted.is_empty(), "{story}: nothing has failed");
        let alone = BTreeSet::from(["out".to_owned(), "second".to_owned()]);
        assert!(restarted.iter().all(|operators| *operators == alone), "{story}: {restarted:?}");
        check(dir.path(), lost(&ran), &story);
        total += lost(&ran);
        restores += ran.restored().len();
    }
    assert!(0 < total, "no record was lost at all");
    assert!(3 < restores, "only {restores} restarts had a checkpoint to go on from");
}

#[test]
fn producer_restarts_with_its_reader_and_nothing_is_lost() {
    for seed in 0..4 {
        let at = Random::new(seed).between(500, 20_000);
        let first = format!(r#"do = "trap", at = {at}, attempts = 3, step = 200"#);
        let dir = tempfile::tempdir().expect("a directory");
        let ran = Approximate { first, ..Approximate::default() }.run_in(dir.path());
        assert_eq!(ran.outcome, Ok(Outcome::Finished));
        let restarted = restarted(&ran);
        assert!(!restarted.is_empty() && restarted.iter().all(|operators| operators.len() == 5));
        assert_eq!(losses(&ran), (0, 0));
        check(dir.path(), 0, &format!("SEED={seed}"));
    }
}

#[test]
fn one_of_two_producers_restarts_with_its_reader_and_what_the_other_has_sent_is_lost() {
    let dir = tempfile::tempdir().expect("a directory");
    let job = Approximate {
        first: r#"do = "trap", at = 9000, attempts = 3, step = 500, task = 0"#.to_owned(),
        // Two pipelines, so that each task of the first operator is in a region of its own.
        partition: "forward",
        ..Approximate::default()
    };
    let ran = job.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    let sizes: Vec<usize> = ran.restarted().iter().map(Vec::len).collect();
    assert!(!sizes.is_empty() && sizes.iter().all(|size| *size == 7), "{sizes:?} of 10 tasks");
    check(dir.path(), lost(&ran), "one producer");
}

#[test]
fn both_may_fail_and_the_process_may_end_in_between() {
    let dir = tempfile::tempdir().expect("a directory");
    // What they have seen is not declared, so both trap again when the job is run again.
    let trap = |at| format!(r#"do = "trap", at = {at}, attempts = 1"#);
    let job = Approximate {
        first: trap(2_000),
        second: trap(1_500),
        snapshot: "declared",
        checkpointing: "interval = \"10ms\"\nexternalized-checkpoint-retention = \"RETAIN_ON_CANCELLATION\"",
        rate: 60_000,
        ..Approximate::default()
    };
    let manifest = job.write(dir.path());
    let mut all_lost = 0;
    for stops_after in [Some(20_000), None] {
        let ran = run_manifest(&manifest, |job| {
            if let Some(records) = stops_after {
                // By then both have trapped.
                let (metrics, handle) = (job.metrics(), job.control());
                let written = move || metrics.read(|_| false, |node| node == OUT).records_written;
                when(move || records <= written(), move || handle.stop());
            }
        });
        let is_as_expected = match &ran.outcome {
            Ok(Outcome::Finished) => stops_after.is_none(),
            Ok(Outcome::Stopped { is_last: true, .. }) => stops_after.is_some(),
            _ => false,
        };
        assert!(is_as_expected, "{:?}", ran.outcome);
        assert!(!restarted(&ran).is_empty(), "nothing has failed");
        assert!(0 < losses(&ran).1, "nothing was lost in between");
        all_lost += lost(&ran);
    }
    check(dir.path(), all_lost, "stopped");
}

#[test]
fn without_checkpoints_the_reader_begins_anew_with_what_comes_next() {
    let dir = tempfile::tempdir().expect("a directory");
    let second = r#"do = "trap", at = 3000, attempts = 2"#.to_owned();
    let job = Approximate { second, checkpointing: "", ..Approximate::default() };
    let ran = job.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(3_000 <= lost(&ran), "{}", lost(&ran));
    check(dir.path(), lost(&ran), "without checkpoints");
}

#[test]
fn escalation_ends_the_losses() {
    let dir = tempfile::tempdir().expect("a directory");
    let job = Approximate {
        second: r#"do = "trap", at = 4000, attempts = 2, task = 0"#.to_owned(),
        checkpointing: "interval = \"10min\"",
        escalation: "[jobmanager.execution]\nfailover-escalation = 1",
        ..Approximate::default()
    };
    let ran = job.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    let sizes: Vec<usize> = restarted(&ran).iter().map(BTreeSet::len).collect();
    assert_eq!(sizes, [2, 5], "alone, and then with all that it reads from");
    let (in_the_end, in_between) = losses(&ran);
    assert!(0 < in_between && in_the_end == 0, "{in_between} and {in_the_end}");
    check(dir.path(), 0, "escalated");
}

#[test]
fn what_does_not_go_together_with_it_is_refused() {
    let unaligned = Approximate {
        checkpointing: "interval = \"10ms\"\nunaligned.enabled = true",
        ..Approximate::default()
    };
    let batch = Approximate {
        inputs: r#"{ from = "first", partition = "hash", exchange = "pipelined-approximate" }, { from = "first", partition = "hash", exchange = "blocking" }"#,
        ..Approximate::default()
    };
    for (job, other) in [(unaligned, "unaligned checkpoints"), (batch, "not pipelined")] {
        let dir = tempfile::tempdir().expect("a directory");
        let problem = job.run_in(dir.path()).outcome.expect_err("refused");
        assert_eq!(problem.code.number(), "C0022", "{problem}");
        assert!(problem.to_string().contains(other), "{problem}");
        assert!(problem.to_string().contains("job.toml:"), "with its place: {problem}");
    }
}
