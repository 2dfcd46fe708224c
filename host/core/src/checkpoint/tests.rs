//! When a checkpoint begins, completes and fails: the rows of Flink's `CheckpointCoordinatorTest` and its relatives, and our own.

use super::*;
use crate::{failure::EnvironmentError, ids::NodeId};

const A: TaskId = TaskId { node: NodeId(0), index: 0 };
const B: TaskId = TaskId { node: NodeId(1), index: 0 };

/// A running coordinator of two tasks.
struct Rig {
    coordinator: Coordinator,
    steps: Vec<Step>,
    now: u64,
    cleans_slowly: bool,
}

impl Rig {
    fn new(interval_ms: u64, settings: CheckpointSettings) -> Self {
        let settings = CheckpointSettings { interval_ms: Some(interval_ms), ..settings };
        let mut coordinator = Coordinator::new(settings, &[], CheckpointId(1));
        coordinator.start(Millis(0), &mut Random::new(7));
        Self { coordinator, steps: Vec::new(), now: 0, cleans_slowly: false }
    }

    /// Lets time pass, millisecond by millisecond; gives what was decided.
    fn run_to(&mut self, now: u64) -> String {
        while self.now < now {
            self.now += 1;
            self.on_time();
        }
        self.take()
    }

    fn on_time(&mut self) {
        let tasks = BTreeSet::from([A, B]);
        self.coordinator.expire(Millis(self.now), &mut self.steps);
        self.coordinator.begin_due(Millis(self.now), &tasks, &mut self.steps);
    }

    fn savepoint(&mut self, ticket: u64) -> String {
        let trigger = Trigger::Savepoint { ticket, purpose: SavepointPurpose::Keep };
        self.coordinator.request(Millis(self.now), trigger, &mut self.steps);
        self.on_time();
        self.take()
    }

    fn ack(&mut self, task: TaskId, checkpoint: u64) -> String {
        self.coordinator.ack(task, CheckpointId(checkpoint), &mut self.steps);
        self.take()
    }

    /// Both tasks ack and the metadata is durable.
    fn complete(&mut self, checkpoint: u64) -> String {
        self.ack(A, checkpoint);
        self.ack(B, checkpoint);
        self.coordinator.complete(Millis(self.now), CheckpointId(checkpoint), &mut self.steps);
        let is_subsumed = |step: &&Step| matches!(step, Step::Subsumed { .. });
        for _ in 0..self.steps.iter().filter(is_subsumed).count() {
            if !self.cleans_slowly {
                self.coordinator.on_cleaned();
            }
        }
        self.on_time();
        self.take()
    }

    fn decline(&mut self, checkpoint: u64) -> String {
        let reason = AbortReason::Declined { task: Some(A), message: String::new() };
        self.coordinator.abort(CheckpointId(checkpoint), reason, &mut self.steps);
        self.take()
    }

    fn take(&mut self) -> String {
        let show = |step: &Step| match step {
            Step::Begin { checkpoint, .. } => format!("begin {checkpoint}"),
            Step::Persist { checkpoint, .. } => format!("persist {checkpoint}"),
            Step::Aborted { checkpoint, reason, .. } => {
                format!("abort {checkpoint} {}", reason.name())
            }
            Step::Refused { reason, .. } => format!("refuse {}", reason.name()),
            Step::Completed { checkpoint, .. } => format!("complete {checkpoint}"),
            Step::Subsumed { checkpoint } => format!("subsume {checkpoint}"),
            Step::Exceeded { .. } => "exceeded".to_owned(),
        };
        let is_aborted = |step: &&Step| matches!(step, Step::Aborted { .. });
        if !self.cleans_slowly {
            let aborted = self.steps.iter().filter(is_aborted).count();
            (0..aborted).for_each(|_| self.coordinator.on_cleaned());
        }
        let shown: Vec<String> = std::mem::take(&mut self.steps).iter().map(show).collect();
        shown.join(", ")
    }

    fn pending(&self) -> usize {
        self.coordinator.pending.len()
    }
}

fn tolerant() -> CheckpointSettings {
    CheckpointSettings { tolerable_failures: None, timeout_ms: 1_000, ..Default::default() }
}

