//! Composes the decisions of a job: one `step(now, Event, &mut Vec<Effect>)` for all of it.
//!
//! The shell performs effects and reports events; it decides nothing. Every message of a task
//! carries its attempt, and one of an earlier attempt is ignored.
//!
//! **Invariant:** the restore point is chosen only after the fate of a manifest in flight is
//! known. Restarting from checkpoint `n - 1` while the manifest of `n` turns out durable would
//! commit the sinks' records of `n` and then produce them again.

use std::collections::BTreeSet;

use crate::{
    checkpoint::{CheckpointSettings, Coordinator, DiscardReason, FailureWeight, Purpose},
    failure::FailureCause,
    ids::{Attempt, CheckpointId, Millis, TaskId},
    random::Random,
    restart::{RestartDecision, RestartState, RestartStrategy},
};

/// After a failed last checkpoint, the time until the next try.
const LAST_CHECKPOINT_RETRY_MS: u64 = 1_000;

/// Everything that can happen to a job, as seen by the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A deadline has passed.
    Tick,
    /// Every task of the attempt runs.
    TasksStarted {
        /// The attempt that was to be started.
        attempt: Attempt,
    },
    /// A task has processed the end of all its inputs. It still answers barriers.
    TaskDrained {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
    },
    /// A task's snapshot is durable.
    SnapshotAcked {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
        /// The checkpoint the snapshot belongs to.
        checkpoint: CheckpointId,
    },
    /// A task could not take or store its snapshot.
    SnapshotDeclined {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
        /// The checkpoint it declines.
        checkpoint: CheckpointId,
        /// Why.
        message: String,
    },
    /// The manifest is written and flushed.
    ManifestDurable {
        /// The checkpoint that is complete by this.
        checkpoint: CheckpointId,
    },
    /// It is known that the manifest is not in the storage.
    ManifestLost {
        /// The checkpoint that will never complete.
        checkpoint: CheckpointId,
        /// The storage's reason.
        message: String,
    },
    /// A task has ended by a failure.
    TaskFailed {
        /// The task; `None` for a failure that is not one task's (it could not be started).
        task: Option<TaskId>,
        /// Its attempt.
        attempt: Attempt,
        /// What ended it.
        cause: FailureCause,
    },
    /// A task has committed the last checkpoint and closed.
    TaskFinished {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
    },
    /// After `CancelTasks`: nothing of the attempt runs any more.
    TasksStopped {
        /// The attempt that has ended.
        attempt: Attempt,
    },
    /// Someone wants the job to take a last checkpoint and end.
    StopRequested,
}

/// Everything the core can ask the shell to do. Order within one step matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Instantiate every task, from a checkpoint or empty. Answer: `TasksStarted`.
    StartTasks {
        /// The attempt that the tasks carry in everything they send.
        attempt: Attempt,
        /// Whose snapshots they get.
        restore_from: Option<CheckpointId>,
    },
    /// Send a barrier from every source. Answers: `SnapshotAcked` or `SnapshotDeclined`.
    InjectBarrier {
        /// The checkpoint that begins.
        checkpoint: CheckpointId,
        /// The attempt that takes it.
        attempt: Attempt,
        /// Whether sources go on behind the barrier.
        purpose: Purpose,
    },
    /// Write the manifest and flush. Answer: `ManifestDurable` or `ManifestLost`.
    PersistManifest {
        /// The checkpoint whose snapshots are all durable.
        checkpoint: CheckpointId,
    },
    /// Tell the tasks that the checkpoint is complete, so that sinks commit.
    NotifyComplete {
        /// The completed checkpoint.
        checkpoint: CheckpointId,
        /// The attempt to tell.
        attempt: Attempt,
        /// After the last one, tasks close and answer `TaskFinished`.
        purpose: Purpose,
    },
    /// Forget a checkpoint: unblock tasks that align for it, drop what was stored for it.
    Discard {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Why it is not needed.
        reason: DiscardReason,
    },
    /// End every task of the attempt. Answer: `TasksStopped`.
    CancelTasks {
        /// The attempt to end.
        attempt: Attempt,
    },
    /// Tell people that a failure leads to a restart.
    AnnounceRestart {
        /// The task that failed, if it was one.
        task: Option<TaskId>,
        /// What ended it.
        cause: FailureCause,
        /// When the tasks start again, counted from now.
        delay_ms: u64,
    },
    /// The job is over.
    Finish {
        /// How.
        outcome: Outcome,
    },
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every input was processed and every sink has committed.
    Finished,
    /// Stopped on request; it resumes from this checkpoint.
    Stopped {
        /// The newest completed checkpoint.
        checkpoint: Option<CheckpointId>,
        /// False where the last checkpoint failed, so that the newest is an older one.
        is_last: bool,
    },
    /// Failed, and the restart strategy allows no restart.
    Failed {
        /// The task that failed, if it was one.
        task: Option<TaskId>,
        /// The failure that was one too many.
        cause: FailureCause,
        /// The newest completed checkpoint.
        checkpoint: Option<CheckpointId>,
    },
}

