//! Checkpoints in every mode: several at once, several kept, at least once, savepoints, rescaling,
//! and a storage that fails or rots.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cofferdam_connector::catalog::Conflicts;
use cofferdam_core::{job::Outcome, random::Random};
use cofferdam_engine::{
    job::JobOptions,
    progress::Progress,
    restore::{RestoreFrom, open_named},
};
use cofferdam_store::{Storage, faulty::Faults, sled::SledStorage};
use cofferdam_tests::{
    disk::copy_dir,
    job::{
        Harness, Ran, after_records, block_on, check_counts, committed, golden, rounds,
        run_manifest, run_with,
    },
};

fn with_lines(lines: &str) -> Harness {
    let checkpointing =
        format!("externalized-checkpoint-retention = \"RETAIN_ON_CANCELLATION\"\n{lines}");
    Harness { checkpointing, rate: Some(200_000), interval_ms: 10, ..Harness::default() }
}

fn trap(at: u64, attempts: u64) -> String {
    format!(r#"do = "trap", at = {at}, step = 700, attempts = {attempts}"#)
}

fn output(dir: &Path) -> Vec<String> {
    committed(&dir.join("output"))
}

/// Runs a job until so many records were read, and stops it with a last checkpoint.
fn run_and_stop(manifest: &Path, records: u64) {
    let ran = run_manifest(manifest, |job| after_records(job, records, |job| job.stop()));
    assert!(matches!(ran.outcome, Ok(Outcome::Stopped { is_last: true, .. })), "{:?}", ran.outcome);
}

#[test]
fn several_checkpoints_at_once_and_several_kept_give_the_golden_output() {
    let lines = "max-concurrent-checkpoints = 3\nnum-retained = 3\nsnapshot-compression = true";
    let harness = Harness { config: trap(6_000, 6), ..with_lines(lines) };
    let (ran, lines) = harness.run();
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(6 <= ran.restart_count());
    assert!(lines == golden());
}

#[test]
fn sources_far_behind_the_clock_have_no_periodic_checkpoints_if_that_is_wanted() {
    let completed = |lines: &str| {
        let dir = tempfile::tempdir().expect("a directory");
        let text = with_lines(lines).manifest();
        let manifest = dir.path().join("job.toml");
        // Event times from 1970 on.
        let text = text.replace("seed = 5\n", "seed = 5\ntimestamps = true\n");
        fs::write(&manifest, text).expect("written");
        let ran = run_manifest(&manifest, |_| {});
        assert_eq!(ran.outcome, Ok(Outcome::Finished));
        assert!(output(dir.path()) == golden());
        let is_completed = |it: &&Progress| matches!(it, Progress::CheckpointCompleted { .. });
        ran.progress.iter().filter(is_completed).count()
    };
    let threshold = "\n[pipeline.backlog]\nwatermark-lag-threshold = \"1h\"";
    let none = completed(&format!("interval-during-backlog = \"0\"{threshold}"));
    // The tick that was due before the first record, and the last one.
    assert!(none <= 2, "{none} checkpoints during the backlog");
    let many = completed(&format!("interval-during-backlog = \"10ms\"{threshold}"));
    assert!(4 < many, "only {many} checkpoints in 300 ms");
}

#[test]
fn at_least_once_loses_nothing() {
    let harness = Harness { config: trap(6_000, 6), ..with_lines("mode = \"AT_LEAST_ONCE\"") };
    let (ran, lines) = harness.run();
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(6 <= ran.restart_count());
    let mut words: Vec<&str> = lines.iter().filter_map(|line| line.split(' ').next()).collect();
    words.sort_unstable();
    let mut expected: Vec<&str> =
        golden().iter().filter_map(|line| line.split(' ').next()).collect();
    expected.sort_unstable();
    // Each word comes at least as often; counts may jump, which is what the mode allows.
    let mut place = 0;
    for word in &expected {
        while words.get(place).is_some_and(|seen| seen < word) {
            place += 1;
        }
        assert_eq!(words.get(place), Some(word), "a record of {word} is lost");
        place += 1;
    }
}

#[test]
fn num_retained_checkpoints_stay_and_an_older_one_is_used_when_the_newest_is_damaged() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = with_lines("num-retained = 3");
    let manifest = harness.write(dir.path());
    run_and_stop(&manifest, 30_000);
    let state = dir.path().join("probe.cofferdam");
    let (store, newest) = open_named(&state).expect("opens");
    let kept = store.checkpoints();
    assert_eq!(kept.len(), 3, "{kept:?}");
    assert_eq!(kept.last(), Some(&newest.checkpoint));
    drop(store);

    damage_newest_pages(&state);
    // What the newest checkpoint had committed would come twice.
    let before = output(dir.path());
    let problem = run_manifest(&manifest, |_| {}).outcome.expect_err("it would come twice");
    assert_eq!(problem.code.number(), "C0029", "{problem}");
    assert_eq!(output(dir.path()), before, "nothing was changed");
    assert_eq!(open_named(&state).expect("opens").0.checkpoints(), kept, "and nothing deleted");
    let conflicts = Conflicts { discard_output: true, ..Conflicts::default() };
    let options = JobOptions { conflicts, ..JobOptions::default() };
    let ran = run_with(&manifest, &options, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(output(dir.path()) == golden(), "with that it is the golden output");
    let warnings: Vec<&String> = ran
        .progress
        .iter()
        .filter_map(|progress| match progress {
            Progress::Warning { message } => Some(message),
            _ => None,
        })
        .collect();
    let named = format!("checkpoint {} is skipped", newest.checkpoint);
    assert!(warnings.iter().any(|warning| warning.contains(&named)), "{warnings:?}");
    let restored = ran.restored().first().copied();
    assert!(
        restored.is_some_and(|id| id < newest.checkpoint && kept.contains(&id)),
        "{restored:?}"
    );
}

/// Flips a bit in the last bytes of the pack, which the newest snapshots have written.
fn damage_newest_pages(state: &Path) {
    let generation = fs::read_dir(state)
        .expect("listed")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("gen-"))
        })
        .max()
        .expect("a generation");
    let number = generation.file_name().and_then(|name| name.to_str());
    let number = number.and_then(|name| name.rsplit('-').next()).expect("a number");
    let storage = SledStorage::new(state.to_owned());
    let stored = storage.read(number.parse().expect("a number"), 0).expect("readable");
    // Snapshot, task, kind; kind 1 is a pack of pages. The highest bit says that they were carried forward.
    let is_pages = |key: &Vec<u8>| key.len() == 18 && key[13] == 1 && key[1] < 128;
    let newest = stored.keys(b"s").expect("listed").into_iter().rfind(is_pages).expect("pages");
    let value = stored.get(&newest).expect("readable").expect("there");
    let pack = generation.join("pack");
    let mut bytes = fs::read(&pack).expect("readable");
    let at = bytes.windows(value.len()).position(|window| window == value).expect("it is there");
    bytes[at + value.len() - 100] ^= 1;
    fs::write(&pack, bytes).expect("written");
}