#[test]
fn first_tick_falls_between_pause_and_interval() {
    let settings = CheckpointSettings {
        interval_ms: Some(100),
        min_pause_ms: 30,
        ..CheckpointSettings::default()
    };
    for seed in 0..200 {
        let mut coordinator = Coordinator::new(settings.clone(), &[], CheckpointId(1));
        coordinator.start(Millis(1000), &mut Random::new(seed));
        let at = coordinator.next_deadline().expect("periodic");
        assert!((1030..=1100).contains(&at.0), "{at:?}");
    }
}

/// Flink: `MinCheckpointPause`.
#[test]
fn the_next_checkpoint_waits_for_the_pause() {
    let mut rig = Rig::new(12, CheckpointSettings { min_pause_ms: 50, ..tolerant() });
    assert_eq!(rig.run_to(60), "begin 1");
    rig.run_to(150);
    let completed_at = rig.now;
    // The ticks that waited are dropped, each for the same reason.
    let refused = "refuse MINIMUM_TIME_BETWEEN_CHECKPOINTS";
    assert_eq!(rig.complete(1), format!("complete 1, {refused}, {refused}"));
    assert!(!rig.run_to(completed_at + 49).contains("begin"), "not before the pause is over");
    assert_eq!(rig.run_to(completed_at + 50), "begin 2");
}

/// The pause counts from a completion only: what expired delays nothing.
#[test]
fn aborted_checkpoint_does_not_move_the_pause() {
    let settings = CheckpointSettings { min_pause_ms: 50, timeout_ms: 60, ..tolerant() };
    let mut rig = Rig::new(50, settings);
    assert_eq!(rig.run_to(50), "begin 1");
    let steps = rig.run_to(111);
    assert_eq!(steps, "abort 1 CHECKPOINT_EXPIRED, begin 2");
}

/// Flink: `MaxConcurrentAttempts`.
#[test]
fn no_more_checkpoints_are_pending_than_may_be() {
    for concurrent_max in [1usize, 2, 5] {
        let mut rig = Rig::new(10, CheckpointSettings { concurrent_max, ..tolerant() });
        rig.run_to(200);
        assert_eq!(rig.pending(), concurrent_max);
        let steps = rig.complete(1);
        assert!(steps.contains(&format!("begin {}", concurrent_max + 1)), "{steps}");
        assert_eq!(rig.pending(), concurrent_max);
    }
}

/// Flink: `MaxConcurrentAttemptsWithSubsumption`.
#[test]
fn a_completed_checkpoint_makes_room_for_as_many_as_it_subsumes() {
    let mut rig = Rig::new(10, CheckpointSettings { concurrent_max: 2, ..tolerant() });
    assert_eq!(rig.run_to(200), "begin 1, begin 2");
    assert_eq!(rig.complete(2), "complete 2, abort 1 CHECKPOINT_SUBSUMED, begin 3, begin 4");
}

/// Flink: `SuccessfulCheckpointSubsumesUnsuccessful`.
#[test]
fn a_completed_checkpoint_ends_older_ones_that_are_pending() {
    let mut rig = Rig::new(10, CheckpointSettings { concurrent_max: 2, ..tolerant() });
    rig.run_to(40);
    rig.ack(A, 1);
    assert!(rig.complete(2).starts_with("complete 2, abort 1 CHECKPOINT_SUBSUMED"));
    assert_eq!(rig.ack(B, 1), "", "a late ack changes nothing");
    assert!(rig.complete(3).starts_with("complete 3, subsume 2"));
}

/// Flink: `CheckpointTimeoutIsolated`.
#[test]
fn a_checkpoint_expires_and_late_acks_change_nothing() {
    let mut rig = Rig::new(10, CheckpointSettings { timeout_ms: 30, ..tolerant() });
    let begun = rig.run_to(10);
    assert_eq!(begun, "begin 1");
    rig.ack(A, 1);
    let steps = rig.run_to(60);
    assert!(steps.starts_with("abort 1 CHECKPOINT_EXPIRED"), "{steps}");
    assert_eq!(rig.ack(B, 1), "", "a late ack is ignored");
    assert_eq!(rig.coordinator.last_completed(), None);
}

