//! Composes the decisions of a job: one `step(now, Event, &mut Vec<Effect>)` for all of it.
//!
//! The shell performs effects and reports events; it decides nothing. Every message of a task
//! carries its attempt, and one of an earlier attempt is ignored. A failure makes an *incident*:
//! the tasks that restart together, after a delay, once all of them have stopped. A task that a
//! later incident wants as well restarts with that one (Flink: vertex versions).
//!
//! **Invariant:** the restore point is chosen only after the fate of a manifest in flight is
//! known. Restarting from checkpoint `n - 1` while the manifest of `n` turns out durable would
//! commit the sinks' records of `n` and then produce them again.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    checkpoint::{
        AbortReason, CheckpointSettings, Coordinator, Purpose, SavepointPurpose, Step, Trigger,
    },
    exchange::ExchangeType,
    failover::{
        FailoverStrategy, RestartReason, Situation, tasks_to_restart,
        topology::{PartitionId, RegionId, Topology},
    },
    failure::FailureCause,
    graph::JobGraph,
    ids::{Attempt, CheckpointId, Millis, TaskId},
    random::Random,
    restart::{RestartState, RestartStrategy},
};

/// After a failed last checkpoint, the time until the next try.
const LAST_CHECKPOINT_RETRY_MS: u64 = 1_000;

/// A task and the attempt that is meant.
pub type TaskAttempt = (TaskId, Attempt);

