//! A failure: which tasks restart, when, and when the job gives up.

use std::collections::BTreeMap;

use super::{
    IncidentId, Job, Phase, Stop, StopInput, StopSavepoint, TaskState,
    event::{Effect, Outcome, TaskAttempt},
};
use crate::{
    checkpoint::AbortReason,
    failover::{RestartReason, Situation, tasks_to_restart, topology::PartitionId},
    failure::FailureCause,
    ids::{Millis, TaskId},
};

/// What a failure concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escalation {
    /// What the failover strategy says. Approximate exchanges let a task restart without those that it
    /// reads from.
    Task,
    /// These, too.
    Region,
    EveryTask,
    /// The job fails.
    Job,
}

impl Job {
    pub(super) fn on_failure(
        &mut self,
        now: Millis,
        task: Option<TaskAttempt>,
        cause: FailureCause,
        lost: Option<PartitionId>,
        effects: &mut Vec<Effect>,
    ) {
        if matches!(self.phase, Phase::Cancelling(_) | Phase::Over) {
            return;
        }
        // The savepoint is durable, its output is not committed: the job recovers, as in Flink, and
        // the caller that has stopped it learns that it runs on.
        if matches!(self.phase, Phase::Ending { .. })
            && let Some(stop) = self.stop()
            && let Some(ticket) = stop.savepoint.ticket()
        {
            let result = Err(AbortReason::StopFailed { cause: Some(Box::new(cause.clone())) });
            effects.push(Effect::Answer { ticket, result });
            // Who has asked to stop whatever comes of it still wants that.
            let urgent =
                Stop { savepoint: StopSavepoint::NotWanted, input: StopInput::Keep, ..stop };
            self.set_stop(stop.is_urgent.then_some(urgent));
        }
        // What cannot help to repeat is not even counted.
        let verdict = match cause.is_restartable() {
            true => Some(self.restart.on_failure(now, &mut self.random)),
            false => None,
        };
        let checkpoint = self.coordinator.last_completed();
        self.failovers += u32::from(verdict.is_some_and(|verdict| verdict.is_new_attempt));
        let escalation = self.escalation();
        let allowed = verdict.filter(|it| it.can_restart && escalation != Escalation::Job);
        let Some(verdict) = allowed else {
            let task = task.map(|(task, _)| task);
            return self.give_up(now, Outcome::Failed { task, cause, checkpoint }, effects);
        };
        let (delay_ms, is_new_attempt) = (verdict.backoff_ms, verdict.is_new_attempt);
        // It would only be restarted to be stopped.
        if self.stop().is_some_and(|stop| stop.savepoint == StopSavepoint::NotWanted) {
            return self.stop_at_completed(now, effects);
        }
        let mut reasons = self.restart_set(task, lost, escalation);
        if escalation == Escalation::EveryTask {
            for task in self.tasks.keys() {
                reasons.entry(*task).or_insert(RestartReason::Escalated);
            }
        }
        self.phase = Phase::Active { stop: self.stop() };
        let restarting: Vec<TaskId> = reasons.keys().copied().collect();
        self.suspend_checkpoints(now, effects);
        // The end of its last checkpoint may have been that of the job.
        if !self.is_active() {
            return;
        }
        let incident = self.new_incident(now.after(delay_ms));
        self.cancel(&restarting, Some(incident), effects);
        let tasks = reasons;
        let remaining = self.restart.remaining();
        effects.push(Effect::AnnounceRestart {
            task,
            cause,
            delay_ms,
            is_new_attempt,
            remaining,
            tasks,
        });
    }

    /// An incident whose tasks restart together, not before `at`.
    fn new_incident(&mut self, at: Millis) -> IncidentId {
        self.next_incident += 1;
        self.incidents.insert(self.next_incident, at);
        self.next_incident
    }

    /// How far the failovers since the last completed checkpoint have led: restarting the same
    /// region again and again may be what keeps the job from getting on.
    fn escalation(&self) -> Escalation {
        let levels: &[Escalation] = match self.is_approximate {
            true => &[Escalation::Task, Escalation::Region, Escalation::EveryTask],
            false => &[Escalation::Region, Escalation::EveryTask],
        };
        let before = self.failovers.saturating_sub(1);
        let level = self.escalates_after.map_or(0, |bound| before / bound.max(1));
        levels.get(level as usize).copied().unwrap_or(Escalation::Job)
    }

    /// Which tasks restart. A failure that is not one task's, and one while others are closing
    /// already, restarts all.
    fn restart_set(
        &self,
        task: Option<TaskAttempt>,
        lost: Option<PartitionId>,
        escalation: Escalation,
    ) -> BTreeMap<TaskId, RestartReason> {
        let is_ending = matches!(self.phase, Phase::Ending { .. });
        let Some((task, _)) = task.filter(|_| !is_ending) else {
            let every = self.tasks.keys().map(|task| (*task, RestartReason::EveryTask));
            return every.collect();
        };
        let situation = Situation {
            is_lost: &|partition| Some(partition) == lost || self.released.contains(&partition),
            is_created: &|task| self.tasks[&task].state == TaskState::Created,
            is_exact: escalation != Escalation::Task,
        };
        tasks_to_restart(self.failover, &self.topology, task, situation)
    }

    fn suspend_checkpoints(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let mut steps = Vec::new();
        self.coordinator.stop(&AbortReason::FailoverRegion, &mut steps);
        self.apply(now, steps, effects);
    }

    /// Ends those of the tasks that run; the incident, if any, starts all of them again.
    pub(super) fn cancel(
        &mut self,
        tasks: &[TaskId],
        incident: Option<IncidentId>,
        effects: &mut Vec<Effect>,
    ) {
        let mut ending = Vec::new();
        for task in tasks {
            let Some(run) = self.tasks.get_mut(task) else { continue };
            self.coordinator.forget_backlog(*task);
            match run.state {
                TaskState::Starting { .. } | TaskState::Running { .. } => {
                    run.state = TaskState::Stopping { incident };
                    ending.push((*task, run.attempt));
                }
                TaskState::Stopping { .. } => run.state = TaskState::Stopping { incident },
                TaskState::Created | TaskState::Stopped { .. } | TaskState::Finished => {
                    run.state = TaskState::Stopped { incident };
                }
            }
        }
        if !ending.is_empty() {
            effects.push(Effect::CancelTasks { tasks: ending });
        }
    }

    /// True if every task of the incident has stopped.
    pub(super) fn is_stopped(&self, incident: IncidentId) -> bool {
        self.all(|run| run.incident() != Some(incident) || run.is_stopped())
    }

    pub(super) fn restart_what_is_due(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if self.coordinator.is_in_doubt() {
            return;
        }
        let due: Vec<IncidentId> = self
            .incidents
            .iter()
            .filter(|(id, at)| **at <= now && self.is_stopped(**id))
            .map(|(id, _)| *id)
            .collect();
        if !due.is_empty() {
            self.restart.on_restarted();
        }
        for incident in due {
            self.incidents.remove(&incident);
            for (task, run) in &mut self.tasks {
                // What a later incident wants restarts with that one.
                if run.incident() == Some(incident) {
                    run.attempt = run.attempt.next();
                    run.state = TaskState::Created;
                    self.released.retain(|partition| partition.producer != *task);
                }
            }
            let tasks = self.start_ready();
            if !tasks.is_empty() {
                effects.push(self.start(tasks));
            }
        }
    }
}
