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

/// What is left of a job that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remains {
    /// Its checkpoints stay.
    pub has_checkpoints: bool,
    /// What it began from and owns stays.
    pub has_claimed: bool,
}

impl Retention {
    /// What stays after an end; `None`: the job was only interrupted, and resumes by itself. `is_recorded`: its state
    /// directory says how it has ended. `is_untouched`: it has failed, and has not completed a checkpoint of its own.
    #[must_use]
    pub fn remains(self, end: Option<End>, is_recorded: bool, is_untouched: bool) -> Remains {
        // Without a record the next run would begin anew; and what a run has added nothing to may not even fit it.
        let is_needed = !is_recorded || is_untouched;
        Remains {
            has_checkpoints: is_needed || end.is_none_or(|end| self.keeps(end)),
            has_claimed: is_needed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_removed_that_a_next_run_needs() {
        let all = Retention::RetainOnCancellation;
        let remains = |retention: Retention, end, is_recorded, is_untouched| {
            let Remains { has_checkpoints, has_claimed } =
                retention.remains(end, is_recorded, is_untouched);
            (has_checkpoints, has_claimed)
        };
        for policy in [Retention::NeverRetain, Retention::RetainOnFailure, all] {
            assert_eq!(remains(policy, Some(End::Finished), true, false), (false, false));
            assert_eq!(remains(policy, Some(End::Finished), false, false), (true, true));
            assert_eq!(remains(policy, Some(End::Failed), true, true), (true, true));
            assert_eq!(remains(policy, None, true, false), (true, false), "only interrupted");
        }
        assert_eq!(remains(Retention::NeverRetain, Some(End::Failed), true, false), (false, false));
        assert_eq!(remains(all, Some(End::Failed), true, false), (true, false));
        assert_eq!(remains(all, Some(End::Canceled), true, false), (true, false));
    }

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
