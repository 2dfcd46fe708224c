//! The one loop of a job: receive an event or reach a deadline, step the core, perform the effects.
//!
//! Performing starts work; its result comes back as an event. Nothing here decides.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_connector::blocking::{Blocking, CallsEnded};
use cofferdam_core::{
    checkpoint::Purpose,
    failover::RestartReason,
    failure::{EnvironmentError, FailureCause},
    ids::{CheckpointId, Millis, TaskId},
    job::{Effect, Event, Job, Outcome, TaskAttempt},
};
use futures::{FutureExt, future::join_all};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender},
    task::JoinHandle,
};

use super::wiring::PreparedWorker;
use crate::{
    clock::now_ms,
    exchange::{Element, Sender},
    failure::host_bug,
    job::{plan::Plan, rehearsal::Rehearsal},
    state::local::TaskLocal,
    task::{Control, Head},
    threads::{GuestTask, Share},
    watch::{
        control::{KeptCheckpoint, SavepointRequests},
        monitor::{Monitor, WriterReport},
        progress::{Progress, Restart},
    },
};

/// One running job.
pub(crate) struct Driver {
    plan: Plan,
    core: Job,
    monitor: Arc<Monitor>,
    inbox: UnboundedReceiver<Event>,
    started: Instant,
    workers: Vec<RunningWorker>,
    /// When the event that is being answered has come.
    event_at: Instant,
    outcome: Option<Outcome>,
    /// Whether every task runs, as was reported last.
    is_running: bool,
    requests: Arc<SavepointRequests>,
    /// Brings forward what the process keeps of tasks; the job ends after the last of it.
    blocking: Blocking,
    rehearsal: Arc<Rehearsal>,
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.rehearsal.end();
    }
}

struct RunningWorker {
    tasks: Vec<TaskId>,
    is_source: bool,
    control: UnboundedSender<Control>,
    task: GuestTask<()>,
    /// Feeds the channels that begin at partitions.
    reader: Option<JoinHandle<()>>,
    partition_channels: Vec<Sender>,
    /// Ends with the last call of its connectors that blocks.
    calls_ended: CallsEnded,
}

/// After this long a call that blocks is left behind: an attempt that waits for it would wait with it.
const CALLS_WAIT: Duration = Duration::from_secs(30);

impl Driver {
    pub(crate) fn new(
        mut plan: Plan,
        core: Job,
        monitor: Monitor,
        report: &WriterReport,
        inbox: UnboundedReceiver<Event>,
        requests: Arc<SavepointRequests>,
        blocking: Blocking,
    ) -> Self {
        let untried = std::mem::take(&mut plan.untried);
        let rehearsal = Rehearsal::new(untried, report.events.clone(), report.observer.clone());
        Self {
            plan,
            core,
            monitor: Arc::new(monitor),
            inbox,
            started: Instant::now(),
            workers: Vec::new(),
            event_at: Instant::now(),
            outcome: None,
            is_running: false,
            requests,
            blocking,
            rehearsal: Arc::new(rehearsal),
        }
    }

    /// Runs the job to its end. `first` is the core's first effect.
    pub(crate) async fn run(mut self, first: Effect) -> Outcome {
        self.perform(first);
        let mut effects = Vec::new();
        loop {
            let event = self.next_event().await;
            self.event_at = Instant::now();
            self.core.step(self.now(), event, &mut effects);
            // The caller that gets an answer finds all that belongs to it.
            let is_answer = |effect: &Effect| matches!(effect, Effect::Answer { .. });
            effects.sort_by_key(is_answer);
            for effect in effects.drain(..) {
                self.perform(effect);
            }
            let was_running = std::mem::replace(&mut self.is_running, self.core.is_running());
            if self.is_running && !was_running {
                self.observe(Progress::Running { tasks: self.plan.locals.len() });
            }
            if let Some(outcome) = self.outcome.take() {
                return outcome;
            }
        }
    }

