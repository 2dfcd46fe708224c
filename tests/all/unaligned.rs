//! Checkpoints whose barriers overtake: under backpressure, with traps, and over a rescale.

use std::fs;

use cofferdam_core::job::Outcome;
use cofferdam_engine::{progress::Progress, restore::open_named};
use cofferdam_tests::{
    guest,
    job::{Harness, Ran, after_checkpoints, check_counts, committed, run_manifest},
};

const COUNT: u64 = 300_000;

/// An operator that is much slower than its source, so that its channels are always full.
fn slow(lines: &str) -> Harness {
    Harness {
        count: COUNT,
        config: "ballast = 1048576, dirty = 400".to_owned(),
        checkpointing: format!(
            "externalized-checkpoint-retention = \"RETAIN_ON_CANCELLATION\"\n{lines}"
        ),
        interval_ms: 10,
        ..Harness::default()
    }
}

fn in_flight(ran: &Ran) -> Vec<u64> {
    let of = |progress: &Progress| match progress {
        Progress::CheckpointCompleted { in_flight_bytes, .. } => Some(*in_flight_bytes),
        _ => None,
    };
    ran.progress.iter().filter_map(of).collect()
}

#[test]
fn records_in_flight_are_restored_once_and_in_order() {
    let count = 3 * COUNT;
    let mut harness = Harness { count, ..slow("unaligned.enabled = true") };
    harness.config.push_str(r#", do = "trap", at = 60000, step = 25000, attempts = 8"#);
    let (ran, lines) = harness.run();
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(8 <= ran.restart_count(), "{} restarts", ran.restart_count());
    assert!(1 < ran.restored().len(), "restarts from checkpoints: {:?}", ran.restored());
    let bytes = in_flight(&ran);
    let filled = bytes.iter().filter(|bytes| 0 < **bytes).count();
    assert!(1 < filled, "only {filled} of {} checkpoints held records in flight", bytes.len());
    check_counts(&lines, count).expect("exactly once");
}

/// One of two senders is asleep more often than not, so its barrier comes late; many checkpoints
/// expire while the receiver has taken its snapshot already and waits for what is in flight.
#[test]
fn checkpoints_that_are_given_up_half_way_lose_nothing() {
    let count = 40_000;
    let lines = "unaligned.enabled = true\ntimeout = \"20ms\"\n\
                 tolerable-failed-checkpoints = 100000";
    let harness = Harness {
        count,
        config:
            r#"do = "trap", at = 5000, step = 1500, attempts = 6, ballast = 1048576, dirty = 1"#
                .to_owned(),
        checkpointing: lines.to_owned(),
        rate: Some(30_000),
        interval_ms: 10,
        ..Harness::default()
    };
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = harness.write(dir.path());
    let text = fs::read_to_string(&manifest).expect("readable");
    let (before, after) = text.split_once("[[operator]]").expect("an operator");
    let component = guest::probe();
    let sleepy = format!(
        "[[operator]]\nname = \"sleepy\"\ncomponent = {component:?}\n\
         inputs = [{{ from = \"words\", partition = \"hash\" }}]\n\
         config = {{ do = \"nap\", at = 600, task = 1 }}\n\n[[operator]]"
    );
    let after = after.replace("from = \"words\"", "from = \"sleepy\"");
    fs::write(&manifest, [before, &sleepy, &after].concat()).expect("written");
    let ran = run_manifest(&manifest, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    let is_given_up = |progress: &&Progress| matches!(progress, Progress::CheckpointFailed { .. });
    let given_up = ran.progress.iter().filter(is_given_up).count();
    let completed = in_flight(&ran).len();
    assert!(1 < given_up && 1 < completed, "{given_up} given up, {completed} completed");
    assert!(1 < ran.restored().len(), "restarts from checkpoints: {:?}", ran.restored());
    check_counts(&committed(&dir.path().join("output")), count).expect("exactly once");
}

#[test]
fn barrier_that_arrives_in_time_overtakes_nothing() {
    let lines = "unaligned.enabled = true\naligned-checkpoint-timeout = \"1min\"";
    let (ran, lines) = slow(lines).run();
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    let bytes = in_flight(&ran);
    assert!(!bytes.is_empty() && bytes.iter().all(|bytes| *bytes == 0), "{bytes:?}");
    check_counts(&lines, COUNT).expect("exactly once");
}

#[test]
fn barrier_that_is_late_overtakes_after_its_timeout() {
    let count = 2 * COUNT;
    let lines = "unaligned.enabled = true\naligned-checkpoint-timeout = \"2ms\"";
    let mut harness = Harness { count, ..slow(lines) };
    harness.config.push_str(r#", do = "trap", at = 50000, step = 20000, attempts = 4"#);
    let (ran, lines) = harness.run();
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(4 <= ran.restart_count());
    assert!(in_flight(&ran).iter().any(|bytes| 0 < *bytes), "{:?}", in_flight(&ran));
    check_counts(&lines, count).expect("exactly once");
}

#[test]
fn records_in_flight_follow_their_keys_to_another_parallelism() {
    let dir = tempfile::tempdir().expect("a directory");
    // Enough for three runs to be cancelled before the end, however slow their checkpoints are.
    let (count, config) = (4 * COUNT, "ballast = 1048576, dirty = 1500".to_owned());
    let harness =
        Harness { count, config, snapshot: "declared", ..slow("unaligned.enabled = true") };
    let mut carried = 0;
    for parallelism in [2, 5, 3] {
        let manifest = Harness { parallelism, ..harness.clone() }.write(dir.path());
        // A stop would take an aligned one: what is kept here is the newest periodic checkpoint.
        let ran = run_manifest(&manifest, |job| {
            after_checkpoints(job, 2, |job| job.cancel());
        });
        assert!(matches!(ran.outcome, Ok(Outcome::Canceled { .. })), "{:?}", ran.outcome);
        let (store, newest) = open_named(&dir.path().join("probe.cofferdam")).expect("whole");
        let tasks = store.inspect(newest.checkpoint).expect("whole");
        carried += tasks.iter().map(|task| task.stats.in_flight_bytes).sum::<u64>();
    }
    assert!(0 < carried, "no checkpoint that was gone on from held records in flight");
    // What is declared goes on with another config: the rest needs not be slow.
    let config = String::new();
    let ran = Harness { parallelism: 4, config, ..harness }.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    check_counts(&committed(&dir.path().join("output")), count).expect("exactly once");
}

/// Both edges lead into the one input of the operator; each record in flight finds its own again.
#[test]
fn records_in_flight_of_two_edges_to_one_input_are_restored() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = "ballast = 1048576, dirty = 1500".to_owned();
    let manifest = Harness { config, ..slow("unaligned.enabled = true") }.write(dir.path());
    let text = fs::read_to_string(&manifest).expect("readable");
    let more = "[[source]]\nname = \"more\"\nconnector = \"generator\"\nvocabulary = 500\n\
                seed = 6\ncount = 300000\n\n[[operator]]";
    let text = text.replace("[[operator]]", more).replace(
        "inputs = [{ from = \"words\", partition = \"hash\" }]",
        "inputs = [{ from = \"words\", partition = \"hash\" }, \
                   { from = \"more\", partition = \"hash\" }]",
    );
    fs::write(&manifest, text).expect("written");
    let ran = run_manifest(&manifest, |job| after_checkpoints(job, 2, |job| job.cancel()));
    assert!(matches!(ran.outcome, Ok(Outcome::Canceled { .. })), "{:?}", ran.outcome);
    assert!(in_flight(&ran).iter().any(|bytes| 0 < *bytes), "{:?}", in_flight(&ran));
    let ran = run_manifest(&manifest, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert_eq!(ran.restored().len(), 1);
    check_counts(&committed(&dir.path().join("output")), 2 * COUNT).expect("exactly once");
}

#[test]
fn records_for_every_task_are_not_moved_and_the_remedy_is_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = Harness {
        partition: "broadcast",
        snapshot: "declared",
        ..slow("unaligned.enabled = true")
    };
    let manifest = harness.write(dir.path());
    let _ = run_manifest(&manifest, |job| after_checkpoints(job, 3, |job| job.cancel()));
    let problem = Harness { parallelism: 3, ..harness.clone() }.run_in(dir.path()).outcome;
    let problem = problem.expect_err("it cannot be shared out");
    assert_eq!(problem.code.number(), "C0033", "{problem}");
    assert!(problem.to_string().contains("set the parallelism back"), "{problem}");
    assert_eq!(harness.run_in(dir.path()).outcome, Ok(Outcome::Finished));
    let lines = committed(&dir.path().join("output"));
    assert_eq!(lines.len() as u64, 2 * COUNT);
}
