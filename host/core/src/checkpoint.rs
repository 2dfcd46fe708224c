//! Decides when a checkpoint is triggered, when it is complete, and what its failure costs.
//!
//! Semantics are Flink's checkpoint coordinator with one checkpoint at a time: the first trigger
//! falls at random between the pause and the interval, later ones at a fixed rate; the pause
//! counts from the last *completion*; a checkpoint is complete once its manifest is durable.
//!
//! **Invariant:** between "every task has acked" and "the manifest's fate is known" a checkpoint
//! is in doubt, and whoever wants a restore point has to wait ([`Coordinator::is_in_doubt`]).

use std::collections::BTreeSet;

use crate::{
    ids::{CheckpointId, Millis, TaskId},
    random::Random,
};

/// When checkpoints are taken and how many may fail. Durations in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointSettings {
    /// The base period; `None` takes no periodic checkpoints.
    pub interval_ms: Option<u64>,
    /// From the completion of one checkpoint to the next periodic trigger. Flink's default: 0.
    pub min_pause_ms: u64,
    /// From the trigger to the last ack; then the checkpoint has expired. Flink's default: 10 min.
    pub timeout_ms: u64,
    /// Consecutive failures that do not yet fail the job. Flink's default: 0.
    pub tolerable_failures: u32,
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        Self { interval_ms: None, min_pause_ms: 0, timeout_ms: 600_000, tolerable_failures: 0 }
    }
}

/// Why a checkpoint was given up, or a completed one is no longer needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiscardReason {
    /// Not every task had acked within the timeout.
    Expired,
    /// A task could not take its snapshot.
    Declined {
        /// The task that could not.
        task: TaskId,
        /// Its reason.
        message: String,
    },
    /// The manifest could not be made durable.
    ManifestLost {
        /// The storage's reason.
        message: String,
    },
    /// The tasks were restarted while it was being collected.
    TasksRestarted,
    /// A newer checkpoint is complete.
    Subsumed,
}

impl DiscardReason {
    /// True for the failures that `tolerable-failed-checkpoints` counts.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        matches!(self, Self::Expired | Self::Declined { .. } | Self::ManifestLost { .. })
    }

    /// The reason, for a log line; the task of a decline is named by the caller.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::Expired => "not every task acked within the timeout".to_owned(),
            Self::Declined { message, .. } => format!("declined: {message}"),
            Self::ManifestLost { message } => format!("its manifest was not written: {message}"),
            Self::TasksRestarted => "its tasks were restarted".to_owned(),
            Self::Subsumed => "a newer checkpoint is complete".to_owned(),
        }
    }
}

/// What a checkpoint is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The interval is over.
    Periodic,
    /// The job ends with it: sources send nothing behind its barrier.
    Last,
}

#[derive(Debug, Clone)]
enum Phase {
    Idle,
    Collecting {
        checkpoint: CheckpointId,
        deadline: Millis,
        missing: BTreeSet<TaskId>,
        purpose: Purpose,
    },
    Persisting {
        checkpoint: CheckpointId,
        purpose: Purpose,
    },
}

/// Follows the one checkpoint that may be pending, and the newest completed one.
#[derive(Debug, Clone)]
pub struct Coordinator {
    settings: CheckpointSettings,
    phase: Phase,
    next_id: CheckpointId,
    next_trigger_at: Option<Millis>,
    last_completed: Option<CheckpointId>,
    last_completed_at: Option<Millis>,
    consecutive_failures: u32,
}

/// What [`Coordinator::fail`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum FailureWeight {
    /// The job goes on.
    Tolerated,
    /// More consecutive failures than the settings tolerate; counting starts anew.
    Exceeded,
}

impl Coordinator {
    /// No checkpoint is pending; ids go on after `last_completed` and after every id in use.
    #[must_use]
    pub fn new(
        settings: CheckpointSettings,
        last_completed: Option<CheckpointId>,
        next_id: CheckpointId,
    ) -> Self {
        Self {
            settings,
            phase: Phase::Idle,
            next_id,
            next_trigger_at: None,
            last_completed,
            last_completed_at: None,
            consecutive_failures: 0,
        }
    }

