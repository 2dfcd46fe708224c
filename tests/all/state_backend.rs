//! Declared state that the host keeps: larger than a guest's memory, and exactly once all the same.

use std::{fs, path::Path};

use cofferdam_core::{job::Outcome, random::Random};
use cofferdam_engine::restore::open_named;
use cofferdam_tests::job::{
    HOST_STATE, Harness, after_records, check_counts, committed, golden, run_manifest,
};

fn by_host(harness: Harness) -> Harness {
    let checkpointing = harness.checkpointing + HOST_STATE;
    Harness { checkpointing, ..harness }
}

fn output(dir: &Path) -> Vec<String> {
    committed(&dir.join("output"))
}

#[test]
fn output_equals_that_of_guests_that_keep_their_state_wherever_one_traps() {
    let mut restored = 0;
    for seed in 0..8 {
        let mut random = Random::new(seed);
        let (at, attempts) = (random.between(0, 25_000), random.between(1, 4));
        let snapshot = ["both", "declared"][(seed % 2) as usize];
        let harness = by_host(Harness {
            config: format!(r#"do = "trap", at = {at}, attempts = {attempts}"#),
            snapshot,
            rate: Some(300_000),
            interval_ms: 10,
            ..Harness::default()
        });
        let (ran, lines) = harness.run();
        let story = format!("SEED={seed} trap at {at}, {attempts} times, {snapshot}");
        assert_eq!(ran.outcome, Ok(Outcome::Finished), "{story}");
        assert!(0 < ran.restart_count(), "{story}: nothing has failed");
        assert!(lines == golden(), "{story}: the output is not the golden run's");
        restored += ran.restored().len();
    }
    assert!(3 < restored, "only {restored} restarts had a checkpoint to go on from");
}

#[test]
fn state_may_be_larger_than_the_memory_of_its_guest() {
    let harness = Harness {
        count: 600_000,
        vocabulary: 400_000,
        parallelism: 1,
        interval_ms: 200,
        config: "quiet = true }\nlimits = { memory = \"8MiB\", call = \"10s\"".to_owned(),
        ..Harness::default()
    };
    let in_guest = Harness { attempts: 0, ..harness.clone() }.run().0.outcome;
    let problem = in_guest.expect_err("8 MiB are not enough");
    assert_eq!(problem.code.number(), "C0102", "{problem}");
    let (ran, lines) = by_host(harness).run();
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [seen, keys, sum] = numbers.as_slice() else { panic!("{line}") };
    assert_eq!((*seen, *sum), (600_000, 600_000), "every record was counted once");
    assert!(100_000 < *keys, "{keys} keys fit into 8 MiB");
}

#[test]
fn state_of_the_host_moves_to_another_parallelism_and_into_guests_and_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let guests = Harness {
        snapshot: "declared",
        // Slow enough that a busy machine stops each run before its end.
        rate: Some(50_000),
        interval_ms: 10,
        ..Harness::default()
    };
    let hosts = by_host(guests.clone());
    let runs = [(2, &hosts), (5, &hosts), (3, &guests), (4, &hosts), (1, &hosts)];
    for (place, (parallelism, harness)) in runs.into_iter().enumerate() {
        let harness = Harness { parallelism, ..harness.clone() };
        let text = harness.manifest().replace("\nconfig =", "\nmax-parallelism = 128\nconfig =");
        let manifest = dir.path().join("job.toml");
        fs::write(&manifest, text).expect("written");
        let is_last = place == 4;
        let ran = run_manifest(&manifest, |job| {
            assert_eq!(job.resumes_from().is_some(), 0 < place);
            if !is_last {
                after_records(job, 9_000, |job| job.stop());
            }
        });
        match is_last {
            true => assert_eq!(ran.outcome, Ok(Outcome::Finished)),
            false => assert!(
                matches!(ran.outcome, Ok(Outcome::Stopped { is_last: true, .. })),
                "{:?}",
                ran.outcome
            ),
        }
    }
    assert!(output(dir.path()) == golden());
}

#[test]
fn memory_fits_only_the_backend_that_it_was_written_with() {
    let dir = tempfile::tempdir().expect("a directory");
    let guests = Harness { rate: Some(100_000), interval_ms: 10, ..Harness::default() };
    let manifest = by_host(guests.clone()).write(dir.path());
    let ran = run_manifest(&manifest, |job| after_records(job, 5_000, |job| job.stop()));
    assert!(matches!(ran.outcome, Ok(Outcome::Stopped { is_last: true, .. })), "{:?}", ran.outcome);
    let (store, newest) = open_named(&dir.path().join("probe.cofferdam")).expect("opens");
    let reports = store.inspect(newest.checkpoint).expect("whole");
    let entries: usize = reports.iter().filter_map(|task| task.declared_entries).sum();
    assert!(300 < entries, "the checkpoint holds what guests have let go of: {entries} entries");
    drop(store);

    let problem = guests.run_in(dir.path()).outcome.expect_err("another backend").to_string();
    assert!(problem.contains("state.backend.type = \"sled\""), "{problem}");
    assert!(problem.contains("snapshot = \"declared\""), "the remedy is told: {problem}");
    let ran = Harness { snapshot: "declared", ..guests }.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    check_counts(&output(dir.path()), 60_000).expect("exactly once");
}

#[test]
fn more_state_than_its_limit_is_told_as_such() {
    let harness = by_host(Harness {
        vocabulary: 100_000,
        attempts: 0,
        config: "quiet = true }\nlimits = { state = \"64KiB\", call = \"5s\"".to_owned(),
        ..Harness::default()
    });
    let problem = harness.run().0.outcome.expect_err("too much state");
    assert_eq!(problem.code.number(), "C0102", "{problem}");
    assert!(problem.to_string().contains("raise limits.state"), "{problem}");
}

#[test]
fn state_that_is_written_before_it_is_restored_is_refused_by_both_backends() {
    let many = "it writes declared state in `open`";
    let few = "state \"counts\" was written in `open`";
    let cases = [
        (Harness::default(), 1, few),
        (Harness::default(), 10_000, few),
        (by_host(Harness::default()), 1, few),
        // Some of it is written behind by then.
        (by_host(Harness::default()), 10_000, many),
    ];
    for (harness, at, expected) in cases {
        let config = format!(r#"do = "write-in-open", at = {at}"#);
        let problem = Harness { attempts: 0, config, ..harness }.run().0.outcome;
        let problem = problem.expect_err("refused").to_string();
        assert!(problem.contains(expected), "{at}: {problem}");
    }
}

#[test]
fn memory_alone_would_miss_what_the_host_keeps() {
    let harness = by_host(Harness { snapshot: "memory", ..Harness::default() });
    let problem = harness.run().0.outcome.expect_err("refused").to_string();
    assert!(problem.contains("the checkpoints of operator \"count\" would miss"), "{problem}");
}

#[test]
fn nothing_is_left_of_the_tables_when_a_job_has_ended() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = by_host(Harness { count: 5_000, ..Harness::default() });
    assert_eq!(harness.run_in(dir.path()).outcome, Ok(Outcome::Finished));
    let left = fs::read_dir(dir.path().join("probe.cofferdam")).expect("listed").flatten();
    let mut left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    left.sort();
    assert_eq!(left, ["JOB", "LOCK", "outputs"], "no state is left");
}