#[test]
fn savepoint_of_a_running_job_is_whole_and_relocatable() {
    let dir = tempfile::tempdir().expect("a directory");
    let savepoint = dir.path().join("elsewhere/savepoint");
    let manifest = with_lines("").write(dir.path());
    let target = savepoint.clone();
    let ran = run_manifest(&manifest, |job| {
        after_records(job, 20_000, move |job| {
            block_on(job.savepoint(target)).expect("a savepoint");
        });
    });
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(output(dir.path()) == golden(), "the job went on as if nothing had happened");

    let other = tempfile::tempdir().expect("a directory");
    let moved = other.path().join("moved");
    fs::rename(&savepoint, &moved).expect("moved");
    fs::remove_dir_all(dir.path().join("probe.cofferdam")).expect("removed");
    let lines = continue_from(&moved, &with_lines(""), false, dir.path());
    assert!(lines == golden(), "from the savepoint on, the output is the golden one");
    assert!(moved.is_dir(), "it was not claimed");
}

/// Runs a job from a savepoint, with an output of its own; gives what was committed up to the savepoint
/// and what came of it.
fn continue_from(savepoint: &Path, harness: &Harness, claim: bool, first: &Path) -> Vec<String> {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = harness.write(dir.path());
    let (_, taken) = open_named(savepoint).expect("a savepoint");
    let from = RestoreFrom { dir: savepoint.to_owned(), claim, ignore_unclaimed_state: false };
    let options = JobOptions { from: Some(from), ..JobOptions::default() };
    let ran = run_with(&manifest, &options, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    let mut lines = output(dir.path());
    for entry in fs::read_dir(first.join("output")).expect("listed").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let checkpoint = name.split('-').nth(2).and_then(|text| text.parse::<u64>().ok());
        if checkpoint.is_some_and(|checkpoint| checkpoint <= taken.checkpoint) {
            let text = fs::read_to_string(entry.path()).expect("readable");
            lines.extend(text.lines().map(str::to_owned));
        }
    }
    lines.sort_unstable();
    lines
}

