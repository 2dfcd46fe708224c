//! The laws that every connector has to obey, as checks that its tests call.
//!
//! [`check_source`] wants a source whose records come to an end, and [`check_sink`] a sink whose output the test can
//! look at. Both are strict about what the contract promises and about nothing else: the order of records of
//! several tasks, for example, is free.

use std::{collections::BTreeMap, future::poll_fn, sync::Arc};

use cofferdam_contract::{Batch, RecordRef};
use cofferdam_core::{checkpoint::Purpose, ids::CheckpointId};

use crate::{
    Result, Sink, Source, Step, TaskContext,
    blocking::Blocking,
    catalog::{SinkPlan, SinkSpec, SourcePlan},
    sink::StateWriter,
};

/// Records with how often each was seen.
type Bag = BTreeMap<String, usize>;

fn task(index: u32, parallelism: u32) -> TaskContext {
    let (blocking, _) = Blocking::new();
    TaskContext { index, parallelism, blocking }
}

fn put(bag: &mut Bag, batch: &Batch) {
    for record in batch.records() {
        let key = record.key.map(String::from_utf8_lossy).unwrap_or_default();
        let value = String::from_utf8_lossy(record.value);
        *bag.entry(format!("{key}\t{value}")).or_default() += 1;
    }
}

/// Takes a step: true at the end. Checks that event time does not go back, and that no record is older than the
/// watermark before it.
fn take(step: Step, bag: &mut Bag, watermark: &mut i64) -> std::result::Result<bool, String> {
    let advance = |to: i64, watermark: &mut i64| {
        let before = std::mem::replace(watermark, (*watermark).max(to));
        if to < before {
            Err(format!("its watermark goes back from {before} to {to}"))
        } else {
            Ok(())
        }
    };
    match step {
        Step::Records { batch, letters, watermark: next, .. } => {
            batch.check().map_err(|what| format!("it gives a malformed batch: {what}"))?;
            if let Some(late) = batch.timestamps.iter().find(|time| **time <= *watermark) {
                return Err(format!("a record of time {late} comes after watermark {watermark}"));
            }
            put(bag, &batch);
            letters.iter().for_each(|letters| put(bag, letters));
            next.map_or(Ok(()), |next| advance(next, watermark))?;
        }
        Step::Watermark(next) => advance(next, watermark)?,
        Step::Idle => {}
        Step::End => return Ok(true),
    }
    Ok(false)
}

/// Reads up to so many steps, and what was under way; gives the position behind them.
async fn read(
    source: &mut dyn Source,
    steps: usize,
    bag: &mut Bag,
) -> std::result::Result<Vec<u8>, String> {
    let said = |cause: cofferdam_core::failure::FailureCause| cause.message().into_owned();
    let mut watermark = i64::MIN;
    for _ in 0..steps {
        let step = poll_fn(|context| source.poll_next(context)).await.map_err(said)?;
        if take(step, bag, &mut watermark)? {
            break;
        }
    }
    while let Some(step) = source.complete_step().await.map_err(said)? {
        take(step, bag, &mut watermark)?;
    }
    source.position().await.map_err(said)
}

/// Checks the laws of a source whose records come to an end:
///
/// - tasks together give every record, however many there are;
/// - a source that is opened at a position gives exactly what was still to come, every time;
/// - positions that were redistributed cover exactly what was still to come.
///
/// # Errors
/// The law that it breaks, and how.
pub async fn check_source(plan: &dyn SourcePlan) -> std::result::Result<(), String> {
    let mut whole = Bag::new();
    let mut one = open(plan, 0, 1, None).await?;
    read(&mut *one, usize::MAX, &mut whole).await?;
    for (before, after) in [(1, 1), (2, 2), (2, 3), (3, 1)] {
        for steps in [0, 1, 2, 5] {
            let (mut seen, mut positions) = (Bag::new(), Vec::new());
            for index in 0..before {
                let mut source = open(plan, index, before, None).await?;
                positions.push(read(&mut *source, steps, &mut seen).await?);
            }
            let old: Vec<&[u8]> = positions.iter().map(Vec::as_slice).collect();
            let new = match before == after {
                true => positions.clone(),
                false => {
                    let shared = plan.redistribute(&old, after as usize).await;
                    shared.map_err(|cause| cause.message().into_owned())?
                }
            };
            if new.len() != after as usize {
                return Err(format!("{} positions for {after} tasks", new.len()));
            }
            // Twice: a restart may happen more than once from the same position.
            for _ in 0..2 {
                let mut all = seen.clone();
                for (index, position) in (0..).zip(&new) {
                    let mut source = open(plan, index, after, Some(position.clone())).await?;
                    read(&mut *source, usize::MAX, &mut all).await?;
                }
                if all != whole {
                    return Err(format!(
                        "{before} tasks that have read {steps} steps, then {after} tasks, do not give every \
                         record once: {}",
                        difference(&whole, &all)
                    ));
                }
            }
        }
    }
    Ok(())
}

async fn open(
    plan: &dyn SourcePlan,
    index: u32,
    parallelism: u32,
    position: Option<Vec<u8>>,
) -> std::result::Result<Box<dyn Source>, String> {
    let opened = plan.open(&task(index, parallelism), position).await;
    opened.map_err(|cause| format!("it does not open: {}", cause.message()))
}

/// The first record that two bags have in different numbers.
fn difference(wanted: &Bag, found: &Bag) -> String {
    let count = |bag: &Bag, record: &str| bag.get(record).copied().unwrap_or(0);
    let records = wanted.keys().chain(found.keys());
    let odd = records.into_iter().find(|it| count(wanted, it) != count(found, it));
    odd.map_or_else(String::new, |record| {
        let (wanted, found) = (count(wanted, record), count(found, record));
        format!("{record:?} came {found} times instead of {wanted}")
    })
}

