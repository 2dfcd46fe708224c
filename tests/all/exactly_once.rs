//! Golden run equals faulted run, whatever fails in between.

use cofferdam_core::{job::Outcome, random::Random};
use cofferdam_engine::{job::JobOptions, progress::Progress};
use cofferdam_tests::{
    crash,
    job::{Harness, committed, golden, rounds, run_manifest, run_with},
    world,
};

/// Runs a faulted job; its output must be the golden run's, and the fault must have struck.
fn check(harness: &Harness, story: &str) -> usize {
    let (ran, lines) = harness.run();
    assert_eq!(ran.outcome, Ok(Outcome::Finished), "{story}");
    assert!(0 < ran.restart_count(), "{story}: nothing has failed");
    assert!(lines == golden(), "{story}: the output is not the golden run's");
    ran.restored().len()
}

#[test]
fn output_equals_the_golden_run_wherever_a_guest_traps() {
    let mut restored = 0;
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let (at, attempts) = (random.between(0, 25_000), random.between(1, 4));
        let snapshot = ["both", "memory", "declared"][(seed % 3) as usize];
        let config = format!(
            r#"do = "trap", at = {at}, attempts = {attempts}, ballast = 200000, dirty = 1"#
        );
        // A rate keeps the job alive for some checkpoints before and after each trap.
        let harness = Harness {
            config,
            snapshot,
            rate: Some(300_000),
            interval_ms: 10,
            ..Harness::default()
        };
        restored +=
            check(&harness, &format!("SEED={seed} trap at {at}, {attempts} times, {snapshot}"));
    }
    assert!(5 < restored, "only {restored} restarts had a checkpoint to go on from");
}

#[test]
fn output_equals_the_golden_run_whatever_kind_of_fault() {
    for (deed, limits) in [
        ("spin", true),
        ("eat-memory", true),
        ("recurse", false),
        ("reject", false),
        ("fail", false),
        ("exit", false),
    ] {
        let config = format!(r#"do = "{deed}", at = 9000, attempts = 1"#);
        let mut harness =
            Harness { config, rate: Some(300_000), interval_ms: 10, ..Harness::default() };
        if limits {
            // Short limits, so that the deed ends soon.
            harness.config.push_str(" }\nlimits = { call = \"200ms\", memory = \"16MiB\"");
        }
        check(&harness, deed);
    }
}

#[test]
fn trap_in_open_and_in_finish_are_faults_like_others() {
    check(
        &Harness {
            config: r#"do = "trap-in-open", attempts = 2"#.to_owned(),
            ..Harness::default()
        },
        "open",
    );
    check(
        &Harness {
            config: r#"do = "trap-in-finish", attempts = 2"#.to_owned(),
            ..Harness::default()
        },
        "finish",
    );
}

#[test]
fn job_gives_up_after_its_attempts_and_keeps_its_checkpoint() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = r#"do = "trap", at = 4000"#.to_owned();
    // Declared state: what `open` was told is part of a guest's memory, and a restore would bring it back.
    let snapshot = "declared";
    let failing = Harness {
        config,
        snapshot,
        attempts: 2,
        rate: Some(200_000),
        interval_ms: 10,
        ..Harness::default()
    };
    let ran = failing.run_in(dir.path());
    let problem = ran.outcome.as_ref().expect_err("it traps in every attempt");
    assert_eq!(problem.code.number(), "C0101");
    assert_eq!(problem.code.exit_code(), 1);
    assert!(
        problem.message.contains("count/") && problem.message.contains("one too many"),
        "{problem}"
    );
    assert_eq!(ran.restart_count(), 2);

    // The operator is mended by its config: the run goes on from the checkpoint that was kept.
    let ran = Harness { config: String::new(), ..failing }.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert_eq!(ran.restored().len(), 1);
    assert!(committed(&dir.path().join("output")) == golden());
}

