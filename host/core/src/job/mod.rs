//! Composes the decisions of a job: one `step(now, Event, &mut Vec<Effect>)` for all of it.
//!
//! The shell performs effects and reports events; it decides nothing. Every message of a task
//! carries its attempt, and one of an earlier attempt is ignored. A failure makes an *incident*:
//! the tasks that restart together, after a delay, once all of them have stopped. A task that a
//! later incident wants as well restarts with that one (Flink: vertex versions).
//!
//! **Invariant:** the restore point is chosen only after the fate of metadata in flight is
//! known. Restarting from checkpoint `n - 1` while the metadata of `n` turns out durable would
//! commit the sinks' records of `n` and then produce them again.

mod ending;
mod event;
mod failover;
mod regions;
mod settings;

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    checkpoint::{AbortReason, Coordinator, Purpose, SavepointPurpose, Step, Trigger},
    exchange::ExchangeType,
    failover::{
        FailoverStrategy,
        topology::{PartitionId, Topology},
    },
    failure::FailureCause,
    ids::{Attempt, CheckpointId, Millis, TaskId},
    random::Random,
    restart::RestartState,
};

pub use self::{
    event::{Effect, Event, Outcome, TaskAttempt},
    settings::{JobSettings, Resume},
};

/// What the core knows of a task.
#[derive(Debug, Clone)]
struct TaskRun {
    attempt: Attempt,
    state: TaskState,
}

/// Names an incident; ascends.
type IncidentId = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TaskState {
    /// Waits for what its region reads to be there.
    Created,
    /// Being started with others. It may be drained before all of them run.
    Starting { is_drained: bool },
    /// Processes records, or has processed the end of its inputs.
    Running { is_drained: bool },
    /// Being cancelled. The incident starts it again; without one, the job ends.
    Stopping { incident: Option<IncidentId> },
    /// Gone, and otherwise as above.
    Stopped { incident: Option<IncidentId> },
    /// Has committed the last checkpoint and closed.
    Finished,
}

impl TaskRun {
    fn has_begun(&self) -> bool {
        matches!(self.state, TaskState::Starting { .. } | TaskState::Running { .. })
    }

    fn is_running(&self) -> bool {
        matches!(self.state, TaskState::Running { .. })
    }

    fn is_stopping(&self) -> bool {
        matches!(self.state, TaskState::Stopping { .. })
    }

    fn is_stopped(&self) -> bool {
        matches!(self.state, TaskState::Stopped { .. })
    }

    /// It has processed the end of its inputs, and no restart has taken that back.
    fn is_drained(&self) -> bool {
        match self.state {
            TaskState::Starting { is_drained } | TaskState::Running { is_drained } => is_drained,
            _ => false,
        }
    }

    /// The incident that starts it again.
    fn incident(&self) -> Option<IncidentId> {
        match self.state {
            TaskState::Stopping { incident } | TaskState::Stopped { incident } => incident,
            _ => None,
        }
    }
}

#[derive(Debug, Clone)]
enum Phase {
    /// Tasks run, start or restart; somebody may have asked for a stop.
    Active {
        stop: Option<Stop>,
    },
    /// The last checkpoint is complete; tasks commit it and close. A failure leads back.
    Ending {
        stop: Option<Stop>,
        outcome: Outcome,
        checkpoint: CheckpointId,
    },
    /// Everything is being cancelled.
    Cancelling(Outcome),
    Over,
}

/// A stop that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stop {
    savepoint: StopSavepoint,
    input: StopInput,
    /// Somebody asked again, without a savepoint: the job ends whatever comes of this one.
    is_urgent: bool,
}

/// The savepoint of a stop, and who waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopSavepoint {
    NotWanted,
    /// To be taken, or being taken.
    Wanted {
        ticket: u64,
    },
    /// Durable, but the sinks have not committed what it holds.
    Durable {
        ticket: u64,
    },
}

impl StopSavepoint {
    fn ticket(self) -> Option<u64> {
        match self {
            Self::NotWanted => None,
            Self::Wanted { ticket } | Self::Durable { ticket } => Some(ticket),
        }
    }
}

