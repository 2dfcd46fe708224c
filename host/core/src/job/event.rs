//! What can happen to a job, what it asks of the shell, and how it ends.

use std::collections::BTreeMap;

use crate::{
    checkpoint::{AbortReason, Purpose, retention::End},
    failover::{RestartReason, topology::PartitionId},
    failure::{EnvironmentError, FailureCause},
    ids::{Attempt, CheckpointId, TaskId},
};

/// A task and the attempt that is meant.
pub type TaskAttempt = (TaskId, Attempt);

/// Everything that can happen to a job, as seen by the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A deadline has passed.
    Tick,
    /// After `StartTasks`: every task that was to be started runs.
    TasksStarted {
        /// As in the effect.
        tasks: Vec<TaskAttempt>,
    },
    /// A task has processed the end of all its inputs. It still answers barriers.
    TaskDrained {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
    },
    /// A source works off a backlog from now on, or does not any more.
    BacklogChanged {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
        /// Whether it does.
        is_backlog: bool,
    },
    /// A task's snapshot is durable.
    SnapshotAcked {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
        /// The checkpoint the snapshot belongs to.
        checkpoint: CheckpointId,
    },
    /// A task could not take its snapshot, or its snapshot could not be stored.
    SnapshotDeclined {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
        /// The checkpoint it declines.
        checkpoint: CheckpointId,
        /// Why.
        reason: AbortReason,
    },
    /// The metadata is written and flushed.
    MetadataDurable {
        /// The checkpoint that is complete by this.
        checkpoint: CheckpointId,
    },
    /// It is known that the metadata is not in the storage.
    MetadataLost {
        /// The checkpoint that will never complete.
        checkpoint: CheckpointId,
        /// The storage's reason.
        error: EnvironmentError,
    },
    /// The savepoint is written and flushed.
    SavepointDurable {
        /// Its checkpoint.
        checkpoint: CheckpointId,
    },
    /// The savepoint could not be written.
    SavepointLost {
        /// Its checkpoint.
        checkpoint: CheckpointId,
        /// The storage's reason.
        error: EnvironmentError,
    },
    /// After `Subsume` or `Discard`: the checkpoint's data are gone, or written as part of the next.
    CheckpointCleaned,
    /// Something has ended by a failure.
    TaskFailed {
        /// The task; `None` for a failure that is not one task's and restarts all.
        task: Option<TaskAttempt>,
        /// What ended it.
        cause: FailureCause,
        /// The result partition that it could not read.
        lost: Option<PartitionId>,
    },
    /// A task has committed the last checkpoint and closed.
    TaskFinished {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
    },
    /// After `CancelTasks`: none of them runs any more.
    TasksStopped {
        /// As in the effect.
        tasks: Vec<TaskAttempt>,
    },
    /// Somebody wants a savepoint of the running job.
    SavepointRequested {
        /// Names the request in the answer.
        ticket: u64,
    },
    /// Somebody wants a checkpoint of the running job now.
    CheckpointRequested {
        /// Names the request in the answer.
        ticket: u64,
    },
    /// Somebody wants the job to take a last checkpoint and end.
    StopRequested {
        /// The last checkpoint is to be a savepoint, too; it is answered under this ticket.
        savepoint: Option<u64>,
        /// Sources end first, and everything that waits in the job is processed and emitted.
        drain: bool,
    },
    /// Somebody wants the job to end at once.
    CancelRequested,
}

