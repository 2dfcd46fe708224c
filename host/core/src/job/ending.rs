//! The end of a job: stops, savepoints, and what follows when it gives up.

use super::{
    Job, Phase, Stop, StopInput, StopSavepoint, TaskRun, TaskState,
    event::{Effect, Outcome, TaskAttempt},
};
use crate::{
    checkpoint::{AbortReason, SavepointPurpose, Step, Trigger},
    failure::FailureCause,
    ids::{Attempt, CheckpointId, Millis, TaskId},
};

/// After a failed last checkpoint, the time until the next try.
const LAST_CHECKPOINT_RETRY_MS: u64 = 1_000;

impl Job {
    pub(super) fn on_stop_requested(&mut self, now: Millis, stop: Stop, effects: &mut Vec<Effect>) {
        let refuse = |reason, effects: &mut Vec<Effect>| {
            if let Some(ticket) = stop.savepoint.ticket() {
                effects.push(Effect::Answer { ticket, result: Err(reason) });
            }
        };
        let has_savepoint = stop.savepoint != StopSavepoint::NotWanted;
        if !self.is_active() {
            return refuse(AbortReason::CoordinatorShutdown, effects);
        }
        if self.is_batch && has_savepoint {
            return refuse(AbortReason::BlockingOutputExists, effects);
        }
        if self.is_batch && !self.is_ending() {
            // Its regions cannot be continued half-way.
            return self.stop_at_completed(now, effects);
        }
        if let Some(mut under_way) = self.stop() {
            // A caller that asks again is in more of a hurry: nothing is drained any more.
            if (under_way.input, stop.input) == (StopInput::Drain, StopInput::Keep) {
                under_way.input = StopInput::DrainGivenUp;
            }
            under_way.is_urgent |= !has_savepoint;
            self.set_stop(Some(under_way));
            return refuse(AbortReason::CoordinatorShutdown, effects);
        }
        if self.incidents.is_empty() {
            self.set_stop(Some(stop));
            if stop.input == StopInput::Drain {
                effects.push(Effect::EndInput);
            }
        } else if has_savepoint {
            refuse(AbortReason::NotAllTasksRunning, effects);
        } else {
            // It would only be restarted to be stopped.
            self.stop_at_completed(now, effects);
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
        } else if self.is_active() && !self.is_ending() {
            self.coordinator.request(now, trigger, steps);
        } else {
            let reason = AbortReason::CoordinatorShutdown;
            steps.push(Step::Refused { trigger, reason });
        }
    }

    /// Answers the caller that waits for a checkpoint or a savepoint, once.
    pub(super) fn answer(
        &mut self,
        trigger: Trigger,
        result: Result<CheckpointId, AbortReason>,
        effects: &mut Vec<Effect>,
    ) {
        match trigger {
            Trigger::Requested { ticket }
            | Trigger::Savepoint { ticket, purpose: SavepointPurpose::Keep } => {
                effects.push(Effect::Answer { ticket, result });
            }
            Trigger::Savepoint { purpose: SavepointPurpose::Stop, .. } => {
                self.answer_stop(result, effects);
            }
            Trigger::Checkpoint | Trigger::Last => {}
        }
    }

    /// Answers the caller that waits for the savepoint of a stop, once.
    fn answer_stop(
        &mut self,
        result: Result<CheckpointId, AbortReason>,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(stop) = self.stop()
            && let Some(ticket) = stop.savepoint.ticket()
        {
            self.set_stop(Some(Stop { savepoint: StopSavepoint::NotWanted, ..stop }));
            effects.push(Effect::Answer { ticket, result });
        }
    }

    /// The last checkpoint is complete and every task runs: they commit it, and the job ends.
    pub(super) fn begin_ending(
        &mut self,
        now: Millis,
        checkpoint: CheckpointId,
        trigger: Trigger,
        effects: &mut Vec<Effect>,
    ) {
        let has_savepoint = matches!(trigger, Trigger::Savepoint { .. });
        if !has_savepoint {
            // A job that was at its end already has no savepoint to show.
            self.answer_stop(Err(AbortReason::CoordinatorShutdown), effects);
        }
        // A job that was asked to stop has finished all the same if nothing was left to do.
        let outcome = if self.all(TaskRun::is_drained) {
            Outcome::Finished
        } else {
            Outcome::Stopped { checkpoint: Some(checkpoint), is_last: true, has_savepoint }
        };
        let stop = self.stop().map(|stop| match stop.savepoint {
            StopSavepoint::Wanted { ticket } => {
                Stop { savepoint: StopSavepoint::Durable { ticket }, ..stop }
            }
            _ => stop,
        });
        self.phase = Phase::Ending { stop, outcome, checkpoint };
        // A caller that still waits for a checkpoint or a savepoint will not get one.
        let mut steps = Vec::new();
        self.coordinator.stop(&AbortReason::CoordinatorShutdown, &mut steps);
        self.apply(now, steps, effects);
    }

