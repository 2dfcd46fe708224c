//! Decides whether completed checkpoints outlive their job.
//!
//! Flink's `CheckpointProperties` and `CheckpointRetentionPolicy` (2.0).

/// `execution.checkpointing.externalized-checkpoint-retention`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Retention {
    /// `NO_EXTERNALIZED_CHECKPOINTS`: nothing outlives the job. Flink's default.
    #[default]
    NeverRetain,
    /// `DELETE_ON_CANCELLATION`: what has failed may be resumed.
    RetainOnFailure,
    /// `RETAIN_ON_CANCELLATION`: what was cancelled, too.
    RetainOnCancellation,
}

/// Why a completed checkpoint may not be needed any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Newer ones are complete.
    Subsumed,
    /// The job has finished, or was stopped with a savepoint.
    Finished,
    /// The job was cancelled.
    Canceled,
    /// The job has failed for good.
    Failed,
    /// The job was suspended.
    Suspended,
}

impl Retention {
    /// Its name in a manifest.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NeverRetain => "NO_EXTERNALIZED_CHECKPOINTS",
            Self::RetainOnFailure => "DELETE_ON_CANCELLATION",
            Self::RetainOnCancellation => "RETAIN_ON_CANCELLATION",
        }
    }

    /// True where completed checkpoints are kept.
    #[must_use]
    pub fn keeps(self, end: End) -> bool {
        match (self, end) {
            (_, End::Subsumed | End::Finished) | (Self::NeverRetain, _) => false,
            (_, End::Failed) => true,
            (_, End::Canceled | End::Suspended) => self == Self::RetainOnCancellation,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Table 1.5 of the reference.
    #[test]
    fn retention_truth_table() {
        let ends = [End::Subsumed, End::Finished, End::Canceled, End::Failed, End::Suspended];
        let rows = [
            (Retention::NeverRetain, [false, false, false, false, false]),
            (Retention::RetainOnFailure, [false, false, false, true, false]),
            (Retention::RetainOnCancellation, [false, false, true, true, true]),
        ];
        for (policy, expected) in rows {
            assert_eq!(ends.map(|end| policy.keeps(end)), expected, "{}", policy.name());
        }
        assert_eq!(Retention::default(), Retention::NeverRetain);
    }
}