/// Everything the core can ask the shell to do. Order within one step matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Every reader of these result partitions has finished: remove them.
    ReleasePartitions {
        /// The partitions.
        partitions: Vec<PartitionId>,
    },
    /// Instantiate tasks, from a checkpoint or empty. Answer: `TasksStarted`.
    StartTasks {
        /// Each with the attempt that it carries in everything it sends.
        tasks: Vec<TaskAttempt>,
        /// Whose snapshots they get.
        restore_from: Option<CheckpointId>,
        /// The newest checkpoint that was given up: whatever they meet of it or an older one is ignored.
        ignore_up_to: Option<CheckpointId>,
    },
    /// Send a barrier from every source. Answers: `SnapshotAcked` or `SnapshotDeclined`.
    InjectBarrier {
        /// The checkpoint that begins.
        checkpoint: CheckpointId,
        /// Whether sources continue behind the barrier.
        purpose: Purpose,
    },
    /// Sources have reached the end of their input, wherever they are.
    EndInput,
    /// Write the metadata and flush. Answer: `MetadataDurable` or `MetadataLost`.
    PersistMetadata {
        /// The checkpoint whose snapshots are all durable.
        checkpoint: CheckpointId,
    },
    /// Write a savepoint and flush. Answer: `SavepointDurable` or `SavepointLost`.
    PersistSavepoint {
        /// The checkpoint whose snapshots are all durable.
        checkpoint: CheckpointId,
        /// Who knows where to.
        ticket: u64,
    },
    /// Tell the tasks that the checkpoint is complete, so that sinks commit.
    NotifyComplete {
        /// The completed checkpoint.
        checkpoint: CheckpointId,
        /// After the last one, tasks close and answer `TaskFinished`.
        purpose: Purpose,
    },
    /// A pending checkpoint is given up: unblock tasks that align for it. Answer: `CheckpointCleaned`, when
    /// what was taken for it does not wait to be written any more.
    Discard {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Why.
        reason: AbortReason,
        /// The newest one that is complete.
        completed: Option<CheckpointId>,
        /// The oldest one that may still be completed, now or later: what was taken for an older one counts only
        /// as far as later ones stand on it.
        needed_from: CheckpointId,
    },
    /// Remove a completed checkpoint that is not kept any more. Answer: `CheckpointCleaned`.
    Subsume {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// The newest one that is complete.
        newest: CheckpointId,
        /// The oldest one that is neither complete nor given up.
        oldest_pending: Option<CheckpointId>,
    },
    /// Answer the caller that asked for a checkpoint or a savepoint.
    Answer {
        /// Their ticket.
        ticket: u64,
        /// The checkpoint, or why there is none.
        result: Result<CheckpointId, AbortReason>,
    },
    /// End these tasks. Answer: `TasksStopped`.
    CancelTasks {
        /// Each with the attempt to end.
        tasks: Vec<TaskAttempt>,
    },
    /// Tell people that a failure leads to a restart.
    AnnounceRestart {
        /// The task that failed, if it was one.
        task: Option<TaskAttempt>,
        /// What ended it.
        cause: FailureCause,
        /// When the tasks start again, counted from now.
        delay_ms: u64,
        /// False where the restart strategy counts it to an attempt that was under way.
        is_new_attempt: bool,
        /// How many more failures the strategy answers with a restart, if it counts them.
        remaining: Option<u64>,
        /// What restarts and why.
        tasks: BTreeMap<TaskId, RestartReason>,
    },
    /// The job is over.
    Finish {
        /// How.
        outcome: Outcome,
    },
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every input was processed and every sink has committed.
    Finished,
    /// Stopped on request; it resumes from this checkpoint.
    Stopped {
        /// The newest completed checkpoint.
        checkpoint: Option<CheckpointId>,
        /// False where the last checkpoint failed, so that the newest is an older one.
        is_last: bool,
        /// The last checkpoint is a savepoint, too: that is what to resume from.
        has_savepoint: bool,
    },
    /// Ended at once, on request.
    Canceled {
        /// The newest completed checkpoint.
        checkpoint: Option<CheckpointId>,
    },
    /// Failed, and the restart strategy allows no restart.
    Failed {
        /// The task that failed, if it was one.
        task: Option<TaskId>,
        /// The failure that was one too many.
        cause: FailureCause,
        /// The newest completed checkpoint.
        checkpoint: Option<CheckpointId>,
    },
}

impl Outcome {
    /// Flink's terminal status; `None`: the job was only interrupted, and resumes by itself.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        match self {
            Self::Finished | Self::Stopped { has_savepoint: true, .. } => Some(End::Finished),
            Self::Stopped { has_savepoint: false, .. } => None,
            Self::Canceled { .. } => Some(End::Canceled),
            Self::Failed { .. } => Some(End::Failed),
        }
    }

    /// True where the job has failed before it completed a checkpoint of its own.
    #[must_use]
    pub fn is_untouched(&self, resumed_from: Option<CheckpointId>) -> bool {
        matches!(self, Self::Failed { checkpoint: Some(it), .. } if Some(*it) == resumed_from)
    }
}
