//! One task within a chain: a source, an instance of an operator, or a sink.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use cofferdam_connector::{
    Sink, Source, TaskContext,
    blocking::Blocking,
    catalog::{SinkPlan, SourcePlan},
    sink::StateWriter,
};
use cofferdam_contract::{Batch, Emission, OpenContext, StateChanges};
use cofferdam_core::{
    checkpoint::Purpose,
    failure::{FailureCause, Obstacle},
    ids::{Attempt, CheckpointId, TaskId, micros},
    random::mix,
};
use cofferdam_sandbox::{
    Component, GuestError, Host, Instance, InstanceSetup, Level, MemorySnapshot, RestoreError,
    SnapshotError, StateError,
};
use cofferdam_settings::problem::{shown, with_sources};
use cofferdam_spec::OperatorSpec;
use cofferdam_store::{
    changes::Changes,
    declared::{self, OwnKeys},
    snapshot::TaskSnapshot,
};

use super::{
    TaskFailure,
    poison::{Guard, Processed},
};
use crate::{
    clock::now_ms,
    driver::Shared,
    metrics::Metrics,
    state::{keyed::KeyedState, local::TaskLocal},
    storage::cause_of as storage_cause,
};

type Result<T> = std::result::Result<T, FailureCause>;

/// Entries of declared state that a guest takes back in one call.
const RESTORE_ENTRIES_MAX: usize = 4096;
/// How much of it is in the host's memory at once.
const RESTORE_BYTES: usize = 16 << 20;

/// Where records of an output go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// To a node of the same chain.
    Node { node: usize, input: u32 },
    /// To an exchange.
    Writer(usize),
}

/// What a node does.
pub(crate) enum Work {
    Source { plan: Arc<dyn SourcePlan>, source: Option<Box<dyn Source>> },
    Operator(Box<OperatorTask>),
    Sink { plan: Option<Arc<dyn SinkPlan>>, sink: Option<Box<dyn Sink>> },
}

/// An operator's component and, once it is open, its instance.
pub(crate) struct OperatorTask {
    pub(crate) name: String,
    pub(crate) component: Component,
    pub(crate) spec: Arc<OperatorSpec>,
    pub(crate) has_states: bool,
    /// Whether checkpoints ask for what has changed of declared state.
    pub(crate) tracks_changes: bool,
    /// Whether its memory is copied for a checkpoint again and again.
    pub(crate) expects_snapshots: bool,
    /// The keys of the records that come to it; `None` where they come otherwise, or all to one task.
    pub(crate) own_keys: Option<OwnKeys>,
    /// Of this task of this job; see [`Host::random`].
    pub(crate) random_seed: u64,
    /// The checkpoint that the attempt began from; 0: the beginning.
    pub(crate) restored_from: u64,
    pub(crate) instance: Option<Instance>,
    /// The host's own output, behind those that the component describes.
    pub(crate) dead_letter_output: u32,
    pub(crate) processed: Processed,
    pub(crate) guard: Option<Guard>,
    /// What was secured since the last checkpoint's snapshot.
    pub(crate) unsaved: Vec<MemorySnapshot>,
}

/// What an operator's calls need to know of its task.
pub(crate) struct Context<'a> {
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) local: &'a Arc<TaskLocal>,
    pub(crate) task: TaskId,
    pub(crate) attempt: Attempt,
    pub(crate) parallelism: u32,
}

impl Context<'_> {
    /// `operator/index`.
    pub(crate) fn name(&self, operator: &str) -> String {
        format!("{operator}/{}", self.task.index)
    }
}

/// One task of one attempt.
pub(crate) struct Node {
    pub(crate) task: TaskId,
    /// Its number in the checkpoints.
    pub(crate) slot: usize,
    pub(crate) attempt: Attempt,
    pub(crate) parallelism: u32,
    pub(crate) work: Work,
    /// By output.
    pub(crate) targets: Vec<Vec<Target>>,
    pub(crate) local: Arc<TaskLocal>,
    pub(crate) is_drained: bool,
    /// By output: whether its records have keys.
    pub(crate) outputs: Arc<[bool]>,
}

