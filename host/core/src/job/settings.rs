//! What a job is and where it begins, as far as decisions go.

use crate::{
    checkpoint::CheckpointSettings, failover::FailoverStrategy, graph::JobGraph, ids::CheckpointId,
    restart::RestartStrategy,
};

/// What a job is, as far as decisions go.
#[derive(Debug, Clone)]
pub struct JobSettings {
    /// Its operators and edges.
    pub graph: JobGraph,
    /// What restarts when a task fails.
    pub failover: FailoverStrategy,
    /// When checkpoints are taken.
    pub checkpoint: CheckpointSettings,
    /// What a failure leads to.
    pub restart: RestartStrategy,
    /// Failures of one incident count as one, whatever the strategy.
    pub is_merging_failures: bool,
    /// After so many failovers in a row with no checkpoint completed between them, more restarts than
    /// the failure asks for: where a task may restart alone and lose records, also all that it reads
    /// from; after as many again every task; after as many again the job fails. `None`: never.
    pub escalates_after: Option<u32>,
    /// Seeds jitter and the first trigger.
    pub seed: u64,
}

/// Where a job begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    /// The completed checkpoints that are kept, oldest first; the last one is restored.
    pub completed: Vec<CheckpointId>,
    /// An id above every one ever used by the job.
    pub next_id: CheckpointId,
}

impl Default for Resume {
    fn default() -> Self {
        Self { completed: Vec::new(), next_id: CheckpointId(1) }
    }
}
