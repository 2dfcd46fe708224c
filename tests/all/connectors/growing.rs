//! A source whose splits appear while it runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

use cofferdam_connector::{
    Answer, Result, Source, Step, TaskContext,
    catalog::{Formats, NodeContext, SourceConnector, SourcePlan, SourceSpec},
    ready,
    source::Lag,
    state::{decode_all, encode_all, unreadable},
};
use cofferdam_contract::{Batch, Format, RecordRef};
use cofferdam_core::{failure::FailureCause, ids::CheckpointId};
use cofferdam_settings::{AnySetting, Problem, Section, Setting, table::Key};

/// What there is to read: splits that grow, and more of them.
#[derive(Debug, Default)]
pub(super) struct Topic(Mutex<TopicState>);

#[derive(Debug, Default)]
pub(super) struct TopicState {
    /// Each split has records with their event times.
    splits: Vec<Vec<(i64, String)>>,
    is_closed: bool,
    wakers: Vec<Waker>,
    /// Checkpoints that the source was told of.
    pub(super) completed: BTreeSet<u64>,
}

impl Topic {
    pub(super) fn lock(&self) -> MutexGuard<'_, TopicState> {
        self.0.lock().expect("no panic while it is locked")
    }

    pub(super) fn add(&self, split: usize, time: i64, value: impl Into<String>) {
        let mut state = self.lock();
        while state.splits.len() <= split {
            state.splits.push(Vec::new());
        }
        state.splits[split].push((time, value.into()));
        state.wakers.drain(..).for_each(Waker::wake);
    }

    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        state.wakers.drain(..).for_each(Waker::wake);
    }
}

pub(super) struct Growing(pub(super) Arc<Topic>);

pub(super) static BATCH: Setting<u64> =
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
pub(super) struct GrowingSpec {
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
pub(super) type Offsets = BTreeMap<usize, usize>;

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

pub(super) struct GrowingSource {
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
