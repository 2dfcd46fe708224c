//! Decides when failed checkpoints fail the job.
//!
//! Flink's `CheckpointFailureManager` (2.0): five reasons count, each checkpoint at most once,
//! none up to the last completed one; a completed checkpoint forgives.

use std::collections::BTreeSet;

use super::AbortReason;
use crate::ids::CheckpointId;

/// What a failed checkpoint costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureWeight {
    /// The job continues.
    Tolerated,
    /// More consecutive failures than the settings tolerate; counting starts again.
    Exceeded,
}

/// Counts consecutive failures.
#[derive(Debug, Clone)]
pub struct FailureCounter {
    /// `None`: any number.
    tolerable: Option<u32>,
    failures: u32,
    counted: BTreeSet<CheckpointId>,
    last_completed: Option<CheckpointId>,
}

impl FailureCounter {
    /// No failure yet.
    #[must_use]
    pub fn new(tolerable: Option<u32>) -> Self {
        Self { tolerable, failures: 0, counted: BTreeSet::new(), last_completed: None }
    }

    /// A checkpoint was given up; `None`: before it had an id.
    pub fn on_failure(
        &mut self,
        checkpoint: Option<CheckpointId>,
        reason: &AbortReason,
    ) -> FailureWeight {
        if !reason.is_counted() || checkpoint.is_some_and(|id| Some(id) <= self.last_completed) {
            return FailureWeight::Tolerated;
        }
        if checkpoint.is_none_or(|id| self.counted.insert(id)) {
            self.failures += 1;
        }
        if self.tolerable.is_none_or(|tolerable| self.failures <= tolerable) {
            return FailureWeight::Tolerated;
        }
        self.forgive();
        FailureWeight::Exceeded
    }

    /// A checkpoint is complete.
    pub fn on_success(&mut self, checkpoint: CheckpointId) {
        if self.last_completed < Some(checkpoint) {
            self.last_completed = Some(checkpoint);
            self.forgive();
        }
    }

    fn forgive(&mut self) {
        self.failures = 0;
        self.counted.clear();
    }
}

#[cfg(test)]
mod tests {
    //! `CheckpointFailureManagerTest`, row by row.

    use super::*;
    use crate::failure::EnvironmentError;

    /// Feeds `REASON@id` and `success@id`; gives how often the job was failed.
    fn exceeded(tolerable: Option<u32>, sequence: &str) -> usize {
        let mut counter = FailureCounter::new(tolerable);
        let mut exceeded = 0;
        for entry in sequence.split(", ") {
            let (what, id) = entry.split_once('@').expect("what@id");
            let id = id.parse().ok().map(CheckpointId);
            let message = String::new();
            let reason = match what {
                "success" => {
                    counter.on_success(id.expect("an id"));
                    continue;
                }
                "EXPIRED" => AbortReason::Expired { task: None, others: 0 },
                "DECLINED" => AbortReason::Declined { task: None, message },
                "IO" => AbortReason::Io(EnvironmentError::new(message)),
                "ASYNC" => AbortReason::SnapshotNotStored {
                    task: None,
                    error: EnvironmentError::new(message),
                },
                "FINALIZE" => AbortReason::NotFinalized(EnvironmentError::new(message)),
                "JOB_FAILOVER_REGION" => AbortReason::FailoverRegion,
                "SUBSUMED" => AbortReason::Subsumed,
                other => panic!("{other}"),
            };
            exceeded += usize::from(counter.on_failure(id, &reason) == FailureWeight::Exceeded);
        }
        exceeded
    }

    /// Flink: `IgnoresOneCheckpointTwiceAndOldOnes`.
    #[test]
    fn a_checkpoint_counts_once_and_an_old_one_not_at_all() {
        let sequence = "EXPIRED@1, EXPIRED@2, success@2, EXPIRED@1, EXPIRED@3, EXPIRED@4";
        assert_eq!(exceeded(Some(2), sequence), 0);
        assert_eq!(exceeded(Some(1), "EXPIRED@1, EXPIRED@1, DECLINED@1"), 0);
    }

    /// Flink: `ContinuousFailure`.
    #[test]
    fn failures_in_a_row_exceed_what_is_tolerated() {
        let sequence = "DECLINED@1, DECLINED@2, JOB_FAILOVER_REGION@3, DECLINED@4";
        assert_eq!(exceeded(Some(2), sequence), 1);
    }

    /// Flink: `BreakContinuousFailure`.
    #[test]
    fn a_completed_checkpoint_forgives_what_failed_before() {
        let sequence = "IO@1, DECLINED@2, JOB_FAILOVER_REGION@3, success@4, EXPIRED@5";
        assert_eq!(exceeded(Some(2), sequence), 0);
    }

    #[test]
    fn five_reasons_count_and_counting_starts_anew_after_the_breach() {
        for reason in ["IO", "ASYNC", "EXPIRED", "DECLINED", "FINALIZE"] {
            assert_eq!(exceeded(Some(0), &format!("{reason}@1, {reason}@2")), 2, "{reason}");
        }
        assert_eq!(exceeded(Some(0), "SUBSUMED@1, JOB_FAILOVER_REGION@2"), 0);
        assert_eq!(exceeded(Some(1), "IO@1, IO@2, IO@3, IO@4"), 2);
    }

    #[test]
    fn unknown_id_always_counts_and_any_number_may_be_tolerated() {
        assert_eq!(exceeded(Some(1), "IO@-, IO@-"), 1);
        assert_eq!(exceeded(None, "IO@1, IO@2, IO@3"), 0);
    }
}