/// Everything that can happen to a job, as seen by the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A deadline has passed.
    Tick,
    /// After `StartTasks`: every task that was to be started runs.
    TasksStarted {
        /// As in the effect.
        tasks: Vec<TaskAttempt>,
    },
    /// A task has processed the end of all its inputs. It still answers barriers.
    TaskDrained {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
    },
    /// A source works off a backlog from now on, or does not any more.
    BacklogChanged {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
        /// Whether it does.
        is_backlog: bool,
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
    /// A task could not take its snapshot, or its snapshot could not be stored.
    SnapshotDeclined {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
        /// The checkpoint it declines.
        checkpoint: CheckpointId,
        /// Why.
        reason: AbortReason,
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
    /// The savepoint is written and flushed.
    SavepointDurable {
        /// Its checkpoint.
        checkpoint: CheckpointId,
    },
    /// The savepoint could not be written.
    SavepointLost {
        /// Its checkpoint.
        checkpoint: CheckpointId,
        /// The storage's reason.
        message: String,
    },
    /// After `Subsume` or `Discard`: the checkpoint's data are gone, or written as part of the next.
    CheckpointCleaned,
    /// Something has ended by a failure.
    TaskFailed {
        /// The task; `None` for a failure that is not one task's and restarts all.
        task: Option<TaskAttempt>,
        /// What ended it.
        cause: FailureCause,
        /// The result partition that it could not read.
        lost: Option<PartitionId>,
    },
    /// A task has committed the last checkpoint and closed.
    TaskFinished {
        /// The task.
        task: TaskId,
        /// Its attempt.
        attempt: Attempt,
    },
    /// After `CancelTasks`: none of them runs any more.
    TasksStopped {
        /// As in the effect.
        tasks: Vec<TaskAttempt>,
    },
    /// Somebody wants a savepoint of the running job.
    SavepointRequested {
        /// Names the request in the answer.
        ticket: u64,
    },
    /// Somebody wants the job to take a last checkpoint and end.
    StopRequested {
        /// The last checkpoint is to be a savepoint, too; it is answered under this ticket.
        savepoint: Option<u64>,
        /// Sources end first, and everything that waits in the job is processed and emitted.
        drain: bool,
    },
    /// Somebody wants the job to end at once.
    CancelRequested,
}

/// Everything the core can ask the shell to do. Order within one step matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Every reader of these result partitions has finished: remove them.
    ReleasePartitions {
        /// The partitions.
        partitions: Vec<PartitionId>,
    },
    /// Instantiate tasks, from a checkpoint or empty. Answer: `TasksStarted`.
    StartTasks {
        /// Each with the attempt that it carries in everything it sends.
        tasks: Vec<TaskAttempt>,
        /// Whose snapshots they get.
        restore_from: Option<CheckpointId>,
    },
    /// Send a barrier from every source. Answers: `SnapshotAcked` or `SnapshotDeclined`.
    InjectBarrier {
        /// The checkpoint that begins.
        checkpoint: CheckpointId,
        /// Whether sources go on behind the barrier.
        purpose: Purpose,
    },
    /// Sources have reached the end of their input, wherever they are.
    EndInput,
    /// Write the manifest and flush. Answer: `ManifestDurable` or `ManifestLost`.
    PersistManifest {
        /// The checkpoint whose snapshots are all durable.
        checkpoint: CheckpointId,
    },
    /// Write a savepoint and flush. Answer: `SavepointDurable` or `SavepointLost`.
    PersistSavepoint {
        /// The checkpoint whose snapshots are all durable.
        checkpoint: CheckpointId,
        /// Who knows where to.
        ticket: u64,
    },
    /// Tell the tasks that the checkpoint is complete, so that sinks commit.
    NotifyComplete {
        /// The completed checkpoint.
        checkpoint: CheckpointId,
        /// After the last one, tasks close and answer `TaskFinished`.
        purpose: Purpose,
    },
    /// A pending checkpoint is given up: unblock tasks that align for it. Answer: `CheckpointCleaned`, when
    /// what was taken for it does not wait to be written any more.
    Discard {
        /// The checkpoint.
        checkpoint: CheckpointId,
        /// Why.
        reason: AbortReason,
    },
    /// Remove a completed checkpoint that is not kept any more. Answer: `CheckpointCleaned`.
    Subsume {
        /// The checkpoint.
        checkpoint: CheckpointId,
    },
    /// Answer whoever asked for a savepoint.
    AnswerSavepoint {
        /// Their ticket.
        ticket: u64,
        /// The checkpoint, or why there is none.
        result: Result<CheckpointId, AbortReason>,
    },
    /// End these tasks. Answer: `TasksStopped`.
    CancelTasks {
        /// Each with the attempt to end.
        tasks: Vec<TaskAttempt>,
    },
    /// Tell people that a failure leads to a restart.
    AnnounceRestart {
        /// The task that failed, if it was one.
        task: Option<TaskAttempt>,
        /// What ended it.
        cause: FailureCause,
        /// When the tasks start again, counted from now.
        delay_ms: u64,
        /// False where the restart strategy counts it to an attempt that was under way.
        is_new_attempt: bool,
        /// How many more failures the strategy answers with a restart, if it counts them.
        remaining: Option<u64>,
        /// What restarts and why.
        tasks: BTreeMap<TaskId, RestartReason>,
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
        /// The last checkpoint is a savepoint, too: that is what to go on from.
        has_savepoint: bool,
    },
    /// Ended at once, on request.
    Canceled {
        /// The newest completed checkpoint.
        checkpoint: Option<CheckpointId>,
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
    /// Its operators and edges.
    pub graph: JobGraph,
    /// What restarts when a task fails.
    pub failover: FailoverStrategy,
    /// When checkpoints are taken.
    pub checkpoint: CheckpointSettings,
    /// What a failure leads to.
    pub restart: RestartStrategy,
    /// Failures of one incident count as one, whatever the strategy.
    pub is_merging_failures: bool,
    /// After so many failovers in a row with no checkpoint completed between them, more restarts than
    /// the failure asks for: where a task may restart alone and lose records, also all that it reads
    /// from; after as many again every task; after as many again the job fails. `None`: never.
    pub escalates_after: Option<u32>,
    /// Seeds jitter and the first trigger.
    pub seed: u64,
}

/// Where a job begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    /// The completed checkpoints that are kept, oldest first; the last one is restored.
    pub completed: Vec<CheckpointId>,
    /// An id above every one ever used by the job.
    pub next_id: CheckpointId,
}