    /// The checkpoint to restore from.
    #[must_use]
    pub fn last_completed(&self) -> Option<CheckpointId> {
        self.last_completed
    }

    /// True while a manifest is being written: the restore point is not known.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        matches!(self.phase, Phase::Persisting { .. })
    }

    /// True while nothing is pending.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle)
    }

    /// The tasks run: the first periodic trigger falls at random in `[min-pause, interval]`.
    pub fn start(&mut self, now: Millis, random: &mut Random) {
        self.next_trigger_at = self.settings.interval_ms.map(|interval| {
            let low = self.settings.min_pause_ms.min(interval);
            now.after(random.between(low, interval))
        });
    }

    /// When the next periodic checkpoint may be triggered; `None` while one is pending.
    #[must_use]
    pub fn trigger_at(&self) -> Option<Millis> {
        let at = self.next_trigger_at.filter(|_| self.is_idle())?;
        Some(match self.last_completed_at {
            Some(completed) => at.max(completed.after(self.settings.min_pause_ms)),
            None => at,
        })
    }

    /// When the pending checkpoint expires.
    #[must_use]
    pub fn expires_at(&self) -> Option<Millis> {
        match &self.phase {
            Phase::Collecting { deadline, .. } => Some(*deadline),
            Phase::Idle | Phase::Persisting { .. } => None,
        }
    }

    /// Begins a checkpoint that waits for the acks of `tasks`.
    ///
    /// # Panics
    /// If one is pending.
    pub fn trigger(
        &mut self,
        now: Millis,
        purpose: Purpose,
        tasks: BTreeSet<TaskId>,
    ) -> CheckpointId {
        assert!(self.is_idle(), "one checkpoint at a time");
        let checkpoint = self.next_id;
        self.next_id = checkpoint.next();
        if let (Some(at), Some(interval)) = (self.next_trigger_at, self.settings.interval_ms) {
            self.next_trigger_at = Some(at.after(interval).max(now));
        }
        let deadline = now.after(self.settings.timeout_ms);
        self.phase = Phase::Collecting { checkpoint, deadline, missing: tasks, purpose };
        checkpoint
    }

    /// A task's snapshot is durable. Gives the checkpoint whose manifest is now to be written.
    pub fn ack(&mut self, task: TaskId, checkpoint: CheckpointId) -> Option<CheckpointId> {
        match &mut self.phase {
            Phase::Collecting { checkpoint: pending, missing, purpose, .. }
                if *pending == checkpoint =>
            {
                let purpose = *purpose;
                missing.remove(&task);
                missing.is_empty().then(|| {
                    self.phase = Phase::Persisting { checkpoint, purpose };
                    checkpoint
                })
            }
            _ => None,
        }
    }

    /// The manifest is durable: the checkpoint is complete. Gives its purpose and the checkpoint
    /// it subsumes.
    pub fn complete(
        &mut self,
        now: Millis,
        checkpoint: CheckpointId,
    ) -> Option<(Purpose, Option<CheckpointId>)> {
        let Phase::Persisting { checkpoint: pending, purpose } = self.phase else { return None };
        if pending != checkpoint {
            return None;
        }
        self.phase = Phase::Idle;
        self.consecutive_failures = 0;
        self.last_completed_at = Some(now);
        Some((purpose, self.last_completed.replace(checkpoint)))
    }

    /// The checkpoint still being collected, which a failure or a restart ends.
    #[must_use]
    pub fn collecting(&self) -> Option<CheckpointId> {
        match &self.phase {
            Phase::Collecting { checkpoint, .. } => Some(*checkpoint),
            Phase::Idle | Phase::Persisting { .. } => None,
        }
    }

    /// The checkpoint whose manifest is being written.
    #[must_use]
    pub fn persisting(&self) -> Option<CheckpointId> {
        match &self.phase {
            Phase::Persisting { checkpoint, .. } => Some(*checkpoint),
            Phase::Idle | Phase::Collecting { .. } => None,
        }
    }

    /// Gives the pending checkpoint up and weighs the failure.
    pub fn fail(&mut self, reason: &DiscardReason) -> FailureWeight {
        self.phase = Phase::Idle;
        if !reason.is_counted() {
            return FailureWeight::Tolerated;
        }
        self.consecutive_failures += 1;
        if self.consecutive_failures <= self.settings.tolerable_failures {
            return FailureWeight::Tolerated;
        }
        self.consecutive_failures = 0;
        FailureWeight::Exceeded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::OperatorId;

    fn coordinator(interval_ms: u64, min_pause_ms: u64) -> Coordinator {
        let settings = CheckpointSettings {
            interval_ms: Some(interval_ms),
            min_pause_ms,
            timeout_ms: 60,
            tolerable_failures: 1,
        };
        Coordinator::new(settings, None, CheckpointId(1))
    }

    fn task() -> TaskId {
        TaskId { operator: OperatorId(0), index: 0 }
    }

    #[test]
    fn first_trigger_falls_between_pause_and_interval() {
        for seed in 0..200 {
            let mut coordinator = coordinator(100, 30);
            coordinator.start(Millis(1000), &mut Random::new(seed));
            let at = coordinator.trigger_at().expect("periodic");
            assert!((1030..=1100).contains(&at.0), "{at:?}");
        }
    }

    #[test]
    fn pause_counts_from_the_completion_and_only_from_there() {
        let mut coordinator = coordinator(10, 50);
        coordinator.start(Millis(0), &mut Random::new(0));
        let first = coordinator.trigger_at().expect("periodic");
        let id = coordinator.trigger(first, Purpose::Periodic, BTreeSet::from([task()]));
        assert_eq!(coordinator.trigger_at(), None);
        assert_eq!(coordinator.fail(&DiscardReason::Expired), FailureWeight::Tolerated);
        let retry = coordinator.trigger_at().expect("an aborted checkpoint delays nothing");
        assert_eq!(retry, first.after(10));

        let second = coordinator.trigger(retry, Purpose::Periodic, BTreeSet::from([task()]));
        assert!(id < second);
        assert_eq!(coordinator.ack(task(), second), Some(second));
        assert_eq!(coordinator.complete(Millis(500), second), Some((Purpose::Periodic, None)));
        assert_eq!(coordinator.trigger_at(), Some(Millis(550)));
    }

    #[test]
    fn success_forgives_and_the_failure_after_the_tolerated_ones_does_not() {
        let mut coordinator = coordinator(10, 0);
        assert_eq!(coordinator.fail(&DiscardReason::Expired), FailureWeight::Tolerated);
        assert_eq!(coordinator.fail(&DiscardReason::TasksRestarted), FailureWeight::Tolerated);
        let id = coordinator.trigger(Millis(0), Purpose::Periodic, BTreeSet::from([task()]));
        coordinator.ack(task(), id);
        coordinator.complete(Millis(1), id);
        assert_eq!(coordinator.fail(&DiscardReason::Expired), FailureWeight::Tolerated);
        assert_eq!(coordinator.fail(&DiscardReason::Expired), FailureWeight::Exceeded);
        assert_eq!(coordinator.fail(&DiscardReason::Expired), FailureWeight::Tolerated);
    }

    #[test]
    fn ack_counts_once_and_only_for_the_pending_checkpoint() {
        let mut coordinator = coordinator(10, 0);
        let other = TaskId { index: 1, ..task() };
        let id = coordinator.trigger(Millis(0), Purpose::Last, BTreeSet::from([task(), other]));
        assert_eq!(coordinator.ack(task(), id), None);
        assert_eq!(coordinator.ack(task(), id), None);
        assert_eq!(coordinator.ack(other, CheckpointId(99)), None);
        assert!(!coordinator.is_in_doubt());
        assert_eq!(coordinator.ack(other, id), Some(id));
        assert!(coordinator.is_in_doubt());
    }
}
