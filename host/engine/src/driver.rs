//! The one loop of a job: receive an event or reach a deadline, step the core, perform the effects.
//!
//! Performing starts work; its result comes back as an event. Nothing here decides.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cofferdam_core::{
    checkpoint::{DiscardReason, Purpose},
    failure::FailureCause,
    graph::{JobGraph, Partitioner},
    ids::{Attempt, CheckpointId, Millis, OperatorId, TaskId},
    job::{Effect, Event, Job, Outcome},
};
use futures::FutureExt;
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinHandle,
};

use crate::{
    exchange::{Gate, Sender, writer::Writer},
    job::Plan,
    metrics::Metrics,
    progress::{Observer, Progress},
    storage::{
        snapshot::TaskSnapshot,
        writer::{Report, StorageHandle},
    },
    task::{
        Control, Head, Worker,
        local::TaskLocal,
        node::{Node, Target, host_bug},
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
}

impl Stats {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, CheckpointStats>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, checkpoint: CheckpointId, change: impl FnOnce(&mut CheckpointStats)) {
        change(self.lock().entry(checkpoint.0).or_default());
    }
}

impl Shared {
    pub(crate) fn report(&self, event: Event) {
        // The driver is the last to go; after it nobody needs to know.
        let _ = self.events.send(event);
    }

