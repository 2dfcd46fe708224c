//! Decides when a checkpoint is triggered, when it is complete, and what its failure costs.
//!
//! Semantics are those of Flink's `CheckpointCoordinator` (2.0): the first tick falls at random
//! between the pause and the interval, later ones at a fixed rate; requests queue where too many
//! checkpoints are pending; the pause counts from the last *completion*; a checkpoint is complete
//! once its metadata is durable, and ends the pending ones that are older.
//!
//! **Invariant:** between "every task has acked" and "the metadata's fate is known" a checkpoint
//! is in doubt, and anyone who wants a restore point has to wait ([`Coordinator::is_in_doubt`]).

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    ids::{CheckpointId, Millis, TaskId},
    random::Random,
};

pub mod chain;
pub mod failures;
pub mod request;
pub mod retained;
pub mod retention;

mod trigger;

pub use self::trigger::{Purpose, SavepointPurpose, Trigger};
use self::{
    failures::{FailureCounter, FailureWeight},
    request::{Choice, Load, QUEUE_MAX, Request, RequestQueue},
    retained::{Kind, Retained},
};
pub use crate::failure::AbortReason;

/// When checkpoints are taken and how many may fail. Durations in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointSettings {
    /// The base period; `None` takes no periodic checkpoints.
    pub interval_ms: Option<u64>,
    /// The period while any source works off a backlog, 0: none then; `None`: as at other times.
    pub backlog_interval_ms: Option<u64>,
    /// From the completion of one checkpoint to the next periodic trigger. Flink's default: 0.
    pub min_pause_ms: u64,
    /// From the trigger to the last ack; then the checkpoint has expired. Flink's default: 10 min.
    pub timeout_ms: u64,
    /// Checkpoints that may be pending at once. Flink's default: 1.
    pub concurrent_max: usize,
    /// Consecutive failures that do not yet fail the job; `None`: any number. Flink's default: 0.
    pub tolerable_failures: Option<u32>,
    /// Completed checkpoints that are kept. Flink's default: 1.
    pub retained_max: usize,
    /// `None`: a barrier waits for its turn in every channel. Else it overtakes what lies before it
    /// where it has not arrived everywhere this long after the trigger; 0: at once.
    pub unaligned_after_ms: Option<u64>,
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        Self {
            interval_ms: None,
            backlog_interval_ms: None,
            min_pause_ms: 0,
            timeout_ms: 600_000,
            concurrent_max: 1,
            tolerable_failures: Some(0),
            retained_max: 1,
            unaligned_after_ms: None,
        }
    }
}

/// What the coordinator has decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Send barriers.
    Begin {
        /// The new checkpoint.
        checkpoint: CheckpointId,
        /// Who wants it.
        trigger: Trigger,
    },
    /// Every task has acked: make it durable.
    Persist {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Who wants it.
        trigger: Trigger,
    },
    /// It will never be complete.
    Aborted {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Who wanted it.
        trigger: Trigger,
        /// Why.
        reason: AbortReason,
    },
    /// A request will never begin, or what came of it is of no use any more.
    Refused {
        /// What was wanted.
        trigger: Trigger,
        /// Why not.
        reason: AbortReason,
    },
    /// It is complete; tasks are told unless it is a savepoint.
    Completed {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Who wanted it.
        trigger: Trigger,
    },
    /// A completed checkpoint is not kept any more.
    Subsumed {
        /// That checkpoint.
        checkpoint: CheckpointId,
    },
    /// More checkpoints failed than are tolerated: the job fails.
    Exceeded {
        /// The last of them.
        checkpoint: CheckpointId,
        /// Why it failed.
        reason: AbortReason,
    },
}

#[derive(Debug, Clone)]
struct Pending {
    trigger: Trigger,
    stage: Stage,
}

/// How far a pending checkpoint is.
#[derive(Debug, Clone)]
enum Stage {
    /// Tasks have still to ack it, before the deadline.
    Collecting { missing: BTreeSet<TaskId>, deadline: Millis },
    /// Its metadata is being written.
    Persisting,
}

impl Pending {
    fn is_persisting(&self) -> bool {
        matches!(self.stage, Stage::Persisting)
    }

    /// When it expires; `None` once every task has acked.
    fn deadline(&self) -> Option<Millis> {
        match self.stage {
            Stage::Collecting { deadline, .. } => Some(deadline),
            Stage::Persisting => None,
        }
    }
}