/// What a stop does with the input that was not read yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopInput {
    /// Leaves it for the next run.
    Keep,
    /// Makes sources end, and waits until everything is processed.
    Drain,
    /// Has made sources end, and waits no longer: a checkpoint from now on holds the end of their
    /// input as if they had read all of it.
    DrainGivenUp,
}

/// The decisions of one running job.
#[derive(Debug, Clone)]
pub struct Job {
    tasks: BTreeMap<TaskId, TaskRun>,
    topology: Topology,
    failover: FailoverStrategy,
    coordinator: Coordinator,
    restart: RestartState,
    escalates_after: Option<u32>,
    /// Failovers since the last completed checkpoint.
    failovers: u32,
    random: Random,
    phase: Phase,
    /// When each incident's delay is over.
    incidents: BTreeMap<IncidentId, Millis>,
    next_incident: IncidentId,
    /// The last checkpoint is not begun before this: the one before it may have failed.
    last_checkpoint_from: Millis,
    /// Some regions read result partitions: they run one after the other, and no checkpoint but the
    /// last holds the state of the job.
    is_batch: bool,
    /// Some tasks may restart without those that they read from.
    is_approximate: bool,
    /// Partitions that were given up because every reader had finished.
    released: BTreeSet<PartitionId>,
    /// The newest checkpoint that was given up.
    given_up: Option<CheckpointId>,
}

impl Job {
    /// A job whose tasks are to be started: perform the effect that is given back.
    #[must_use]
    pub fn new(settings: JobSettings, resume: Resume) -> (Self, Effect) {
        let JobSettings {
            graph,
            failover,
            checkpoint,
            restart,
            is_merging_failures,
            escalates_after,
            seed,
        } = settings;
        let fresh = |task| {
            let (attempt, state) = (Attempt(0), TaskState::Created);
            (task, TaskRun { attempt, state })
        };
        let is_batch = graph.has_exchange(ExchangeType::has_partition);
        let is_approximate = graph.has_exchange(ExchangeType::is_approximate);
        let mut job = Self {
            tasks: graph.tasks().into_iter().map(fresh).collect(),
            topology: Topology::new(&graph),
            failover,
            coordinator: Coordinator::new(checkpoint, &resume.completed, resume.next_id),
            restart: RestartState::new(restart).merging(is_merging_failures),
            escalates_after,
            failovers: 0,
            random: Random::new(seed),
            phase: Phase::Active { stop: None },
            incidents: BTreeMap::new(),
            next_incident: 0,
            last_checkpoint_from: Millis(0),
            is_batch,
            is_approximate,
            released: BTreeSet::new(),
            given_up: None,
        };
        let tasks = job.start_ready();
        let first = job.start(tasks);
        (job, first)
    }

    /// Starts tasks, as of the newest completed checkpoint.
    fn start(&self, tasks: Vec<TaskAttempt>) -> Effect {
        let restore_from = self.coordinator.last_completed();
        Effect::StartTasks { tasks, restore_from, ignore_up_to: self.given_up }
    }

    /// The attempt of a task that runs or is about to.
    #[must_use]
    pub fn attempt(&self, task: TaskId) -> Option<Attempt> {
        self.tasks.get(&task).map(|run| run.attempt)
    }