    pub(crate) fn note_pause(
        &self,
        checkpoint: CheckpointId,
        pause: Duration,
        snapshot: &TaskSnapshot,
    ) {
        let state_bytes = snapshot.memory.as_ref().map_or(0, |memory| memory.size_bytes());
        self.stats.change(checkpoint, |stats| {
            stats.pause = stats.pause.max(pause);
            stats.state_bytes += state_bytes;
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
            self.observer.observe(Progress::Recovered { recovery_us });
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
    locals: BTreeMap<TaskId, Arc<TaskLocal>>,
    workers: Vec<RunningWorker>,
    failed_at: Option<Instant>,
    outcome: Option<Outcome>,
}

struct RunningWorker {
    is_source: bool,
    control: UnboundedSender<Control>,
    handle: JoinHandle<()>,
}

impl Driver {
    pub(crate) fn new(
        plan: Plan,
        core: Job,
        storage: StorageHandle,
        report: &WriterReport,
        inbox: UnboundedReceiver<Event>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let shared = Shared {
            events: report.events.clone(),
            storage,
            metrics,
            observer: report.observer.clone(),
            stats: report.stats.clone(),
            recovery: Mutex::new(None),
            is_recovering: AtomicBool::new(false),
        };
        let locals = plan.graph.tasks().into_iter().map(|task| (task, Arc::default())).collect();
        Self {
            plan,
            core,
            shared: Arc::new(shared),
            inbox,
            started: Instant::now(),
            locals,
            workers: Vec::new(),
            failed_at: None,
            outcome: None,
        }
    }

    /// Runs the job to its end. `first` is the core's first effect.
    pub(crate) async fn run(mut self, first: Effect) -> Outcome {
        self.perform(first);
        let mut effects = Vec::new();
        loop {
            let event = self.next_event().await;
            if let Event::TaskFailed { attempt, .. } = &event
                && *attempt == self.core.attempt()
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
            Effect::StartTasks { attempt, restore_from } => self.start_tasks(attempt, restore_from),
            Effect::InjectBarrier { checkpoint, purpose, .. } => {
                self.shared
                    .stats
                    .change(checkpoint, |stats| stats.triggered_at = Some(Instant::now()));
                let sources = self.workers.iter().filter(|worker| worker.is_source);
                tell(sources, Control::Barrier(checkpoint, purpose));
            }
            Effect::PersistManifest { checkpoint } => self.shared.storage.complete(checkpoint),
            Effect::NotifyComplete { checkpoint, purpose, .. } => {
                self.notify_complete(checkpoint, purpose)
            }
            Effect::Discard { checkpoint, reason: DiscardReason::Subsumed } => {
                if let Some(newest) = self.core.last_completed() {
                    self.shared.storage.subsume(checkpoint, newest);
                }
            }
            Effect::Discard { checkpoint, reason } => {
                tell(&self.workers, Control::Abort(checkpoint));
                self.shared.stats.lock().remove(&checkpoint.0);
                let reason = match &reason {
                    DiscardReason::Declined { task, .. } => {
                        format!("{} {}", self.plan.graph.task_name(*task), reason.message())
                    }
                    _ => reason.message(),
                };
                self.observe(Progress::checkpoint_failed(checkpoint, reason));
            }
            Effect::CancelTasks { attempt } => self.cancel_tasks(attempt),
            Effect::AnnounceRestart { task, cause, delay_ms } => {
                self.announce_restart(task, &cause, delay_ms);
            }
            Effect::Finish { outcome } => self.outcome = Some(outcome),
        }
    }

    fn observe(&self, progress: Progress) {
        self.shared.observer.observe(progress);
    }

    fn announce_restart(&mut self, task: Option<TaskId>, cause: &FailureCause, delay_ms: u64) {
        let failed_at = self.failed_at.take().unwrap_or_else(Instant::now);
        let delay = Duration::from_millis(delay_ms);
        let recovery = Recovery { operator: task.map(|task| task.operator), failed_at, delay };
        *self.shared.recovery.lock().unwrap_or_else(PoisonError::into_inner) = Some(recovery);
        self.shared.is_recovering.store(true, Ordering::Relaxed);
        self.shared.metrics.restarts.fetch_add(1, Ordering::Relaxed);
        let task = task.map(|task| self.plan.graph.task_name(task));
        self.observe(Progress::restarting(task, cause, delay_ms));
    }

    fn notify_complete(&mut self, checkpoint: CheckpointId, purpose: Purpose) {
        tell(&self.workers, Control::Complete(checkpoint, purpose));
        self.shared.metrics.checkpoints.fetch_add(1, Ordering::Relaxed);
        let stats = self.shared.stats.lock().remove(&checkpoint.0).unwrap_or_default();
        let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
        self.observe(Progress::CheckpointCompleted {
            checkpoint: checkpoint.0,
            duration_ms: stats.triggered_at.map_or(0.0, |at| millis(at.elapsed())),
            pause_ms: millis(stats.pause),
            bytes: stats.bytes,
            state_bytes: stats.state_bytes,
        });
        let locals: Vec<Arc<TaskLocal>> = self.locals.values().cloned().collect();
        tokio::task::spawn_blocking(move || {
            for local in locals {
                if let Err(error) = local.lock().settle(checkpoint.0) {
                    tracing::warn!(%error, "bring the local image forward: a restart will read the storage");
                }
            }
        });
    }

    fn start_tasks(&mut self, attempt: Attempt, restore_from: Option<CheckpointId>) {
        self.failed_at = None;
        self.shared.storage.begin(attempt, restore_from);
        let workers = self.plan.workers(attempt, restore_from, &self.shared, &self.locals);
        self.observe(Progress::Started {
            attempt: attempt.0,
            restored_from: restore_from.map(|checkpoint| checkpoint.0),
            tasks: self.plan.graph.tasks().len(),
        });
        self.workers = workers.into_iter().map(|(worker, control)| run(worker, control)).collect();
    }

    fn cancel_tasks(&mut self, attempt: Attempt) {
        let workers = std::mem::take(&mut self.workers);
        workers.iter().for_each(|worker| worker.handle.abort());
        let shared = self.shared.clone();
        tokio::spawn(async move {
            for worker in workers {
                // An abort is what was asked for, and a panic was reported by the worker itself.
                let _ = worker.handle.await;
            }
            shared.report(Event::TasksStopped { attempt });
        });
    }
}

fn tell<'w>(workers: impl IntoIterator<Item = &'w RunningWorker>, control: Control) {
    for worker in workers {
        // A worker that has ended needs to know nothing more.
        let _ = worker.control.send(control);
    }
}

fn run(worker: Worker, control: UnboundedSender<Control>) -> RunningWorker {
    let is_source = matches!(worker.head, Head::Source);
    let (shared, attempt, first) = (worker.shared.clone(), worker.attempt, worker.nodes[0].task);
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
        shared.report(Event::TaskFailed { task: Some(task), attempt, cause });
    });
    RunningWorker { is_source, control, handle }
}