#[test]
fn stop_with_savepoint_ends_the_job_and_the_next_one_begins_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let savepoint = dir.path().join("savepoint");
    let manifest = with_lines("").write(dir.path());
    let target = savepoint.clone();
    let ran = run_manifest(&manifest, |job| {
        after_records(job, 20_000, move |job| {
            block_on(job.stop_with_savepoint(target, false)).expect("a savepoint");
        });
    });
    assert!(
        matches!(ran.outcome, Ok(Outcome::Stopped { has_savepoint: true, .. })),
        "{:?}",
        ran.outcome
    );
    assert!(output(dir.path()).len() < 60_000);
    let from = RestoreFrom { dir: savepoint.clone(), claim: true, ignore_unclaimed_state: false };
    let options = JobOptions { from: Some(from), ..JobOptions::default() };
    let ran = run_with(&manifest, &options, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(output(dir.path()) == golden());
    assert!(!savepoint.exists(), "it was claimed");
}

#[test]
fn drain_emits_everything_and_finishes() {
    let dir = tempfile::tempdir().expect("a directory");
    let savepoint = dir.path().join("savepoint");
    let manifest = with_lines("").write(dir.path());
    let target = savepoint.clone();
    let ran = run_manifest(&manifest, |job| {
        after_records(job, 20_000, move |job| {
            block_on(job.stop_with_savepoint(target, true)).expect("a savepoint");
        });
    });
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    let lines = output(dir.path());
    check_counts(&lines, lines.len() as u64).expect("whole counts");
    assert!((20_000..60_000).contains(&lines.len()), "{}", lines.len());
    assert!(savepoint.is_dir());
}

#[test]
fn retention_decides_what_a_cancelled_and_a_failed_job_leave() {
    let rows = [
        ("NO_EXTERNALIZED_CHECKPOINTS", false, false),
        ("DELETE_ON_CANCELLATION", false, true),
        ("RETAIN_ON_CANCELLATION", true, true),
    ];
    for (policy, after_cancel, after_failure) in rows {
        let checkpointing = format!("externalized-checkpoint-retention = \"{policy}\"");
        let harness =
            Harness { checkpointing, rate: Some(100_000), interval_ms: 10, ..Harness::default() };
        let is_kept = |dir: &Path| open_named(&dir.join("probe.cofferdam")).is_ok();

        let dir = tempfile::tempdir().expect("a directory");
        let manifest = harness.write(dir.path());
        let ran = run_manifest(&manifest, |job| after_records(job, 20_000, |job| job.cancel()));
        assert!(
            matches!(ran.outcome, Ok(Outcome::Canceled { checkpoint: Some(_) })),
            "{policy}: {:?}",
            ran.outcome
        );
        assert_eq!(is_kept(dir.path()), after_cancel, "{policy}, cancelled");

        let dir = tempfile::tempdir().expect("a directory");
        let config = r#"do = "trap", at = 8000"#.to_owned();
        let ran = Harness { config, attempts: 1, ..harness.clone() }.run_in(dir.path());
        assert!(ran.outcome.is_err(), "{policy}");
        assert_eq!(is_kept(dir.path()), after_failure, "{policy}, failed");

        let dir = tempfile::tempdir().expect("a directory");
        let manifest = harness.write(dir.path());
        run_and_stop(&manifest, 20_000);
        assert!(is_kept(dir.path()), "{policy}: an interrupted job resumes by itself");
    }
}

#[test]
fn declared_state_moves_to_another_parallelism_in_both_directions() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = Harness { snapshot: "declared", ..with_lines("") };
    let mut records = 0;
    for parallelism in [2, 5, 3] {
        let manifest = Harness { parallelism, ..harness.clone() }.write(dir.path());
        run_and_stop(&manifest, 12_000);
        let now = output(dir.path()).len();
        assert!(records < now, "nothing was processed at {parallelism}");
        records = now;
    }
    let ran = Harness { parallelism: 4, config: trap(2_000, 2), ..harness }.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(output(dir.path()) == golden());
}

#[test]
fn node_that_the_checkpoint_does_not_know_begins_anew() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = with_lines("").write(dir.path());
    run_and_stop(&manifest, 12_000);
    let text = fs::read_to_string(&manifest).expect("readable");
    let second = "\n[[sink]]\nname = \"second\"\nconnector = \"file\"\ninputs = [\"count\"]\npath = \"second\"\n";
    fs::write(&manifest, text + second).expect("written");
    let ran = run_manifest(&manifest, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(output(dir.path()) == golden());
    let late = committed(&dir.path().join("second"));
    assert!(!late.is_empty() && late.len() < 60_000, "{}", late.len());
}