/// What a test lets [`check_sink`] do.
pub trait SinkUnderTest {
    /// Claims the output for a run that begins from this checkpoint with these states, or from nothing.
    fn claim(&mut self, restored: Option<(u64, Vec<Vec<u8>>)>) -> Box<dyn SinkPlan>;

    /// The sink as the manifest has it.
    fn spec(&self) -> Arc<dyn SinkSpec>;

    /// What a reader of the output sees, a value for each record.
    fn visible(&mut self) -> Vec<String>;
}

async fn write(sink: &mut dyn Sink, value: &str) -> Result<()> {
    let mut batch = Batch::empty();
    batch.push(RecordRef { key: None, value: value.as_bytes(), timestamp: None });
    sink.write(batch).await
}

async fn pre_commit(sink: &mut dyn Sink, checkpoint: u64) -> Result<Vec<u8>> {
    let mut state = StateWriter::default();
    sink.pre_commit(CheckpointId(checkpoint), Purpose::Periodic, &mut state).await?;
    Ok(state.into_state().to_vec())
}

/// Checks the laws of a sink whose output is seen once:
///
/// - nothing is seen before its checkpoint is committed, and everything after;
/// - a second commit changes nothing;
/// - what a given-up checkpoint held is seen with the next one, once;
/// - a state that is restored is committed by the first barrier at the latest, as often as that happens, and what
///   was written after it is not.
///
/// # Errors
/// The law that it breaks, and how.
pub async fn check_sink(test: &mut dyn SinkUnderTest) -> std::result::Result<(), String> {
    let said = |cause: cofferdam_core::failure::FailureCause| cause.message().into_owned();
    let sees = |test: &mut dyn SinkUnderTest, wanted: &[&str], law: &str| {
        let mut visible = test.visible();
        visible.sort();
        if visible == wanted { Ok(()) } else { Err(format!("{law}: {visible:?} is seen")) }
    };
    let plan = test.claim(None);
    plan.begin().map_err(|problem| problem.to_string())?;
    let mut sink = plan.open(&task(0, 1), None).await.map_err(said)?;
    write(&mut *sink, "a").await.map_err(said)?;
    write(&mut *sink, "b").await.map_err(said)?;
    pre_commit(&mut *sink, 1).await.map_err(said)?;
    sees(test, &[], "nothing is seen before its checkpoint is committed")?;
    for _ in 0..2 {
        sink.commit(CheckpointId(1)).await.map_err(said)?;
        sees(test, &["a", "b"], "what was committed is seen, once")?;
    }
    write(&mut *sink, "c").await.map_err(said)?;
    pre_commit(&mut *sink, 2).await.map_err(said)?;
    sink.abort(CheckpointId(2)).await.map_err(said)?;
    write(&mut *sink, "d").await.map_err(said)?;
    pre_commit(&mut *sink, 3).await.map_err(said)?;
    sink.commit(CheckpointId(3)).await.map_err(said)?;
    sees(test, &["a", "b", "c", "d"], "what a given-up checkpoint held is seen with the next")?;
    write(&mut *sink, "e").await.map_err(said)?;
    let state = pre_commit(&mut *sink, 4).await.map_err(said)?;
    write(&mut *sink, "f").await.map_err(said)?;
    drop(sink);
    drop(plan);
    for _ in 0..2 {
        let plan = test.claim(Some((4, vec![state.clone()])));
        plan.begin().map_err(|problem| problem.to_string())?;
        let mut sink = plan.open(&task(0, 1), Some(state.clone())).await.map_err(said)?;
        pre_commit(&mut *sink, 5).await.map_err(said)?;
        drop(sink);
        let law = "what was restored is committed, and what came after it is not";
        sees(test, &["a", "b", "c", "d", "e"], law)?;
    }
    Ok(())
}

/// Checks the law of a sink whose parallelism changes: what two tasks had pre-committed when they were killed is seen,
/// once, whatever number of tasks takes it over and however often. Wants an output that is empty.
///
/// # Errors
/// The law that it breaks, and how.
pub async fn check_sink_rescaled(test: &mut dyn SinkUnderTest) -> std::result::Result<(), String> {
    let said = |cause: cofferdam_core::failure::FailureCause| cause.message().into_owned();
    let plan = test.claim(None);
    plan.begin().map_err(|problem| problem.to_string())?;
    let (mut sinks, mut states) = (Vec::new(), Vec::new());
    for (index, value) in [(0, "a"), (1, "b")] {
        let mut sink = plan.open(&task(index, 2), None).await.map_err(said)?;
        write(&mut *sink, value).await.map_err(said)?;
        states.push(pre_commit(&mut *sink, 1).await.map_err(said)?);
        sinks.push(sink);
    }
    drop((sinks, plan));
    let states: Vec<&[u8]> = states.iter().map(Vec::as_slice).collect();
    for parallelism in [3, 1, 2] {
        let shared = test.spec().redistribute(&states, parallelism as usize).await.map_err(said)?;
        if shared.len() != parallelism as usize {
            return Err(format!("{} states for {parallelism} tasks", shared.len()));
        }
        let plan = test.claim(Some((1, shared.clone())));
        plan.begin().map_err(|problem| problem.to_string())?;
        for (index, state) in (0..).zip(shared) {
            let state = Some(state).filter(|state| !state.is_empty());
            let mut sink = plan.open(&task(index, parallelism), state).await.map_err(said)?;
            pre_commit(&mut *sink, 2).await.map_err(said)?;
        }
        let mut visible = test.visible();
        visible.sort();
        if visible != ["a", "b"] {
            return Err(format!(
                "what two tasks held is committed once by {parallelism}: {visible:?} is seen"
            ));
        }
    }
    Ok(())
}