impl Plan {
    /// Builds every worker of an attempt, with its channels.
    fn workers(
        &self,
        attempt: Attempt,
        restore_from: Option<CheckpointId>,
        shared: &Arc<Shared>,
        locals: &BTreeMap<TaskId, Arc<TaskLocal>>,
    ) -> Vec<(Worker, UnboundedSender<Control>)> {
        let graph = &self.graph;
        let heads: Vec<OperatorId> = graph.chain_heads().collect();
        let gates: BTreeMap<TaskId, Arc<Gate>> = heads
            .iter()
            .filter(|head| graph.inputs(**head).next().is_some())
            .flat_map(|&head| {
                let count = channel_counts(graph, head).iter().sum();
                let tasks = 0..graph.operator(head).parallelism;
                tasks.map(move |index| (TaskId { operator: head, index }, Gate::new(count)))
            })
            .collect();
        let count: u32 = heads.iter().map(|head| graph.operator(*head).parallelism).sum();
        let opening = Arc::new(AtomicUsize::new(count as usize));
        let mut workers = Vec::with_capacity(count as usize);
        for &head in &heads {
            for index in 0..graph.operator(head).parallelism {
                let (nodes, writers) = self.chain(head, index, &gates, locals);
                let source_head = match gates.get(&TaskId { operator: head, index }) {
                    Some(gate) => {
                        Head::Gate { gate: gate.clone(), inputs: channel_inputs(graph, head) }
                    }
                    None => Head::Source,
                };
                let (sender, control) = mpsc::unbounded_channel();
                let worker = Worker {
                    attempt,
                    shared: shared.clone(),
                    head: source_head,
                    nodes,
                    writers,
                    control,
                    opening: opening.clone(),
                    restore_from,
                };
                workers.push((worker, sender));
            }
        }
        workers
    }

    /// The nodes and writers of the chain that begins with one task.
    fn chain(
        &self,
        head: OperatorId,
        index: u32,
        gates: &BTreeMap<TaskId, Arc<Gate>>,
        locals: &BTreeMap<TaskId, Arc<TaskLocal>>,
    ) -> (Vec<Node>, Vec<Writer>) {
        let (mut nodes, mut writers) = (Vec::<Node>::new(), Vec::new());
        // Each entry: an operator, and the node and output whose records it takes.
        let mut waiting = std::collections::VecDeque::from([(head, None::<(usize, u32, u32)>)]);
        while let Some((operator, from)) = waiting.pop_front() {
            let place = nodes.len();
            if let Some((producer, output, input)) = from {
                add_target(&mut nodes[producer], output, Target::Node { node: place, input });
            }
            let task = TaskId { operator, index };
            nodes.push(self.node(task, locals[&task].clone()));
            for edge in self.graph.outputs(operator) {
                if self.graph.is_chained(edge) {
                    waiting.push_back((edge.to, Some((place, edge.output, edge.input))));
                    continue;
                }
                let senders = senders(&self.graph, edge, index, gates);
                let groups = self.max_parallelism(edge.to);
                let writer = Writer::new(edge.partitioner, groups, senders, index as usize);
                add_target(&mut nodes[place], edge.output, Target::Writer(writers.len()));
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

/// How many channels each input edge of an operator brings to each of its tasks.
fn channel_counts(graph: &JobGraph, to: OperatorId) -> Vec<usize> {
    let count = |edge: &cofferdam_core::graph::Edge| match edge.partitioner {
        Partitioner::Forward => 1,
        Partitioner::Hash | Partitioner::Rebalance | Partitioner::Broadcast => {
            graph.operator(edge.from).parallelism as usize
        }
    };
    graph.inputs(to).map(count).collect()
}

/// The input that each channel of a task belongs to.
fn channel_inputs(graph: &JobGraph, to: OperatorId) -> Vec<u32> {
    let counts = channel_counts(graph, to);
    let edges = graph.inputs(to).zip(counts);
    edges.flat_map(|(edge, count)| std::iter::repeat_n(edge.input, count)).collect()
}

/// The channels of an edge that begin at one of its producing tasks.
fn senders(
    graph: &JobGraph,
    edge: &cofferdam_core::graph::Edge,
    index: u32,
    gates: &BTreeMap<TaskId, Arc<Gate>>,
) -> Vec<Sender> {
    let before = graph.inputs(edge.to).take_while(|other| *other != edge).count();
    let first: usize = channel_counts(graph, edge.to).iter().take(before).sum();
    let receiver = |index: u32, channel: usize| {
        Sender::new(&gates[&TaskId { operator: edge.to, index }], first + channel)
    };
    match edge.partitioner {
        Partitioner::Forward => vec![receiver(index, 0)],
        Partitioner::Hash | Partitioner::Rebalance | Partitioner::Broadcast => {
            let tasks = 0..graph.operator(edge.to).parallelism;
            tasks.map(|to| receiver(to, index as usize)).collect()
        }
    }
}