    fn now(&self) -> Millis {
        Millis(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    async fn next_event(&mut self) -> Event {
        let Some(deadline) = self.core.next_deadline() else {
            return self.inbox.recv().await.unwrap_or(Event::Tick);
        };
        let until = self.started + Duration::from_millis(deadline.0);
        tokio::select! {
            biased;
            event = self.inbox.recv() => event.unwrap_or(Event::Tick),
            () = tokio::time::sleep_until(until.into()) => Event::Tick,
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::StartTasks { tasks, restore_from, ignore_up_to } => {
                self.start_tasks(tasks, restore_from, ignore_up_to);
            }
            Effect::InjectBarrier { checkpoint, purpose } => {
                self.monitor.note_triggered(checkpoint);
                self.tell_sources(Control::Barrier(checkpoint, purpose));
                // No barrier travels through a partition: its readers have it from here.
                for sender in self.workers.iter().flat_map(|worker| &worker.partition_channels) {
                    sender.send(Element::Barrier(checkpoint, purpose));
                }
            }
            Effect::ReleasePartitions { partitions } => {
                let known = self.plan.partitions.iter();
                known.for_each(|known| partitions.iter().for_each(|id| known.release(*id)));
            }
            Effect::EndInput => self.tell_sources(Control::EndInput),
            Effect::PersistMetadata { checkpoint } => self.monitor.storage.complete(checkpoint),
            Effect::PersistSavepoint { checkpoint, ticket } => match self.requests.dir(ticket) {
                Some(dir) => self.monitor.storage.export(checkpoint, dir),
                None => {
                    let error = EnvironmentError::new("no directory was given for it");
                    self.monitor.report(Event::SavepointLost { checkpoint, error });
                }
            },
            Effect::Answer { ticket, result } => {
                self.requests.answer(ticket, result);
            }
            Effect::NotifyComplete { checkpoint, purpose } => {
                self.notify_complete(checkpoint, purpose)
            }
            Effect::Subsume { checkpoint, newest, oldest_pending } => {
                self.requests.forget(checkpoint);
                self.monitor.storage.subsume(checkpoint, newest, oldest_pending);
            }
            Effect::Discard { checkpoint, reason, completed, needed_from } => {
                tell(&self.workers, Control::Abort(checkpoint));
                self.monitor.note_given_up(checkpoint);
                self.release(completed, needed_from);
                let task = reason.task().map(|task| self.plan.graph.task_name(task));
                let words = match task {
                    Some(task) => format!("{task} {}", reason.message()),
                    None => reason.message(),
                };
                self.observe(Progress::checkpoint_failed(checkpoint, reason.name(), words));
            }
            Effect::CancelTasks { tasks } => self.cancel_tasks(tasks),
            Effect::AnnounceRestart { task, cause, delay_ms, is_new_attempt, remaining, tasks } => {
                self.announce_restart(task, &cause, delay_ms, is_new_attempt, remaining, &tasks);
            }
            Effect::Finish { outcome } => self.outcome = Some(outcome),
        }
    }

    fn tell_sources(&self, control: Control) {
        tell(self.workers.iter().filter(|worker| worker.is_source), control);
    }

    fn observe(&self, progress: Progress) {
        self.monitor.observe(progress);
    }

    fn announce_restart(
        &mut self,
        task: Option<TaskAttempt>,
        cause: &FailureCause,
        delay_ms: u64,
        is_new_attempt: bool,
        remaining: Option<u64>,
        restarting: &BTreeMap<TaskId, RestartReason>,
    ) {
        let task = task.map(|(task, _)| task);
        let delay = Duration::from_millis(delay_ms);
        self.monitor.note_restart(task.map(|task| task.node), self.event_at, delay);
        let task = task.map(|task| self.plan.graph.task_name(task));
        let graph = &self.plan.graph;
        let because = restarting
            .iter()
            .map(|(task, reason)| (graph.task_name(*task), reason.words(graph)))
            .collect();
        let count = self.plan.locals.len();
        self.observe(Progress::Restarting(Restart {
            task,
            failure: cause.into(),
            delay_ms,
            new_attempt: is_new_attempt,
            remaining_attempts: remaining,
            restarting: because,
            tasks: count,
        }));
    }

    fn notify_complete(&mut self, checkpoint: CheckpointId, purpose: Purpose) {
        tell(&self.workers, Control::Complete(checkpoint, purpose));
        self.plan.links.complete(checkpoint);
        self.requests.keep(KeptCheckpoint {
            checkpoint: checkpoint.0,
            job: self.plan.job.clone(),
            tasks: self.plan.locals.len(),
            written_at_ms: now_ms(),
        });
        self.monitor.note_complete(checkpoint);
        let locals: Vec<Arc<TaskLocal>> = self.plan.locals.values().cloned().collect();
        let rehearsal = (purpose == Purpose::Periodic).then(|| self.rehearsal.clone());
        self.blocking.run(move || {
            for local in locals {
                if let Err(error) = local.lock().apply_completed(checkpoint) {
                    tracing::warn!(%error, "cannot update the local image: a restart will read the storage");
                }
                if let Some(keyed) = &local.keyed
                    && let Err(error) = keyed.complete(checkpoint)
                {
                    tracing::warn!(%error, "cannot update the declared state: it will be retried");
                }
            }
            if let Some(rehearsal) = rehearsal {
                rehearsal.run();
            }
        });
    }

    /// What a checkpoint that was given up has taken counts only as far as later ones stand on it.
    fn release(&self, completed: Option<CheckpointId>, needed_from: CheckpointId) {
        self.monitor.storage.release(needed_from);
        let locals: Vec<Arc<TaskLocal>> = self.plan.locals.values().cloned().collect();
        self.blocking.run(move || {
            for local in locals {
                local.lock().fold(completed, needed_from);
                if let Some(keyed) = &local.keyed
                    && let Err(error) = keyed.fold(completed, needed_from)
                {
                    tracing::warn!(%error, "cannot merge an aborted checkpoint: it will be retried");
                }
            }
        });
    }

    fn start_tasks(
        &mut self,
        tasks: Vec<TaskAttempt>,
        restore_from: Option<CheckpointId>,
        ignore_up_to: Option<CheckpointId>,
    ) {
        let slots = tasks.iter().map(|(task, _)| self.plan.slot(*task)).collect();
        self.monitor.storage.begin(slots, restore_from);
        self.observe(Progress::Started {
            attempt: tasks.iter().map(|(_, attempt)| attempt.0).max().unwrap_or(0),
            restored_from: restore_from.map(|checkpoint| checkpoint.0),
            tasks: tasks.len(),
        });
        let workers = self.plan.workers(tasks, restore_from, ignore_up_to, &self.monitor);
        self.workers.extend(workers.into_iter().map(|worker| run(worker, &self.plan.share)));
    }

    fn cancel_tasks(&mut self, tasks: Vec<TaskAttempt>) {
        let is_meant =
            |worker: &RunningWorker| tasks.iter().any(|(task, _)| worker.tasks.contains(task));
        let (ending, others) =
            std::mem::take(&mut self.workers).into_iter().partition(|worker| is_meant(worker));
        self.workers = others;
        let ending: Vec<RunningWorker> = ending;
        self.plan.links.disconnect(|consumer| tasks.iter().any(|(task, _)| *task == consumer));
        let (mut cancelled, mut are_ended) = (Vec::new(), Vec::new());
        for worker in ending {
            worker.reader.iter().for_each(JoinHandle::abort);
            // Its first poll cancels.
            let mut task = Box::pin(worker.task.cancel());
            if (&mut task).now_or_never().is_none() {
                cancelled.push(task);
            }
            are_ended.push(worker.calls_ended);
        }
        let monitor = self.monitor.clone();
        tokio::spawn(async move {
            join_all(cancelled).await;
            let calls = async {
                for ended in &mut are_ended {
                    ended.wait().await;
                }
            };
            if tokio::time::timeout(CALLS_WAIT, calls).await.is_err() {
                let seconds = CALLS_WAIT.as_secs();
                monitor.observe(Progress::Warning {
                    message: format!(
                        "a source or a sink has blocked for {seconds} s after its task was cancelled; \
                         the job continues without it"
                    ),
                });
            }
            monitor.report(Event::TasksStopped { tasks });
        });
    }
}

fn tell<'w>(workers: impl IntoIterator<Item = &'w RunningWorker>, control: Control) {
    for worker in workers {
        // A worker that has ended needs to know nothing more.
        let _ = worker.control.send(control);
    }
}

fn run(prepared: PreparedWorker, share: &Arc<Share>) -> RunningWorker {
    let PreparedWorker { worker, control, reader, calls_ended } = prepared;
    let channels = reader.iter().flat_map(|reader| &reader.channels);
    let partition_channels = channels.map(|channel| channel.sender.clone()).collect();
    let is_source = matches!(worker.head, Head::Source);
    let (monitor, attempt) = (worker.monitor.clone(), worker.attempt);
    let tasks: Vec<TaskId> = worker.nodes.iter().map(|node| node.task).collect();
    let first = tasks[0];
    let reader = reader.and_then(|reader| match worker.restore_from {
        None => Some(tokio::spawn(reader.run(monitor.clone()))),
        // The last checkpoint of a job is after the end of everything that there was to read.
        Some(_) => {
            for channel in &reader.channels {
                channel.sender.send(Element::EndOfInput);
            }
            None
        }
    });
    let task = share.spawn(async move {
        let ended = AssertUnwindSafe(worker.run()).catch_unwind().await;
        let (failed, cause) = match ended {
            Ok(Ok(())) => return,
            Ok(Err(failure)) => (failure.task, failure.cause),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text =
                    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
                (first, host_bug(text))
            }
        };
        monitor.report(Event::TaskFailed { task: Some((failed, attempt)), cause, lost: None });
    });
    RunningWorker { tasks, is_source, control, task, reader, partition_channels, calls_ended }
}
