//! Takes records out of a job: a sink writes into a transaction that is held from one barrier to the commit of
//! its checkpoint.

use bytes::Bytes;
use cofferdam_contract::Batch;
use cofferdam_core::{checkpoint::Purpose, ids::CheckpointId};

use crate::{Answer, ready, state::ConnectorState};

/// What a reader of the output can rely on after a failure, if checkpoints are exactly once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guarantee {
    /// Each record is seen once: output becomes visible with its checkpoint.
    ExactlyOnce,
    /// Records may be written twice, and the second time changes nothing: they overwrite by key, or the other
    /// side knows their identity.
    EffectivelyOnce,
    /// Records may be seen twice.
    AtLeastOnce,
}

impl Guarantee {
    /// Its name, for people and programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ExactlyOnce => "exactly once",
            Self::EffectivelyOnce => "effectively once",
            Self::AtLeastOnce => "at least once",
        }
    }
}

/// Takes the state of a sink's task for a checkpoint, in chunks.
///
/// A chunk that is [`Bytes`] is shared and not copied: a sink that keeps whole epochs until the other side has
/// confirmed them needs the memory of each epoch once, however many checkpoints hold it. The store writes them in
/// parts, and a task that is restored gets its state in one piece. So what a sink keeps has to fit into memory.
#[derive(Debug, Default)]
pub struct StateWriter(ConnectorState);

impl StateWriter {
    /// Adds bytes behind those that are there.
    pub fn write(&mut self, chunk: impl Into<Bytes>) {
        self.0.push(chunk);
    }

    /// All that was written.
    #[must_use]
    pub fn into_state(self) -> ConnectorState {
        self.0
    }
}

/// One task of a sink.
///
/// Between two barriers it takes records with [`write`](Self::write). At a barrier
/// [`pre_commit`](Self::pre_commit) ends the transaction, so that the state it gives is enough to commit it after
/// a restore. Then the checkpoint either completes and is [committed](Self::commit), or is given up: then its
/// records are part of the next one that completes, and [`abort`](Self::abort) says so.
pub trait Sink: Send {
    /// Takes records into the open transaction. What it does with them may come later, at the latest with
    /// [`pre_commit`](Self::pre_commit).
    ///
    /// # Errors
    /// Where the outside does not take these records, or earlier ones.
    fn write(&mut self, batch: Batch) -> Answer<'_, ()>;

    /// Makes durable what the open transaction has, not yet visible. The state goes into the snapshot, and is
    /// enough to commit after a restore, by this task or another one.
    ///
    /// # Errors
    /// Where it cannot be made durable: the task fails.
    fn pre_commit<'a>(
        &'a mut self,
        checkpoint: CheckpointId,
        purpose: Purpose,
        state: &'a mut StateWriter,
    ) -> Answer<'a, ()>;

    /// Makes everything visible that was pre-committed up to this checkpoint. Called again after a restart for
    /// what was committed before: a second commit must change nothing.
    ///
    /// # Errors
    /// Where it cannot be made visible: the task fails, and a later attempt commits it.
    fn commit(&mut self, checkpoint: CheckpointId) -> Answer<'_, ()>;

    /// A checkpoint that was pre-committed is given up. Its records stay the job's: they become visible with the
    /// next checkpoint that completes.
    ///
    /// # Errors
    /// Where the outside fails.
    fn abort(&mut self, checkpoint: CheckpointId) -> Answer<'_, ()> {
        let _ = checkpoint;
        ready(Ok(()))
    }
}
