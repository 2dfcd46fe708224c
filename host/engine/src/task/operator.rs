//! One instance of an operator: opened, restored, snapshotted.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use cofferdam_contract::{Batch, Emission, OpenContext};
use cofferdam_core::{
    call_size::CallSize,
    failure::{FailureCause, Obstacle},
    ids::{Attempt, CheckpointId, TaskId},
    random::mix,
};
use cofferdam_sandbox::{
    Component, GuestError, Instance, InstanceSetup, MemorySnapshot, SnapshotError,
};
use cofferdam_spec::OperatorSpec;
use cofferdam_store::{
    changes::Changes,
    declared::{self, OwnKeys},
    snapshot::TaskSnapshot,
};

use super::{
    guard::{Guard, Processed},
    host::{Random, TaskHost},
    reach::Reach,
};
use crate::{
    failure::{
        blocking, cause_of, cause_with_record, foreign_key, host_bug, restore_cause, snapshot_cause,
    },
    state::local::TaskLocal,
    watch::monitor::Monitor,
};

type Result<T> = std::result::Result<T, FailureCause>;

/// Entries of declared state that a guest takes back in one call.
const RESTORE_ENTRIES_MAX: usize = 4096;

/// How much of it is in the host's memory at once.
const RESTORE_BYTES: usize = 16 << 20;

/// An operator's component and, once it is open, its instance.
pub(crate) struct OperatorTask {
    pub(crate) name: String,
    pub(crate) component: Component,
    pub(crate) spec: Arc<OperatorSpec>,
    /// What it is given beside its sandbox.
    pub(crate) reach: Arc<Reach>,
    pub(crate) has_states: bool,
    /// Whether checkpoints ask for what has changed of declared state.
    pub(crate) tracks_changes: bool,
    /// Whether its memory is copied for a checkpoint again and again.
    pub(crate) expects_snapshots: bool,
    /// The keys of the records that come to it; `None` where they come otherwise, or all to one task.
    pub(crate) own_keys: Option<OwnKeys>,
    /// Of this task of this job: the key of what it gets for random.
    pub(crate) random_key: [u8; 32],
    /// The checkpoint that the attempt began from; 0: the beginning.
    pub(crate) restored_from: Option<CheckpointId>,
    pub(crate) instance: Option<Instance>,
    /// The host's own output, behind those that the component describes.
    pub(crate) dead_letter_output: u32,
    pub(crate) processed: Processed,
    pub(crate) guard: Option<Guard>,
    /// What was committed since the last checkpoint's snapshot.
    pub(crate) unsaved: Vec<MemorySnapshot>,
    /// How many records a call of it gets.
    pub(crate) call_size: CallSize,
}

/// What an operator's calls need to know of its task.
pub(crate) struct Context<'a> {
    pub(crate) monitor: &'a Arc<Monitor>,
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

impl OperatorTask {
    pub(crate) fn instance(&mut self) -> Result<&mut Instance> {
        self.instance.as_mut().ok_or_else(|| host_bug("an operator that is not open"))
    }

    pub(crate) async fn open(&mut self, context: &Context<'_>) -> Result<Instance> {
        let Context { monitor, task, attempt, parallelism, .. } = *context;
        let index = task.index;
        let keyed = context.local.keyed.clone();
        // What is done again after a restart is done with the same numbers; what comes later with others.
        let random = Random::new(&self.random_key, self.restored_from);
        let state_cache = keyed.is_some().then_some(self.spec.state_cache_bytes);
        let (capabilities, scratch) = match Reach::is_wanted(&self.spec) {
            false => Default::default(),
            true => {
                let (spec, reach) = (self.spec.clone(), self.reach.clone());
                blocking(move || reach.capabilities(&spec)).await?
            }
        };
        let host = TaskHost::new(monitor, task, &self.name, attempt, keyed, random);
        let host = Arc::new(host.with_scratch(scratch));
        // The same in every attempt: what a guest's library takes for random must not change.
        let seed = mix(u64::from(task.node.0) << 32 | u64::from(index));
        let limits = self.spec.limits.clone();
        let setup = InstanceSetup { host: host.clone(), limits, capabilities, seed };
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
        // Files and secrets may be others in the next attempt.
        let is_same_again = !Reach::is_wanted(&self.spec);
        instance.open(context).await.map_err(|error| match error {
            // Its own word on its settings, which are the same in every attempt.
            GuestError::Failed { message, .. } | GuestError::Rejected { message, .. }
                if is_same_again =>
            {
                FailureCause::Permanent { obstacle: Obstacle::OpenRefused, message }
            }
            other => cause_of(other),
        })?;
        host.is_open.store(true, Ordering::Relaxed);
        Ok(instance)
    }

