//! Decides which exchange an edge has that names none.
//!
//! Flink's `RuntimeExecutionMode`, `BatchShuffleMode` (2.0) and `ExecutionMode` (1.20).

use crate::{exchange::ExchangeType, graph::Partitioner};

/// Whether a job runs as a stream or as a batch: `execution.runtime-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuntimeMode {
    /// Every task runs at the same time.
    Streaming,
    /// One region runs after the other.
    Batch,
    /// Batch where every source is bounded.
    Automatic,
}

/// Which exchange the edges of a batch job have: `execution.batch-shuffle-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShuffleMode {
    /// This one, but for forward edges, which are chained.
    All(ExchangeType),
    /// What Flink's `ExecutionMode` says.
    Execution(ExecutionMode),
}

/// Flink's older names (`ExecutionConfig`, until 1.20).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecutionMode {
    /// Every edge is pipelined.
    PipelinedForced,
    /// Edges that break the pipeline are blocking.
    Pipelined,
    /// Only forward edges are pipelined.
    Batch,
    /// No edge is pipelined.
    BatchForced,
}

/// The exchange of the edges that name none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultExchange {
    /// Stream or batch.
    pub mode: RuntimeMode,
    /// What holds in a batch.
    pub batch: ShuffleMode,
    /// In a stream, readers restart alone, except across forward edges.
    pub is_approximate: bool,
}

impl DefaultExchange {
    /// The exchange of an edge. It breaks the pipeline where its consumer waits for it while its producer waits for
    /// another input of that consumer. `is_bounded`: every source of the job comes to an end.
    #[must_use]
    pub fn of(
        &self,
        partitioner: Partitioner,
        breaks_pipeline: bool,
        is_bounded: bool,
    ) -> ExchangeType {
        use ExchangeType::{Blocking, PipelinedApproximate, PipelinedBounded};
        let is_batch = match self.mode {
            RuntimeMode::Streaming => false,
            RuntimeMode::Batch => true,
            RuntimeMode::Automatic => is_bounded,
        };
        let is_forward = partitioner == Partitioner::Forward;
        let is_blocking = match self.batch {
            // A forward edge costs no channel as long as it is pipelined.
            _ if !is_batch && self.is_approximate && !is_forward => return PipelinedApproximate,
            _ if !is_batch => false,
            ShuffleMode::All(_) if is_forward => false,
            ShuffleMode::All(exchange) => return exchange,
            ShuffleMode::Execution(ExecutionMode::PipelinedForced) => false,
            ShuffleMode::Execution(ExecutionMode::Pipelined) => breaks_pipeline,
            ShuffleMode::Execution(ExecutionMode::Batch) => breaks_pipeline || !is_forward,
            ShuffleMode::Execution(ExecutionMode::BatchForced) => true,
        };
        if is_blocking { Blocking } else { PipelinedBounded }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By shuffle mode: a forward edge, a hash edge, and the same two where they break the pipeline.
    #[test]
    fn an_edge_that_names_no_exchange_has_that_of_the_mode() {
        use ExchangeType::{
            Blocking as B, HybridFull as F, HybridSelective as S, PipelinedBounded as P,
        };
        let rows = [
            (ShuffleMode::All(B), [P, B, P, B]),
            (ShuffleMode::All(P), [P, P, P, P]),
            (ShuffleMode::All(F), [P, F, P, F]),
            (ShuffleMode::All(S), [P, S, P, S]),
            (ShuffleMode::Execution(ExecutionMode::PipelinedForced), [P, P, P, P]),
            (ShuffleMode::Execution(ExecutionMode::Pipelined), [P, P, B, B]),
            (ShuffleMode::Execution(ExecutionMode::Batch), [P, B, B, B]),
            (ShuffleMode::Execution(ExecutionMode::BatchForced), [B, B, B, B]),
        ];
        let edges = [
            (Partitioner::Forward, false),
            (Partitioner::Hash, false),
            (Partitioner::Forward, true),
            (Partitioner::Hash, true),
        ];
        let all = |default: DefaultExchange, is_bounded: bool| {
            edges.map(|(partitioner, breaks)| default.of(partitioner, breaks, is_bounded))
        };
        for (batch, expected) in rows {
            for is_approximate in [false, true] {
                let default = |mode| DefaultExchange { mode, batch, is_approximate };
                assert_eq!(all(default(RuntimeMode::Batch), false), expected, "{batch:?}");
                assert_eq!(all(default(RuntimeMode::Automatic), true), expected, "{batch:?}");
                let hash = if is_approximate { ExchangeType::PipelinedApproximate } else { P };
                let of_a_stream = [P, hash, P, hash];
                assert_eq!(all(default(RuntimeMode::Streaming), true), of_a_stream, "{batch:?}");
                assert_eq!(all(default(RuntimeMode::Automatic), false), of_a_stream, "{batch:?}");
            }
        }
    }
}
