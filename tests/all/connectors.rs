//! Connectors that the program brings along: nothing in the host knows of them.
//!
//! `growing` reads splits that appear while it runs, and `ledger` keeps each epoch with the checkpoint until the other
//! side has confirmed it. Both are written here, against `cofferdam-connector` alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::Duration,
};

use cofferdam_connector::{
    Answer, Catalog, Result, Sink, Source, Step, TaskContext,
    catalog::{
        Formats, NodeContext, OutputContext, SinkConnector, SinkPlan, SinkSpec, SourceConnector,
        SourcePlan, SourceSpec,
    },
    ready,
    sink::{Guarantee, StateWriter},
    source::Lag,
    state::{decode_all, encode_all, unreadable},
    testing::{SinkUnderTest, check_sink, check_sink_rescaled, check_source},
};
use cofferdam_connectors::builtin;
use cofferdam_contract::{Batch, Format, RecordRef};
use cofferdam_core::{
    checkpoint::Purpose,
    failure::{EnvironmentError, FailureCause},
    ids::CheckpointId,
    job::Outcome,
};
use cofferdam_engine::{job::JobOptions, restore::RestoreFrom};
use cofferdam_settings::{
    AnySetting, Document, Optional, Problem, Required, Section, Setting, table::Key,
};
use cofferdam_spec::JobSpec;
use cofferdam_tests::job::{block_on, run_with_catalog};
use serde::{Deserialize, Serialize};

/// What there is to read: splits that grow, and more of them.
#[derive(Debug, Default)]
struct Topic(Mutex<TopicState>);

#[derive(Debug, Default)]
struct TopicState {
    /// Each split has records with their event times.
    splits: Vec<Vec<(i64, String)>>,
    is_closed: bool,
    wakers: Vec<Waker>,
    /// Checkpoints that the source was told of.
    completed: BTreeSet<u64>,
}

impl Topic {
    fn lock(&self) -> MutexGuard<'_, TopicState> {
        self.0.lock().expect("no panic while it is locked")
    }

    fn add(&self, split: usize, time: i64, value: impl Into<String>) {
        let mut state = self.lock();
        while state.splits.len() <= split {
            state.splits.push(Vec::new());
        }
        state.splits[split].push((time, value.into()));
        state.wakers.drain(..).for_each(Waker::wake);
    }

    fn close(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        state.wakers.drain(..).for_each(Waker::wake);
    }
}

struct Growing(Arc<Topic>);

static BATCH: Setting<u64> =
    Key::integer("batch-records", 1, 1_000, "how many records a batch has").of_job().or(7);

impl SourceConnector for Growing {
    fn name(&self) -> &'static str {
        "growing"
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        static ROWS: &[&dyn AnySetting] = &[&BATCH];
        ROWS
    }

    fn read(
        &self,
        section: &Section<'_>,
        _: &Path,
    ) -> std::result::Result<Arc<dyn SourceSpec>, Problem> {
        Ok(Arc::new(GrowingSpec { topic: self.0.clone(), batch: section.get(&BATCH) as usize }))
    }
}

#[derive(Debug, Clone)]
struct GrowingSpec {
    topic: Arc<Topic>,
    batch: usize,
}

impl SourceSpec for GrowingSpec {
    fn formats(&self) -> Formats {
        Formats { key: None, value: Format::Text }
    }

    fn is_bounded(&self) -> bool {
        false
    }

    fn has_dead_letters(&self) -> bool {
        true
    }

    fn prepare(&self, _: NodeContext<'_>) -> std::result::Result<Arc<dyn SourcePlan>, Problem> {
        Ok(Arc::new(self.clone()))
    }
}

/// How far each split was read; of those that are not in it nothing was.
type Offsets = BTreeMap<usize, usize>;

impl SourcePlan for GrowingSpec {
    fn open(
        &self,
        task: &TaskContext,
        position: Option<Vec<u8>>,
    ) -> Answer<'static, Box<dyn Source>> {
        let offsets = match position {
            Some(bytes) => match postcard::from_bytes(&bytes) {
                Ok(offsets) => offsets,
                Err(error) => return ready(Err(unreadable("position of a topic", error))),
            },
            None => Offsets::new(),
        };
        let (index, parallelism) = (task.index as usize, task.parallelism as usize);
        ready(Ok(Box::new(GrowingSource {
            spec: self.clone(),
            index,
            parallelism,
            offsets,
            times: BTreeMap::new(),
            watermark: i64::MIN,
            is_idle: false,
        })))
    }

    fn redistribute<'a>(
        &'a self,
        positions: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        // It may wait, as one that asks a broker would.
        Box::pin(async move {
            tokio::task::yield_now().await;
            let old = decode_all::<Offsets>(positions)
                .map_err(|error| unreadable("position of a topic", error))?;
            let mut new = vec![Offsets::new(); parallelism];
            for (split, offset) in old.into_iter().flatten() {
                new[split % parallelism].insert(split, offset);
            }
            encode_all(&new).map_err(|message| FailureCause::HostBug { message })
        })
    }
}

