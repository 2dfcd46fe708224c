//! What an operator keeps to isolate poison records: an image as of its last good call, and how far it is.

use cofferdam_core::ids::CheckpointId;
use cofferdam_sandbox::Image;

/// An operator's memory as of its last call that ended well.
pub(crate) struct Guard {
    pub(super) image: Image,
    pub(super) records_left: u64,
}

/// How many records an operator has processed, and as of which checkpoints.
#[derive(Debug, Default)]
pub(crate) struct Processed {
    total: u64,
    /// Checkpoints that are not complete, with the total at their barriers.
    barriers: Vec<(CheckpointId, u64)>,
    /// The total at the barrier of the last one that is.
    completed: u64,
}

impl Processed {
    pub(crate) fn add(&mut self, records: usize) {
        self.total += records as u64;
    }

    pub(crate) fn on_barrier(&mut self, checkpoint: CheckpointId) {
        self.barriers.push((checkpoint, self.total));
    }

    pub(crate) fn on_complete(&mut self, checkpoint: CheckpointId) {
        if let Some((_, total)) = self.barriers.iter().rfind(|(id, _)| *id <= checkpoint) {
            self.completed = *total;
        }
        self.barriers.retain(|(id, _)| checkpoint < *id);
    }

    /// Records that a restart now would bring again.
    pub(super) fn since_completed(&self) -> u64 {
        self.total - self.completed
    }
}
