//! From the plan of a job to the workers of an attempt, with the channels between them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, atomic::Ordering},
};

use cofferdam_connector::blocking::{Blocking, CallsEnded};
use cofferdam_core::{
    channel::{consumers, producers},
    failover::topology::PartitionId,
    graph::{Edge, JobGraph},
    ids::{Attempt, CheckpointId, NodeId, TaskId},
    job::TaskAttempt,
    watermark::Clock,
};
use tokio::sync::mpsc::{self, UnboundedSender};

use crate::{
    exchange::{
        Gate, Outlet, Sender,
        link::{LinkId, Losses},
        partition::{PartitionChannel, PartitionReader},
        writer::Writer,
    },
    job::plan::Plan,
    task::{
        Control, Head, Opening, Origin, Worker,
        node::{Node, Target},
    },
    watch::{monitor::Monitor, progress::Progress},
};

/// A worker that is to be run, and what feeds those of its channels that begin at partitions.
pub(super) struct PreparedWorker {
    pub(super) worker: Worker,
    pub(super) control: UnboundedSender<Control>,
    pub(super) reader: Option<PartitionReader>,
    pub(super) calls_ended: CallsEnded,
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
    pub(super) fn workers(
        &self,
        tasks: Vec<TaskAttempt>,
        restore_from: Option<CheckpointId>,
        given_up: Option<CheckpointId>,
        monitor: &Arc<Monitor>,
    ) -> Vec<PreparedWorker> {
        let graph = &self.graph;
        let is_head: BTreeSet<NodeId> = graph.chain_heads().collect();
        let heads = || tasks.iter().filter(|(task, _)| is_head.contains(&task.node));
        let gates: BTreeMap<TaskId, Arc<Gate>> = heads()
            .filter(|(task, _)| graph.inputs(task.node).next().is_some())
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
                monitor: monitor.clone(),
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
                idle_after: self.idle_after(task.node),
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
        self.tell_losses(monitor);
        workers
    }

    fn tell_losses(&self, monitor: &Monitor) {
        for (place, Losses { lost, regained }) in self.links.take_news() {
            if (lost, regained) == (0, 0) {
                continue;
            }
            monitor.metrics.records_lost.fetch_add(lost, Ordering::Relaxed);
            monitor.metrics.records_lost.fetch_sub(regained, Ordering::Relaxed);
            let edge = &self.graph.edges()[place];
            let name = |operator| self.graph.node(operator).name.clone();
            let (from, to, is_exact) = (name(edge.from), name(edge.to), self.is_exactly_once);
            monitor.observe(Progress::RecordsLost { from, to, lost, regained, is_exact });
        }
    }

    /// The channels of a task, in their order.
    fn incoming(&self, task: TaskId) -> impl Iterator<Item = Incoming<'_>> {
        let edges = self.graph.edges().iter().enumerate();
        let channels =
            edges.filter(move |(_, edge)| edge.to == task.node).flat_map(move |(place, edge)| {
                let producers = producers(&self.graph, edge, task.index);
                producers.map(move |index| (place, edge, TaskId { node: edge.from, index }))
            });
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
            let readers = consumers(&self.graph, edge, producer.index);
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
        let receivers = consumers(&self.graph, edge, producer.index);
        if edge.exchange.is_approximate() {
            let link = |index| {
                let consumer = TaskId { node: edge.to, index };
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
        let bytes_max = self.partition_bytes_max(producer.node);
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
            std::collections::VecDeque::from([(head.node, None::<(usize, u32, u32)>)]);
        while let Some((operator, from)) = waiting.pop_front() {
            let node = nodes.len();
            if let Some((producer, output, input)) = from {
                add_target(&mut nodes[producer], output, Target::Node { node, input });
            }
            let task = TaskId { node: operator, index };
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

/// How many channels each input edge brings to a task.
fn channel_counts(graph: &JobGraph, to: TaskId) -> Vec<usize> {
    graph.inputs(to.node).map(|edge| producers(graph, edge, to.index).len()).collect()
}

/// Where the records of each channel of a task come from.
fn origins(graph: &JobGraph, to: TaskId) -> Arc<[Origin]> {
    let mut origins = Vec::new();
    for (place, edge) in (0..).zip(graph.inputs(to.node)) {
        let from: Arc<str> = graph.node(edge.from).name.as_str().into();
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
        let task = TaskId { node: edge.to, index: to };
        let first: usize = channel_counts(graph, task).iter().take(before).sum();
        let place = index - producers(graph, edge, to).start;
        Sender::new(&gates[&task], first + place as usize)
    };
    consumers(graph, edge, index).map(sender).collect()
}
