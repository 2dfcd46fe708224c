//! The end of a job: stops, savepoints, and what follows when it gives up.

use super::{
    Job, Phase, Stop, TaskRun, TaskState,
    event::{Effect, Outcome, TaskAttempt},
};
use crate::{
    checkpoint::{AbortReason, SavepointPurpose, Step, Trigger},
    ids::{Attempt, CheckpointId, Millis, TaskId},
};

impl Job {
    pub(super) fn on_stop_requested(&mut self, now: Millis, stop: Stop, effects: &mut Vec<Effect>) {
        let refuse = |reason, effects: &mut Vec<Effect>| {
            if let Some(ticket) = stop.savepoint {
                effects.push(Effect::Answer { ticket, result: Err(reason) });
            }
        };
        if !matches!(self.phase, Phase::Active) {
            return refuse(AbortReason::CoordinatorShutdown, effects);
        }
        if self.is_batch && stop.savepoint.is_some() {
            return refuse(AbortReason::BlockingOutputExists, effects);
        }
        if self.is_batch && !self.is_ending() {
            // Its regions cannot be continued half-way.
            let outcome =
                Outcome::Stopped { checkpoint: None, is_last: false, has_savepoint: false };
            return self.give_up(now, outcome, effects);
        }
        if let Some(under_way) = &mut self.stop {
            // Whoever asks again is in more of a hurry: nothing is drained any more.
            under_way.drain &= stop.drain;
            under_way.is_urgent |= stop.savepoint.is_none();
            return refuse(AbortReason::CoordinatorShutdown, effects);
        }
        if self.incidents.is_empty() {
            self.stop = Some(stop);
            self.stop_ticket = stop.savepoint;
            if stop.drain {
                effects.push(Effect::EndInput);
            }
        } else if stop.savepoint.is_some() {
            refuse(AbortReason::NotAllTasksRunning, effects);
        } else {
            // It would only be restarted to be stopped.
            let checkpoint = self.coordinator.last_completed();
            self.give_up(
                now,
                Outcome::Stopped { checkpoint, is_last: false, has_savepoint: false },
                effects,
            );
        }
    }

    /// Somebody wants a checkpoint or a savepoint of the running job.
    pub(super) fn on_checkpoint_requested(
        &mut self,
        now: Millis,
        trigger: Trigger,
        steps: &mut Vec<Step>,
    ) {
        if self.is_batch {
            steps.push(Step::Refused { trigger, reason: AbortReason::BlockingOutputExists });
        } else if matches!(self.phase, Phase::Active) && !self.is_ending() {
            self.coordinator.request(now, trigger, steps);
        } else {
            let reason = AbortReason::CoordinatorShutdown;
            steps.push(Step::Refused { trigger, reason });
        }
    }

    /// Answers whoever waits for a checkpoint or a savepoint, once.
    pub(super) fn answer(
        &mut self,
        trigger: Trigger,
        result: Result<CheckpointId, AbortReason>,
        effects: &mut Vec<Effect>,
    ) {
        let (ticket, is_open) = match trigger {
            Trigger::Requested { ticket }
            | Trigger::Savepoint { ticket, purpose: SavepointPurpose::Keep } => (ticket, true),
            Trigger::Savepoint { ticket, purpose: SavepointPurpose::Stop } => {
                (ticket, self.stop_ticket.take_if(|open| *open == ticket).is_some())
            }
            Trigger::Checkpoint | Trigger::Last => return,
        };
        if is_open {
            effects.push(Effect::Answer { ticket, result });
        }
    }

    /// Ends everything, and then the job.
    pub(super) fn give_up(&mut self, now: Millis, outcome: Outcome, effects: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Cancelling(_) | Phase::Over) {
            return;
        }
        self.phase = Phase::Cancelling(outcome);
        let mut steps = Vec::new();
        self.coordinator.stop(&AbortReason::CoordinatorShutdown, &mut steps);
        self.apply(now, steps, effects);
        self.stop = None;
        if let Some(ticket) = self.stop_ticket.take() {
            let result = Err(AbortReason::CoordinatorShutdown);
            effects.push(Effect::Answer { ticket, result });
        }
        let all: Vec<TaskId> = self.tasks.keys().copied().collect();
        self.cancel(&all, effects);
        self.finish_if_stopped(effects);
    }

    fn finish_if_stopped(&mut self, effects: &mut Vec<Effect>) {
        let is_gone = |run: &TaskRun| matches!(run.state, TaskState::Stopped | TaskState::Finished);
        if let Phase::Cancelling(outcome) = &self.phase
            && self.all(is_gone)
        {
            effects.push(Effect::Finish { outcome: outcome.clone() });
            self.phase = Phase::Over;
        }
    }

    pub(super) fn on_finished(
        &mut self,
        task: TaskId,
        attempt: Attempt,
        effects: &mut Vec<Effect>,
    ) {
        let Some(run) = self.current(task, attempt) else { return };
        if run.state == TaskState::Running {
            run.state = TaskState::Finished;
        }
        if let Phase::Ending { outcome, checkpoint } = &self.phase
            && self.all(|run| run.state == TaskState::Finished)
        {
            if let Some(ticket) = self.stop_ticket.take() {
                effects.push(Effect::Answer { ticket, result: Ok(*checkpoint) });
            }
            effects.push(Effect::Finish { outcome: outcome.clone() });
            self.phase = Phase::Over;
        }
    }

    pub(super) fn on_stopped(&mut self, tasks: &[TaskAttempt], effects: &mut Vec<Effect>) {
        for (task, attempt) in tasks {
            if let Some(run) = self.current(*task, *attempt)
                && run.state == TaskState::Stopping
            {
                run.state = TaskState::Stopped;
            }
        }
        self.finish_if_stopped(effects);
    }
}