/// Flink: `TriggerAndDeclineCheckpointComplex`.
#[test]
fn a_declined_checkpoint_ends_and_no_other() {
    let mut rig = Rig::new(10, CheckpointSettings { concurrent_max: 2, ..tolerant() });
    rig.run_to(40);
    assert_eq!(rig.decline(1), "abort 1 CHECKPOINT_DECLINED");
    assert_eq!(rig.decline(1), "", "told once");
    assert_eq!(rig.ack(A, 1), "");
    rig.ack(A, 2);
    assert_eq!(rig.ack(B, 2), "persist 2");
}

#[test]
fn savepoints_are_not_subsumed() {
    let mut rig = Rig::new(10, CheckpointSettings { concurrent_max: 2, ..tolerant() });
    rig.run_to(10);
    assert_eq!(rig.savepoint(1), "begin 2");
    rig.run_to(20);
    let steps = rig.complete(1);
    assert!(steps.starts_with("complete 1"), "{steps}");
    let newest = rig.coordinator.pending.keys().next_back().expect("pending").0;
    let steps = rig.complete(newest);
    assert!(!steps.contains("abort 2"), "{steps}");
    let steps = rig.complete(2);
    assert!(steps.starts_with("complete 2"), "{steps}");
    assert_eq!(rig.coordinator.last_completed(), Some(CheckpointId(newest)), "no restore point");
    assert!(rig.coordinator.retained().all(|id| id != CheckpointId(2)), "and not in the store");
}

/// Flink: `ConcurrentSavepoints`.
#[test]
fn savepoints_run_beside_each_other() {
    let mut rig = Rig::new(1_000_000, tolerant());
    for ticket in 1..=5 {
        assert_eq!(rig.savepoint(ticket), format!("begin {ticket}"));
    }
    for id in (1..=5).rev() {
        assert_eq!(rig.complete(id), format!("complete {id}"));
    }
}

/// Flink: `SavepointScheduledInUnalignedMode`.
#[test]
fn a_savepoint_waits_its_turn_where_barriers_overtake() {
    let settings = CheckpointSettings { unaligned_after_ms: Some(0), ..tolerant() };
    let mut rig = Rig::new(1_000_000, settings);
    assert_eq!(rig.savepoint(1), "begin 1");
    assert_eq!(rig.savepoint(2), "", "it waits: barriers that overtake must not meet");
    assert_eq!(rig.complete(1), "complete 1, begin 2");
}

/// Flink: `MinDelayBetweenSavepointsIsIgnored`.
#[test]
fn savepoints_do_not_wait_for_the_pause() {
    let settings = CheckpointSettings { min_pause_ms: 100_000_000, ..tolerant() };
    let mut rig = Rig::new(10, settings);
    assert_eq!(rig.savepoint(1), "begin 1");
    rig.complete(1);
    assert_eq!(rig.savepoint(2), "begin 2");
}

#[test]
fn failed_savepoint_does_not_fail_the_job() {
    let settings = CheckpointSettings { tolerable_failures: Some(0), ..tolerant() };
    let mut rig = Rig::new(50, settings);
    rig.savepoint(1);
    assert_eq!(rig.decline(1), "abort 1 CHECKPOINT_DECLINED");
    assert_eq!(rig.run_to(50), "begin 2");
    assert_eq!(rig.decline(2), "abort 2 CHECKPOINT_DECLINED, exceeded");
}

/// Flink: `PeriodicTriggeringAndStop`.
#[test]
fn ticks_come_at_a_fixed_rate_until_the_stop() {
    let mut rig = Rig::new(10, tolerant());
    for id in 1..=5 {
        let from = rig.now;
        assert_eq!(rig.run_to(from + 10), format!("begin {id}"));
        rig.complete(id);
    }
    rig.coordinator.stop(&AbortReason::CoordinatorSuspend, &mut rig.steps);
    assert_eq!(rig.run_to(1_000), "");
    rig.coordinator.start(Millis(rig.now), &mut Random::new(1));
    assert_eq!(rig.run_to(1_010), "begin 6");
}