    /// The last checkpoint of an active job has failed.
    pub(super) fn on_last_aborted(
        &mut self,
        now: Millis,
        trigger: Trigger,
        reason: AbortReason,
        effects: &mut Vec<Effect>,
    ) {
        let is_restarting = reason == AbortReason::FailoverRegion;
        let stop = self.stop();
        if is_restarting && stop.is_some_and(|stop| stop.input == StopInput::Drain) {
            // The drain continues when the tasks run again, and so does the wait for its savepoint.
            return;
        }
        self.last_checkpoint_from = now.after(LAST_CHECKPOINT_RETRY_MS);
        let Some(stop) = stop else { return };
        let has_savepoint = stop.savepoint != StopSavepoint::NotWanted;
        if has_savepoint && trigger == Trigger::Last && !is_restarting {
            // The stop came when this one was under way: its own savepoint is the next try.
            return;
        }
        self.answer_stop(Err(reason.clone()), effects);
        match (has_savepoint, stop.is_urgent, stop.input) {
            // The drain has failed, and any checkpoint from now on would hold the end of the input
            // as if it had not.
            (true, true, StopInput::Drain | StopInput::DrainGivenUp) => {
                self.stop_at_completed(now, effects);
            }
            // Who has asked again wants no savepoint: the next try is without one.
            (true, true, StopInput::Keep) => {}
            // The sources have ended: only a restart from before brings the rest of their input.
            (_, _, StopInput::Drain) | (true, false, StopInput::DrainGivenUp) => {
                self.set_stop(None);
                let cause = FailureCause::CheckpointsFailed { checkpoint: None, reason };
                self.on_failure(now, None, cause, None, effects);
            }
            // The caller that wanted a savepoint has its answer; the job continues as before.
            (true, false, StopInput::Keep) => {
                self.set_stop(None);
                if !is_restarting && self.all(TaskRun::is_running) {
                    self.coordinator.start(now, &mut self.random);
                }
            }
            // The last checkpoint of a stop failed: end all the same, from the newest one.
            (false, _, _) if !is_restarting => self.stop_at_completed(now, effects),
            (false, _, _) => {}
        }
    }

    /// Ends the job without a last checkpoint.
    pub(super) fn stop_at_completed(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let checkpoint = self.coordinator.last_completed();
        let outcome = Outcome::Stopped { checkpoint, is_last: false, has_savepoint: false };
        self.give_up(now, outcome, effects);
    }

    /// Ends everything, and then the job.
    pub(super) fn give_up(&mut self, now: Millis, outcome: Outcome, effects: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Cancelling(_) | Phase::Over) {
            return;
        }
        let ticket = self.stop().and_then(|stop| stop.savepoint.ticket());
        self.phase = Phase::Cancelling(outcome);
        let mut steps = Vec::new();
        self.coordinator.stop(&AbortReason::CoordinatorShutdown, &mut steps);
        self.apply(now, steps, effects);
        if let Some(ticket) = ticket {
            let result = Err(AbortReason::CoordinatorShutdown);
            effects.push(Effect::Answer { ticket, result });
        }
        let all: Vec<TaskId> = self.tasks.keys().copied().collect();
        self.cancel(&all, None, effects);
        self.finish_if_stopped(effects);
    }

    fn finish_if_stopped(&mut self, effects: &mut Vec<Effect>) {
        let is_gone = |run: &TaskRun| run.is_stopped() || run.state == TaskState::Finished;
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
        if run.is_running() {
            run.state = TaskState::Finished;
        }
        if let Phase::Ending { stop, outcome, checkpoint } = &self.phase
            && self.all(|run| run.state == TaskState::Finished)
        {
            if let Some(ticket) = stop.and_then(|stop| stop.savepoint.ticket()) {
                effects.push(Effect::Answer { ticket, result: Ok(*checkpoint) });
            }
            effects.push(Effect::Finish { outcome: outcome.clone() });
            self.phase = Phase::Over;
        }
    }

    pub(super) fn on_stopped(&mut self, tasks: &[TaskAttempt], effects: &mut Vec<Effect>) {
        for (task, attempt) in tasks {
            if let Some(run) = self.current(*task, *attempt)
                && let TaskState::Stopping { incident } = run.state
            {
                run.state = TaskState::Stopped { incident };
            }
        }
        self.finish_if_stopped(effects);
    }
}