/// Who may ask for a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Schedule {
    /// Nobody: some tasks do not run.
    Suspended,
    /// Users. The job takes no periodic checkpoints, or takes none any more.
    OnRequest,
    /// Users, and the timer at its next tick: `None` while a backlog holds it up.
    Periodic { next_tick: Option<Millis> },
}

/// Follows pending checkpoints, waiting requests, and those that are complete.
#[derive(Debug, Clone)]
pub struct Coordinator {
    settings: CheckpointSettings,
    queue: RequestQueue,
    pending: BTreeMap<CheckpointId, Pending>,
    next_id: CheckpointId,
    next_request: u64,
    schedule: Schedule,
    /// The sources that work off a backlog.
    backlog: BTreeSet<TaskId>,
    retained: Retained,
    last_completed_at: Option<Millis>,
    failures: FailureCounter,
    cleaning: usize,
}

impl Coordinator {
    /// No checkpoint is pending; ids continue after every id in use.
    #[must_use]
    pub fn new(
        settings: CheckpointSettings,
        completed: &[CheckpointId],
        next_id: CheckpointId,
    ) -> Self {
        let (concurrent_max, pause) = (settings.concurrent_max.max(1), settings.min_pause_ms);
        Self {
            queue: RequestQueue::new(concurrent_max, pause, QUEUE_MAX),
            failures: FailureCounter::new(settings.tolerable_failures),
            retained: Retained::new(settings.retained_max, completed),
            settings,
            pending: BTreeMap::new(),
            next_id,
            next_request: 0,
            schedule: Schedule::Suspended,
            backlog: BTreeSet::new(),
            last_completed_at: None,
            cleaning: 0,
        }
    }

    /// The checkpoint to restore from.
    #[must_use]
    pub fn last_completed(&self) -> Option<CheckpointId> {
        // The newest is always kept.
        self.retained.latest()
    }

    /// Completed checkpoints that are kept, oldest first.
    pub fn retained(&self) -> impl Iterator<Item = CheckpointId> {
        self.retained.ids()
    }