struct GrowingSource {
    spec: GrowingSpec,
    index: usize,
    parallelism: usize,
    offsets: Offsets,
    /// The latest event time of each split.
    times: BTreeMap<usize, i64>,
    watermark: i64,
    is_idle: bool,
}

impl GrowingSource {
    fn is_own(&self, split: usize) -> bool {
        split % self.parallelism == self.index
    }
}

impl Source for GrowingSource {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Step>> {
        let topic = self.spec.topic.clone();
        let mut state = topic.lock();
        let own = (0..state.splits.len()).filter(|split| self.is_own(*split));
        let readable = |split: &usize| {
            self.offsets.get(split).copied().unwrap_or(0) < state.splits[*split].len()
        };
        let mut waiting: Vec<usize> = own.filter(readable).collect();
        // The one that is furthest behind in event time first: the others hold nothing back then.
        waiting.sort_by_key(|split| {
            state.splits[*split][self.offsets.get(split).copied().unwrap_or(0)].0
        });
        let Some(split) = waiting.first().copied() else {
            if state.is_closed {
                return Poll::Ready(Ok(Step::End));
            }
            state.wakers.push(context.waker().clone());
            if !std::mem::replace(&mut self.is_idle, true) {
                return Poll::Ready(Ok(Step::Idle));
            }
            return Poll::Pending;
        };
        self.is_idle = false;
        let from = self.offsets.get(&split).copied().unwrap_or(0);
        let (mut batch, mut letters) = (Batch::empty(), Batch::empty());
        let records = state.splits[split][from..].iter().take(self.spec.batch);
        let mut next = from;
        for (time, value) in records {
            next += 1;
            let record = RecordRef { key: None, value: value.as_bytes(), timestamp: Some(*time) };
            match value.starts_with("bad") {
                true => letters.push(RecordRef { timestamp: None, ..record }),
                false => batch.push(record),
            }
            self.times.insert(split, *time);
        }
        self.offsets.insert(split, next);
        let bad = letters.record_count() as u64;
        let letters = (0 < bad).then(|| Box::new(letters));
        // Of splits with something to read the earliest record counts; the others are idle.
        let is_behind = |it: &usize| {
            state.splits[*it].get(self.offsets.get(it).copied().unwrap_or(0)).map(|(time, _)| *time)
        };
        let earliest = waiting.iter().filter_map(is_behind).min();
        let latest = self.times.values().copied().max().unwrap_or(i64::MIN);
        self.watermark = self.watermark.max(earliest.unwrap_or(latest) - 1);
        Poll::Ready(Ok(Step::Records { batch, letters, bad, watermark: Some(self.watermark) }))
    }

    fn position(&mut self) -> Answer<'_, Vec<u8>> {
        let encoded = postcard::to_stdvec(&self.offsets);
        ready(encoded.map_err(|error| FailureCause::HostBug { message: error.to_string() }))
    }

    fn on_complete(&mut self, checkpoint: CheckpointId) -> Answer<'_, ()> {
        self.spec.topic.lock().completed.insert(checkpoint.0);
        ready(Ok(()))
    }

    fn lag(&self) -> Lag {
        let state = self.spec.topic.lock();
        let left = |(split, records): (usize, &Vec<(i64, String)>)| {
            records.len() - self.offsets.get(&split).copied().unwrap_or(0)
        };
        let own = state.splits.iter().enumerate().filter(|(split, _)| self.is_own(*split));
        let records: usize = own.map(left).sum();
        Lag { records: Some(records as u64), is_backlog: Some(1_000 < records) }
    }
}

/// The other side of the sink: it takes each epoch once, whoever sends it and how often.
#[derive(Debug, Default)]
struct Ledger(Mutex<LedgerState>);

#[derive(Debug, Default)]
struct LedgerState {
    epochs: BTreeMap<Epoch, Vec<String>>,
    /// It does not confirm anything while this is set.
    is_away: bool,
    /// Writes that succeed before one fails.
    fails_after: Option<usize>,
    failures: usize,
    /// Epochs that came again.
    repeated: usize,
    aborted: BTreeSet<u64>,
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, LedgerState> {
        self.0.lock().expect("no panic while it is locked")
    }

