//! Classes of failure: what ended an attempt, and whether running it again can help.

mod abort;

use std::{borrow::Cow, error::Error, fmt, io, sync::Arc};

pub use self::abort::AbortReason;
use crate::ids::CheckpointId;

/// What the environment could not do: a disk, a file system, a server, the memory of the machine.
///
/// Its text contains that of its source. Two are equal where they say the same.
#[derive(Debug, Clone)]
pub struct EnvironmentError {
    message: String,
    source: Option<Arc<dyn Error + Send + Sync>>,
}

impl EnvironmentError {
    /// A failure that no other error has caused.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), source: None }
    }

    /// What could not be done because of an error.
    pub fn of(doing: impl fmt::Display, error: impl Error + Send + Sync + 'static) -> Self {
        Self { message: format!("{doing}: {error}"), source: Some(Arc::new(error)) }
    }

    /// The error that caused it; its message says so already.
    #[must_use]
    pub fn because(mut self, error: impl Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(error));
        self
    }

    /// What was being done, on what, and why it failed.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The number of the operating system's error, where the failure is its.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        self.source.as_deref().and_then(|source| os_error(source))
    }
}

impl PartialEq for EnvironmentError {
    fn eq(&self, other: &Self) -> bool {
        self.message == other.message && self.os_error() == other.os_error()
    }
}

impl Eq for EnvironmentError {}

impl fmt::Display for EnvironmentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for EnvironmentError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// The number of the operating system's error that an error is, or stands on.
#[must_use]
pub fn os_error(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        let error_of_io = error.downcast_ref::<io::Error>();
        if let Some(number) = error_of_io.and_then(io::Error::raw_os_error) {
            return Some(number);
        }
        // An error that was made an error of I/O is not among its sources, but what it stands on is.
        next = match error_of_io.and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// A limit of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitKind {
    /// Linear memory.
    Memory,
    /// How long a call may run.
    Call,
    /// How long a call may wait.
    Wait,
    /// What a call may give back.
    Output,
    /// Resources of the host that it may hold.
    Handles,
    /// The elements of its tables.
    Table,
    /// Declared state that the host keeps.
    State,
    /// A result partition on disk.
    Partition,
    /// The stack of its calls.
    Stack,
}

impl LimitKind {
    /// The setting that raises it, by its path in the operator's section of a manifest; `None`: nothing does.
    #[must_use]
    pub fn setting(self) -> Option<&'static str> {
        match self {
            Self::Memory => Some("limits.memory"),
            Self::Call => Some("limits.call"),
            Self::Wait => Some("limits.wait"),
            Self::Output => Some("limits.output"),
            Self::Handles => Some("limits.handles"),
            Self::Table => Some("limits.table-elements"),
            Self::State => Some("limits.state"),
            Self::Partition => Some("limits.partition"),
            Self::Stack => None,
        }
    }
}

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
    StoreInDoubt {
        /// The number of the operating system's error, where the failure is its.
        os_error: Option<i32>,
    },
    /// The state in the checkpoint needs more than a limit allows.
    Limit(LimitKind),
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
        /// Which limit.
        limit: LimitKind,
        /// Its value, and what was wanted.
        message: String,
    },
    /// The guest returned an error: its own verdict on a record, or on itself.
    Rejected {
        /// The guest's words.
        message: String,
    },
    /// Storage, a source or a sink could not do its work; that may pass.
    Environment(EnvironmentError),
    /// A checkpoint failed more often than `tolerable-failed-checkpoints` allows.
    CheckpointsFailed {
        /// The last of them; `None`: the savepoint of a drain, which may not fail even once.
        checkpoint: Option<CheckpointId>,
        /// Why it failed.
        reason: AbortReason,
    },
    /// Running it again cannot help: the state does not fit the component, an input is another.
    Permanent {
        /// Of which kind.
        obstacle: Obstacle,
        /// What does not fit.
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
    pub fn message(&self) -> Cow<'_, str> {
        match self {
            Self::Trap { message, .. }
            | Self::LimitExceeded { message, .. }
            | Self::Rejected { message }
            | Self::Permanent { message, .. }
            | Self::HostBug { message } => message.into(),
            Self::Environment(error) => error.message().into(),
            Self::CheckpointsFailed { checkpoint: Some(checkpoint), reason } => {
                format!("checkpoint {checkpoint}: {}", reason.message()).into()
            }
            Self::CheckpointsFailed { checkpoint: None, reason } => {
                format!("the savepoint of a drain: {}", reason.message()).into()
            }
        }
    }

    /// The guest's frames, innermost first; empty where there are none.
    #[must_use]
    pub fn backtrace(&self) -> &[String] {
        match self {
            Self::Trap { backtrace, .. } => backtrace,
            _ => &[],
        }
    }

    /// The number of the operating system's error that lies behind it.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Environment(error) => error.os_error(),
            Self::CheckpointsFailed { reason, .. } => reason.os_error(),
            Self::Permanent { obstacle: Obstacle::StoreInDoubt { os_error }, .. } => *os_error,
            _ => None,
        }
    }

    /// The limit that was exceeded.
    #[must_use]
    pub fn limit(&self) -> Option<LimitKind> {
        match self {
            Self::LimitExceeded { limit, .. }
            | Self::Permanent { obstacle: Obstacle::Limit(limit), .. } => Some(*limit),
            _ => None,
        }
    }
}

impl fmt::Display for FailureCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self {
            Self::Trap { .. } => "trapped",
            Self::LimitExceeded { .. } => "exceeded a limit",
            Self::Rejected { .. } => "rejected its input",
            Self::Environment { .. } => "failed",
            Self::CheckpointsFailed { .. } => "exceeded the tolerable failed checkpoints",
            Self::Permanent { .. } => "cannot run",
            Self::HostBug { .. } => "hit a bug in the host",
        };
        write!(f, "{verb}: {}", self.message())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Wrapped(io::Error);

    impl fmt::Display for Wrapped {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("it cannot be written")
        }
    }

    impl Error for Wrapped {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn the_operating_systems_error_is_found_however_deep_it_lies() {
        let full = || io::Error::from_raw_os_error(28);
        assert_eq!(os_error(&full()), Some(28));
        assert_eq!(os_error(&Wrapped(full())), Some(28));
        assert_eq!(os_error(&Wrapped(io::Error::other(Wrapped(full())))), Some(28));
        assert_eq!(os_error(&io::Error::other(full())), Some(28));
        assert_eq!(os_error(&EnvironmentError::of("write", full())), Some(28));
        assert_eq!(os_error(&io::Error::other("no number (os error 28)")), None);
    }
}