    /// True while metadata is being written: the restore point is not known.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        // A savepoint that is being written is no restore point, whatever comes of it.
        self.pending.values().any(|pending| {
            pending.is_persisting() && pending.trigger.purpose() != Purpose::Savepoint
        })
    }

    /// The oldest checkpoint that is neither complete nor given up.
    #[must_use]
    pub fn oldest_pending(&self) -> Option<CheckpointId> {
        self.pending.keys().next().copied()
    }

    /// True while nothing is pending.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// Effective period: never shorter than the pause.
    fn interval_ms(&self) -> Option<u64> {
        let interval = self.settings.interval_ms?;
        let interval = match self.settings.backlog_interval_ms {
            Some(0) if !self.backlog.is_empty() => return None,
            Some(backlog) if !self.backlog.is_empty() => backlog,
            _ => interval,
        };
        Some(interval.max(self.settings.min_pause_ms))
    }

    /// A source works off a backlog from now on, or does not. A tick that is further away than a period
    /// comes earlier; one that is due sooner comes as it would have.
    pub fn set_backlog(&mut self, now: Millis, source: TaskId, is_backlog: bool) {
        match is_backlog {
            true => self.backlog.insert(source),
            false => self.backlog.remove(&source),
        };
        if let (Schedule::Periodic { next_tick }, Some(interval)) =
            (self.schedule, self.interval_ms())
        {
            let due = now.after(interval);
            let next_tick = Some(next_tick.map_or(due, |at| at.min(due)));
            self.schedule = Schedule::Periodic { next_tick };
        }
    }

    /// All tasks run: the first tick falls at random in `[min-pause, interval]`.
    pub fn start(&mut self, now: Millis, random: &mut Random) {
        let pause = self.settings.min_pause_ms;
        self.schedule = match self.settings.interval_ms {
            Some(interval) => {
                let first = now.after(random.between(pause, interval.max(pause)));
                Schedule::Periodic { next_tick: Some(first) }
            }
            None => Schedule::OnRequest,
        };
    }

    /// A source has ended, or is to begin again and will report again.
    pub fn forget_backlog(&mut self, source: TaskId) {
        self.backlog.remove(&source);
    }

    /// Some tasks do not run any more: ends what is pending and drops what waits. What is being
    /// persisted stays in doubt until its fate is known.
    pub fn stop(&mut self, reason: &AbortReason, steps: &mut Vec<Step>) {
        self.schedule = Schedule::Suspended;
        for checkpoint in self.collecting() {
            self.abort(checkpoint, reason.clone(), steps);
        }
        let suspended = AbortReason::CoordinatorSuspend;
        for request in self.queue.clear() {
            steps.push(Step::Refused { trigger: request.trigger, reason: suspended.clone() });
        }
    }

    /// The timer asks no more, and what it has asked for is dropped; users may ask.
    pub fn stop_periodic(&mut self, steps: &mut Vec<Step>) {
        if let Schedule::Periodic { .. } = self.schedule {
            self.schedule = Schedule::OnRequest;
        }
        for request in self.queue.drop_periodic() {
            let reason = AbortReason::PeriodicSchedulerShutdown;
            steps.push(Step::Refused { trigger: request.trigger, reason });
        }
    }

    /// When [`Coordinator::expire`] or [`Coordinator::begin_due`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        let deadlines = self.pending.values().filter_map(Pending::deadline);
        deadlines.chain(self.next_tick()).min()
    }

    /// Gives up what has not been acked in time. What follows from that comes before
    /// [`Coordinator::begin_due`]: the job may fail or end by it.
    pub fn expire(&mut self, now: Millis, steps: &mut Vec<Step>) {
        for checkpoint in self.collecting() {
            if let Stage::Collecting { missing, deadline } = &self.pending[&checkpoint].stage
                && *deadline <= now
            {
                let (task, others) = (missing.first().copied(), missing.len().saturating_sub(1));
                self.abort(checkpoint, AbortReason::Expired { task, others }, steps);
            }
        }
    }

    /// Asks for what is due, begins what may begin.
    pub fn begin_due(&mut self, now: Millis, tasks: &BTreeSet<TaskId>, steps: &mut Vec<Step>) {
        self.tick(now, steps);
        self.begin_waiting(now, tasks, steps);
    }

    fn next_tick(&self) -> Option<Millis> {
        match self.schedule {
            Schedule::Periodic { next_tick } => next_tick,
            Schedule::Suspended | Schedule::OnRequest => None,
        }
    }

    fn tick(&mut self, now: Millis, steps: &mut Vec<Step>) {
        let mut ticks = 0;
        while let Some(at) = self.next_tick().filter(|at| *at <= now) {
            // Ticks that are late come all, as many as the queue could hold anyway.
            ticks += 1;
            let next = |interval| if ticks < QUEUE_MAX { at.after(interval) } else { now.after(1) };
            self.schedule = Schedule::Periodic { next_tick: self.interval_ms().map(next) };
            self.submit(now, Trigger::Checkpoint, false, true, steps);
        }
    }

    /// Somebody wants a checkpoint or a savepoint now.
    pub fn request(&mut self, now: Millis, trigger: Trigger, steps: &mut Vec<Step>) {
        if self.schedule == Schedule::Suspended {
            steps.push(Step::Refused { trigger, reason: AbortReason::NotAllTasksRunning });
            return;
        }
        // Savepoints are always aligned, so they may run beside another that is.
        let is_forced = matches!(trigger, Trigger::Savepoint { .. })
            && self.settings.unaligned_after_ms.is_none();
        self.submit(now, trigger, is_forced, false, steps);
    }

    fn submit(
        &mut self,
        now: Millis,
        trigger: Trigger,
        is_forced: bool,
        is_periodic: bool,
        steps: &mut Vec<Step>,
    ) {
        self.next_request += 1;
        let number = self.next_request;
        let request = Request { trigger, is_forced, is_periodic, at: now, number };
        if let Some(dropped) = self.queue.submit(request) {
            let reason = AbortReason::TooManyRequests;
            steps.push(Step::Refused { trigger: dropped.trigger, reason });
        }
    }

    fn begin_waiting(&mut self, now: Millis, tasks: &BTreeSet<TaskId>, steps: &mut Vec<Step>) {
        loop {
            let load = Load {
                pending: self.pending.len(),
                cleaning: self.cleaning,
                last_completed_at: self.last_completed_at,
            };
            match self.queue.choose(now, load) {
                Choice::Wait => return,
                Choice::Run(request) => self.begin(now, request.trigger, tasks.clone(), steps),
                Choice::TooEarly { dropped, retry_at } => {
                    let reason = AbortReason::MinimumTimeBetweenCheckpoints;
                    steps.push(Step::Refused { trigger: dropped.trigger, reason });
                    if let Schedule::Periodic { next_tick: Some(at) } = &mut self.schedule {
                        *at = retry_at;
                    }
                }
            }
        }
    }

    /// Begins a checkpoint that waits for the acks of `tasks`, whatever else is pending.
    pub fn begin(
        &mut self,
        now: Millis,
        trigger: Trigger,
        tasks: BTreeSet<TaskId>,
        steps: &mut Vec<Step>,
    ) {
        let checkpoint = self.next_id;
        self.next_id = checkpoint.next();
        let deadline = now.after(self.settings.timeout_ms);
        let stage = Stage::Collecting { missing: tasks, deadline };
        self.pending.insert(checkpoint, Pending { trigger, stage });
        steps.push(Step::Begin { checkpoint, trigger });
    }

    /// A task's snapshot is durable. One that is not waited for changes nothing.
    pub fn ack(&mut self, task: TaskId, checkpoint: CheckpointId, steps: &mut Vec<Step>) {
        if let Some(pending) = self.pending.get_mut(&checkpoint)
            && let Stage::Collecting { missing, .. } = &mut pending.stage
            && missing.remove(&task)
            && missing.is_empty()
        {
            pending.stage = Stage::Persisting;
            steps.push(Step::Persist { checkpoint, trigger: pending.trigger });
        }
    }

    /// It is durable, and thereby complete.
    pub fn complete(&mut self, now: Millis, checkpoint: CheckpointId, steps: &mut Vec<Step>) {
        let Some(trigger) = self.persisting(checkpoint) else { return };
        self.pending.remove(&checkpoint);
        if trigger.kind() == Kind::Checkpoint && Some(checkpoint) < self.last_completed() {
            // A newer one was faster, and has said all that this one could say.
            self.cleaning += 1;
            if matches!(trigger, Trigger::Requested { .. }) {
                steps.push(Step::Refused { trigger, reason: AbortReason::Subsumed });
            }
            steps.push(Step::Subsumed { checkpoint });
            return;
        }
        self.last_completed_at = Some(now);
        self.failures.on_success(checkpoint);
        steps.push(Step::Completed { checkpoint, trigger });
        // A savepoint of a running job belongs to the caller that asked for it: it is not restored from,
        // and ends no other.
        if trigger.kind() == Kind::Savepoint {
            return;
        }
        for (subsumed, _) in self.retained.add(checkpoint, trigger.kind()) {
            self.cleaning += 1;
            steps.push(Step::Subsumed { checkpoint: subsumed });
        }
        for older in self.collecting() {
            let is_savepoint = self.pending[&older].trigger.savepoint().is_some();
            if older < checkpoint && !is_savepoint {
                self.abort(older, AbortReason::Subsumed, steps);
            }
        }
    }

    /// The data of a checkpoint that was subsumed or aborted are gone, or written as part of the next.
    pub fn on_cleaned(&mut self) {
        self.cleaning = self.cleaning.saturating_sub(1);
    }

    /// Gives a pending checkpoint up and weighs the failure; does nothing if it is not pending.
    pub fn abort(&mut self, checkpoint: CheckpointId, reason: AbortReason, steps: &mut Vec<Step>) {
        let Some(Pending { trigger, .. }) = self.pending.remove(&checkpoint) else { return };
        // The caller that asked for a savepoint hears of its failure; the job does not fail by it.
        let weight = match trigger.savepoint() {
            Some(_) => FailureWeight::Tolerated,
            None => self.failures.on_failure(Some(checkpoint), &reason),
        };
        self.cleaning += 1;
        steps.push(Step::Aborted { checkpoint, trigger, reason: reason.clone() });
        if weight == FailureWeight::Exceeded {
            steps.push(Step::Exceeded { checkpoint, reason });
        }
    }

    /// True while tasks have still to ack it.
    #[must_use]
    pub fn is_collecting(&self, checkpoint: CheckpointId) -> bool {
        self.pending.get(&checkpoint).is_some_and(|pending| !pending.is_persisting())
    }

    /// Who wanted it, while it is being made durable.
    #[must_use]
    pub fn persisting(&self, checkpoint: CheckpointId) -> Option<Trigger> {
        let pending = self.pending.get(&checkpoint).filter(|pending| pending.is_persisting());
        pending.map(|pending| pending.trigger)
    }

    fn collecting(&self) -> Vec<CheckpointId> {
        let collecting = self.pending.iter().filter(|(_, pending)| !pending.is_persisting());
        collecting.map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests;