/// What came of a barrier.
pub(crate) enum SnapshotOutcome {
    Taken(Box<TaskSnapshot>),
    /// The checkpoint fails; the task goes on.
    Declined(String),
}

impl Node {
    /// Makes the node ready, in the state of a checkpoint where there is one.
    pub(crate) async fn open(
        &mut self,
        shared: &Arc<Shared>,
        restore_from: Option<CheckpointId>,
        blocking: &Blocking,
    ) -> Result<()> {
        let checkpoint = restore_from.map(|checkpoint| checkpoint.0);
        // Checkpoints are counted from 1.
        self.fetch_state(shared, checkpoint.unwrap_or(0)).await?;
        self.fetch_keyed(shared, checkpoint.unwrap_or(0)).await?;
        let (state, is_drained) = {
            let local = self.local.lock();
            // A node that the checkpoint does not know begins anew: a real state is never empty.
            let state = checkpoint.map(|_| local.state.clone());
            (state.filter(|state| !state.is_empty()), local.is_drained)
        };
        let (index, parallelism) = (self.task.index, self.parallelism);
        let (local, task, attempt) = (&self.local, self.task, self.attempt);
        let context = Context { shared, local, task, attempt, parallelism };
        let connector = TaskContext { index, parallelism, blocking: blocking.clone() };
        match &mut self.work {
            Work::Source { plan, source } => {
                *source = Some(plan.open(&connector, state).await?);
            }
            Work::Sink { plan, sink } => {
                let plan = plan.as_ref().ok_or_else(|| host_bug("a sink without an output"))?;
                *sink = Some(plan.open(&connector, state).await?);
            }
            Work::Operator(operator) => {
                operator.restored_from = checkpoint.unwrap_or(0);
                let mut instance = operator.open(&context).await?;
                if let Some(checkpoint) = checkpoint {
                    operator.restore(&context, self.slot, checkpoint, &mut instance).await?;
                }
                // Of what it has from a restored image only what it changes is copied.
                if operator.expects_snapshots {
                    instance.expect_snapshots();
                }
                operator.instance = Some(instance);
                let suspects = self.local.suspects();
                if 0 < suspects {
                    let is_restored = checkpoint.is_some() && operator.spec.snapshot.has_memory();
                    let base = is_restored.then(|| self.local.copy_image()).transpose();
                    let base = base.map_err(|error| FailureCause::Environment {
                        message: format!("copy the image of a task: {error}"),
                    })?;
                    operator.begin_guard(&context, base, suspects).await?;
                }
            }
        }
        self.is_drained = is_drained;
        Ok(())
    }

    /// Brings the local copy of the state to a checkpoint, from the storage if need be.
    async fn fetch_state(&mut self, shared: &Arc<Shared>, checkpoint: u64) -> Result<()> {
        let Some(turn) = self.local.lock().rewind(checkpoint) else { return Ok(()) };
        let (local, slot, shared) = (self.local.clone(), self.slot, shared.clone());
        blocking(move || {
            let loaded = shared.storage.load(slot, checkpoint)?;
            local.lock().load(turn, checkpoint, &loaded).map_err(|error| {
                FailureCause::Environment { message: format!("make the image of a task: {error}") }
            })
        })
        .await
    }

    /// Brings the declared state that the host keeps to a checkpoint.
    async fn fetch_keyed(&mut self, shared: &Arc<Shared>, checkpoint: u64) -> Result<()> {
        let Some(keyed) = self.local.keyed.clone() else { return Ok(()) };
        let Some(turn) = keyed.rewind(checkpoint) else { return Ok(()) };
        let (slot, shared) = (self.slot, shared.clone());
        blocking(move || {
            let load = |entries: declared::Entries<'_>| keyed.load(turn, checkpoint, entries);
            match checkpoint {
                0 => load(Box::new(std::iter::empty())).map_err(storage_cause),
                _ => shared.storage.read_declared(slot, checkpoint, None, load),
            }
        })
        .await
    }