    fn records(&self) -> Vec<String> {
        let mut records: Vec<String> = self.lock().epochs.values().flatten().cloned().collect();
        records.sort();
        records
    }
}

/// What identifies an epoch: whoever sends it, whoever wrote it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Epoch {
    job: String,
    timeline: String,
    sink: String,
    task: u32,
    number: u64,
}

struct LedgerConnector(Arc<Ledger>);

static BOOK: Required<String> =
    Key::text("book", "the name of the ledger").of_job().required("a name");
static PAUSE: Optional<u64> =
    Key::duration("pause", "how long each write takes").of_job().or_none("no time");

impl SinkConnector for LedgerConnector {
    fn name(&self) -> &'static str {
        "ledger"
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        static ROWS: &[&dyn AnySetting] = &[&BOOK, &PAUSE];
        ROWS
    }

    fn read(
        &self,
        section: &Section<'_>,
        _: &Path,
    ) -> std::result::Result<Arc<dyn SinkSpec>, Problem> {
        section.require(&BOOK)?;
        let pause = section.find(&PAUSE).map(|pause| Duration::from_millis(pause.value));
        Ok(Arc::new(LedgerSpec { ledger: self.0.clone(), pause }))
    }
}

#[derive(Debug, Clone)]
struct LedgerSpec {
    ledger: Arc<Ledger>,
    pause: Option<Duration>,
}

/// An epoch that the other side has not confirmed.
type Unconfirmed = (Epoch, u64, Vec<String>);

impl SinkSpec for LedgerSpec {
    fn guarantee(&self) -> Guarantee {
        Guarantee::EffectivelyOnce
    }

    fn claim(&self, output: OutputContext<'_>) -> std::result::Result<Box<dyn SinkPlan>, Problem> {
        let identity = Epoch {
            job: output.lineage.job.to_string(),
            timeline: output.lineage.timeline.to_string(),
            sink: output.sink.to_owned(),
            task: 0,
            number: 0,
        };
        Ok(Box::new(LedgerPlan { spec: self.clone(), identity }))
    }

    /// An epoch moves whole, to one task, which sends it under its old identity.
    fn redistribute<'a>(
        &'a self,
        states: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        let shared = decode_all::<Vec<Unconfirmed>>(states).and_then(|old| {
            let mut new = vec![Vec::<Unconfirmed>::new(); parallelism];
            for epoch in old.into_iter().flatten() {
                new[epoch.0.task as usize % parallelism].push(epoch);
            }
            encode_all(&new)
        });
        ready(shared.map_err(|message| FailureCause::HostBug { message }))
    }
}

struct LedgerPlan {
    spec: LedgerSpec,
    identity: Epoch,
}

impl SinkPlan for LedgerPlan {
    fn open(&self, task: &TaskContext, state: Option<Vec<u8>>) -> Answer<'static, Box<dyn Sink>> {
        let unconfirmed: Vec<Unconfirmed> = match state.as_deref().map(postcard::from_bytes) {
            Some(Ok(unconfirmed)) => unconfirmed,
            Some(Err(error)) => return ready(Err(unreadable("state of a ledger", error))),
            None => Vec::new(),
        };
        let (spec, index) = (self.spec.clone(), task.index);
        let identity = Epoch { task: index, ..self.identity.clone() };
        Box::pin(async move {
            let mut sink = LedgerSink { spec, identity, open: Vec::new(), unconfirmed };
            // What the restored checkpoint holds comes before anything new.
            sink.send(u64::MAX);
            Ok(Box::new(sink) as Box<dyn Sink>)
        })
    }
}

struct LedgerSink {
    spec: LedgerSpec,
    identity: Epoch,
    open: Vec<String>,
    unconfirmed: Vec<Unconfirmed>,
}

impl LedgerSink {
    /// Sends epochs up to a checkpoint; what is not confirmed stays.
    fn send(&mut self, checkpoint: u64) {
        let mut ledger = self.spec.ledger.lock();
        if ledger.is_away {
            return;
        }
        self.unconfirmed.retain(|(epoch, of, records)| {
            let is_due = *of <= checkpoint;
            if is_due && ledger.epochs.insert(epoch.clone(), records.clone()).is_some() {
                ledger.repeated += 1;
            }
            !is_due
        });
    }
}

