//! The one loop of a job: receive an event or reach a deadline, step the core, perform the effects.
//!
//! Performing starts work; its result comes back as an event. Nothing here decides.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cofferdam_connector::blocking::{Blocking, CallsEnded};
use cofferdam_core::{
    checkpoint::Purpose,
    failover::{RestartReason, topology::PartitionId},
    failure::FailureCause,
    graph::{Edge, JobGraph, Partitioner, consumer_range},
    ids::{Attempt, CheckpointId, Millis, OperatorId, TaskId},
    job::{Effect, Event, Job, Outcome, TaskAttempt},
    watermark::Clock,
};
use cofferdam_store::{manifest::SnapshotStats, snapshot::TaskSnapshot};
use futures::FutureExt;
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinHandle,
};

use crate::{
    clock::now_ms,
    control::{Desk, KeptCheckpoint},
    exchange::{
        Element, Gate, Outlet, Sender,
        link::{LinkId, Losses},
        partition::{PartitionChannel, PartitionReader},
        writer::Writer,
    },
    failure::host_bug,
    job::Plan,
    metrics::Metrics,
    progress::{Observer, Progress},
    rehearsal::Rehearsal,
    state::local::TaskLocal,
    storage::{Report, StorageHandle},
    task::{
        Control, Head, Opening, Origin, Worker,
        node::{Node, Target},
    },
};

/// What the workers of a job share with its driver.
pub(crate) struct Shared {
    events: UnboundedSender<Event>,
    pub(crate) storage: StorageHandle,
    pub(crate) metrics: Arc<Metrics>,
    observer: Arc<dyn Observer>,
    stats: Arc<Stats>,
    recovery: Mutex<Option<Recovery>>,
    /// Whether `recovery` is worth a look: asked once a batch.
    is_recovering: AtomicBool,
}

/// A restart under way.
struct Recovery {
    operator: Option<OperatorId>,
    failed_at: Instant,
    delay: Duration,
}

/// Figures of the checkpoints that are under way.
#[derive(Debug, Default)]
pub(crate) struct Stats(Mutex<BTreeMap<u64, CheckpointStats>>);

#[derive(Debug, Clone, Copy, Default)]
struct CheckpointStats {
    triggered_at: Option<Instant>,
    pause: Duration,
    bytes: u64,
    state_bytes: u64,
    alignment_us: u64,
    in_flight_bytes: u64,
}

impl Stats {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, CheckpointStats>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the figures of a checkpoint; one that was given up has none.
    fn change(&self, checkpoint: CheckpointId, change: impl FnOnce(&mut CheckpointStats)) {
        if let Some(stats) = self.lock().get_mut(&checkpoint.0) {
            change(stats);
        }
    }
}

impl Shared {
    pub(crate) fn report(&self, event: Event) {
        // The driver is the last to go; after it nobody needs to know.
        let _ = self.events.send(event);
    }

    pub(crate) fn observe(&self, progress: Progress) {
        self.observer.observe(progress);
    }

    /// When a checkpoint that is under way was triggered.
    pub(crate) fn triggered_at(&self, checkpoint: CheckpointId) -> Option<Instant> {
        self.stats.lock().get(&checkpoint.0).and_then(|stats| stats.triggered_at)
    }

    /// The tasks of a chain stood still for so long.
    pub(crate) fn note_pause(&self, checkpoint: CheckpointId, pause: Duration) {
        self.stats.change(checkpoint, |stats| stats.pause = stats.pause.max(pause));
    }

    /// A task has taken its snapshot.
    pub(crate) fn note_snapshot(&self, checkpoint: CheckpointId, snapshot: &TaskSnapshot) {
        let state_bytes = snapshot.memory.as_ref().map_or(0, |memory| memory.size_bytes());
        let SnapshotStats { alignment_us, in_flight_bytes, .. } = snapshot.stats;
        self.stats.change(checkpoint, |stats| {
            stats.state_bytes += state_bytes + in_flight_bytes;
            stats.alignment_us = stats.alignment_us.max(alignment_us);
            stats.in_flight_bytes += in_flight_bytes;
        });
    }