    pub(crate) fn source(&mut self) -> Result<&mut Box<dyn Source>> {
        match &mut self.work {
            Work::Source { source: Some(source), .. } => Ok(source),
            _ => Err(host_bug("the head of a source chain is not an open source")),
        }
    }

    pub(crate) async fn process(
        &mut self,
        shared: &Arc<Shared>,
        input: u32,
        batch: Batch,
    ) -> Result<Vec<Emission>> {
        shared.metrics.operators[self.task.operator.0 as usize].add_in(batch.record_count());
        match &mut self.work {
            Work::Operator(operator) => {
                let emissions = match operator.instance()?.process(input, &batch).await {
                    Ok(processed) => {
                        operator.processed.add(batch.record_count());
                        operator.secure(&self.local, batch.record_count()).await?;
                        let (local, task, attempt) = (&self.local, self.task, self.attempt);
                        let parallelism = self.parallelism;
                        let context = Context { shared, local, task, attempt, parallelism };
                        operator.accept(&context, input, &batch, processed)?
                    }
                    Err(error) if operator.guard.is_some() => {
                        let (local, task, attempt) = (&self.local, self.task, self.attempt);
                        let parallelism = self.parallelism;
                        let context = Context { shared, local, task, attempt, parallelism };
                        operator.isolate(&context, input, &batch, error).await?
                    }
                    Err(error) => {
                        if operator.spec.dead_letter_after.is_some() {
                            self.local.suspect(operator.suspects());
                        }
                        return Err(cause_with_record(error, &batch));
                    }
                };
                self.local.unmap_buried();
                shared.note_processed(self.task);
                Ok(emissions)
            }
            Work::Sink { sink: Some(sink), .. } => {
                sink.write(batch).await?;
                Ok(Vec::new())
            }
            _ => Err(host_bug("records were delivered to a source")),
        }
    }

    pub(crate) async fn advance(
        &mut self,
        shared: &Shared,
        watermark: i64,
    ) -> Result<Vec<Emission>> {
        shared.metrics.operators[self.task.operator.0 as usize].set_watermark(watermark);
        match &mut self.work {
            Work::Operator(operator) => {
                let emissions = operator.instance()?.advance(watermark).await.map_err(cause_of)?;
                operator.secure(&self.local, 0).await?;
                Ok(emissions)
            }
            Work::Source { .. } | Work::Sink { .. } => Ok(Vec::new()),
        }
    }

    pub(crate) async fn finish(&mut self, shared: &Shared) -> Result<Vec<Emission>> {
        match &mut self.work {
            Work::Operator(operator) => {
                let emissions = operator.instance()?.finish().await.map_err(cause_of)?;
                shared.note_processed(self.task);
                Ok(emissions)
            }
            Work::Source { .. } | Work::Sink { .. } => Ok(Vec::new()),
        }
    }

    /// Counts records that a source could make no sense of.
    pub(crate) fn count_bad(&self, shared: &Shared, records: u64) {
        if 0 < records {
            let metrics = &shared.metrics.operators[self.task.operator.0 as usize];
            metrics.bad_records.fetch_add(records, Ordering::Relaxed);
        }
    }

    /// Notes how many records a source has still to read, if it knows.
    pub(crate) fn set_records_behind(&self, shared: &Shared, records: Option<u64>) {
        let metrics = &shared.metrics.operators[self.task.operator.0 as usize];
        metrics.set_records_behind(self.task.index, records);
    }

    pub(crate) fn count_out(&self, shared: &Shared, records: &Batch) {
        shared.metrics.operators[self.task.operator.0 as usize].add_out(records.record_count());
    }