impl Default for Resume {
    fn default() -> Self {
        Self { completed: Vec::new(), next_id: CheckpointId(1) }
    }
}

/// What the core knows of a task.
#[derive(Debug, Clone)]
struct TaskRun {
    attempt: Attempt,
    state: TaskState,
    is_drained: bool,
    /// The incident that restarts it.
    incident: Option<u64>,
}

impl TaskRun {
    fn has_begun(&self) -> bool {
        matches!(self.state, TaskState::Starting | TaskState::Running)
    }

    /// It has processed the end of its inputs, and nothing takes that back. Its word may come before
    /// that of all who were started with it.
    fn has_ended(&self) -> bool {
        self.is_drained && self.has_begun()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TaskState {
    /// Waits for what its region reads to be there.
    Created,
    Starting,
    Running,
    /// Being cancelled.
    Stopping,
    /// Gone; an incident starts it again.
    Stopped,
    /// Has committed the last checkpoint and closed.
    Finished,
}

#[derive(Debug, Clone)]
enum Phase {
    Active,
    /// The last checkpoint is complete; tasks commit it and close.
    Ending {
        outcome: Outcome,
        checkpoint: CheckpointId,
    },
    /// Everything is being cancelled.
    Cancelling(Outcome),
    Over,
}

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

/// What a stop was asked for with.
#[derive(Debug, Clone, Copy)]
struct Stop {
    savepoint: Option<u64>,
    drain: bool,
    /// Somebody asked again, without a savepoint: the job ends whatever comes of this one.
    is_urgent: bool,
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
    incidents: BTreeMap<u64, Millis>,
    next_incident: u64,
    /// After a failed last checkpoint: not before this.
    retry_at: Option<Millis>,
    stop: Option<Stop>,
    /// Whoever waits for the savepoint of the stop.
    stop_ticket: Option<u64>,
    /// Some regions read result partitions: they run one after the other, and no checkpoint but the
    /// last holds the state of the job.
    is_batch: bool,
    /// Some tasks may restart without those that they read from.
    is_approximate: bool,
    /// Partitions that were given up because every reader had finished.
    released: BTreeSet<PartitionId>,
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
            (task, TaskRun { attempt, state, is_drained: false, incident: None })
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
            phase: Phase::Active,
            incidents: BTreeMap::new(),
            next_incident: 0,
            retry_at: None,
            stop: None,
            stop_ticket: None,
            is_batch,
            is_approximate,
            released: BTreeSet::new(),
        };
        let (tasks, restore_from) = (job.start_ready(), job.coordinator.last_completed());
        (job, Effect::StartTasks { tasks, restore_from })
    }

    /// The attempt of a task that runs or is about to.
    #[must_use]
    pub fn attempt(&self, task: TaskId) -> Option<Attempt> {
        self.tasks.get(&task).map(|run| run.attempt)
    }

    /// The checkpoint a restart would restore.
    #[must_use]
    pub fn last_completed(&self) -> Option<CheckpointId> {
        self.coordinator.last_completed()
    }

    /// The oldest checkpoint whose snapshots may still be needed for it.
    #[must_use]
    pub fn oldest_pending(&self) -> Option<CheckpointId> {
        self.coordinator.oldest_pending()
    }

