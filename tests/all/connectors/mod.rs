//! Connectors that the program brings along: nothing in the host knows of them. They are written here, against
//! `cofferdam-connector` alone.

mod blocked;
mod growing;
mod laws;
mod ledger;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use cofferdam_connector::Catalog;
use cofferdam_connectors::builtin;
use cofferdam_core::job::Outcome;
use cofferdam_engine::{job::JobOptions, metrics::Metrics, restore::RestoreFrom};
use cofferdam_spec::JobSpec;
use cofferdam_tests::job::{block_on, run_with_catalog};

use self::{
    growing::{Growing, Topic},
    ledger::{Ledger, LedgerConnector},
};

fn catalog(topic: &Arc<Topic>, ledger: &Arc<Ledger>) -> Catalog {
    builtin().source(Growing(topic.clone())).sink(LedgerConnector(ledger.clone()))
}

fn manifest(dir: &Path, parallelism: u32, more: &str) -> PathBuf {
    let path = dir.join("job.toml");
    let text = format!(
        r#"
[job]
name = "ledger"
parallelism = {parallelism}

[execution.checkpointing]
interval = "20ms"

[restart-strategy]
type = "fixed-delay"
fixed-delay = {{ attempts = 100, delay = "1ms" }}

[[source]]
name = "in"
connector = "growing"
batch-records = 3

[[sink]]
name = "out"
connector = "ledger"
book = "main"
inputs = ["in"]
{more}
[[sink]]
name = "letters"
connector = "discard"
inputs = ["in.dead-letter"]
"#
    );
    fs::write(&path, text).expect("written");
    path
}

/// Waits until so many records have arrived.
fn wait_for(ledger: &Ledger, count: usize) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while ledger.records().len() < count {
        let seen = ledger.records().len();
        assert!(std::time::Instant::now() < deadline, "{seen} of {count} records have arrived");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn connectors_of_the_program_run_through_failures_and_a_rescale() {
    let dir = tempfile::tempdir().expect("a directory");
    let (topic, ledger) = (Arc::<Topic>::default(), Arc::<Ledger>::default());
    let catalog = catalog(&topic, &ledger);
    let record = |number: i64| format!("record {number:04}");
    let mut wanted: Vec<String> = (0..900).map(record).collect();

    // Splits appear while it runs, one write fails, and records that make no sense are left out.
    (0..100).for_each(|number| topic.add((number % 2) as usize, number, record(number)));
    ledger.lock().fails_after = Some(20);
    let savepoints = dir.path().join("savepoint");
    let (others, more) = (topic.clone(), ledger.clone());
    let target = savepoints.clone();
    let metrics = Arc::<OnceLock<Arc<Metrics>>>::default();
    let counters = metrics.clone();
    let ran = run_with_catalog(
        &manifest(dir.path(), 2, ""),
        &JobOptions::default(),
        &catalog,
        move |job| {
            let handle = job.control();
            counters.get_or_init(|| job.metrics());
            std::thread::spawn(move || {
                wait_for(&more, 100);
                others.add(0, 100, "bad luck");
                let split = |number: i64| 2 + (number % 3) as usize;
                (100..300).for_each(|number| others.add(split(number), number, record(number)));
                wait_for(&more, 300);
                // From now on nothing is confirmed: epochs stay with the checkpoints.
                more.lock().is_away = true;
                (300..600).for_each(|number| others.add(split(number), number, record(number)));
                std::thread::sleep(Duration::from_millis(100));
                block_on(handle.stop_with_savepoint(target, false)).expect("a savepoint");
            });
        },
    );
    assert!(matches!(ran.outcome, Ok(Outcome::Stopped { .. })), "{:?}", ran.outcome);
    assert_eq!(ledger.lock().failures, 1, "the fault struck");
    assert!(0 < ran.restart_count());
    assert_eq!(ledger.records().len(), 300, "what is not confirmed is with the savepoint");
    assert!(!topic.lock().completed.is_empty(), "the source was told of its checkpoints");
    let metrics = metrics.get().expect("it ran");
    let reading = metrics.read(|index| index == 0, |_| false);
    assert!(0 < reading.bad_records, "what makes no sense is counted");
    assert_eq!(metrics.read_operators()[0].records_behind, Some(0), "it has read everything");
    let timelines: BTreeSet<String> =
        ledger.lock().epochs.keys().map(|epoch| epoch.timeline.clone()).collect();
    assert_eq!(timelines.len(), 1, "a restart is no new course of events");

    // With another parallelism: unconfirmed epochs are sent under the identity of those who wrote them.
    ledger.lock().is_away = false;
    (600..900).for_each(|number| topic.add((number % 7) as usize, number, record(number)));
    topic.close();
    let options = JobOptions {
        from: Some(RestoreFrom { dir: savepoints, claim: false, ignore_unclaimed_state: false }),
        state_dir: Some(dir.path().join("again")),
        ..JobOptions::default()
    };
    let ran = run_with_catalog(&manifest(dir.path(), 3, ""), &options, &catalog, |_| ());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    wanted.sort();
    assert_eq!(ledger.records(), wanted);
    let state = ledger.lock();
    let tasks: BTreeSet<u32> = state.epochs.keys().map(|epoch| epoch.task).collect();
    assert_eq!(tasks, BTreeSet::from([0, 1, 2]));
    // What was with the savepoint came whole, and under the identity of the tasks that wrote it.
    let (of_first, of_second) = (record(300)..record(600), record(600)..record(900));
    for (epoch, records) in &state.epochs {
        let is_first = timelines.contains(&epoch.timeline);
        for unconfirmed in records.iter().filter(|it| of_first.contains(*it)) {
            assert!(is_first && epoch.task < 2, "{unconfirmed} came as {epoch:?}");
        }
        let is_mixed = is_first && records.iter().any(|it| of_second.contains(it));
        assert!(!is_mixed, "{epoch:?} has records of the second run");
    }
}

#[test]
fn settings_of_a_connector_are_checked_and_listed_like_all_others() {
    let (topic, ledger) = (Arc::<Topic>::default(), Arc::<Ledger>::default());
    let catalog = catalog(&topic, &ledger);
    let dir = tempfile::tempdir().expect("a directory");
    let path = manifest(dir.path(), 1, "");
    let spec = JobSpec::read_with(&path, None, &catalog).expect("a job");
    let counts = |key: &str| spec.effective.iter().find(|it| it.key == key).map(|it| &*it.value);
    assert_eq!(counts("source.in.batch-records"), Some("3"));
    let text = fs::read_to_string(&path).expect("a manifest").replace("book", "bok");
    let problem = JobSpec::parse(&path, &text, None, &catalog).expect_err("two mistakes");
    let all = problem.to_string();
    assert!(
        all.contains("did you mean `sink.book`?") && all.contains("`sink.book` is missing"),
        "{all}"
    );
    let unknown =
        JobSpec::read_with(&path, None, &builtin()).expect_err("it is not built in").to_string();
    assert!(unknown.contains("\"growing\" is not one of file, generator"), "{unknown}");
    let schema = cofferdam_spec::tables::json_schema(&catalog).to_string();
    assert!(schema.contains("the name of the ledger"));
}