    /// An operator has processed something: if it is the one that had failed, the job has recovered.
    pub(crate) fn note_processed(&self, task: TaskId) {
        if !self.is_recovering.load(Ordering::Relaxed) {
            return;
        }
        let mut recovery = self.recovery.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(done) =
            recovery.take_if(|recovery| recovery.operator.is_none_or(|id| id == task.operator))
        {
            self.is_recovering.store(false, Ordering::Relaxed);
            let took = done.failed_at.elapsed().saturating_sub(done.delay);
            let recovery_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            self.observe(Progress::Recovered { recovery_us });
        }
    }
}

/// The writer's way to the driver.
pub(crate) struct WriterReport {
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) stats: Arc<Stats>,
}

impl Report for WriterReport {
    fn event(&self, event: Event) {
        let _ = self.events.send(event);
    }

    fn written(&self, checkpoint: CheckpointId, bytes: u64) {
        self.stats.change(checkpoint, |stats| stats.bytes += bytes);
    }

    fn warning(&self, message: String) {
        self.observer.observe(Progress::Warning { message });
    }
}

/// One running job.
pub(crate) struct Driver {
    plan: Plan,
    core: Job,
    shared: Arc<Shared>,
    inbox: UnboundedReceiver<Event>,
    started: Instant,
    workers: Vec<RunningWorker>,
    failed_at: Option<Instant>,
    /// The newest checkpoint that was given up: tasks that begin later know nothing of it.
    given_up: Option<CheckpointId>,
    outcome: Option<Outcome>,
    desk: Arc<Desk>,
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
    handle: JoinHandle<()>,
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
        storage: StorageHandle,
        report: &WriterReport,
        inbox: UnboundedReceiver<Event>,
        metrics: Arc<Metrics>,
        desk: Arc<Desk>,
    ) -> Self {
        let untried = std::mem::take(&mut plan.untried);
        let rehearsal = Rehearsal::new(untried, report.events.clone(), report.observer.clone());
        let shared = Shared {
            events: report.events.clone(),
            storage,
            metrics,
            observer: report.observer.clone(),
            stats: report.stats.clone(),
            recovery: Mutex::new(None),
            is_recovering: AtomicBool::new(false),
        };
        Self {
            plan,
            core,
            shared: Arc::new(shared),
            inbox,
            started: Instant::now(),
            workers: Vec::new(),
            failed_at: None,
            given_up: None,
            outcome: None,
            desk,
            rehearsal: Arc::new(rehearsal),
        }
    }

    /// Runs the job to its end. `first` is the core's first effect.
    pub(crate) async fn run(mut self, first: Effect) -> Outcome {
        self.perform(first);
        let mut effects = Vec::new();
        loop {
            let event = self.next_event().await;
            if let Event::TaskFailed { task, .. } = &event
                && task.is_none_or(|(task, attempt)| self.core.attempt(task) == Some(attempt))
            {
                self.failed_at.get_or_insert_with(Instant::now);
            }
            self.core.step(self.now(), event, &mut effects);
            for effect in effects.drain(..) {
                self.perform(effect);
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
            Effect::StartTasks { tasks, restore_from } => self.start_tasks(tasks, restore_from),
            Effect::InjectBarrier { checkpoint, purpose } => {
                let stats = CheckpointStats {
                    triggered_at: Some(Instant::now()),
                    ..CheckpointStats::default()
                };
                self.shared.stats.lock().insert(checkpoint.0, stats);
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
            Effect::PersistManifest { checkpoint } => self.shared.storage.complete(checkpoint),
            Effect::PersistSavepoint { checkpoint, ticket } => match self.desk.dir(ticket) {
                Some(dir) => self.shared.storage.export(checkpoint, dir),
                None => {
                    let message = "nobody said where to write it".to_owned();
                    self.shared.report(Event::SavepointLost { checkpoint, message });
                }
            },
            Effect::AnswerSavepoint { ticket, result } => {
                self.desk.answer(ticket, result.map_err(|reason| reason.message()));
            }
            Effect::NotifyComplete { checkpoint, purpose } => {
                self.notify_complete(checkpoint, purpose)
            }
            Effect::Subsume { checkpoint } => {
                self.desk.forget(checkpoint);
                if let Some(newest) = self.core.last_completed() {
                    let oldest_pending = self.core.oldest_pending();
                    self.shared.storage.subsume(checkpoint, newest, oldest_pending);
                }
            }
            Effect::Discard { checkpoint, reason } => {
                self.given_up = self.given_up.max(Some(checkpoint));
                tell(&self.workers, Control::Abort(checkpoint));
                self.shared.stats.lock().remove(&checkpoint.0);
                self.release(checkpoint);
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
        self.shared.observe(progress);
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
        let failed_at = self.failed_at.take().unwrap_or_else(Instant::now);
        let delay = Duration::from_millis(delay_ms);
        let recovery = Recovery { operator: task.map(|task| task.operator), failed_at, delay };
        *self.shared.recovery.lock().unwrap_or_else(PoisonError::into_inner) = Some(recovery);
        self.shared.is_recovering.store(true, Ordering::Relaxed);
        self.shared.metrics.restarts.fetch_add(1, Ordering::Relaxed);
        let task = task.map(|task| self.plan.graph.task_name(task));
        let graph = &self.plan.graph;
        let because = restarting
            .iter()
            .map(|(task, reason)| (graph.task_name(*task), reason.words(graph)))
            .collect();
        let count = self.plan.locals.len();
        self.observe(Progress::restarting(
            task,
            cause,
            delay_ms,
            is_new_attempt,
            remaining,
            because,
            count,
        ));
    }

    fn notify_complete(&mut self, checkpoint: CheckpointId, purpose: Purpose) {
        tell(&self.workers, Control::Complete(checkpoint, purpose));
        self.plan.links.complete(checkpoint);
        self.shared.metrics.checkpoints.fetch_add(1, Ordering::Relaxed);
        self.desk.keep(KeptCheckpoint {
            checkpoint: checkpoint.0,
            job: self.plan.job.clone(),
            tasks: self.plan.locals.len(),
            written_at_ms: now_ms(),
        });
        let stats = self.shared.stats.lock().remove(&checkpoint.0).unwrap_or_default();
        let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
        self.observe(Progress::CheckpointCompleted {
            checkpoint: checkpoint.0,
            duration_ms: stats.triggered_at.map_or(0.0, |at| millis(at.elapsed())),
            pause_ms: millis(stats.pause),
            bytes: stats.bytes,
            state_bytes: stats.state_bytes,
            alignment_ms: stats.alignment_us as f64 / 1e3,
            in_flight_bytes: stats.in_flight_bytes,
        });
        let locals: Vec<Arc<TaskLocal>> = self.plan.locals.values().cloned().collect();
        let rehearsal = (purpose == Purpose::Periodic).then(|| self.rehearsal.clone());
        tokio::task::spawn_blocking(move || {
            for local in locals {
                if let Err(error) = local.lock().settle(checkpoint.0) {
                    tracing::warn!(%error, "bring the local image forward: a restart will read the storage");
                }
                if let Some(keyed) = &local.keyed
                    && let Err(error) = keyed.complete(checkpoint.0)
                {
                    tracing::warn!(%error, "bring the declared state forward: it is tried again");
                }
            }
            if let Some(rehearsal) = rehearsal {
                rehearsal.run();
            }
        });
    }

    /// What a checkpoint that was given up has taken counts only as far as later ones stand on it.
    fn release(&self, aborted: CheckpointId) {
        let next = CheckpointId(aborted.0 + 1);
        let needed_from = self.core.oldest_pending().map_or(next, |oldest| oldest.min(next));
        self.shared.storage.release(needed_from);
        let completed = self.core.last_completed().map_or(0, |completed| completed.0);
        let locals: Vec<Arc<TaskLocal>> = self.plan.locals.values().cloned().collect();
        tokio::task::spawn_blocking(move || {
            for local in locals {
                local.lock().fold(completed, needed_from.0);
                if let Some(keyed) = &local.keyed
                    && let Err(error) = keyed.fold(completed, needed_from.0)
                {
                    tracing::warn!(%error, "make one of what was given up: it is tried again");
                }
            }
        });
    }

    fn start_tasks(&mut self, tasks: Vec<TaskAttempt>, restore_from: Option<CheckpointId>) {
        self.failed_at = None;
        let slots = tasks.iter().map(|(task, _)| self.plan.slot(*task)).collect();
        self.shared.storage.begin(slots, restore_from);
        self.observe(Progress::Started {
            attempt: tasks.iter().map(|(_, attempt)| attempt.0).max().unwrap_or(0),
            restored_from: restore_from.map(|checkpoint| checkpoint.0),
            tasks: tasks.len(),
        });
        let workers = self.plan.workers(tasks, restore_from, self.given_up, &self.shared);
        self.workers.extend(workers.into_iter().map(run));
    }

    fn cancel_tasks(&mut self, tasks: Vec<TaskAttempt>) {
        let is_meant =
            |worker: &RunningWorker| tasks.iter().any(|(task, _)| worker.tasks.contains(task));
        let (ending, others) =
            std::mem::take(&mut self.workers).into_iter().partition(|worker| is_meant(worker));
        self.workers = others;
        let ending: Vec<RunningWorker> = ending;
        for worker in &ending {
            worker.handle.abort();
            worker.reader.iter().for_each(JoinHandle::abort);
        }
        self.plan.links.disconnect(|consumer| tasks.iter().any(|(task, _)| *task == consumer));
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let mut are_ended = Vec::with_capacity(ending.len());
            for worker in ending {
                // An abort is what was asked for, and a panic was reported by the worker itself.
                let _ = worker.handle.await;
                are_ended.push(worker.calls_ended);
            }
            let calls = async {
                for ended in &mut are_ended {
                    ended.wait().await;
                }
            };
            if tokio::time::timeout(CALLS_WAIT, calls).await.is_err() {
                let seconds = CALLS_WAIT.as_secs();
                shared.observe(Progress::Warning {
                    message: format!(
                        "a source or a sink has blocked for {seconds} s after its task was cancelled; \
                         the job continues without it"
                    ),
                });
            }
            shared.report(Event::TasksStopped { tasks });
        });
    }
}

fn tell<'w>(workers: impl IntoIterator<Item = &'w RunningWorker>, control: Control) {
    for worker in workers {
        // A worker that has ended needs to know nothing more.
        let _ = worker.control.send(control);
    }
}

