//! Turns a job graph (nodes and edges) into tasks, channels and chains.

use std::collections::BTreeSet;

use crate::{
    exchange::ExchangeType,
    ids::{NodeId, TaskId},
};

/// How an edge picks the channel of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partitioner {
    /// Task `i` to task `i`; needs equal parallelism.
    Forward,
    /// By the key group of the record's key.
    Hash,
    /// To one channel after the other.
    Rebalance,
    /// As rebalance, among the few tasks that are nearest by index.
    Rescale,
    /// To every channel.
    Broadcast,
    /// To task 0.
    Global,
}

impl Partitioner {
    /// Each task talks to few others, and not to all.
    #[must_use]
    pub fn is_pointwise(self) -> bool {
        matches!(self, Self::Forward | Self::Rescale)
    }
}

/// A node of the job graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name in the manifest; unique in the job.
    pub name: String,
    /// How many tasks run it; at least 1.
    pub parallelism: u32,
}

/// An edge of the job graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    /// The node that sends.
    pub from: NodeId,
    /// Which of its outputs.
    pub output: u32,
    /// The node that receives.
    pub to: NodeId,
    /// Which of its inputs.
    pub input: u32,
    /// How a record finds its task.
    pub partitioner: Partitioner,
    /// How records get from one side to the other.
    pub exchange: ExchangeType,
}

/// A job graph without cycles. Operators are numbered as they were given.
#[derive(Debug, Clone)]
pub struct JobGraph {
    nodes: Vec<Node>,
    edges: Vec<Edge>,
    topological: Vec<NodeId>,
}

/// Why nodes and edges do not make a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GraphError {
    /// These nodes wait for each other, in this order.
    Cycle(Vec<NodeId>),
    /// A forward edge joins nodes of different parallelism.
    ForwardNeedsEqualParallelism(Edge),
}

impl JobGraph {
    /// Checks the graph and puts its nodes in topological order.
    ///
    /// # Errors
    /// Where the edges form a cycle, or a forward edge joins different parallelisms.
    ///
    /// # Panics
    /// If an edge names a node that is not there.
    pub fn new(nodes: Vec<Node>, edges: Vec<Edge>) -> Result<Self, GraphError> {
        let parallelism = |id: NodeId| nodes[id.0 as usize].parallelism;
        for edge in &edges {
            let is_equal = parallelism(edge.from) == parallelism(edge.to);
            if edge.partitioner == Partitioner::Forward && !is_equal {
                return Err(GraphError::ForwardNeedsEqualParallelism(*edge));
            }
        }
        let topological = topological_order(nodes.len(), &edges)?;
        Ok(Self { nodes, edges, topological })
    }

    /// Every node with its id, in the order of the manifest.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        (0..).map(NodeId).zip(&self.nodes)
    }

    /// One node.
    ///
    /// # Panics
    /// If the id is not of this graph.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// Every edge.
    #[must_use]
    pub fn edges(&self) -> &[Edge] {
        &self.edges
    }

    /// The edges into a node.
    pub fn inputs(&self, id: NodeId) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |edge| edge.to == id)
    }

    /// The edges out of a node.
    pub fn outputs(&self, id: NodeId) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |edge| edge.from == id)
    }

    /// Every task of the job, by node, then index.
    #[must_use]
    pub fn tasks(&self) -> BTreeSet<TaskId> {
        self.nodes()
            .flat_map(|(node, spec)| (0..spec.parallelism).map(move |index| TaskId { node, index }))
            .collect()
    }

    /// Whether an edge has an exchange of this kind.
    #[must_use]
    pub fn has_exchange(&self, is_meant: impl Fn(ExchangeType) -> bool) -> bool {
        self.edges.iter().any(|edge| is_meant(edge.exchange))
    }

    /// True for an edge that costs no channel: its ends run in one worker, one call after the
    /// other. A forward edge is chained where it is its receiver's only input.
    #[must_use]
    pub fn is_chained(&self, edge: &Edge) -> bool {
        edge.partitioner == Partitioner::Forward
            && edge.exchange.must_be_pipelined()
            && self.inputs(edge.to).count() == 1
    }

    /// The nodes that head a chain, in topological order: every one that is not chained to
    /// its input.
    pub fn chain_heads(&self) -> impl Iterator<Item = NodeId> {
        self.topological
            .iter()
            .copied()
            .filter(|id| !self.inputs(*id).any(|edge| self.is_chained(edge)))
    }

    /// A task as people write it: `count/1`.
    #[must_use]
    pub fn task_name(&self, task: TaskId) -> String {
        format!("{}/{}", self.node(task.node).name, task.index)
    }
}