    /// Where records of an output go: nowhere, if nobody reads it. They must be what was described.
    pub(crate) fn targets(
        &self,
        output: u32,
        records: &Batch,
    ) -> std::result::Result<&[Target], TaskFailure> {
        let wrong = |message: String| TaskFailure {
            task: self.task,
            cause: FailureCause::Trap { message, backtrace: Vec::new() },
        };
        let Some(is_keyed) = self.outputs.get(output as usize) else {
            return Err(wrong(format!(
                "it gave records to output {output}, and has described only {}",
                self.outputs.len().saturating_sub(1)
            )));
        };
        if records.shape().0 != *is_keyed {
            let (with, described) = match is_keyed {
                true => ("without keys", "with keys"),
                false => ("with keys", "without keys"),
            };
            return Err(wrong(format!(
                "it gave records {with} to output {output}, which it has described as {described}"
            )));
        }
        Ok(self.targets.get(output as usize).map_or(&[], Vec::as_slice))
    }

    /// Takes the snapshot of this task.
    pub(crate) async fn snapshot(
        &mut self,
        checkpoint: CheckpointId,
        purpose: Purpose,
    ) -> Result<SnapshotOutcome> {
        let began = Instant::now();
        let mut snapshot =
            Box::new(TaskSnapshot { is_drained: self.is_drained, ..TaskSnapshot::default() });
        match &mut self.work {
            Work::Source { .. } => snapshot.state = self.source()?.position().await?,
            Work::Sink { sink: Some(sink), .. } => {
                let mut state = StateWriter::default();
                sink.pre_commit(checkpoint, purpose, &mut state).await?;
                snapshot.state = state.into_bytes();
            }
            Work::Sink { sink: None, .. } => return Err(host_bug("a sink that is not open")),
            // It has ended for good and made room; see `Worker::announce_end`.
            Work::Operator(operator) if self.is_drained && operator.instance.is_none() => {}
            Work::Operator(operator) => {
                if let Some(declined) =
                    operator.snapshot(&self.local, checkpoint, &mut snapshot).await?
                {
                    return Ok(SnapshotOutcome::Declined(declined));
                }
            }
        }
        snapshot.stats.sync_us = micros(began.elapsed());
        snapshot.taken_at = Some(Instant::now());
        Ok(SnapshotOutcome::Taken(snapshot))
    }

    /// Keeps a snapshot until the checkpoint's fate is known.
    pub(crate) fn keep(&self, checkpoint: CheckpointId, snapshot: Arc<TaskSnapshot>) {
        self.local.lock().push(checkpoint.0, snapshot);
    }