fn run(prepared: PreparedWorker) -> RunningWorker {
    let PreparedWorker { worker, control, reader, calls_ended } = prepared;
    let channels = reader.iter().flat_map(|reader| &reader.channels);
    let partition_channels = channels.map(|channel| channel.sender.clone()).collect();
    let is_source = matches!(worker.head, Head::Source);
    let (shared, attempt) = (worker.shared.clone(), worker.attempt);
    let tasks: Vec<TaskId> = worker.nodes.iter().map(|node| node.task).collect();
    let first = tasks[0];
    let reader = reader.and_then(|reader| match worker.restore_from {
        None => Some(tokio::spawn(reader.run(shared.clone()))),
        // The last checkpoint of a job is after the end of everything that there was to read.
        Some(_) => {
            for channel in &reader.channels {
                channel.sender.send(Element::EndOfInput);
            }
            None
        }
    });
    let handle = tokio::spawn(async move {
        let ended = AssertUnwindSafe(worker.run()).catch_unwind().await;
        let (task, cause) = match ended {
            Ok(Ok(())) => return,
            Ok(Err(failure)) => (failure.task, failure.cause),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text =
                    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
                (first, host_bug(text))
            }
        };
        shared.report(Event::TaskFailed { task: Some((task, attempt)), cause, lost: None });
    });
    RunningWorker { tasks, is_source, control, handle, reader, partition_channels, calls_ended }
}