    /// True once `Finish` has been given out.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// When to send a `Tick` at the latest; `None` where only an event can change anything.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        if !matches!(self.phase, Phase::Active) {
            return None;
        }
        let retry_at = self.retry_at.filter(|_| self.wants_last());
        let incidents = self.incidents.iter().filter(|(id, _)| self.is_stopped(**id));
        let restart_at = incidents.map(|(_, at)| *at).min();
        let restart_at = restart_at.filter(|_| !self.coordinator.is_in_doubt());
        [self.coordinator.next_deadline(), retry_at, restart_at].into_iter().flatten().min()
    }

    /// Takes one event in and gives the effects out, in the order they are to be performed.
    pub fn step(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        let mut steps = Vec::new();
        match event {
            Event::Tick => {}
            Event::TasksStarted { tasks } => self.on_started(now, &tasks, effects),
            Event::TaskDrained { task, attempt } => {
                if let Some(run) = self.current(task, attempt) {
                    run.is_drained = true;
                    self.coordinator.set_backlog(now, task, false);
                    self.on_drained(task, effects);
                }
            }
            Event::BacklogChanged { task, attempt, is_backlog } => {
                if self.current(task, attempt).is_some_and(|run| run.state != TaskState::Stopping) {
                    self.coordinator.set_backlog(now, task, is_backlog);
                }
            }
            Event::SnapshotAcked { task, attempt, checkpoint } => {
                if self.current(task, attempt).is_some() {
                    self.coordinator.ack(task, checkpoint, &mut steps);
                }
            }
            Event::SnapshotDeclined { task, attempt, checkpoint, reason } => {
                if self.current(task, attempt).is_some()
                    && self.coordinator.is_collecting(checkpoint)
                {
                    self.coordinator.abort(checkpoint, reason, &mut steps);
                }
            }
            Event::ManifestDurable { checkpoint } => {
                self.coordinator.complete(now, checkpoint, &mut steps);
            }
            Event::ManifestLost { checkpoint, message }
            | Event::SavepointLost { checkpoint, message } => {
                if self.coordinator.persisting(checkpoint).is_some() {
                    let reason = AbortReason::NotFinalized { message };
                    self.coordinator.abort(checkpoint, reason, &mut steps);
                }
            }
            Event::SavepointDurable { checkpoint } => {
                self.on_savepoint_durable(now, checkpoint, &mut steps, effects);
            }
            Event::CheckpointCleaned => self.coordinator.on_cleaned(),
            Event::TaskFailed { task, cause, lost } => {
                let is_current = task.is_none_or(|(task, attempt)| {
                    self.current(task, attempt).is_some_and(|run| run.state != TaskState::Stopping)
                });
                if is_current {
                    self.on_failure(now, task, cause, lost, effects);
                }
            }
            Event::TaskFinished { task, attempt } => self.on_finished(task, attempt, effects),
            Event::TasksStopped { tasks } => self.on_stopped(&tasks, effects),
            Event::SavepointRequested { ticket } => {
                self.on_savepoint_requested(now, ticket, &mut steps)
            }
            Event::StopRequested { savepoint, drain } => {
                let stop = Stop { savepoint, drain, is_urgent: false };
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
        (run.state != TaskState::Stopped).then_some(run)
    }

    fn task_ids(&self) -> BTreeSet<TaskId> {
        self.tasks.keys().copied().collect()
    }

    fn all(&self, is: impl Fn(&TaskRun) -> bool) -> bool {
        self.tasks.values().all(is)
    }

    /// What is due now, whatever the event was.
    fn act_on_time(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::Active) {
            return;
        }
        let mut steps = Vec::new();
        // Whatever is drained early must not be restored as if its input had ended there.
        if self.is_ending() || self.stop.is_some() {
            self.coordinator.stop_periodic(&mut steps);
        }
        let tasks = self.task_ids();
        self.coordinator.on_time(now, &tasks, &mut steps);
        self.apply(now, std::mem::take(&mut steps), effects);
        if self.wants_last() && self.retry_at.is_none_or(|at| at <= now) {
            let savepoint = self.stop.and_then(|stop| stop.savepoint);
            let trigger = savepoint.map_or(Trigger::Last, |ticket| Trigger::Savepoint {
                ticket,
                purpose: SavepointPurpose::Stop,
            });
            self.coordinator.begin(now, trigger, tasks, &mut steps);
            self.apply(now, steps, effects);
        }
        self.restart_what_is_due(now, effects);
    }

    /// True while the only checkpoint to come is the last one.
    fn is_ending(&self) -> bool {
        self.all(|run| run.is_drained) || self.stop.is_some_and(|stop| !stop.drain)
    }

    fn wants_last(&self) -> bool {
        matches!(self.phase, Phase::Active)
            && self.is_ending()
            && self.all(|run| run.state == TaskState::Running)
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
                Step::Persist { checkpoint, trigger } => effects.push(match trigger.ticket() {
                    Some(ticket) => Effect::PersistSavepoint { checkpoint, ticket },
                    None => Effect::PersistManifest { checkpoint },
                }),
                Step::Completed { checkpoint, trigger } => {
                    self.on_completed(now, checkpoint, trigger, effects);
                }
                Step::Subsumed { checkpoint } => effects.push(Effect::Subsume { checkpoint }),
                Step::Refused { trigger, reason } => self.answer(trigger, Err(reason), effects),
                Step::Aborted { checkpoint, trigger, reason } => {
                    effects.push(Effect::Discard { checkpoint, reason: reason.clone() });
                    self.on_aborted(now, trigger, reason, effects);
                }
                // What restarts already is not to restart for a checkpoint of its last run.
                Step::Exceeded { .. } if !self.incidents.is_empty() => {}
                Step::Exceeded { message } => {
                    let cause = FailureCause::CheckpointsFailed { message };
                    self.on_failure(now, None, cause, None, effects);
                }
            }
        }
    }

    /// The savepoint that ends a job is a checkpoint as well: what sinks commit is in its manifest.
    fn on_savepoint_durable(
        &mut self,
        now: Millis,
        checkpoint: CheckpointId,
        steps: &mut Vec<Step>,
        effects: &mut Vec<Effect>,
    ) {
        match self.coordinator.persisting(checkpoint).map(Trigger::purpose) {
            Some(Purpose::Last) if matches!(self.phase, Phase::Active) => {
                effects.push(Effect::PersistManifest { checkpoint });
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
        if purpose == Purpose::Savepoint || !matches!(self.phase, Phase::Active) {
            return;
        }
        self.failovers = 0;
        // Tasks that are being restarted commit it when they are restored from it.
        if purpose == Purpose::Last {
            if self.all(|run| run.state == TaskState::Running) {
                // A job that was at its end already has no savepoint to show.
                if !matches!(trigger, Trigger::Savepoint { .. })
                    && let Some(ticket) = self.stop_ticket.take()
                {
                    let result = Err(AbortReason::CoordinatorShutdown);
                    effects.push(Effect::AnswerSavepoint { ticket, result });
                }
                let outcome = self.outcome_of_last(checkpoint);
                self.phase = Phase::Ending { outcome, checkpoint };
                // It is written; should the job run once more, it needs no second one.
                self.stop.iter_mut().for_each(|stop| stop.savepoint = None);
            } else if self.stop.is_some_and(|stop| !stop.drain) {
                // Nobody is left to commit it; whoever runs the job again begins with that.
                let message = "tasks were being restarted".to_owned();
                self.answer(trigger, Err(AbortReason::StopFailed { message }), effects);
                self.stop.iter_mut().for_each(|stop| stop.savepoint = None);
                return self.give_up(now, self.stopped_at(checkpoint), effects);
            } else {
                purpose = Purpose::Periodic;
            }
        }
        if self.tasks.values().any(|run| run.state == TaskState::Running) {
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
        let is_restarting = reason == AbortReason::FailoverRegion;
        let is_last = trigger.purpose() == Purpose::Last && matches!(self.phase, Phase::Active);
        if is_last && is_restarting && self.stop.is_some_and(|stop| stop.drain) {
            // The drain goes on when the tasks run again, and so does the wait for its savepoint.
            return;
        }
        self.answer(trigger, Err(reason.clone()), effects);
        if !is_last {
            return;
        }
        self.retry_at = Some(now.after(LAST_CHECKPOINT_RETRY_MS));
        match self.stop {
            Some(Stop { savepoint: Some(_), is_urgent: true, .. }) => {
                self.stop = Some(Stop { savepoint: None, drain: false, is_urgent: true });
            }
            // The sources have ended: only a restart from before brings the rest of their input.
            Some(Stop { drain: true, .. }) => {
                self.stop = None;
                let message = format!("the savepoint of a drain: {}", reason.message());
                let cause = FailureCause::CheckpointsFailed { message };
                self.on_failure(now, None, cause, None, effects);
            }
            // Whoever wanted a savepoint has their answer; the job goes on as before.
            Some(Stop { savepoint: Some(_), .. }) => {
                self.stop = None;
                if !is_restarting && self.all(|run| run.state == TaskState::Running) {
                    self.coordinator.start(now, &mut self.random);
                }
            }
            // The last checkpoint of a stop failed: end all the same, from the newest one.
            Some(_) if !is_restarting => {
                let checkpoint = self.coordinator.last_completed();
                let outcome = Outcome::Stopped { checkpoint, is_last: false, has_savepoint: false };
                self.give_up(now, outcome, effects);
            }
            Some(_) | None => {}
        }
    }

    /// A job that was asked to stop has finished all the same if nothing was left to do.
    fn outcome_of_last(&self, checkpoint: CheckpointId) -> Outcome {
        match self.all(|run| run.is_drained) {
            true => Outcome::Finished,
            false => self.stopped_at(checkpoint),
        }
    }

    fn stopped_at(&self, checkpoint: CheckpointId) -> Outcome {
        let has_savepoint = self.stop.is_some_and(|stop| stop.savepoint.is_some());
        Outcome::Stopped { checkpoint: Some(checkpoint), is_last: true, has_savepoint }
    }

    fn on_started(&mut self, now: Millis, tasks: &[TaskAttempt], effects: &mut Vec<Effect>) {
        for (task, attempt) in tasks {
            if let Some(run) = self.current(*task, *attempt)
                && run.state == TaskState::Starting
            {
                run.state = TaskState::Running;
            }
        }
        if self.all(|run| run.state == TaskState::Running) {
            self.coordinator.start(now, &mut self.random);
        }
        // Sources that start again do not know that they are to end.
        if self.stop.is_some_and(|stop| stop.drain) {
            effects.push(Effect::EndInput);
        }
    }

    /// Regions that have waited for this partition may begin, and partitions that were read for the
    /// last time are given up.
    fn on_drained(&mut self, task: TaskId, effects: &mut Vec<Effect>) {
        if !self.is_batch {
            return;
        }
        let tasks = self.start_ready();
        if !tasks.is_empty() {
            let restore_from = self.coordinator.last_completed();
            effects.push(Effect::StartTasks { tasks, restore_from });
        }
        let partitions = self.unread_partitions(task);
        if !partitions.is_empty() {
            self.released.extend(&partitions);
            effects.push(Effect::ReleasePartitions { partitions });
        }
    }

    /// Starts every region that waits and whose inputs are there: finished partitions of blocking
    /// exchanges, and producers that have begun of all others. Flink:
    /// `PipelinedRegionSchedulingStrategy`.
    fn start_ready(&mut self) -> Vec<TaskAttempt> {
        let mut tasks = Vec::new();
        loop {
            let regions = self.topology.regions().iter().enumerate();
            let ready: Vec<TaskId> = regions
                .filter(|(region, tasks)| self.is_waiting(tasks) && self.is_ready(*region))
                .flat_map(|(_, tasks)| tasks.iter().copied())
                .collect();
            if ready.is_empty() {
                tasks.sort_unstable();
                return tasks;
            }
            // What begins may be what others have waited for.
            for task in ready {
                if let Some(run) = self.tasks.get_mut(&task) {
                    run.state = TaskState::Starting;
                    tasks.push((task, run.attempt));
                }
            }
        }
    }

    fn is_waiting(&self, region: &[TaskId]) -> bool {
        region.iter().all(|task| self.tasks[task].state == TaskState::Created)
    }

    fn is_ready(&self, region: RegionId) -> bool {
        let has_checkpoint = self.coordinator.last_completed().is_some();
        self.topology.consumed_by(region).all(|group| {
            // The one checkpoint of a job with partitions holds the end of every region.
            if has_checkpoint && group.exchange.has_partition() {
                return true;
            }
            let outside = |task: &&TaskId| self.topology.region_of(**task) != Some(region);
            group.producers.iter().filter(outside).all(|producer| {
                let run = &self.tasks[producer];
                match group.exchange.is_blocking() {
                    true => run.has_ended(),
                    false => run.has_begun(),
                }
            })
        })
    }

    /// The partitions that nobody reads any more because the region of a task has finished.
    fn unread_partitions(&self, task: TaskId) -> Vec<PartitionId> {
        let Some(region) = self.topology.region_of(task) else { return Vec::new() };
        let has_finished = |task: &TaskId| {
            let region = self.topology.region_of(*task).map(|id| &self.topology.regions()[id]);
            // What is about to restart will read it again, however far it was.
            region.is_some_and(|tasks| tasks.iter().all(|task| self.tasks[task].has_ended()))
        };
        let groups = self.topology.consumed_by(region).filter(|group| {
            let is_kept = !group.exchange.has_partition() || group.exchange.is_persistent();
            !is_kept && group.consumers.iter().all(has_finished)
        });
        let partitions = groups.flat_map(|group| {
            let of = |producer: &TaskId| PartitionId { edge: group.edge, producer: *producer };
            group.producers.iter().map(of)
        });
        partitions.filter(|partition| !self.released.contains(partition)).collect()
    }

    fn on_failure(
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
        // whoever has stopped it learns that it runs on.
        if matches!(self.phase, Phase::Ending { .. })
            && let Some(ticket) = self.stop_ticket.take()
        {
            let result = Err(AbortReason::StopFailed { message: cause.to_string() });
            effects.push(Effect::AnswerSavepoint { ticket, result });
            self.stop = None;
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
        if matches!(self.stop, Some(Stop { savepoint: None, .. })) {
            return self.give_up(
                now,
                Outcome::Stopped { checkpoint, is_last: false, has_savepoint: false },
                effects,
            );
        }
        let mut reasons = self.restart_set(task, lost, escalation);
        if escalation == Escalation::EveryTask {
            for task in self.tasks.keys() {
                reasons.entry(*task).or_insert(RestartReason::Escalated);
            }
        }
        self.phase = Phase::Active;
        let restarting: Vec<TaskId> = reasons.keys().copied().collect();
        self.suspend_checkpoints(now, effects);
        self.cancel(&restarting, effects);
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
        self.next_incident += 1;
        let incident = self.next_incident;
        for task in restarting {
            if let Some(run) = self.tasks.get_mut(&task) {
                run.incident = Some(incident);
            }
        }
        self.incidents.insert(incident, now.after(delay_ms));
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

    /// Ends those of the tasks that run.
    fn cancel(&mut self, tasks: &[TaskId], effects: &mut Vec<Effect>) {
        let mut ending = Vec::new();
        for task in tasks {
            let Some(run) = self.tasks.get_mut(task) else { continue };
            self.coordinator.forget_backlog(*task);
            match run.state {
                TaskState::Starting | TaskState::Running => {
                    run.state = TaskState::Stopping;
                    ending.push((*task, run.attempt));
                }
                TaskState::Created | TaskState::Finished => run.state = TaskState::Stopped,
                TaskState::Stopping | TaskState::Stopped => {}
            }
        }
        if !ending.is_empty() {
            effects.push(Effect::CancelTasks { tasks: ending });
        }
    }

    /// Ends everything, and then the job.
    fn give_up(&mut self, now: Millis, outcome: Outcome, effects: &mut Vec<Effect>) {
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
            effects.push(Effect::AnswerSavepoint { ticket, result });
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

    fn on_finished(&mut self, task: TaskId, attempt: Attempt, effects: &mut Vec<Effect>) {
        let Some(run) = self.current(task, attempt) else { return };
        if run.state == TaskState::Running {
            run.state = TaskState::Finished;
        }
        if let Phase::Ending { outcome, checkpoint } = &self.phase
            && self.all(|run| run.state == TaskState::Finished)
        {
            if let Some(ticket) = self.stop_ticket.take() {
                effects.push(Effect::AnswerSavepoint { ticket, result: Ok(*checkpoint) });
            }
            effects.push(Effect::Finish { outcome: outcome.clone() });
            self.phase = Phase::Over;
        }
    }

    fn on_stopped(&mut self, tasks: &[TaskAttempt], effects: &mut Vec<Effect>) {
        for (task, attempt) in tasks {
            if let Some(run) = self.current(*task, *attempt)
                && run.state == TaskState::Stopping
            {
                run.state = TaskState::Stopped;
            }
        }
        self.finish_if_stopped(effects);
    }

    /// True if every task of the incident has stopped.
    fn is_stopped(&self, incident: u64) -> bool {
        self.all(|run| run.incident != Some(incident) || run.state == TaskState::Stopped)
    }

    fn restart_what_is_due(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if self.coordinator.is_in_doubt() {
            return;
        }
        let due: Vec<u64> = self
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
                if run.incident == Some(incident) {
                    run.incident = None;
                    run.attempt = run.attempt.next();
                    run.state = TaskState::Created;
                    run.is_drained = false;
                    self.released.retain(|partition| partition.producer != *task);
                }
            }
            let tasks = self.start_ready();
            if !tasks.is_empty() {
                let restore_from = self.coordinator.last_completed();
                effects.push(Effect::StartTasks { tasks, restore_from });
            }
        }
    }

    /// Answers whoever waits for a savepoint, once.
    fn answer(
        &mut self,
        trigger: Trigger,
        result: Result<CheckpointId, AbortReason>,
        effects: &mut Vec<Effect>,
    ) {
        let Trigger::Savepoint { ticket, purpose } = trigger else { return };
        let is_open = match purpose {
            SavepointPurpose::Keep => true,
            SavepointPurpose::Stop => self.stop_ticket.take_if(|open| *open == ticket).is_some(),
        };
        if is_open {
            effects.push(Effect::AnswerSavepoint { ticket, result });
        }
    }

    fn on_savepoint_requested(&mut self, now: Millis, ticket: u64, steps: &mut Vec<Step>) {
        let trigger = Trigger::Savepoint { ticket, purpose: SavepointPurpose::Keep };
        if self.is_batch {
            steps.push(Step::Refused { trigger, reason: AbortReason::BlockingOutputExists });
        } else if matches!(self.phase, Phase::Active) && !self.is_ending() {
            self.coordinator.request(now, trigger, steps);
        } else {
            let reason = AbortReason::CoordinatorShutdown;
            steps.push(Step::Refused { trigger, reason });
        }
    }

    fn on_stop_requested(&mut self, now: Millis, stop: Stop, effects: &mut Vec<Effect>) {
        let refuse = |reason, effects: &mut Vec<Effect>| {
            if let Some(ticket) = stop.savepoint {
                effects.push(Effect::AnswerSavepoint { ticket, result: Err(reason) });
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
}

#[cfg(test)]
mod batch_tests;
#[cfg(test)]
mod tests;
