//! What a running job tells anyone who watches it.

use std::collections::BTreeMap;

use cofferdam_core::{
    failure::{FailureCause, LimitKind},
    ids::CheckpointId,
};
use serde::Serialize;

/// The facts of a failure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FailureFacts {
    /// Its class: `trap`, `limit-exceeded`, `rejected`, `environment`, `checkpoints-failed`, `permanent`, `host-bug`.
    pub class: &'static str,
    /// What happened.
    pub message: String,
    /// The guest's frames, innermost first; empty where there are none.
    pub backtrace: Vec<String>,
    /// The setting of the limit that was exceeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<&'static str>,
    /// The number of the operating system's error that lies behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub os_error: Option<i32>,
}

impl From<&FailureCause> for FailureFacts {
    fn from(cause: &FailureCause) -> Self {
        Self {
            class: cause.class(),
            message: cause.message().into_owned(),
            backtrace: cause.backtrace().to_vec(),
            limit: cause.limit().and_then(LimitKind::setting),
            os_error: cause.os_error(),
        }
    }
}

/// A failure, and what restarts because of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Restart {
    /// The task that failed, `operator/index`.
    pub task: Option<String>,
    /// What has failed.
    #[serde(flatten)]
    pub failure: FailureFacts,
    /// The tasks start again after this.
    pub delay_ms: u64,
    /// False where the restart strategy counts the failure to an attempt that was under way.
    pub new_attempt: bool,
    /// How many more failures lead to a restart, if the strategy counts them.
    pub remaining_attempts: Option<u64>,
    /// The tasks that restart, `operator/index`, and why each does; all others continue.
    pub restarting: BTreeMap<String, String>,
    /// How many tasks there are.
    pub tasks: usize,
}

/// Something worth a line.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Progress {
    /// Tasks are started.
    Started {
        /// How often they were restarted before, in this run of the program.
        attempt: u32,
        /// The checkpoint they were restored from.
        restored_from: Option<u64>,
        /// How many there are.
        tasks: usize,
    },
    /// Every task runs: after the start, and after each restart.
    Running {
        /// How many there are.
        tasks: usize,
    },
    /// Before tasks are started: a part of restoring a checkpoint that may take long.
    Restoring {
        /// Which.
        checkpoint: u64,
        /// What begins.
        #[serde(flatten)]
        step: RestoreStep,
    },
    /// A checkpoint is complete.
    CheckpointCompleted {
        /// Which.
        checkpoint: u64,
        /// From the trigger to the durable manifest.
        duration_ms: f64,
        /// The longest pause of a task.
        pause_ms: f64,
        /// Bytes written for it.
        bytes: u64,
        /// Bytes of the whole state.
        state_bytes: u64,
        /// The longest time of a task from its first barrier to its last.
        alignment_ms: f64,
        /// Bytes of records in it that its barriers have overtaken.
        in_flight_bytes: u64,
    },
    /// A checkpoint was given up.
    CheckpointFailed {
        /// Which.
        checkpoint: u64,
        /// Flink's name of the reason.
        code: &'static str,
        /// Why.
        reason: String,
    },
    /// A failure leads to a restart.
    Restarting(Restart),
    /// Tasks have restarted without all that they read from, over an approximate exchange.
    RecordsLost {
        /// The operator that sends.
        from: String,
        /// The one that receives.
        to: String,
        /// What the receivers will never see.
        lost: u64,
        /// What was lost before, and is no more because its producers have gone back behind it.
        regained: u64,
        /// False where the numbers are upper bounds: some records that came behind a barrier may be in
        /// its checkpoint, with `AT_LEAST_ONCE`.
        is_exact: bool,
    },
    /// After a restart, the failed task's operator has processed its first records again.
    Recovered {
        /// From the failure to those records, the restart delay not counted.
        recovery_us: u64,
    },
    /// A record was isolated that traps whenever it is processed.
    DeadLetter {
        /// The task, `operator/index`.
        task: String,
        /// What has failed.
        #[serde(flatten)]
        failure: FailureFacts,
        /// How often it has trapped.
        traps: u32,
        /// From the trap of its batch until it was found.
        isolation_us: u64,
    },
    /// The job has failed for good.
    Failed {
        /// The task that failed, `operator/index`.
        task: Option<String>,
        /// What has failed.
        #[serde(flatten)]
        failure: FailureFacts,
    },
    /// Something that may lead to trouble.
    Warning {
        /// What.
        message: String,
    },
}

/// A part of restoring a checkpoint that does not fit the job as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum RestoreStep {
    /// Declared state is read out of the image of a task's memory.
    ReadOut {
        /// The task, `operator/index`.
        task: String,
        /// The size of its memory.
        bytes: u64,
    },
    /// Declared state is converted to the schemas of now.
    Convert {
        /// The task that takes it over, `operator/index`.
        task: String,
    },
    /// The state of all tasks is written as they are now.
    Write {
        /// How many there are.
        tasks: usize,
    },
}

