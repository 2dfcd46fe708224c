//! Classes of failure: what ended an attempt, and whether running it again can help.

use std::fmt;

/// Why it cannot help to run an attempt again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// The state in the checkpoint is not of this job, or cannot be read.
    StateMismatch,
    /// What a source has still to read is not what it was.
    InputChanged,
    /// A record that a source cannot make sense of.
    BadRecord,
    /// An operator keeps state under a key that no record of its task has.
    ForeignKey,
    /// An operator refuses to open, with the same settings each time.
    OpenRefused,
    /// An output belongs to somebody else, or is not as it was left.
    OutputTaken,
    /// What is kept of a checkpoint is damaged.
    StoreDamaged,
    /// Nobody knows whether a checkpoint is complete.
    StoreInDoubt,
}

/// Why an attempt of a task ended. Decides between restarting and giving up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FailureCause {
    /// The guest trapped: `unreachable`, out of bounds, stack overflow, division by zero.
    Trap {
        /// What the engine says of the trap, first line first.
        message: String,
        /// The guest's frames, symbolised, innermost first; empty where there are none.
        backtrace: Vec<String>,
    },
    /// The guest used more than its limit of memory, time, output or handles.
    LimitExceeded {
        /// Which limit, its value, and how to raise it.
        message: String,
    },
    /// The guest returned an error: its own verdict on a record, or on itself.
    Rejected {
        /// The guest's words.
        message: String,
    },
    /// Storage, a source or a sink could not do its work; that may pass.
    Environment {
        /// What could not be done, and the operating system's reason.
        message: String,
    },
    /// A checkpoint failed more often than `tolerable-failed-checkpoints` allows.
    CheckpointsFailed {
        /// The last of the reasons.
        message: String,
    },
    /// Running it again cannot help: the state does not fit the component, an input is another.
    Permanent {
        /// Of which kind.
        obstacle: Obstacle,
        /// What does not fit, and what to do.
        message: String,
    },
    /// An invariant of the host broke. Never restarted: restarting hides it.
    HostBug {
        /// What should not have been possible.
        message: String,
    },
}

impl FailureCause {
    /// False where the restart strategy is not even asked.
    #[must_use]
    pub fn is_restartable(&self) -> bool {
        !matches!(self, Self::HostBug { .. } | Self::Permanent { .. })
    }

    /// The class, as it stands in logs and in machine-readable output.
    #[must_use]
    pub fn class(&self) -> &'static str {
        match self {
            Self::Trap { .. } => "trap",
            Self::LimitExceeded { .. } => "limit-exceeded",
            Self::Rejected { .. } => "rejected",
            Self::Environment { .. } => "environment",
            Self::CheckpointsFailed { .. } => "checkpoints-failed",
            Self::Permanent { .. } => "permanent",
            Self::HostBug { .. } => "host-bug",
        }
    }

    /// What happened, without the class.
    #[must_use]
    pub fn message(&self) -> &str {
        match self {
            Self::Trap { message, .. }
            | Self::LimitExceeded { message }
            | Self::Rejected { message }
            | Self::Environment { message }
            | Self::CheckpointsFailed { message }
            | Self::Permanent { message, .. }
            | Self::HostBug { message } => message,
        }
    }
}

impl fmt::Display for FailureCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self {
            Self::Trap { .. } => "trapped",
            Self::LimitExceeded { .. } => "exceeded a limit",
            Self::Rejected { .. } => "rejected its input",
            Self::Environment { .. } => "could not go on",
            Self::CheckpointsFailed { .. } => "exceeded the tolerable failed checkpoints",
            Self::Permanent { .. } => "cannot run",
            Self::HostBug { .. } => "met a bug of the host",
        };
        write!(f, "{verb}: {}", self.message())
    }
}