/// A worker that is to be run, and what feeds those of its channels that begin at partitions.
struct PreparedWorker {
    worker: Worker,
    control: UnboundedSender<Control>,
    reader: Option<PartitionReader>,
    calls_ended: CallsEnded,
}

/// A channel of a task.
struct Incoming<'g> {
    /// The edge's place in the graph.
    place: usize,
    edge: &'g Edge,
    producer: TaskId,
    /// Its place among the task's.
    channel: usize,
}

impl Plan {
    /// Builds the workers of these tasks, with their channels. No channel leads out of a region but
    /// those that outlive attempts, so other tasks are not concerned.
    fn workers(
        &self,
        tasks: Vec<TaskAttempt>,
        restore_from: Option<CheckpointId>,
        given_up: Option<CheckpointId>,
        shared: &Arc<Shared>,
    ) -> Vec<PreparedWorker> {
        let graph = &self.graph;
        let is_head: BTreeSet<OperatorId> = graph.chain_heads().collect();
        let heads = || tasks.iter().filter(|(task, _)| is_head.contains(&task.operator));
        let gates: BTreeMap<TaskId, Arc<Gate>> = heads()
            .filter(|(task, _)| graph.inputs(task.operator).next().is_some())
            .map(|(task, _)| (*task, Gate::new(channel_counts(graph, *task).iter().sum())))
            .collect();
        let opening = Arc::new(Opening::new(heads().count(), tasks.clone()));
        let mut workers = Vec::with_capacity(heads().count());
        for &(task, attempt) in heads() {
            let (nodes, writers) = self.chain(task, attempt, restore_from, &gates);
            let head = match gates.get(&task) {
                Some(gate) => {
                    let channels = origins(graph, task);
                    let barriers = self.barriers(channels.len(), given_up);
                    Head::Gate { gate: gate.clone(), channels, barriers }
                }
                None => Head::Source,
            };
            let (sender, control) = mpsc::unbounded_channel();
            let (blocking, calls_ended) = Blocking::new();
            let worker = Worker {
                attempt,
                shared: shared.clone(),
                head,
                nodes,
                writers,
                control,
                opening: opening.clone(),
                restore_from,
                unaligned_after: self.unaligned_after,
                backlog_lag_ms: self.backlog_lag_ms,
                is_backlog: false,
                is_batch: self.partitions.is_some(),
                held: None,
                clock: Clock::default(),
                idle_after: self.idle_after(task.operator),
                blocking,
            };
            workers.push(PreparedWorker { worker, control: sender, reader: None, calls_ended });
        }
        // Only now, when all that these tasks produce for each other has begun.
        for prepared in &mut workers {
            if let Head::Gate { gate, .. } = &prepared.worker.head {
                let (task, attempt) = (prepared.worker.nodes[0].task, prepared.worker.attempt);
                prepared.reader = self.reader(task, attempt, gate);
                for Incoming { place, edge, producer, channel } in self.incoming(task) {
                    if edge.exchange.is_approximate() {
                        let id = LinkId { edge: place, producer, consumer: task };
                        let receiver = Sender::new(gate, channel);
                        self.links.connect(id, receiver, restore_from);
                    }
                }
            }
        }
        self.tell_losses(shared);
        workers
    }