/// Kahn's algorithm; what is left when nothing is free any more contains a cycle.
fn topological_order(count: usize, edges: &[Edge]) -> Result<Vec<NodeId>, GraphError> {
    let mut waiting_for = vec![0usize; count];
    for edge in edges {
        waiting_for[edge.to.0 as usize] += 1;
    }
    let ids = (0..).map(NodeId).take(count);
    let mut order: Vec<NodeId> = ids.filter(|id| waiting_for[id.0 as usize] == 0).collect();
    let mut next = 0;
    while let Some(&id) = order.get(next) {
        next += 1;
        for edge in edges.iter().filter(|edge| edge.from == id) {
            let waiting = &mut waiting_for[edge.to.0 as usize];
            *waiting -= 1;
            if *waiting == 0 {
                order.push(edge.to);
            }
        }
    }
    if order.len() == count {
        return Ok(order);
    }
    Err(GraphError::Cycle(find_cycle(&waiting_for, edges)))
}

/// Walks backwards among the nodes that never became free until one comes again.
fn find_cycle(waiting_for: &[usize], edges: &[Edge]) -> Vec<NodeId> {
    let is_stuck = |id: NodeId| waiting_for[id.0 as usize] != 0;
    let Some(mut at) = (0..).map(NodeId).take(waiting_for.len()).find(|&id| is_stuck(id)) else {
        return Vec::new();
    };
    let mut path = vec![at];
    // Every stuck node has a stuck predecessor, so this ends at the first repetition.
    while let Some(edge) = edges.iter().find(|edge| edge.to == at && is_stuck(edge.from)) {
        at = edge.from;
        if let Some(start) = path.iter().position(|&id| id == at) {
            let mut cycle = path.split_off(start);
            cycle.reverse();
            return cycle;
        }
        path.push(at);
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds a graph from lines like `a -> b hash`; nodes are numbered as they appear.
    fn graph(
        parallelism: &[(&str, u32)],
        edges: &[(&str, &str, Partitioner)],
    ) -> Result<JobGraph, GraphError> {
        let nodes = parallelism
            .iter()
            .map(|&(name, parallelism)| Node { name: name.to_owned(), parallelism })
            .collect();
        let id = |name: &str| {
            let place = parallelism.iter().position(|(known, _)| *known == name).expect("known");
            NodeId(u32::try_from(place).expect("small"))
        };
        let edges = edges
            .iter()
            .map(|&(from, to, partitioner)| Edge {
                from: id(from),
                output: 0,
                to: id(to),
                input: 0,
                partitioner,
                exchange: ExchangeType::PipelinedBounded,
            })
            .collect();
        JobGraph::new(nodes, edges)
    }

    #[test]
    fn chain_ends_where_an_exchange_begins() {
        use Partitioner::{Forward, Hash};
        let graph = graph(
            &[("lines", 2), ("split", 2), ("count", 2), ("out", 2)],
            &[("lines", "split", Forward), ("split", "count", Hash), ("count", "out", Forward)],
        )
        .expect("a job");
        let heads: Vec<&str> = graph.chain_heads().map(|id| graph.node(id).name.as_str()).collect();
        assert_eq!(heads, ["lines", "count"]);
        assert_eq!(graph.tasks().len(), 8);
        assert_eq!(graph.task_name(TaskId { node: NodeId(2), index: 1 }), "count/1");
    }

    #[test]
    fn operator_with_two_inputs_is_never_chained() {
        use Partitioner::Forward;
        let graph = graph(
            &[("a", 1), ("b", 1), ("join", 1)],
            &[("a", "join", Forward), ("b", "join", Forward)],
        )
        .expect("a job");
        assert_eq!(graph.chain_heads().count(), 3);
    }

    #[test]
    fn cycle_is_named_in_the_order_of_its_edges() {
        use Partitioner::Rebalance;
        let error = graph(
            &[("in", 1), ("a", 1), ("b", 1), ("c", 1)],
            &[
                ("in", "a", Rebalance),
                ("a", "b", Rebalance),
                ("b", "c", Rebalance),
                ("c", "a", Rebalance),
            ],
        )
        .expect_err("a cycle");
        let GraphError::Cycle(cycle) = error else { panic!("{error:?}") };
        let mut turned = cycle.clone();
        turned.sort();
        assert_eq!(turned, [NodeId(1), NodeId(2), NodeId(3)]);
        let follows = |a: NodeId| NodeId(a.0 % 3 + 1);
        assert!(cycle.windows(2).all(|pair| follows(pair[0]) == pair[1]), "{cycle:?}");
    }

    #[test]
    fn forward_between_different_parallelisms_is_no_job() {
        let error = graph(&[("a", 1), ("b", 2)], &[("a", "b", Partitioner::Forward)]);
        assert!(matches!(error, Err(GraphError::ForwardNeedsEqualParallelism(_))));
    }
}