    /// A checkpoint is complete.
    pub(crate) async fn commit(&mut self, checkpoint: CheckpointId) -> Result<()> {
        match &mut self.work {
            Work::Sink { sink: Some(sink), .. } => sink.commit(checkpoint).await,
            Work::Source { source: Some(source), .. } => source.on_complete(checkpoint).await,
            Work::Operator(operator) => {
                operator.processed.on_complete(checkpoint.0);
                // What had trapped lies behind a checkpoint: it will not come again.
                if operator.guard.is_none() {
                    self.local.suspect(0);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A checkpoint was given up.
    pub(crate) async fn abort(&mut self, checkpoint: CheckpointId) -> Result<()> {
        match &mut self.work {
            Work::Sink { sink: Some(sink), .. } => sink.abort(checkpoint).await,
            Work::Source { .. } | Work::Operator(_) | Work::Sink { .. } => Ok(()),
        }
    }

    pub(crate) async fn close(&mut self) -> Result<()> {
        match &mut self.work {
            Work::Operator(operator) => match operator.instance.take() {
                Some(instance) => instance.close().await.map_err(cause_of),
                None => Ok(()),
            },
            Work::Source { .. } | Work::Sink { .. } => Ok(()),
        }
    }
}

impl OperatorTask {
    pub(crate) fn instance(&mut self) -> Result<&mut Instance> {
        self.instance.as_mut().ok_or_else(|| host_bug("an operator that is not open"))
    }

    pub(crate) async fn open(&mut self, context: &Context<'_>) -> Result<Instance> {
        let Context { shared, task, attempt, parallelism, .. } = *context;
        let index = task.index;
        let keyed = context.local.keyed.clone();
        // What is done again after a restart is done with the same numbers; what comes later with others.
        let random_seed = mix(self.random_seed ^ mix(self.restored_from));
        let state_cache = keyed.is_some().then_some(self.spec.state_cache_bytes);
        let host = Arc::new(TaskHost::new(shared, task, &self.name, attempt, keyed, random_seed));
        // The same in every attempt: what a guest's library takes for random must not change.
        let seed = mix(u64::from(task.operator.0) << 32 | u64::from(index));
        let setup = InstanceSetup { host: host.clone(), limits: self.spec.limits.clone(), seed };
        let mut instance = self.component.instantiate(setup).await.map_err(cause_of)?;
        let config: Vec<(&str, &str)> =
            self.spec.config.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let context = OpenContext {
            operator: &self.name,
            task_index: index,
            parallelism,
            max_parallelism: self.spec.max_parallelism,
            config: &config,
            state_cache,
            tracks_changes: self.tracks_changes,
        };
        instance.open(context).await.map_err(|error| match error {
            // Its own word on its settings, which are the same in every attempt.
            GuestError::Failed { message, .. } | GuestError::Rejected { message, .. } => {
                FailureCause::Permanent { obstacle: Obstacle::OpenRefused, message }
            }
            other => cause_of(other),
        })?;
        host.is_open.store(true, Ordering::Relaxed);
        Ok(instance)
    }

    async fn restore(
        &mut self,
        context: &Context<'_>,
        slot: usize,
        checkpoint: u64,
        instance: &mut Instance,
    ) -> Result<()> {
        let Context { shared, local, .. } = context;
        if self.spec.snapshot.has_memory() {
            let lent = local.lend_image();
            if !lent.image.is_empty() {
                return instance.restore(&lent.image).await.map_err(restore_cause);
            }
            // It is new, or comes from a checkpoint that holds declared state alone.
        }
        if !self.has_states || local.keyed.is_some() {
            return Ok(());
        }
        // A part at a time: all of it need not fit into the memory beside the guest's.
        let mut next_group = Some(0);
        while let Some(group) = next_group {
            let shared = Arc::clone(shared);
            let read = move || {
                let part =
                    |entries: declared::Entries<'_>| declared::first_part(entries, RESTORE_BYTES);
                shared.storage.read_declared(slot, checkpoint, Some(group..u32::MAX), part)
            };
            let (entries, next) = blocking(read).await?;
            for part in entries.chunks(RESTORE_ENTRIES_MAX) {
                let changes = declared::changes_of(part.iter());
                instance.take_back(&changes, &[]).await.map_err(cause_of)?;
            }
            next_group = next;
        }
        Ok(())
    }

    /// Whether checkpoints leave declared state in the image of the memory.
    fn is_in_image(&self, local: &TaskLocal) -> bool {
        self.spec.snapshot.has_memory() && local.keyed.is_none()
    }

    /// Fills the snapshot; a reason if the checkpoint has to be declined.
    async fn snapshot(
        &mut self,
        local: &TaskLocal,
        checkpoint: CheckpointId,
        snapshot: &mut TaskSnapshot,
    ) -> Result<Option<String>> {
        let (mode, has_states) = (self.spec.snapshot, self.has_states);
        self.processed.on_barrier(checkpoint.0);
        let bytes_max = self.spec.limits.state_bytes_max;
        let (tracks_changes, own_keys) = (self.tracks_changes, self.own_keys);
        let instance = self.instance()?;
        // Before anything is handed over: the guest takes for stored what it has handed over.
        if mode.has_memory()
            && let Err(error) = instance.check_handles()
        {
            return Ok(Some(error.to_string()));
        }
        // First, because handing over changes the memory that is snapshotted next.
        // What is in the image is read out of it when it is needed.
        if mode.has_declared() && has_states && !self.is_in_image(local) {
            let instance = self.instance()?;
            let pieces = instance.hand_over(checkpoint.0, !tracks_changes, bytes_max).await;
            let pieces = pieces.map_err(cause_of)?;
            let changes = match &local.keyed {
                Some(keyed) => {
                    let layer = keyed.cut(checkpoint.0, &pieces);
                    Changes::Host(layer.map_err(|error| cause_of(error.into()))?)
                }
                None => {
                    if let Some(own) = own_keys {
                        pieces.iter().try_for_each(|it| own.check(it)).map_err(foreign_key)?;
                    }
                    Changes::Guest(pieces)
                }
            };
            snapshot.is_declared_whole = !tracks_changes;
            snapshot.declared = Some(Arc::new(changes));
        }
        if mode.has_memory() {
            match self.instance()?.snapshot().await {
                Ok(memory) => snapshot.memory = Some(Arc::new(self.complete_snapshot(memory)?)),
                // What was handed over counts as stored for the guest: it cannot be declined now.
                Err(error @ SnapshotError::HandlesHeld { .. }) if snapshot.declared.is_some() => {
                    let message = format!("it has taken handles while it handed over: {error}");
                    return Err(FailureCause::Trap { message, backtrace: Vec::new() });
                }
                Err(error @ SnapshotError::HandlesHeld { .. }) => {
                    return Ok(Some(error.to_string()));
                }
                Err(error) => return Err(snapshot_cause(error)),
            }
        } else {
            // Handing over has changed the memory, too.
            self.secure(local, 0).await?;
        }
        Ok(None)
    }
}

impl Drop for Node {
    /// Unmapping a large memory takes its time and holds up whoever maps another meanwhile: a
    /// restart must not wait for it, so it is put off until the task has recovered.
    fn drop(&mut self) {
        if let Work::Operator(operator) = &mut self.work
            && let Some(instance) = operator.instance.take()
        {
            self.local.bury(instance);
        }
    }
}

/// Runs something that blocks where that harms nobody.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|error| Err(host_bug(&format!("a blocking call panicked: {error}"))))
}

pub(crate) fn host_bug(message: &str) -> FailureCause {
    FailureCause::HostBug { message: message.to_owned() }
}

/// The class of a guest's error in a batch, with the record that it is about.
fn cause_with_record(error: GuestError, batch: &Batch) -> FailureCause {
    match error {
        GuestError::Rejected { message, record: Some(place) } => {
            FailureCause::Rejected { message: about_record(&message, batch, place) }
        }
        GuestError::Failed { message, record: Some(place) } => FailureCause::Trap {
            message: about_record(&message, batch, place),
            backtrace: Vec::new(),
        },
        error => cause_of(error),
    }
}

/// A message with the record that it is about, shortened.
pub(crate) fn about_record(message: &str, batch: &Batch, place: u32) -> String {
    let Some(record) = batch.records().nth(place as usize) else { return message.to_owned() };
    let key = record.key.map_or(String::new(), |key| format!("key {}, ", shown(key)));
    let time = record.timestamp.map_or(String::new(), |time| format!(", time {time}"));
    format!("{message}: record with {key}value {}{time}", shown(record.value))
}

/// The class of a guest's error.
pub(crate) fn cause_of(error: GuestError) -> FailureCause {
    let at = |message: String, record: Option<u32>| match record {
        Some(record) => format!("{message} (record {record} of its batch)"),
        None => message,
    };
    match error {
        GuestError::Trap { message, backtrace } => FailureCause::Trap { message, backtrace },
        GuestError::Limit(limit) => FailureCause::LimitExceeded { message: limit.to_string() },
        GuestError::Rejected { message, record } => {
            FailureCause::Rejected { message: at(message, record) }
        }
        GuestError::Failed { message, record } => {
            FailureCause::Trap { message: at(message, record), backtrace: Vec::new() }
        }
        GuestError::ForeignKey(message) => foreign_key(message),
        GuestError::Unavailable(message) => FailureCause::Environment { message },
        other => FailureCause::HostBug { message: other.to_string() },
    }
}

fn foreign_key(message: String) -> FailureCause {
    FailureCause::Permanent { obstacle: Obstacle::ForeignKey, message }
}

pub(crate) fn snapshot_cause(error: SnapshotError) -> FailureCause {
    match error {
        SnapshotError::Guest(error) => cause_of(error),
        error => {
            let message = format!("snapshot a guest's memory: {}", with_sources(&error));
            FailureCause::Environment { message }
        }
    }
}

pub(crate) fn restore_cause(error: RestoreError) -> FailureCause {
    match error {
        RestoreError::Guest(error) => cause_of(error),
        RestoreError::Map(_) => FailureCause::Environment { message: with_sources(&error) },
        other => FailureCause::Permanent {
            obstacle: Obstacle::StateMismatch,
            message: format!("restore a guest's memory: {other}"),
        },
    }
}

/// The host as one task's guest sees it.
struct TaskHost {
    name: String,
    operator: usize,
    attempt: Attempt,
    metrics: Arc<Metrics>,
    random: AtomicU64,
    keyed: Option<Arc<KeyedState>>,
    /// Whether `open` has ended, and state may be written.
    is_open: AtomicBool,
}

impl TaskHost {
    fn new(
        shared: &Shared,
        task: TaskId,
        operator: &str,
        attempt: Attempt,
        keyed: Option<Arc<KeyedState>>,
        random_seed: u64,
    ) -> Self {
        Self {
            name: format!("{operator}/{}", task.index),
            operator: task.operator.0 as usize,
            attempt,
            metrics: shared.metrics.clone(),
            random: AtomicU64::new(random_seed),
            keyed,
            is_open: AtomicBool::new(false),
        }
    }

    fn keyed(&self) -> std::result::Result<&KeyedState, StateError> {
        self.keyed.as_deref().ok_or(StateError::NotKept)
    }
}

impl Host for TaskHost {
    fn log(&self, level: Level, message: &str) {
        let task = self.name.as_str();
        match level {
            Level::Trace => tracing::trace!(target: "guest", task, "{message}"),
            Level::Debug => tracing::debug!(target: "guest", task, "{message}"),
            Level::Info => tracing::info!(target: "guest", task, "{message}"),
            Level::Warn => tracing::warn!(target: "guest", task, "{message}"),
            Level::Error => tracing::error!(target: "guest", task, "{message}"),
        }
    }

    fn add_to_counter(&self, name: &str, delta: u64) {
        self.metrics.operators[self.operator].change_custom(name, |value| *value += delta as f64);
    }

    fn set_gauge(&self, name: &str, value: f64) {
        self.metrics.operators[self.operator].change_custom(name, |known| *known = value);
    }

    fn now_ms(&self) -> u64 {
        now_ms()
    }

    fn random(&self) -> u64 {
        mix(self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed))
    }

    fn attempt(&self) -> u32 {
        self.attempt.0
    }

    fn state(
        &self,
        state: u32,
        key: &[u8],
        namespace: u32,
    ) -> std::result::Result<Option<Vec<u8>>, StateError> {
        self.keyed()?.get(state, key, namespace)
    }

    fn put_state(&self, changes: &StateChanges) -> std::result::Result<(), StateError> {
        let keyed = self.keyed()?;
        if !self.is_open.load(Ordering::Relaxed) {
            return Err(StateError::NotOpen);
        }
        keyed.put(changes)
    }

    fn scan_state(
        &self,
        state: u32,
        after: Option<(&[u8], u32)>,
    ) -> std::result::Result<StateChanges, StateError> {
        self.keyed()?.scan(state, after)
    }
}