impl Sink for LedgerSink {
    fn write(&mut self, batch: Batch) -> Answer<'_, ()> {
        Box::pin(async move {
            if let Some(pause) = self.spec.pause {
                tokio::time::sleep(pause).await;
            }
            let mut ledger = self.spec.ledger.lock();
            if let Some(left) = &mut ledger.fails_after {
                match left.checked_sub(1) {
                    Some(fewer) => *left = fewer,
                    None => {
                        ledger.fails_after = None;
                        ledger.failures += 1;
                        let error = EnvironmentError::new("the ledger has dropped the connection");
                        return Err(FailureCause::Environment(error));
                    }
                }
            }
            drop(ledger);
            let values = batch.records().map(|it| String::from_utf8_lossy(it.value).into_owned());
            self.open.extend(values);
            Ok(())
        })
    }

    fn pre_commit<'a>(
        &'a mut self,
        checkpoint: CheckpointId,
        _: Purpose,
        state: &'a mut StateWriter,
    ) -> Answer<'a, ()> {
        if !self.open.is_empty() {
            let epoch = Epoch { number: checkpoint.0, ..self.identity.clone() };
            self.unconfirmed.push((epoch, checkpoint.0, std::mem::take(&mut self.open)));
        }
        let encoded = postcard::to_stdvec(&self.unconfirmed);
        ready(match encoded {
            Ok(bytes) => {
                bytes.chunks(4096).for_each(|chunk| state.write(chunk));
                Ok(())
            }
            Err(error) => Err(FailureCause::HostBug { message: error.to_string() }),
        })
    }

    fn commit(&mut self, checkpoint: CheckpointId) -> Answer<'_, ()> {
        self.send(checkpoint.0);
        ready(Ok(()))
    }

    fn abort(&mut self, checkpoint: CheckpointId) -> Answer<'_, ()> {
        self.spec.ledger.lock().aborted.insert(checkpoint.0);
        ready(Ok(()))
    }
}

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
    let ran = run_with_catalog(
        &manifest(dir.path(), 2, ""),
        &JobOptions::default(),
        &catalog,
        move |job| {
            let handle = job.control();
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
    let tasks: BTreeSet<u32> = ledger.lock().epochs.keys().map(|epoch| epoch.task).collect();
    assert_eq!(tasks, BTreeSet::from([0, 1, 2]));
}

/// I1: what waits in one job holds up neither another job nor a request to end.
#[test]
fn a_sink_that_sleeps_holds_up_neither_another_job_nor_its_own_end() {
    let (topic, ledger) = (Arc::<Topic>::default(), Arc::<Ledger>::default());
    let catalog = catalog(&topic, &ledger);
    (0..1_000).for_each(|number| topic.add(number % 4, number as i64, number.to_string()));
    let asleep = tempfile::tempdir().expect("a directory");
    let manifest = manifest(asleep.path(), 4, "pause = \"1h\"\n");
    let ran = run_with_catalog(&manifest, &JobOptions::default(), &catalog, |job| {
        let handle = job.control();
        std::thread::spawn(move || {
            // On the same two threads another job begins and ends.
            let awake = tempfile::tempdir().expect("a directory");
            let harness = cofferdam_tests::job::Harness { count: 5_000, ..Default::default() };
            let ran = harness.run_in(awake.path());
            assert_eq!(ran.outcome, Ok(Outcome::Finished));
            handle.cancel();
        });
    });
    assert!(matches!(ran.outcome, Ok(Outcome::Canceled { .. })), "{:?}", ran.outcome);
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
    assert_eq!(counts("sink.out.pause"), Some("no time"));
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

/// A source of the catalog, prepared.
fn prepared(catalog: &Catalog, text: &str, base_dir: &Path) -> Arc<dyn SourcePlan> {
    let path = Path::new("source.toml");
    let document = Document::new(path, text);
    let table = document.parse(text, 0).expect("TOML");
    let section = Section::root(&document, &[(&table, 0)]);
    let name = text.lines().next().unwrap_or_default().trim_start_matches("# ");
    let connector = catalog.sources().iter().find(|it| it.name() == name).expect("a connector");
    let spec = connector.read(&section, base_dir).expect("settings");
    spec.prepare(NodeContext { name: "s", base_dir }).expect("something to read")
}

#[test]
fn sources_obey_the_laws() {
    let (topic, ledger) = (Arc::<Topic>::default(), Arc::<Ledger>::default());
    (0..100).for_each(|number| topic.add(number % 5, number as i64, number.to_string()));
    topic.close();
    let catalog = catalog(&topic, &ledger);
    let dir = tempfile::tempdir().expect("a directory");
    for file in 0..3 {
        let lines: String = (0..900).map(|line| format!("{line},{file}\n")).collect();
        fs::write(dir.path().join(format!("{file}.csv")), lines).expect("written");
    }
    let file = "# file\npath = \"*.csv\"\nformat = \"csv\"\nheader = false\nsplit-size = \"4KiB\"\nkey = \"1\"\n";
    let words = "# generator\ncount = 5000\ntimestamps = true\n";
    for text in ["# growing\nbatch-records = 2\n", file, words] {
        let plan = prepared(&catalog, text, dir.path());
        // Whatever blocks is waited for on this runtime's own threads.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let checked = runtime.expect("a runtime").block_on(check_source(&*plan));
        assert_eq!(checked, Ok(()), "{text}");
    }
}

/// Claims the sink of a manifest's text again and again.
struct Tested<V> {
    spec: Arc<dyn SinkSpec>,
    lineage: cofferdam_connector::identity::Lineage,
    record_dir: PathBuf,
    visible: V,
}

impl<V: FnMut() -> Vec<String>> SinkUnderTest for Tested<V> {
    fn claim(&mut self, restored: Option<(u64, Vec<Vec<u8>>)>) -> Box<dyn SinkPlan> {
        let states = restored.iter().flat_map(|(_, states)| states).map(Vec::as_slice).collect();
        let output = OutputContext {
            sink: "out",
            job: "job",
            lineage: &self.lineage,
            restored: restored.as_ref().map(|(checkpoint, _)| *checkpoint),
            states,
            record_dir: Some(self.record_dir.clone()),
            conflicts: Default::default(),
            is_asking: false,
        };
        let mut plan = self.spec.claim(output).expect("it is this job's");
        plan.claim_elsewhere(&BTreeSet::new()).expect("it is elsewhere nowhere");
        plan
    }

    fn spec(&self) -> Arc<dyn SinkSpec> {
        self.spec.clone()
    }

    fn visible(&mut self) -> Vec<String> {
        (self.visible)()
    }
}

#[test]
fn sinks_obey_the_laws() {
    let (topic, ledger) = (Arc::<Topic>::default(), Arc::<Ledger>::default());
    let catalog = catalog(&topic, &ledger);
    let dir = tempfile::tempdir().expect("a directory");
    let spec = |name: &str, text: &str| {
        let path = Path::new("sink.toml");
        let document = Document::new(path, text);
        let table = document.parse(text, 0).expect("TOML");
        let section = Section::root(&document, &[(&table, 0)]);
        let connector = catalog.sinks().iter().find(|it| it.name() == name).expect("a connector");
        connector.read(&section, dir.path()).expect("settings")
    };
    let lineage = cofferdam_connector::identity::Lineage::new();
    let record_dir = dir.path().join("record");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    for name in ["out", "rescaled"] {
        let out = dir.path().join(name);
        let mut file = Tested {
            spec: spec("file", &format!("path = \"{name}\"\n")),
            lineage: lineage.clone(),
            record_dir: record_dir.join(name),
            visible: || cofferdam_tests::job::committed(&out),
        };
        let checked = runtime.block_on(async {
            if name == "out" {
                check_sink(&mut file).await
            } else {
                check_sink_rescaled(&mut file).await
            }
        });
        assert_eq!(checked, Ok(()), "{name}");
    }
    let mut book = Tested {
        spec: spec("ledger", "book = \"main\"\n"),
        lineage: lineage.clone(),
        record_dir: record_dir.join("book"),
        visible: || ledger.records(),
    };
    assert_eq!(runtime.block_on(check_sink(&mut book)), Ok(()));

    let (topic, ledger) = (Arc::<Topic>::default(), Arc::<Ledger>::default());
    let fresh = self::catalog(&topic, &ledger);
    let connector = fresh.sinks().iter().find(|it| it.name() == "ledger").expect("a connector");
    let (path, text) = (Path::new("sink.toml"), "book = \"main\"\n");
    let document = Document::new(path, text);
    let table = document.parse(text, 0).expect("TOML");
    let section = Section::root(&document, &[(&table, 0)]);
    let mut book = Tested {
        spec: connector.read(&section, dir.path()).expect("settings"),
        lineage,
        record_dir: record_dir.join("rescaled-book"),
        visible: || ledger.records(),
    };
    assert_eq!(runtime.block_on(check_sink_rescaled(&mut book)), Ok(()));
}
