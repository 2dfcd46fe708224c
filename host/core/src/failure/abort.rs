//! Why a checkpoint was given up, in Flink's words.

use super::{EnvironmentError, FailureCause};
use crate::ids::TaskId;

/// Why a checkpoint was given up, or a request for one refused. Flink's
/// `CheckpointFailureReason`, as far as it can happen on one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AbortReason {
    /// Before it began: more requests wait than may.
    TooManyRequests,
    /// Before it began: the pause since the last completed checkpoint is not over.
    MinimumTimeBetweenCheckpoints,
    /// Before it began: the job is about to end, and takes its last one instead.
    PeriodicSchedulerShutdown,
    /// Before it began: tasks are being started or have ended.
    NotAllTasksRunning,
    /// It could not be begun.
    Io(EnvironmentError),
    /// A task's snapshot could not be stored.
    SnapshotNotStored {
        /// The task.
        task: Option<TaskId>,
        /// The storage's reason.
        error: EnvironmentError,
    },
    /// Not every task had acked within the timeout.
    Expired {
        /// The first that had not.
        task: Option<TaskId>,
        /// How many others had not.
        others: usize,
    },
    /// A newer checkpoint is complete.
    Subsumed,
    /// A task could not take its snapshot.
    Declined {
        /// The task that could not.
        task: Option<TaskId>,
        /// Its reason.
        message: String,
    },
    /// The metadata, or the savepoint, could not be made durable.
    NotFinalized(EnvironmentError),
    /// The job ends.
    CoordinatorShutdown,
    /// The job is not running any more, so what waited is dropped.
    CoordinatorSuspend,
    /// Tasks are restarted.
    FailoverRegion,
    /// Before it began: regions of the job run one after the other.
    BlockingOutputExists,
    /// The savepoint is durable, but the job could not end with it: what its sinks had still to commit
    /// was not committed. Flink: `StopWithSavepointStoppingException`.
    StopFailed {
        /// What failed; `None`: tasks were being restarted.
        cause: Option<Box<FailureCause>>,
    },
}

impl AbortReason {
    /// True for the five that `tolerable-failed-checkpoints` counts.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        match self {
            Self::Io(_)
            | Self::SnapshotNotStored { .. }
            | Self::Expired { .. }
            | Self::Declined { .. }
            | Self::NotFinalized(_) => true,
            Self::TooManyRequests
            | Self::MinimumTimeBetweenCheckpoints
            | Self::PeriodicSchedulerShutdown
            | Self::NotAllTasksRunning
            | Self::Subsumed
            | Self::CoordinatorShutdown
            | Self::CoordinatorSuspend
            | Self::FailoverRegion
            | Self::BlockingOutputExists
            | Self::StopFailed { .. } => false,
        }
    }

    /// The reason's name in machine-readable output: Flink's.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::TooManyRequests => "TOO_MANY_CHECKPOINT_REQUESTS",
            Self::MinimumTimeBetweenCheckpoints => "MINIMUM_TIME_BETWEEN_CHECKPOINTS",
            Self::PeriodicSchedulerShutdown => "PERIODIC_SCHEDULER_SHUTDOWN",
            Self::NotAllTasksRunning => "NOT_ALL_REQUIRED_TASKS_RUNNING",
            Self::Io(_) => "IO_EXCEPTION",
            Self::SnapshotNotStored { .. } => "CHECKPOINT_ASYNC_EXCEPTION",
            Self::Expired { .. } => "CHECKPOINT_EXPIRED",
            Self::Subsumed => "CHECKPOINT_SUBSUMED",
            Self::Declined { .. } => "CHECKPOINT_DECLINED",
            Self::NotFinalized(_) => "FINALIZE_CHECKPOINT_FAILURE",
            Self::CoordinatorShutdown => "CHECKPOINT_COORDINATOR_SHUTDOWN",
            Self::CoordinatorSuspend => "CHECKPOINT_COORDINATOR_SUSPEND",
            Self::FailoverRegion => "JOB_FAILOVER_REGION",
            Self::BlockingOutputExists => "BLOCKING_OUTPUT_EXIST",
            Self::StopFailed { .. } => "STOP_WITH_SAVEPOINT_STOPPING",
        }
    }

    /// The number of the operating system's error that lies behind it.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Io(error) | Self::SnapshotNotStored { error, .. } | Self::NotFinalized(error) => {
                error.os_error()
            }
            Self::StopFailed { cause: Some(cause) } => cause.os_error(),
            _ => None,
        }
    }

    /// The task that it is about, if it is one's.
    #[must_use]
    pub fn task(&self) -> Option<TaskId> {
        match self {
            Self::SnapshotNotStored { task, .. }
            | Self::Expired { task, .. }
            | Self::Declined { task, .. } => *task,
            _ => None,
        }
    }

    /// The reason for people; the task is named by the caller.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::TooManyRequests => "too many checkpoint requests are waiting".to_owned(),
            Self::MinimumTimeBetweenCheckpoints => {
                "the pause since the last completed checkpoint is not over".to_owned()
            }
            Self::PeriodicSchedulerShutdown => "the job is taking its final checkpoint".to_owned(),
            Self::NotAllTasksRunning => "not all tasks are running".to_owned(),
            Self::Io(error) => format!("it could not start: {error}"),
            Self::SnapshotNotStored { error, .. } => {
                format!("its snapshot was not stored: {error}")
            }
            Self::Expired { others: 0, .. } => {
                "did not acknowledge it within the timeout".to_owned()
            }
            Self::Expired { others, .. } => {
                let tasks = if *others == 1 { "task" } else { "tasks" };
                format!("and {others} other {tasks} did not acknowledge it within the timeout")
            }
            Self::Subsumed => "a newer checkpoint is complete".to_owned(),
            Self::Declined { message, .. } => format!("declined: {message}"),
            Self::NotFinalized(error) => format!("it was not finalized: {error}"),
            Self::CoordinatorShutdown => "the job ends".to_owned(),
            Self::CoordinatorSuspend => "the job is not running".to_owned(),
            Self::FailoverRegion => "tasks were restarted".to_owned(),
            Self::BlockingOutputExists => {
                "a job with exchanges that are not pipelined has no state between its regions"
                    .to_owned()
            }
            Self::StopFailed { cause } => {
                let cause = match cause {
                    Some(cause) => cause.to_string(),
                    None => "tasks were being restarted".to_owned(),
                };
                format!(
                    "the savepoint is complete, but the job did not stop: its sinks had not committed \
                     everything when it failed ({cause})"
                )
            }
        }
    }
}