#[test]
fn stop_aborts_what_is_pending_and_drops_what_waits() {
    let mut rig = Rig::new(10, tolerant());
    rig.run_to(35);
    rig.coordinator.stop(&AbortReason::FailoverRegion, &mut rig.steps);
    let steps = rig.take();
    assert!(steps.starts_with("abort 1 JOB_FAILOVER_REGION"), "{steps}");
    assert!(steps.contains("refuse CHECKPOINT_COORDINATOR_SUSPEND"), "{steps}");
    assert_eq!(rig.pending(), 0);
    assert_eq!(rig.savepoint(1), "refuse NOT_ALL_REQUIRED_TASKS_RUNNING");
}

#[test]
fn metadata_in_doubt_survives_the_stop() {
    let mut rig = Rig::new(10, tolerant());
    rig.run_to(10);
    rig.ack(A, 1);
    assert_eq!(rig.ack(B, 1), "persist 1");
    rig.coordinator.stop(&AbortReason::FailoverRegion, &mut rig.steps);
    assert_eq!(rig.take(), "");
    assert!(rig.coordinator.is_in_doubt());
    rig.coordinator.complete(Millis(20), CheckpointId(1), &mut rig.steps);
    assert_eq!(rig.take(), "complete 1");
    assert!(!rig.coordinator.is_in_doubt());
}

