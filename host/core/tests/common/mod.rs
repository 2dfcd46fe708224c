//! Random job graphs, and the pairs of tasks that their edges join, found without the code under test.

use cofferdam_core::{
    exchange::ExchangeType,
    failover::topology::PartitionId,
    graph::{Edge, JobGraph, Node, Partitioner},
    ids::{NodeId, TaskId},
    random::Random,
};

/// A graph whose edges have exchanges of these types.
pub(crate) fn random_graph(random: &mut Random, exchanges: &[ExchangeType]) -> JobGraph {
    let count = random.between(1, 7) as u32;
    let operators: Vec<Node> = (0..count)
        .map(|n| Node { name: format!("v{n}"), parallelism: random.between(1, 4) as u32 })
        .collect();
    let mut edges = Vec::new();
    for to in 1..count {
        for from in 0..to {
            if !random.one_in(2) {
                continue;
            }
            let is_equal =
                operators[from as usize].parallelism == operators[to as usize].parallelism;
            let partitioner = match random.between(0, 4) {
                0 if is_equal => Partitioner::Forward,
                0 | 1 => Partitioner::Rescale,
                2 => Partitioner::Hash,
                3 => Partitioner::Broadcast,
                _ => Partitioner::Global,
            };
            edges.push(Edge {
                from: NodeId(from),
                output: 0,
                to: NodeId(to),
                input: 0,
                partitioner,
                exchange: exchanges[random.between(0, exchanges.len() as u64 - 1) as usize],
            });
        }
    }
    JobGraph::new(operators, edges).expect("edges go upwards")
}

/// A producer, its consumer, and the partition between them.
pub(crate) type Pair = (TaskId, TaskId, PartitionId, ExchangeType);

/// Every pair of tasks that an edge joins.
pub(crate) fn pairs(graph: &JobGraph) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for (place, edge) in graph.edges().iter().enumerate() {
        let sources = graph.node(edge.from).parallelism;
        let targets = graph.node(edge.to).parallelism;
        for s in 0..sources {
            for t in 0..targets {
                let is_near = if sources >= targets {
                    t * sources / targets <= s && s < (t + 1) * sources / targets
                } else {
                    (s * targets).div_ceil(sources) <= t
                        && t < ((s + 1) * targets).div_ceil(sources)
                };
                let is_pointwise =
                    matches!(edge.partitioner, Partitioner::Forward | Partitioner::Rescale);
                if is_near || !is_pointwise {
                    let producer = TaskId { node: edge.from, index: s };
                    let consumer = TaskId { node: edge.to, index: t };
                    let partition = PartitionId { edge: place, producer };
                    pairs.push((producer, consumer, partition, edge.exchange));
                }
            }
        }
    }
    pairs
}
