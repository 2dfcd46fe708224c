//! Who wants a checkpoint, and what it means to the tasks that take it.

use super::retained::Kind;

/// What a savepoint is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SavepointPurpose {
    /// The job continues.
    Keep,
    /// The job ends with it.
    Stop,
}

/// What a checkpoint is, by who wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// The timer.
    Checkpoint,
    /// Somebody who wants one now, and waits for the answer under this ticket.
    Requested {
        /// Names the request in the answer.
        ticket: u64,
    },
    /// Somebody who waits for the answer under this ticket.
    Savepoint {
        /// Names the request in the answer.
        ticket: u64,
        /// Whether the job ends with it.
        purpose: SavepointPurpose,
    },
    /// The job itself, whose inputs have ended or who was asked to stop.
    Last,
}

impl Trigger {
    /// The ticket of a savepoint.
    #[must_use]
    pub fn savepoint(self) -> Option<u64> {
        match self {
            Self::Savepoint { ticket, .. } => Some(ticket),
            Self::Checkpoint | Self::Requested { .. } | Self::Last => None,
        }
    }

    /// How tasks treat its barrier.
    #[must_use]
    pub fn purpose(self) -> Purpose {
        match self {
            Self::Checkpoint | Self::Requested { .. } => Purpose::Periodic,
            Self::Savepoint { purpose: SavepointPurpose::Keep, .. } => Purpose::Savepoint,
            Self::Savepoint { purpose: SavepointPurpose::Stop, .. } | Self::Last => Purpose::Last,
        }
    }

    pub(super) fn kind(self) -> Kind {
        match self {
            Self::Checkpoint | Self::Requested { .. } | Self::Last => Kind::Checkpoint,
            Self::Savepoint { purpose: SavepointPurpose::Keep, .. } => Kind::Savepoint,
            Self::Savepoint { purpose: SavepointPurpose::Stop, .. } => Kind::StopSavepoint,
        }
    }
}

/// What a checkpoint means to the tasks that take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// One of many.
    Periodic,
    /// For a savepoint: nothing is committed when it is complete.
    Savepoint,
    /// The job ends with it: sources send nothing behind its barrier.
    Last,
}