#[test]
fn failed_resume_removes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = Harness { checkpointing: String::new(), ..with_lines("") };
    let manifest = harness.write(dir.path());
    run_and_stop(&manifest, 12_000);
    // It traps at once, before a checkpoint of its own.
    let config = r#"do = "trap-in-open""#.to_owned();
    let failing = Harness { config, attempts: 0, interval_ms: 60_000, ..harness.clone() };
    assert!(failing.run_in(dir.path()).outcome.is_err());
    let ran = harness.run_in(dir.path());
    assert_eq!(ran.restored().len(), 1);
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(output(dir.path()) == golden());
}

#[test]
fn linear_memory_is_not_moved_and_the_remedy_is_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = with_lines("").write(dir.path());
    run_and_stop(&manifest, 12_000);
    let wider = Harness { parallelism: 3, ..with_lines("") };
    let problem = wider.run_in(dir.path()).outcome.expect_err("refused");
    assert_eq!(problem.code.number(), "C0020");
    assert!(problem.message.contains("parallelism 2, the manifest with 3"), "{problem}");
    assert!(problem.hint.as_ref().is_some_and(|hint| hint.contains("declared")), "{problem}");
    // And that remedy helps.
    let ran = Harness { snapshot: "declared", ..wider }.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(output(dir.path()) == golden());
}

#[test]
fn no_failing_operation_of_the_storage_loses_or_doubles_anything() {
    for lines in ["num-retained = 2", "storage = \"filesystem\"\ndir = \"checkpoints\""] {
        fail_at_each_operation(&with_lines(lines));
    }
}

fn fail_at_each_operation(base: &Harness) {
    let harness = Harness {
        count: 8_000,
        rate: Some(80_000),
        config: r#"do = "trap", at = 1500, attempts = 1"#.to_owned(),
        ..base.clone()
    };
    let faulted = |operation: u64| -> (Ran, Faults, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a directory");
        let manifest = harness.write(dir.path());
        let faults = Faults::at(operation);
        let options = JobOptions { faults: Some(faults.clone()), ..JobOptions::default() };
        let mut ran = run_with(&manifest, &options, |_| {});
        if ran.outcome.is_err() {
            // A storage that cannot even be opened ends the run; the next one goes on.
            ran = run_manifest(&manifest, |_| {});
        }
        (ran, faults, dir)
    };
    let operations = faulted(0).1.operations();
    assert!(50 < operations, "only {operations} operations");
    let stride = (operations / 40).max(1) as usize;
    let mut struck = 0;
    for operation in (1..=operations).step_by(stride) {
        let (ran, faults, dir) = faulted(operation);
        assert_eq!(ran.outcome, Ok(Outcome::Finished), "operation {operation}");
        check_counts(&output(dir.path()), 8_000)
            .unwrap_or_else(|error| panic!("operation {operation}: {error}"));
        struck += u32::from(faults.has_struck());
    }
    assert!(30 < struck, "only {struck} faults struck");
}

/// One bit is flipped in a random place of a random file of the store, again and again: the result is
/// right, or there is none.
#[test]
fn no_flipped_bit_gives_wrong_results() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = Harness { count: 20_000, rate: Some(200_000), ..with_lines("num-retained = 2") };
    let manifest = harness.write(dir.path());
    run_and_stop(&manifest, 10_000);
    let rounds = rounds("FLIP_ROUNDS", 60);
    let (mut told, mut random) = (0, Random::new(11));
    for round in 0..rounds {
        let copy = tempfile::tempdir().expect("a directory");
        copy_dir(dir.path(), copy.path()).expect("copied");
        let files = files_under(&copy.path().join("probe.cofferdam"));
        // Every file as often as the others, however small.
        let (path, size) = &files[random.between(0, files.len() as u64 - 1) as usize];
        let at = random.between(0, size - 1);
        let mut bytes = fs::read(path).expect("readable");
        bytes[at as usize] ^= 1 << random.between(0, 7);
        fs::write(path, bytes).expect("written");

        let ran = run_manifest(&copy.path().join("job.toml"), |_| {});
        let is_warned =
            ran.progress.iter().any(|progress| matches!(progress, Progress::Warning { .. }));
        told += u32::from(is_warned || ran.outcome.is_err());
        if ran.outcome == Ok(Outcome::Finished) {
            check_counts(&output(copy.path()), 20_000)
                .unwrap_or_else(|error| panic!("round {round}, {}: {error}", path.display()));
        }
    }
    assert!(0 < told, "not one of {rounds} flips was found");
}

fn files_under(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).expect("listed").flatten() {
            let path = entry.path();
            match path.is_dir() {
                true => waiting.push(path),
                false => {
                    let size = entry.metadata().expect("readable").len();
                    if 0 < size {
                        found.push((path, size));
                    }
                }
            }
        }
    }
    found.sort();
    found
}