    fn tell_losses(&self, shared: &Shared) {
        for (place, Losses { lost, regained }) in self.links.take_news() {
            if (lost, regained) == (0, 0) {
                continue;
            }
            shared.metrics.records_lost.fetch_add(lost, Ordering::Relaxed);
            shared.metrics.records_lost.fetch_sub(regained, Ordering::Relaxed);
            let edge = &self.graph.edges()[place];
            let name = |operator| self.graph.operator(operator).name.clone();
            let (from, to, is_exact) = (name(edge.from), name(edge.to), self.is_exactly_once);
            shared.observe(Progress::RecordsLost { from, to, lost, regained, is_exact });
        }
    }

    /// The channels of a task, in their order.
    fn incoming(&self, task: TaskId) -> impl Iterator<Item = Incoming<'_>> {
        let edges = self.graph.edges().iter().enumerate();
        let channels = edges.filter(move |(_, edge)| edge.to == task.operator).flat_map(
            move |(place, edge)| {
                let producers = producers(&self.graph, edge, task.index);
                producers.map(move |index| (place, edge, TaskId { operator: edge.from, index }))
            },
        );
        channels.enumerate().map(|(channel, (place, edge, producer))| Incoming {
            place,
            edge,
            producer,
            channel,
        })
    }

    /// What feeds the channels of a task that begin at partitions, if there are such.
    fn reader(&self, task: TaskId, attempt: Attempt, gate: &Arc<Gate>) -> Option<PartitionReader> {
        let partitions = self.partitions.as_ref()?;
        let incoming = self.incoming(task).filter(|channel| channel.edge.exchange.has_partition());
        let channels = incoming.map(|Incoming { place, edge, producer, channel }| {
            let id = PartitionId { edge: place, producer };
            let readers = receivers(&self.graph, edge, producer.index);
            PartitionChannel {
                sender: Sender::new(gate, channel),
                id,
                partition: partitions.get(id),
                reader: (task.index - readers.start) as usize,
            }
        });
        let channels: Vec<_> = channels.collect();
        (!channels.is_empty()).then_some(PartitionReader { task, attempt, channels })
    }

    /// Where a producing task puts the records of an edge, which is named by its place: an input may
    /// be there twice.
    fn outlets(
        &self,
        place: usize,
        producer: TaskId,
        attempt: Attempt,
        restore_from: Option<CheckpointId>,
        gates: &BTreeMap<TaskId, Arc<Gate>>,
    ) -> Vec<Outlet> {
        let edge = &self.graph.edges()[place];
        let receivers = receivers(&self.graph, edge, producer.index);
        if edge.exchange.is_approximate() {
            let link = |index| {
                let consumer = TaskId { operator: edge.to, index };
                let id = LinkId { edge: place, producer, consumer };
                Outlet::Link(self.links.begin(id, restore_from))
            };
            return receivers.map(link).collect();
        }
        let Some(partitions) = self.partitions.as_ref().filter(|_| edge.exchange.has_partition())
        else {
            let senders = senders(&self.graph, place, producer.index, gates);
            return senders.into_iter().map(Outlet::Channel).collect();
        };
        let readers = receivers.len();
        let id = PartitionId { edge: place, producer };
        let bytes_max = self.partition_bytes_max(producer.operator);
        let writer = Arc::new(Mutex::new(partitions.begin(id, attempt, readers, bytes_max)));
        (0..readers).map(|reader| Outlet::Partition(writer.clone(), reader)).collect()
    }

    /// The nodes and writers of the chain that begins with one task.
    fn chain(
        &self,
        head: TaskId,
        attempt: Attempt,
        restore_from: Option<CheckpointId>,
        gates: &BTreeMap<TaskId, Arc<Gate>>,
    ) -> (Vec<Node>, Vec<Writer>) {
        let (mut nodes, mut writers) = (Vec::<Node>::new(), Vec::new());
        // Each entry: an operator, and the node and output whose records it takes.
        let index = head.index;
        let mut waiting =
            std::collections::VecDeque::from([(head.operator, None::<(usize, u32, u32)>)]);
        while let Some((operator, from)) = waiting.pop_front() {
            let node = nodes.len();
            if let Some((producer, output, input)) = from {
                add_target(&mut nodes[producer], output, Target::Node { node, input });
            }
            let task = TaskId { operator, index };
            nodes.push(self.node(task, attempt));
            let edges = self.graph.edges().iter().enumerate();
            for (place, edge) in edges.filter(|(_, edge)| edge.from == operator) {
                if self.graph.is_chained(edge) {
                    waiting.push_back((edge.to, Some((node, edge.output, edge.input))));
                    continue;
                }
                let outlets = self.outlets(place, task, attempt, restore_from, gates);
                let groups = self.max_parallelism(edge.to);
                let writer = Writer::new(edge.partitioner, groups, outlets, index as usize);
                add_target(&mut nodes[node], edge.output, Target::Writer(writers.len()));
                writers.push(writer);
            }
        }
        (nodes, writers)
    }
}