    /// True while every task runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.all(TaskRun::is_running)
    }

    /// True once `Finish` has been given out.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// When to send a `Tick` at the latest; `None` where only an event can change anything.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        if !self.is_active() {
            return None;
        }
        let last_at = self.wants_last().then_some(self.last_checkpoint_from);
        let incidents = self.incidents.iter().filter(|(id, _)| self.is_stopped(**id));
        let restart_at = incidents.map(|(_, at)| *at).min();
        let restart_at = restart_at.filter(|_| !self.coordinator.is_in_doubt());
        [self.coordinator.next_deadline(), last_at, restart_at].into_iter().flatten().min()
    }

    /// Takes one event in and gives the effects out, in the order they are to be performed.
    pub fn step(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        let mut steps = Vec::new();
        match event {
            Event::Tick => {}
            Event::TasksStarted { tasks } => self.on_started(now, &tasks, effects),
            Event::TaskDrained { task, attempt } => self.on_drained(now, task, attempt, effects),
            Event::BacklogChanged { task, attempt, is_backlog } => {
                if self.current(task, attempt).is_some_and(|run| !run.is_stopping()) {
                    self.coordinator.set_backlog(now, task, is_backlog);
                }
            }
            Event::SnapshotAcked { task, attempt, checkpoint } => {
                if self.current(task, attempt).is_some() {
                    self.coordinator.ack(task, checkpoint, &mut steps);
                }
            }
            Event::SnapshotDeclined { task, attempt, checkpoint, reason } => {
                let is_current = self.current(task, attempt).is_some();
                if is_current && self.coordinator.is_collecting(checkpoint) {
                    self.coordinator.abort(checkpoint, reason, &mut steps);
                }
            }
            Event::MetadataDurable { checkpoint } => {
                self.coordinator.complete(now, checkpoint, &mut steps);
            }
            Event::MetadataLost { checkpoint, error }
            | Event::SavepointLost { checkpoint, error } => {
                if self.coordinator.persisting(checkpoint).is_some() {
                    let reason = AbortReason::NotFinalized(error);
                    self.coordinator.abort(checkpoint, reason, &mut steps);
                }
            }
            Event::SavepointDurable { checkpoint } => {
                self.on_savepoint_durable(now, checkpoint, &mut steps, effects);
            }
            Event::CheckpointCleaned => self.coordinator.on_cleaned(),
            Event::TaskFailed { task, cause, lost } => {
                let is_current = task.is_none_or(|(task, attempt)| {
                    self.current(task, attempt).is_some_and(|run| !run.is_stopping())
                });
                if is_current {
                    self.on_failure(now, task, cause, lost, effects);
                }
            }
            Event::TaskFinished { task, attempt } => self.on_finished(task, attempt, effects),
            Event::TasksStopped { tasks } => self.on_stopped(&tasks, effects),
            Event::SavepointRequested { ticket } => {
                let trigger = Trigger::Savepoint { ticket, purpose: SavepointPurpose::Keep };
                self.on_checkpoint_requested(now, trigger, &mut steps);
            }
            Event::CheckpointRequested { ticket } => {
                let trigger = Trigger::Requested { ticket };
                self.on_checkpoint_requested(now, trigger, &mut steps);
            }
            Event::StopRequested { savepoint, drain } => {
                let savepoint = savepoint
                    .map_or(StopSavepoint::NotWanted, |ticket| StopSavepoint::Wanted { ticket });
                let input = if drain { StopInput::Drain } else { StopInput::Keep };
                let stop = Stop { savepoint, input, is_urgent: false };
                self.on_stop_requested(now, stop, effects);
            }
            Event::CancelRequested => {
                let checkpoint = self.coordinator.last_completed();
                self.give_up(now, Outcome::Canceled { checkpoint }, effects);
            }
        }
        self.apply(now, steps, effects);
        self.act_on_time(now, effects);
    }

    /// A task that runs in this attempt.
    fn current(&mut self, task: TaskId, attempt: Attempt) -> Option<&mut TaskRun> {
        let run = self.tasks.get_mut(&task).filter(|run| run.attempt == attempt)?;
        (!run.is_stopped()).then_some(run)
    }

    fn is_active(&self) -> bool {
        matches!(self.phase, Phase::Active { .. })
    }

    /// The stop that is under way.
    fn stop(&self) -> Option<Stop> {
        match self.phase {
            Phase::Active { stop } | Phase::Ending { stop, .. } => stop,
            Phase::Cancelling(_) | Phase::Over => None,
        }
    }

    fn set_stop(&mut self, new: Option<Stop>) {
        if let Phase::Active { stop } | Phase::Ending { stop, .. } = &mut self.phase {
            *stop = new;
        }
    }

    fn task_ids(&self) -> BTreeSet<TaskId> {
        self.tasks.keys().copied().collect()
    }

    fn all(&self, is: impl Fn(&TaskRun) -> bool) -> bool {
        self.tasks.values().all(is)
    }

    /// What is due now, whatever the event was.
    fn act_on_time(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if !self.is_active() {
            return;
        }
        let mut steps = Vec::new();
        self.coordinator.expire(now, &mut steps);
        self.apply(now, std::mem::take(&mut steps), effects);
        if !self.is_active() {
            return;
        }
        // Whatever is drained early must not be restored as if its input had ended there.
        if self.is_ending() || self.stop().is_some() {
            self.coordinator.stop_periodic(&mut steps);
        }
        let tasks = self.task_ids();
        self.coordinator.begin_due(now, &tasks, &mut steps);
        self.apply(now, std::mem::take(&mut steps), effects);
        if self.wants_last() && self.last_checkpoint_from <= now {
            let trigger = match self.stop().map(|stop| stop.savepoint) {
                Some(StopSavepoint::Wanted { ticket }) => {
                    Trigger::Savepoint { ticket, purpose: SavepointPurpose::Stop }
                }
                _ => Trigger::Last,
            };
            self.coordinator.begin(now, trigger, tasks, &mut steps);
            self.apply(now, steps, effects);
        }
        self.restart_what_is_due(now, effects);
    }

    /// True while the only checkpoint to come is the last one.
    fn is_ending(&self) -> bool {
        self.all(TaskRun::is_drained)
            || self.stop().is_some_and(|stop| stop.input != StopInput::Drain)
    }

    fn wants_last(&self) -> bool {
        self.is_active()
            && self.is_ending()
            && self.all(TaskRun::is_running)
            && self.coordinator.is_idle()
    }

    /// Makes effects of what the coordinator has decided.
    fn apply(&mut self, now: Millis, steps: Vec<Step>, effects: &mut Vec<Effect>) {
        for step in steps {
            match step {
                Step::Begin { checkpoint, trigger } => {
                    let purpose = trigger.purpose();
                    effects.push(Effect::InjectBarrier { checkpoint, purpose });
                }
                Step::Persist { checkpoint, trigger } => effects.push(match trigger.savepoint() {
                    Some(ticket) => Effect::PersistSavepoint { checkpoint, ticket },
                    None => Effect::PersistMetadata { checkpoint },
                }),
                Step::Completed { checkpoint, trigger } => {
                    self.on_completed(now, checkpoint, trigger, effects);
                }
                Step::Subsumed { checkpoint } => {
                    let oldest_pending = self.coordinator.oldest_pending();
                    let newest = self.coordinator.last_completed().unwrap_or(checkpoint);
                    effects.push(Effect::Subsume { checkpoint, newest, oldest_pending });
                }
                Step::Refused { trigger, reason } => self.answer(trigger, Err(reason), effects),
                Step::Aborted { checkpoint, trigger, reason } => {
                    self.given_up = self.given_up.max(Some(checkpoint));
                    effects.push(self.discard(checkpoint, reason.clone()));
                    self.on_aborted(now, trigger, reason, effects);
                }
                // What restarts already is not to restart for a checkpoint of its last run.
                Step::Exceeded { .. } if !self.incidents.is_empty() => {}
                Step::Exceeded { checkpoint, reason } => {
                    let checkpoint = Some(checkpoint);
                    let cause = FailureCause::CheckpointsFailed { checkpoint, reason };
                    self.on_failure(now, None, cause, None, effects);
                }
            }
        }
    }

    /// Gives a checkpoint up.
    fn discard(&self, checkpoint: CheckpointId, reason: AbortReason) -> Effect {
        let next = checkpoint.next();
        let needed_from = self.coordinator.oldest_pending().map_or(next, |oldest| oldest.min(next));
        let completed = self.coordinator.last_completed();
        Effect::Discard { checkpoint, reason, completed, needed_from }
    }

    /// The savepoint that ends a job is a checkpoint as well: what sinks commit is in its metadata.
    fn on_savepoint_durable(
        &mut self,
        now: Millis,
        checkpoint: CheckpointId,
        steps: &mut Vec<Step>,
        effects: &mut Vec<Effect>,
    ) {
        match self.coordinator.persisting(checkpoint).map(Trigger::purpose) {
            Some(Purpose::Last) if self.is_active() => {
                effects.push(Effect::PersistMetadata { checkpoint });
            }
            Some(Purpose::Last) => {
                let reason = AbortReason::CoordinatorShutdown;
                self.coordinator.abort(checkpoint, reason, steps);
            }
            Some(_) => self.coordinator.complete(now, checkpoint, steps),
            None => {}
        }
    }

    fn on_completed(
        &mut self,
        now: Millis,
        checkpoint: CheckpointId,
        trigger: Trigger,
        effects: &mut Vec<Effect>,
    ) {
        let mut purpose = trigger.purpose();
        // Whoever stops a job with a savepoint has their answer when the sinks have committed.
        if purpose != Purpose::Last {
            self.answer(trigger, Ok(checkpoint), effects);
        }
        if purpose == Purpose::Savepoint || !self.is_active() {
            return;
        }
        self.failovers = 0;
        // Tasks that are being restarted commit it when they are restored from it.
        if purpose == Purpose::Last {
            if self.all(TaskRun::is_running) {
                self.begin_ending(now, checkpoint, trigger, effects);
            } else if self.stop().is_some_and(|stop| stop.input != StopInput::Drain) {
                // Nobody is left to commit it; whoever runs the job again begins with that.
                self.answer(trigger, Err(AbortReason::StopFailed { cause: None }), effects);
                let checkpoint = Some(checkpoint);
                let outcome = Outcome::Stopped { checkpoint, is_last: true, has_savepoint: false };
                return self.give_up(now, outcome, effects);
            } else {
                purpose = Purpose::Periodic;
            }
        }
        if self.tasks.values().any(TaskRun::is_running) {
            effects.push(Effect::NotifyComplete { checkpoint, purpose });
        }
    }

    fn on_aborted(
        &mut self,
        now: Millis,
        trigger: Trigger,
        reason: AbortReason,
        effects: &mut Vec<Effect>,
    ) {
        if trigger.purpose() != Purpose::Last || !self.is_active() {
            return self.answer(trigger, Err(reason), effects);
        }
        self.on_last_aborted(now, trigger, reason, effects);
    }

    fn on_started(&mut self, now: Millis, tasks: &[TaskAttempt], effects: &mut Vec<Effect>) {
        for (task, attempt) in tasks {
            if let Some(run) = self.current(*task, *attempt)
                && let TaskState::Starting { is_drained } = run.state
            {
                run.state = TaskState::Running { is_drained };
            }
        }
        if self.all(TaskRun::is_running) {
            self.coordinator.start(now, &mut self.random);
        }
        // Sources that start again do not know that they are to end.
        if self.stop().is_some_and(|stop| stop.input == StopInput::Drain) {
            effects.push(Effect::EndInput);
        }
    }

    /// Regions that have waited for this partition may begin, and partitions that were read for the
    /// last time are given up.
    fn on_drained(
        &mut self,
        now: Millis,
        task: TaskId,
        attempt: Attempt,
        effects: &mut Vec<Effect>,
    ) {
        let Some(run) = self.current(task, attempt) else { return };
        match &mut run.state {
            TaskState::Starting { is_drained } | TaskState::Running { is_drained } => {
                *is_drained = true;
            }
            _ => return,
        }
        self.coordinator.set_backlog(now, task, false);
        if !self.is_batch {
            return;
        }
        let tasks = self.start_ready();
        if !tasks.is_empty() {
            effects.push(self.start(tasks));
        }
        let partitions = self.unread_partitions(task);
        if !partitions.is_empty() {
            self.released.extend(&partitions);
            effects.push(Effect::ReleasePartitions { partitions });
        }
    }
}

#[cfg(test)]
mod batch_tests;
#[cfg(test)]
mod tests;