/// With a slow checkpoint and no pause, ticks wait in the queue and run one after the other.
#[test]
fn ticks_accumulate_behind_a_slow_checkpoint() {
    let mut rig = Rig::new(10, tolerant());
    assert_eq!(rig.run_to(100), "begin 1");
    for id in 1..=8 {
        assert_eq!(rig.complete(id).matches("begin").count(), 1, "after checkpoint {id}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "a thousand requests that wait for each other take an hour")]
fn request_that_is_one_too_many_is_refused_by_its_name() {
    let settings = CheckpointSettings { timeout_ms: u64::MAX, ..tolerant() };
    let mut rig = Rig::new(10, settings);
    // The first one runs, and a thousand wait for it.
    assert_eq!(rig.run_to(10_000), "begin 1");
    let steps = rig.run_to(10_100);
    assert!(steps.starts_with("refuse TOO_MANY_CHECKPOINT_REQUESTS"), "{steps}");
}

#[test]
fn as_many_checkpoints_are_kept_as_are_to_be() {
    let mut rig = Rig::new(10, CheckpointSettings { retained_max: 3, ..tolerant() });
    for id in 1..=5 {
        rig.run_to(id * 10);
        let steps = rig.complete(id);
        assert_eq!(steps.contains("subsume"), 3 < id, "{steps}");
        if 3 < id {
            assert!(steps.contains(&format!("subsume {}", id - 3)), "{steps}");
        }
    }
    let kept: Vec<u64> = rig.coordinator.retained().map(|id| id.0).collect();
    assert_eq!(kept, [3, 4, 5]);
}

#[test]
fn slow_cleaning_holds_the_next_checkpoint_back() {
    let mut rig = Rig::new(10, tolerant());
    rig.cleans_slowly = true;
    for id in 1..=3 {
        rig.run_to(id * 10);
        rig.complete(id);
    }
    // Two are being cleaned, one more than may be pending.
    assert_eq!(rig.run_to(60), "");
    rig.coordinator.on_cleaned();
    assert!(rig.run_to(61).starts_with("begin 4"));
}

/// What was taken for it may still wait to be written.
#[test]
fn what_is_given_up_holds_the_next_checkpoint_back_until_it_is_cleaned() {
    let mut rig = Rig::new(10, CheckpointSettings { timeout_ms: 5, ..tolerant() });
    rig.cleans_slowly = true;
    let two = "begin 1, abort 1 CHECKPOINT_EXPIRED, begin 2, abort 2 CHECKPOINT_EXPIRED";
    assert_eq!(rig.run_to(60), two);
    assert_eq!(rig.run_to(90), "", "two are not cleaned, one more than may be pending");
    rig.coordinator.on_cleaned();
    assert_eq!(rig.run_to(91), "begin 3");
}

#[test]
fn job_fails_by_more_failures_than_are_tolerated() {
    let settings = CheckpointSettings { tolerable_failures: Some(1), ..tolerant() };
    let mut rig = Rig::new(10, settings);
    rig.run_to(10);
    assert_eq!(rig.decline(1), "abort 1 CHECKPOINT_DECLINED");
    rig.run_to(20);
    assert_eq!(rig.decline(2), "abort 2 CHECKPOINT_DECLINED, exceeded");
}

#[test]
fn every_reason_has_a_name_and_words_of_its_own() {
    let message = || "m".to_owned();
    let all = [
        AbortReason::TooManyRequests,
        AbortReason::MinimumTimeBetweenCheckpoints,
        AbortReason::PeriodicSchedulerShutdown,
        AbortReason::NotAllTasksRunning,
        AbortReason::Io(EnvironmentError::new(message())),
        AbortReason::SnapshotNotStored { task: None, error: EnvironmentError::new(message()) },
        AbortReason::Expired { task: None, others: 0 },
        AbortReason::Subsumed,
        AbortReason::Declined { task: None, message: message() },
        AbortReason::NotFinalized(EnvironmentError::new(message())),
        AbortReason::CoordinatorShutdown,
        AbortReason::CoordinatorSuspend,
        AbortReason::FailoverRegion,
    ];
    let names: BTreeSet<_> = all.iter().map(AbortReason::name).collect();
    let words: BTreeSet<_> = all.iter().map(AbortReason::message).collect();
    assert_eq!((names.len(), words.len()), (all.len(), all.len()));
    assert_eq!(all.iter().filter(|reason| reason.is_counted()).count(), 5);
}

fn backlog(interval_ms: u64) -> CheckpointSettings {
    CheckpointSettings { backlog_interval_ms: Some(interval_ms), ..tolerant() }
}

/// The times at which checkpoints begin until `end`, each complete at once.
fn begins(rig: &mut Rig, next: &mut u64, end: u64) -> Vec<u64> {
    let mut times = Vec::new();
    while rig.now < end {
        if !rig.run_to(rig.now + 1).is_empty() {
            times.push(rig.now);
            rig.complete(*next);
            *next += 1;
        }
    }
    times
}

#[test]
fn interval_during_backlog_counts_while_any_source_works_one_off() {
    let mut rig = Rig::new(10, backlog(40));
    let mut next = 1;
    let first = begins(&mut rig, &mut next, 30)[0];
    rig.coordinator.set_backlog(Millis(30), A, true);
    rig.coordinator.set_backlog(Millis(30), B, true);
    rig.coordinator.set_backlog(Millis(30), B, false);
    // The tick that was due comes; from then on the longer period counts.
    let due = (1..).map(|n| first + 10 * n).find(|at| 30 < *at).expect("without end");
    assert_eq!(begins(&mut rig, &mut next, 130), [due, due + 40, due + 80]);
    // Leaving the backlog brings the next tick nearer.
    rig.coordinator.set_backlog(Millis(130), A, false);
    assert_eq!(begins(&mut rig, &mut next, 145), [140]);
}

#[test]
fn no_periodic_checkpoint_during_a_backlog_whose_interval_is_zero() {
    let mut rig = Rig::new(10, backlog(0));
    rig.coordinator.set_backlog(Millis(0), A, true);
    let mut next = 1;
    assert_eq!(begins(&mut rig, &mut next, 500).len(), 1, "the tick that was due before");
    assert_eq!(rig.savepoint(1), format!("begin {next}"), "users may ask");
    rig.complete(next);
    next += 1;
    rig.coordinator.set_backlog(Millis(500), A, false);
    assert_eq!(begins(&mut rig, &mut next, 525), [510, 520]);
}

#[test]
fn a_backlog_changes_nothing_without_an_interval_for_it_or_while_nothing_runs() {
    let mut rig = Rig::new(10, tolerant());
    rig.coordinator.set_backlog(Millis(0), A, true);
    assert_eq!(begins(&mut rig, &mut 1, 100).len(), 10);
    let mut steps = Vec::new();
    rig.coordinator.stop(&AbortReason::FailoverRegion, &mut steps);
    rig.coordinator.set_backlog(Millis(100), A, false);
    assert_eq!(rig.coordinator.next_deadline(), None, "the timer stands still");
}