/// What a job is, as far as decisions go.
#[derive(Debug, Clone)]
pub struct JobSettings {
    /// Every task of the job.
    pub tasks: BTreeSet<TaskId>,
    /// When checkpoints are taken.
    pub checkpoint: CheckpointSettings,
    /// What a failure leads to.
    pub restart: RestartStrategy,
    /// Seeds jitter and the first trigger.
    pub seed: u64,
}

/// Where a job begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// The completed checkpoint to restore, if there is one.
    pub checkpoint: Option<CheckpointId>,
    /// An id above every one ever used by the job.
    pub next_id: CheckpointId,
}

impl Default for Resume {
    fn default() -> Self {
        Self { checkpoint: None, next_id: CheckpointId(1) }
    }
}

#[derive(Debug, Clone)]
enum Phase {
    /// Some tasks run already, and a short input may have ended before the last one does.
    Starting {
        drained: BTreeSet<TaskId>,
    },
    Running {
        drained: BTreeSet<TaskId>,
        /// After a failed last checkpoint: not before this.
        retry_at: Option<Millis>,
    },
    /// The last checkpoint is complete; tasks commit it and close.
    Ending {
        missing: BTreeSet<TaskId>,
        outcome: Outcome,
    },
    /// The delay runs while the tasks are being cancelled; both must be over.
    Restarting {
        restart_at: Millis,
        is_stopped: bool,
    },
    Cancelling {
        outcome: Outcome,
    },
    Over,
}

impl Phase {
    fn starting() -> Self {
        Self::Starting { drained: BTreeSet::new() }
    }
}

/// The decisions of one running job.
#[derive(Debug, Clone)]
pub struct Job {
    tasks: BTreeSet<TaskId>,
    coordinator: Coordinator,
    restart: RestartState,
    random: Random,
    attempt: Attempt,
    phase: Phase,
    is_stop_requested: bool,
}

impl Job {
    /// A job whose tasks are to be started: perform the effect that is given back.
    #[must_use]
    pub fn new(settings: JobSettings, resume: Resume) -> (Self, Effect) {
        let JobSettings { tasks, checkpoint, restart, seed } = settings;
        let job = Self {
            tasks,
            coordinator: Coordinator::new(checkpoint, resume.checkpoint, resume.next_id),
            restart: RestartState::new(restart),
            random: Random::new(seed),
            attempt: Attempt(0),
            phase: Phase::starting(),
            is_stop_requested: false,
        };
        let effect = Effect::StartTasks { attempt: job.attempt, restore_from: resume.checkpoint };
        (job, effect)
    }

    /// The attempt that runs or is about to.
    #[must_use]
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// The checkpoint a restart would restore.
    #[must_use]
    pub fn last_completed(&self) -> Option<CheckpointId> {
        self.coordinator.last_completed()
    }