    /// Processes what one call gets.
    pub(super) async fn process(
        &mut self,
        context: &Context<'_>,
        input: u32,
        batch: &Batch,
    ) -> Result<Vec<Emission>> {
        let began = Instant::now();
        match self.instance()?.process(input, batch).await {
            Ok(processed) => {
                let load = self.load(began.elapsed(), &processed.emissions);
                self.call_size.called(batch.record_count(), load);
                self.processed.add(batch.record_count());
                self.commit_call(context.local, batch.record_count()).await?;
                self.accept(context, input, batch, processed)
            }
            Err(error) if self.guard.is_some() => self.isolate(context, input, batch, error).await,
            Err(error) => {
                if self.spec.dead_letter_after.is_some() {
                    context.local.guard_next(self.records_to_guard());
                }
                if matches!(error, GuestError::Limit(_)) && 1 < batch.record_count() {
                    // The limit is one for what a record takes.
                    context.local.call_alone(self.records_to_guard());
                }
                Err(cause_with_record(error, batch))
            }
        }
    }

    /// What a call has taken of the limit that it came nearest to. Time in which others had the thread counts, too:
    /// then calls are smaller than they need be.
    fn load(&self, took: Duration, emissions: &[Emission]) -> f64 {
        let limits = &self.spec.limits;
        let time_max = limits.call_max.min(limits.wait_max);
        let given: usize = emissions.iter().map(|it| it.records.byte_count()).sum();
        let time = took.as_secs_f64() / time_max.as_secs_f64().max(1e-9);
        time.max(given as f64 / (limits.output_bytes_max.max(1)) as f64)
    }

    pub(super) async fn restore(
        &mut self,
        context: &Context<'_>,
        slot: usize,
        checkpoint: CheckpointId,
        instance: &mut Instance,
    ) -> Result<()> {
        let Context { monitor, local, .. } = context;
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
            let monitor = Arc::clone(monitor);
            let read = move || {
                let part =
                    |entries: declared::Entries<'_>| declared::first_part(entries, RESTORE_BYTES);
                monitor.storage.read_declared(slot, checkpoint, Some(group..u32::MAX), part)
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
    pub(super) async fn snapshot(
        &mut self,
        local: &TaskLocal,
        checkpoint: CheckpointId,
        snapshot: &mut TaskSnapshot,
    ) -> Result<Option<String>> {
        let (mode, has_states) = (self.spec.snapshot, self.has_states);
        self.processed.on_barrier(checkpoint);
        let bytes_max = self.spec.state_bytes_max;
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
                    let layer = keyed.cut(checkpoint, &pieces);
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
                Err(error @ (SnapshotError::HandlesHeld { .. } | SnapshotError::PlaceHeld))
                    if snapshot.declared.is_some() =>
                {
                    let message = format!("it has taken handles while it handed over: {error}");
                    return Err(FailureCause::Trap { message, backtrace: Vec::new() });
                }
                Err(error @ (SnapshotError::HandlesHeld { .. } | SnapshotError::PlaceHeld)) => {
                    return Ok(Some(error.to_string()));
                }
                Err(error) => return Err(snapshot_cause(error)),
            }
        } else {
            // Handing over has changed the memory, too.
            self.commit_call(local, 0).await?;
        }
        Ok(None)
    }
}