impl std::fmt::Display for RestoreStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ReadOut { task, bytes } => {
                let mib = bytes.div_ceil(1 << 20);
                write!(f, "reading the declared state of {task} out of {mib} MiB of memory")
            }
            Self::Convert { task } => write!(f, "converting the declared state of {task}"),
            Self::Write { tasks } => write!(f, "writing the state of {tasks} tasks"),
        }
    }
}

impl Progress {
    pub(crate) fn checkpoint_failed(
        checkpoint: CheckpointId,
        code: &'static str,
        reason: String,
    ) -> Self {
        Self::CheckpointFailed { checkpoint: checkpoint.0, code, reason }
    }

    pub(crate) fn dead_letter(
        task: String,
        cause: &FailureCause,
        traps: u32,
        isolation_us: u64,
    ) -> Self {
        Self::DeadLetter { task, failure: cause.into(), traps, isolation_us }
    }

    pub(crate) fn failed(task: Option<String>, cause: &FailureCause) -> Self {
        Self::Failed { task, failure: cause.into() }
    }
}

/// Takes what a job tells. Called from the job's own loop, so it must not block.
pub trait Observer: Send + Sync + 'static {
    /// Something has happened.
    fn observe(&self, progress: Progress);
}

/// Watches nothing.
impl Observer for () {
    fn observe(&self, _: Progress) {}
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// How many events there are. A new one makes this match incomplete: it needs an example, too.
    const KINDS: usize = 11;

    fn is_counted(event: &Progress) -> bool {
        match event {
            Progress::Started { .. }
            | Progress::Running { .. }
            | Progress::Restoring { .. }
            | Progress::CheckpointCompleted { .. }
            | Progress::CheckpointFailed { .. }
            | Progress::Restarting(_)
            | Progress::RecordsLost { .. }
            | Progress::Recovered { .. }
            | Progress::DeadLetter { .. }
            | Progress::Failed { .. }
            | Progress::Warning { .. } => true,
        }
    }

    /// One of each.
    fn examples() -> Vec<Progress> {
        let failure = || FailureFacts {
            class: "trap",
            message: "one too many".to_owned(),
            backtrace: Vec::new(),
            limit: Some("limits.call"),
            os_error: Some(28),
        };
        let (task, checkpoint) = ("count/0".to_owned(), 1);
        let restart = Restart {
            task: Some(task.clone()),
            failure: failure(),
            delay_ms: 0,
            new_attempt: true,
            remaining_attempts: None,
            restarting: BTreeMap::new(),
            tasks: 2,
        };
        let steps = [
            RestoreStep::ReadOut { task: task.clone(), bytes: 1 },
            RestoreStep::Convert { task: task.clone() },
            RestoreStep::Write { tasks: 2 },
        ];
        let restoring = steps.map(|step| Progress::Restoring { checkpoint, step });
        let others = [
            Progress::Started { attempt: 0, restored_from: None, tasks: 2 },
            Progress::Running { tasks: 2 },
            Progress::CheckpointCompleted {
                checkpoint,
                duration_ms: 1.0,
                pause_ms: 1.0,
                bytes: 1,
                state_bytes: 1,
                alignment_ms: 1.0,
                in_flight_bytes: 1,
            },
            Progress::CheckpointFailed {
                checkpoint,
                code: "CHECKPOINT_EXPIRED",
                reason: String::new(),
            },
            Progress::Restarting(restart),
            Progress::RecordsLost {
                from: String::new(),
                to: String::new(),
                lost: 1,
                regained: 0,
                is_exact: true,
            },
            Progress::Recovered { recovery_us: 1 },
            Progress::DeadLetter {
                task: task.clone(),
                failure: failure(),
                traps: 3,
                isolation_us: 1,
            },
            Progress::Failed { task: Some(task), failure: failure() },
            Progress::Warning { message: String::new() },
        ];
        restoring.into_iter().chain(others).collect()
    }

    #[test]
    fn every_event_and_every_field_is_in_the_reference() {
        let reference = include_str!("../../../../docs/events.md");
        let (_, failures) = reference.split_once("## Failures").expect("a section");
        let mut names = std::collections::BTreeSet::new();
        for example in examples().into_iter().filter(is_counted) {
            let Ok(Value::Object(fields)) = serde_json::to_value(&example) else {
                panic!("{example:?} is no object");
            };
            let name = fields["event"].as_str().expect("a name").to_owned();
            let heading = format!("### `{name}`\n");
            let (_, section) = reference.split_once(&heading).expect("every event has a section");
            let section = section.split("\n##").next().unwrap_or_default();
            let is_failure = section.contains("](#failures)");
            for field in fields.keys().filter(|field| *field != "event") {
                let word = format!("`{field}`");
                let is_there = section.contains(&word) || is_failure && failures.contains(&word);
                assert!(is_there, "{name} does not explain {field}");
            }
            names.insert(name);
        }
        assert_eq!(names.len(), KINDS);
    }
}