    /// True once `Finish` has been given out.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// When to send a `Tick` at the latest; `None` where only an event can change anything.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        match &self.phase {
            Phase::Running { .. } => {
                let candidates =
                    [self.coordinator.expires_at(), self.periodic_at(), self.retry_at()];
                candidates.into_iter().flatten().min()
            }
            Phase::Restarting { restart_at, is_stopped: true }
                if !self.coordinator.is_in_doubt() =>
            {
                Some(*restart_at)
            }
            _ => None,
        }
    }

    /// Takes one event in and gives the effects out, in the order they are to be performed.
    pub fn step(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Tick => {}
            Event::TasksStarted { attempt } => self.on_started(now, attempt),
            Event::TaskDrained { task, attempt } => self.on_drained(task, attempt),
            Event::SnapshotAcked { task, attempt, checkpoint } => {
                if attempt == self.attempt
                    && let Some(checkpoint) = self.coordinator.ack(task, checkpoint)
                {
                    effects.push(Effect::PersistManifest { checkpoint });
                }
            }
            Event::SnapshotDeclined { task, attempt, checkpoint, message } => {
                if attempt == self.attempt && self.coordinator.collecting() == Some(checkpoint) {
                    let reason = DiscardReason::Declined { task, message };
                    self.fail_checkpoint(now, checkpoint, reason, effects);
                }
            }
            Event::ManifestDurable { checkpoint } => self.on_durable(now, checkpoint, effects),
            Event::ManifestLost { checkpoint, message } => {
                if self.coordinator.persisting() == Some(checkpoint) {
                    let reason = DiscardReason::ManifestLost { message };
                    self.fail_checkpoint(now, checkpoint, reason, effects);
                }
            }
            Event::TaskFailed { task, attempt, cause } => {
                if attempt == self.attempt {
                    self.on_failure(now, task, cause, effects);
                }
            }
            Event::TaskFinished { task, attempt } => self.on_finished(task, attempt, effects),
            Event::TasksStopped { attempt } => self.on_stopped(attempt, effects),
            Event::StopRequested => self.on_stop_requested(effects),
        }
        self.act_on_time(now, effects);
    }

    /// What is due now, whatever the event was.
    fn act_on_time(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if self.coordinator.expires_at().is_some_and(|at| at <= now)
            && let Some(checkpoint) = self.coordinator.collecting()
        {
            self.fail_checkpoint(now, checkpoint, DiscardReason::Expired, effects);
        }
        // The expiry may have ended the phase, so look only now.
        match &self.phase {
            Phase::Running { .. } => {
                if self.wants_last() && self.retry_at().is_none_or(|at| at <= now) {
                    self.trigger(now, Purpose::Last, effects);
                } else if self.periodic_at().is_some_and(|at| at <= now) {
                    self.trigger(now, Purpose::Periodic, effects);
                }
            }
            Phase::Restarting { restart_at, is_stopped: true }
                if *restart_at <= now && !self.coordinator.is_in_doubt() =>
            {
                self.attempt = self.attempt.next();
                self.phase = Phase::starting();
                let restore_from = self.coordinator.last_completed();
                effects.push(Effect::StartTasks { attempt: self.attempt, restore_from });
            }
            _ => {}
        }
    }

    /// A job that is to end takes no more periodic checkpoints.
    fn periodic_at(&self) -> Option<Millis> {
        self.coordinator.trigger_at().filter(|_| !self.is_ending())
    }

    fn retry_at(&self) -> Option<Millis> {
        match &self.phase {
            Phase::Running { retry_at, .. } if self.wants_last() => *retry_at,
            _ => None,
        }
    }

    fn is_ending(&self) -> bool {
        self.is_stop_requested
            || matches!(&self.phase, Phase::Running { drained, .. } if *drained == self.tasks)
    }

    fn wants_last(&self) -> bool {
        self.is_ending()
            && self.coordinator.is_idle()
            && matches!(self.phase, Phase::Running { .. })
    }

    fn trigger(&mut self, now: Millis, purpose: Purpose, effects: &mut Vec<Effect>) {
        let checkpoint = self.coordinator.trigger(now, purpose, self.tasks.clone());
        effects.push(Effect::InjectBarrier { checkpoint, attempt: self.attempt, purpose });
    }

    fn on_started(&mut self, now: Millis, attempt: Attempt) {
        if attempt == self.attempt
            && let Phase::Starting { drained } = &mut self.phase
        {
            let drained = std::mem::take(drained);
            self.phase = Phase::Running { drained, retry_at: None };
            self.coordinator.start(now, &mut self.random);
        }
    }

    fn on_drained(&mut self, task: TaskId, attempt: Attempt) {
        if attempt == self.attempt
            && let Phase::Starting { drained } | Phase::Running { drained, .. } = &mut self.phase
        {
            drained.insert(task);
        }
    }

    fn on_durable(&mut self, now: Millis, checkpoint: CheckpointId, effects: &mut Vec<Effect>) {
        let Some((purpose, subsumed)) = self.coordinator.complete(now, checkpoint) else { return };
        if matches!(self.phase, Phase::Running { .. }) {
            effects.push(Effect::NotifyComplete { checkpoint, attempt: self.attempt, purpose });
            if purpose == Purpose::Last {
                let outcome = self.outcome_of_last(checkpoint);
                self.phase = Phase::Ending { missing: self.tasks.clone(), outcome };
            }
        }
        if let Some(subsumed) = subsumed {
            let reason = DiscardReason::Subsumed;
            effects.push(Effect::Discard { checkpoint: subsumed, reason });
        }
    }

    /// A job that was asked to stop has finished all the same if nothing was left to do.
    fn outcome_of_last(&self, checkpoint: CheckpointId) -> Outcome {
        match &self.phase {
            Phase::Running { drained, .. } if *drained == self.tasks => Outcome::Finished,
            _ => Outcome::Stopped { checkpoint: Some(checkpoint), is_last: true },
        }
    }

    fn fail_checkpoint(
        &mut self,
        now: Millis,
        checkpoint: CheckpointId,
        reason: DiscardReason,
        effects: &mut Vec<Effect>,
    ) {
        let message = reason.message();
        let weight = self.coordinator.fail(&reason);
        effects.push(Effect::Discard { checkpoint, reason });
        let Phase::Running { retry_at, .. } = &mut self.phase else { return };
        *retry_at = Some(now.after(LAST_CHECKPOINT_RETRY_MS));
        if self.is_stop_requested {
            self.cancel_for_stop(effects);
        } else if weight == FailureWeight::Exceeded {
            let message = format!("checkpoint {checkpoint}: {message}");
            self.on_failure(now, None, FailureCause::CheckpointsFailed { message }, effects);
        }
    }

    fn on_failure(
        &mut self,
        now: Millis,
        task: Option<TaskId>,
        cause: FailureCause,
        effects: &mut Vec<Effect>,
    ) {
        // While the tasks are being cancelled, further failures belong to the same incident.
        if matches!(self.phase, Phase::Restarting { .. } | Phase::Cancelling { .. } | Phase::Over) {
            return;
        }
        if let Some(checkpoint) = self.coordinator.collecting() {
            let reason = DiscardReason::TasksRestarted;
            self.coordinator.fail(&reason);
            effects.push(Effect::Discard { checkpoint, reason });
        }
        effects.push(Effect::CancelTasks { attempt: self.attempt });
        let decision = match cause.is_restartable() {
            true => self.restart.on_failure(now, &mut self.random).decision,
            false => RestartDecision::GiveUp,
        };
        let checkpoint = self.coordinator.last_completed();
        self.phase = match decision {
            // It would only be restarted to be stopped.
            RestartDecision::RestartAfter(_) if self.is_stop_requested => {
                Phase::Cancelling { outcome: Outcome::Stopped { checkpoint, is_last: false } }
            }
            RestartDecision::RestartAfter(delay_ms) => {
                effects.push(Effect::AnnounceRestart { task, cause, delay_ms });
                Phase::Restarting { restart_at: now.after(delay_ms), is_stopped: false }
            }
            RestartDecision::GiveUp => {
                Phase::Cancelling { outcome: Outcome::Failed { task, cause, checkpoint } }
            }
        };
    }

    fn on_finished(&mut self, task: TaskId, attempt: Attempt, effects: &mut Vec<Effect>) {
        if attempt != self.attempt {
            return;
        }
        if let Phase::Ending { missing, outcome } = &mut self.phase {
            missing.remove(&task);
            if missing.is_empty() {
                effects.push(Effect::Finish { outcome: outcome.clone() });
                self.phase = Phase::Over;
            }
        }
    }

    fn on_stopped(&mut self, attempt: Attempt, effects: &mut Vec<Effect>) {
        if attempt != self.attempt {
            return;
        }
        match &mut self.phase {
            Phase::Restarting { is_stopped, .. } => *is_stopped = true,
            Phase::Cancelling { outcome } => {
                effects.push(Effect::Finish { outcome: outcome.clone() });
                self.phase = Phase::Over;
            }
            _ => {}
        }
    }

    fn on_stop_requested(&mut self, effects: &mut Vec<Effect>) {
        self.is_stop_requested = true;
        if let Phase::Restarting { is_stopped, .. } = self.phase {
            let checkpoint = self.coordinator.last_completed();
            let outcome = Outcome::Stopped { checkpoint, is_last: false };
            if is_stopped {
                effects.push(Effect::Finish { outcome });
                self.phase = Phase::Over;
            } else {
                self.phase = Phase::Cancelling { outcome };
            }
        }
    }

    /// The last checkpoint of a stop failed: end all the same, from the newest completed one.
    fn cancel_for_stop(&mut self, effects: &mut Vec<Effect>) {
        let checkpoint = self.coordinator.last_completed();
        effects.push(Effect::CancelTasks { attempt: self.attempt });
        self.phase = Phase::Cancelling { outcome: Outcome::Stopped { checkpoint, is_last: false } };
    }
}

#[cfg(test)]
mod tests;
