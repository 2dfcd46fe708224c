//! Which point of a job's life a state in this process is of.

use cofferdam_core::ids::CheckpointId;

/// What a local copy of a state holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum AsOf {
    /// Nothing that an attempt may begin with: it loads its state from the storage.
    #[default]
    Unknown,
    /// The state with which the job begins.
    Beginning,
    /// The state as of a completed checkpoint.
    Checkpoint(CheckpointId),
}

/// A restore point; `None` is the beginning of the job.
impl From<Option<CheckpointId>> for AsOf {
    fn from(restore_from: Option<CheckpointId>) -> Self {
        restore_from.map_or(Self::Beginning, Self::Checkpoint)
    }
}