fn add_target(node: &mut Node, output: u32, target: Target) {
    let output = output as usize;
    if node.targets.len() <= output {
        node.targets.resize_with(output + 1, Vec::new);
    }
    node.targets[output].push(target);
}

/// The producing tasks of an edge that one receiving task reads from.
fn producers(graph: &JobGraph, edge: &Edge, to: u32) -> Range<u32> {
    let (sources, targets) =
        (graph.operator(edge.from).parallelism, graph.operator(edge.to).parallelism);
    match edge.partitioner {
        // Also what sends everything to one task sends barriers to all.
        Partitioner::Hash
        | Partitioner::Rebalance
        | Partitioner::Broadcast
        | Partitioner::Global => 0..sources,
        Partitioner::Forward | Partitioner::Rescale => {
            let feeds = |from: &u32| consumer_range(*from, sources, targets).contains(&to);
            let first = (0..sources).find(feeds).unwrap_or(0);
            first..first + (first..sources).take_while(feeds).count() as u32
        }
    }
}

/// How many channels each input edge brings to a task.
fn channel_counts(graph: &JobGraph, to: TaskId) -> Vec<usize> {
    graph.inputs(to.operator).map(|edge| producers(graph, edge, to.index).len()).collect()
}

/// Where the records of each channel of a task come from.
fn origins(graph: &JobGraph, to: TaskId) -> Arc<[Origin]> {
    let mut origins = Vec::new();
    for (place, edge) in (0..).zip(graph.inputs(to.operator)) {
        let from: Arc<str> = graph.operator(edge.from).name.as_str().into();
        origins.extend(producers(graph, edge, to.index).map(|producer| Origin {
            place,
            input: edge.input,
            from: from.clone(),
            producer,
        }));
    }
    origins.into()
}

/// The channels of an edge that begin at one of its producing tasks.
fn senders(
    graph: &JobGraph,
    place: usize,
    index: u32,
    gates: &BTreeMap<TaskId, Arc<Gate>>,
) -> Vec<Sender> {
    let edge = &graph.edges()[place];
    let before = graph.edges()[..place].iter().filter(|other| other.to == edge.to).count();
    let sender = |to: u32| {
        let task = TaskId { operator: edge.to, index: to };
        let first: usize = channel_counts(graph, task).iter().take(before).sum();
        let place = index - producers(graph, edge, to).start;
        Sender::new(&gates[&task], first + place as usize)
    };
    receivers(graph, edge, index).map(sender).collect()
}

/// The receiving tasks of an edge that one producing task writes to.
fn receivers(graph: &JobGraph, edge: &Edge, index: u32) -> Range<u32> {
    let (sources, targets) =
        (graph.operator(edge.from).parallelism, graph.operator(edge.to).parallelism);
    match edge.partitioner {
        Partitioner::Hash
        | Partitioner::Rebalance
        | Partitioner::Broadcast
        | Partitioner::Global => 0..targets,
        Partitioner::Forward | Partitioner::Rescale => consumer_range(index, sources, targets),
    }
}