#[test]
fn stopped_job_goes_on_where_it_was() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = Harness { rate: Some(100_000), interval_ms: 10_000, ..Harness::default() };
    let manifest = harness.write(dir.path());
    let ran = run_manifest(&manifest, |job| {
        let (stop, metrics) = (job.control(), job.metrics());
        std::thread::spawn(move || {
            let read = |_: &()| metrics.read(|index| index == 0, |_| false).records_read;
            while read(&()) < 5_000 {
                std::thread::yield_now();
            }
            stop.stop();
        });
    });
    let Ok(Outcome::Stopped { checkpoint: Some(_), is_last: true, .. }) = ran.outcome else {
        panic!("{:?}", ran.outcome)
    };
    let before = committed(&dir.path().join("output")).len();
    assert!(
        (5_000..60_000).contains(&before),
        "{before} records were committed by the last checkpoint"
    );
    let ran = run_manifest(&manifest, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(committed(&dir.path().join("output")) == golden());
}

#[test]
fn every_exchange_brings_every_record() {
    for (partition, parallelism, copies) in
        [("forward", 2, 1), ("rebalance", 3, 1), ("broadcast", 2, 2), ("hash", 3, 1)]
    {
        let harness = Harness { partition, parallelism, count: 20_000, ..Harness::default() };
        let (ran, lines) = harness.run();
        assert_eq!(ran.outcome, Ok(Outcome::Finished), "{partition}");
        assert_eq!(lines.len(), 20_000 * copies, "{partition}");
    }
}

#[test]
fn finished_job_remembers_that_it_has_finished_and_its_output_is_not_overwritten() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = Harness { count: 1_000, ..Harness::default() };
    assert_eq!(harness.run_in(dir.path()).outcome, Ok(Outcome::Finished));
    let left = std::fs::read_dir(dir.path().join("probe.cofferdam")).expect("listed").flatten();
    let mut left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    left.sort();
    assert_eq!(left, ["JOB", "LOCK", "outputs"], "no state is left");
    let before = committed(&dir.path().join("output"));
    // A supervisor that runs it again is told so, and nothing else happens.
    let problem = harness.run_in(dir.path()).outcome.expect_err("it has finished");
    assert_eq!((problem.code.number(), problem.code.exit_code()), ("C0035", 0));
    let other = Harness { config: "quiet = true".to_owned(), ..harness.clone() };
    let problem = other.run_in(dir.path()).outcome.expect_err("another job has finished");
    assert_eq!((problem.code.number(), problem.code.exit_code()), ("C0036", 2));
    let again = JobOptions { again: true, ..JobOptions::default() };
    let problem = run_with(&harness.write(dir.path()), &again, |_| {}).outcome;
    assert_eq!(problem.expect_err("the output is there").code.number(), "C0017");
    assert_eq!(committed(&dir.path().join("output")), before);
}

#[test]
fn checkpoints_hold_only_what_changed() {
    let config = r#"ballast = 33554432, dirty = 0"#.to_owned();
    let harness = Harness {
        config,
        parallelism: 1,
        rate: Some(100_000),
        interval_ms: 50,
        ..Harness::default()
    };
    let (ran, _) = harness.run();
    let bytes: Vec<u64> = ran
        .progress
        .iter()
        .filter_map(|progress| match progress {
            Progress::CheckpointCompleted { bytes, .. } => Some(*bytes),
            _ => None,
        })
        .collect();
    assert!(3 < bytes.len(), "{bytes:?}");
    assert!(
        bytes.iter().skip(1).all(|bytes| *bytes < 4 << 20),
        "32 MiB are never written again: {bytes:?}"
    );
}

#[test]
fn kill_at_any_moment_loses_nothing_and_doubles_nothing() {
    let rounds = rounds("CRASH_ROUNDS", 50);
    let tally = crash::run(rounds, 7, |_| {}).expect("exactly once");
    assert!(rounds <= tally.kills);
    assert!(rounds / 3 < tally.resumed, "the kills came before the first checkpoint: {tally:?}");
}

/// Kills, stops, savepoints, forks, other parallelisms and paths, moved directories, readers, cut inputs.
#[test]
fn every_record_comes_once_whatever_the_history_of_the_job() {
    let wanted = rounds("WORLDS", 40);
    let tally = world::run(wanted, 40, |_| {}).expect("every verdict as predicted");
    assert_eq!(tally.worlds, wanted);
    for step in ["rescales", "upgrades", "renames", "other paths", "moved directories"] {
        assert!(0 < tally.exact.get(step).copied().unwrap_or(0), "{step}: {:?}", tally.exact);
    }
    assert!(10 <= tally.events.values().sum::<u64>(), "{:?}", tally.events);
}
