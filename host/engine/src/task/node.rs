//! One task within a chain: a source, an instance of an operator, or a sink.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use cofferdam_connector::{
    Sink, Source, TaskContext,
    blocking::Blocking,
    catalog::{SinkPlan, SourcePlan},
    sink::StateWriter,
    state::ConnectorState,
};
use cofferdam_contract::{Batch, Emission};
use cofferdam_core::{
    call_size::CallSize,
    checkpoint::Purpose,
    failure::{EnvironmentError, FailureCause},
    ids::{Attempt, CheckpointId, TaskId, micros},
};
use cofferdam_store::{declared, snapshot::TaskSnapshot};

use super::operator::{Context, OperatorTask};
use crate::{
    failure::{TaskFailure, blocking, cause_of, host_bug, storage_cause},
    state::local::TaskLocal,
    watch::monitor::Monitor,
};

type Result<T> = std::result::Result<T, FailureCause>;

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
    /// The checkpoint fails; the task continues.
    Declined(String),
}

impl Node {
    /// Makes the node ready, in the state of a checkpoint where there is one.
    pub(crate) async fn open(
        &mut self,
        monitor: &Arc<Monitor>,
        checkpoint: Option<CheckpointId>,
        blocking: &Blocking,
    ) -> Result<()> {
        self.fetch_state(monitor, checkpoint).await?;
        self.fetch_keyed(monitor, checkpoint).await?;
        let (state, is_drained) = {
            let local = self.local.lock();
            // A node that the checkpoint does not know starts from the beginning: a real state is never empty.
            let state = checkpoint.map(|_| &local.state).filter(|state| !state.is_empty());
            (state.map(ConnectorState::to_vec), local.is_drained)
        };
        let (index, parallelism) = (self.task.index, self.parallelism);
        let (local, task, attempt) = (&self.local, self.task, self.attempt);
        let context = Context { monitor, local, task, attempt, parallelism };
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
                operator.restored_from = checkpoint;
                let mut instance = operator.open(&context).await?;
                if let Some(checkpoint) = checkpoint {
                    operator.restore(&context, self.slot, checkpoint, &mut instance).await?;
                }
                // Of what it has from a restored image only what it changes is copied.
                if operator.expects_snapshots {
                    instance.expect_snapshots();
                }
                operator.instance = Some(instance);
                operator.call_size = CallSize::new(self.local.records_alone());
                let records_to_guard = self.local.records_to_guard();
                if 0 < records_to_guard {
                    let is_restored = checkpoint.is_some() && operator.spec.snapshot.has_memory();
                    let base = is_restored.then(|| self.local.copy_image()).transpose();
                    let base = base.map_err(|error| {
                        let doing = "copy the image of a task";
                        FailureCause::Environment(EnvironmentError::of(doing, error))
                    })?;
                    operator.begin_guard(&context, base, records_to_guard).await?;
                }
            }
        }
        self.is_drained = is_drained;
        Ok(())
    }

    /// Brings the local copy of the state to a checkpoint, from the storage if need be.
    async fn fetch_state(
        &mut self,
        monitor: &Arc<Monitor>,
        checkpoint: Option<CheckpointId>,
    ) -> Result<()> {
        let token = self.local.lock().rewind(checkpoint);
        let (Some(token), Some(checkpoint)) = (token, checkpoint) else { return Ok(()) };
        let (local, slot, monitor) = (self.local.clone(), self.slot, monitor.clone());
        blocking(move || {
            let loaded = monitor.storage.load(slot, checkpoint)?;
            local.lock().load(token, checkpoint, &loaded).map_err(|error| {
                let doing = "make the image of a task";
                FailureCause::Environment(EnvironmentError::of(doing, error))
            })
        })
        .await
    }

    /// Brings the declared state that the host keeps to a checkpoint.
    async fn fetch_keyed(
        &mut self,
        monitor: &Arc<Monitor>,
        checkpoint: Option<CheckpointId>,
    ) -> Result<()> {
        let Some(keyed) = self.local.keyed.clone() else { return Ok(()) };
        let Some(token) = keyed.rewind(checkpoint) else { return Ok(()) };
        let (slot, monitor) = (self.slot, monitor.clone());
        blocking(move || {
            let load = |entries: declared::Entries<'_>| keyed.load(token, checkpoint, entries);
            match checkpoint {
                None => load(Box::new(std::iter::empty())).map_err(storage_cause),
                Some(checkpoint) => monitor.storage.read_declared(slot, checkpoint, None, load),
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

    /// Processes a batch, or the part of it that one call may have: gives the rest back.
    pub(crate) async fn process(
        &mut self,
        monitor: &Arc<Monitor>,
        input: u32,
        batch: Batch,
        from: usize,
    ) -> Result<(Vec<Emission>, Option<(Batch, usize)>)> {
        let metrics = &monitor.metrics.operators[self.task.node.0 as usize];
        match &mut self.work {
            Work::Operator(operator) => {
                let count = batch.record_count();
                let to = count.min(from.saturating_add(operator.call_size.records_max()));
                metrics.add_in(to - from);
                let (local, task, attempt) = (&self.local, self.task, self.attempt);
                let parallelism = self.parallelism;
                let context = Context { monitor, local, task, attempt, parallelism };
                let part = if to - from < count { &batch.part(from..to) } else { &batch };
                let emissions = operator.process(&context, input, part).await?;
                self.local.drop_retired();
                monitor.note_processed(self.task);
                Ok((emissions, (to < count).then_some((batch, to))))
            }
            Work::Sink { sink: Some(sink), .. } => {
                metrics.add_in(batch.record_count());
                sink.write(batch).await?;
                Ok((Vec::new(), None))
            }
            _ => Err(host_bug("records were delivered to a source")),
        }
    }

    pub(crate) async fn advance(
        &mut self,
        monitor: &Monitor,
        watermark: i64,
    ) -> Result<Vec<Emission>> {
        monitor.metrics.operators[self.task.node.0 as usize].set_watermark(watermark);
        match &mut self.work {
            Work::Operator(operator) => {
                let emissions = operator.instance()?.advance(watermark).await.map_err(cause_of)?;
                operator.commit_call(&self.local, 0).await?;
                Ok(emissions)
            }
            Work::Source { .. } | Work::Sink { .. } => Ok(Vec::new()),
        }
    }

    pub(crate) async fn finish(&mut self, monitor: &Monitor) -> Result<Vec<Emission>> {
        match &mut self.work {
            Work::Operator(operator) => {
                let emissions = operator.instance()?.finish().await.map_err(cause_of)?;
                monitor.note_processed(self.task);
                Ok(emissions)
            }
            Work::Source { .. } | Work::Sink { .. } => Ok(Vec::new()),
        }
    }

    /// Counts records that a source could make no sense of.
    pub(crate) fn count_bad(&self, monitor: &Monitor, records: u64) {
        if 0 < records {
            let metrics = &monitor.metrics.operators[self.task.node.0 as usize];
            metrics.bad_records.fetch_add(records, Ordering::Relaxed);
        }
    }

    /// Notes how many records a source has still to read, if it knows.
    pub(crate) fn set_records_behind(&self, monitor: &Monitor, records: Option<u64>) {
        let metrics = &monitor.metrics.operators[self.task.node.0 as usize];
        metrics.set_records_behind(self.task.index, records);
    }

    pub(crate) fn count_out(&self, monitor: &Monitor, records: &Batch) {
        monitor.metrics.operators[self.task.node.0 as usize].add_out(records.record_count());
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
            Work::Source { .. } => snapshot.state = self.source()?.position().await?.into(),
            Work::Sink { sink: Some(sink), .. } => {
                let mut state = StateWriter::default();
                sink.pre_commit(checkpoint, purpose, &mut state).await?;
                snapshot.state = state.into_state();
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
        self.local.lock().push(checkpoint, snapshot);
    }

    /// A checkpoint is complete.
    pub(crate) async fn commit(&mut self, checkpoint: CheckpointId) -> Result<()> {
        match &mut self.work {
            Work::Sink { sink: Some(sink), .. } => sink.commit(checkpoint).await,
            Work::Source { source: Some(source), .. } => source.on_complete(checkpoint).await,
            Work::Operator(operator) => {
                operator.processed.on_complete(checkpoint);
                // What had trapped lies behind a checkpoint: it will not come again.
                if operator.guard.is_none() {
                    self.local.guard_next(0);
                }
                // The others lie behind the checkpoint.
                self.local.call_alone(operator.call_size.alone_left());
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

impl Drop for Node {
    /// Unmapping a large memory takes its time and holds up anyone who maps another meanwhile: a
    /// restart must not wait for it, so it is put off until the task has recovered.
    fn drop(&mut self) {
        if let Work::Operator(operator) = &mut self.work
            && let Some(instance) = operator.instance.take()
        {
            self.local.retire(instance);
        }
    }
}
