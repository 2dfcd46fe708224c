//! Poison records: isolated, told, and everything else exactly once.

use std::{fs, path::Path};

use cofferdam_core::job::Outcome;
use cofferdam_engine::progress::Progress;
use cofferdam_tests::job::{HOST_STATE, Harness, Ran, check_counts, committed, run_manifest};

/// A job whose probe traps at the records with these event times, which are their numbers.
fn poisoned(harness: &Harness, poison: &str, dir: &Path) -> Ran {
    let on_trap = format!("do = \"poison\", poison = \"{poison}\" }}\non-trap = \"dead-letter\"");
    let harness = Harness { config: on_trap + "\nlimits = { call = \"5s\"", ..harness.clone() };
    let manifest = harness.write(dir);
    let text = fs::read_to_string(&manifest).expect("readable");
    let letters = r#"
[[sink]]
name = "letters"
connector = "file"
inputs = ["count.dead-letter"]
path = "letters"
"#;
    let text = text.replace("seed = 5\n", "seed = 5\ntimestamps = true\n") + letters;
    fs::write(&manifest, text).expect("written");
    run_manifest(&manifest, |_| {})
}

fn letters(dir: &Path) -> Vec<serde_json::Value> {
    let parse = |line: &String| serde_json::from_str(line).expect("a document a line");
    committed(&dir.join("letters")).iter().map(parse).collect()
}

#[test]
fn one_record_in_a_million_goes_to_the_dead_letters_and_all_others_are_counted_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = Harness { count: 1_000_000, interval_ms: 50, ..Harness::default() };
    let ran = poisoned(&harness, "654321", dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert_eq!(ran.restart_count(), 1, "the first trap is a failure like others");
    check_counts(&committed(&dir.path().join("output")), 999_999).expect("exactly once");
    let letters = letters(dir.path());
    let [letter] = letters.as_slice() else { panic!("{letters:?}") };
    assert_eq!(letter["timestamp"], 654_321);
    assert_eq!((letter["class"].as_str(), letter["traps"].as_u64()), (Some("trap"), Some(3)));
    assert!(letter["message"].as_str().is_some_and(|text| text.contains("poison")), "{letter}");
    assert!(letter["backtrace"].as_array().is_some_and(|frames| !frames.is_empty()), "{letter}");
    assert!(letter["key"].as_str().is_some_and(|key| !key.is_empty()), "{letter}");
    let told = ran.progress.iter().filter_map(|progress| match progress {
        Progress::DeadLetter { isolation_us, task, .. } => Some((*isolation_us, task.clone())),
        _ => None,
    });
    let told: Vec<_> = told.collect();
    println!("isolated in {told:?} µs");
    assert_eq!(told.len(), 1);
    assert_eq!(Some(told[0].1.as_str()), letter["task"].as_str());
}

#[test]
fn several_poison_records_are_all_found_whatever_a_checkpoint_holds() {
    let poison = [40_000, 40_001, 40_007, 60_000, 119_999, 199_999];
    let list = poison.map(|place| place.to_string()).join(" ");
    for (snapshot, checkpointing) in [
        ("both", ""),
        ("declared", ""),
        ("memory", "unaligned.enabled = true"),
        ("both", HOST_STATE),
        ("declared", HOST_STATE),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let harness = Harness {
            count: 200_000,
            interval_ms: 10,
            rate: Some(400_000),
            snapshot,
            checkpointing: checkpointing.to_owned(),
            ..Harness::default()
        };
        let ran = poisoned(&harness, &list, dir.path());
        assert_eq!(ran.outcome, Ok(Outcome::Finished), "{snapshot}");
        let lines = committed(&dir.path().join("output"));
        check_counts(&lines, 200_000 - poison.len() as u64).expect(snapshot);
        let mut found: Vec<i64> =
            letters(dir.path()).iter().filter_map(|letter| letter["timestamp"].as_i64()).collect();
        found.sort_unstable();
        assert_eq!(found, poison, "{snapshot}");
    }
}

#[test]
fn dead_letters_must_go_somewhere() {
    let config = "} \non-trap = \"dead-letter\"\nlimits = { call = \"5s\"".to_owned();
    let problem = Harness { config, ..Harness::default() }.run().0.outcome;
    let problem = problem.expect_err("nobody takes them").to_string();
    assert!(problem.contains("nothing takes the dead letters of \"count\""), "{problem}");
    assert!(problem.contains("count.dead-letter"), "{problem}");
}
