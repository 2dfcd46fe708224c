//! Which tasks an edge joins: the one formula, for channels and for regions alike.
//!
//! A pointwise edge joins neighbours by Flink's formula (`VertexInputInfoComputationUtils`, 2.0); every other edge
//! joins each producing task with each consuming one, also where its partitioner sends to one of them alone, because
//! barriers go to all.

use std::ops::Range;

use crate::graph::{Edge, JobGraph};

/// The parallelism of both ends of an edge.
fn ends(graph: &JobGraph, edge: &Edge) -> (u32, u32) {
    (graph.node(edge.from).parallelism, graph.node(edge.to).parallelism)
}

/// The consuming tasks that one producing task of an edge writes to.
#[must_use]
pub fn consumers(graph: &JobGraph, edge: &Edge, producer: u32) -> Range<u32> {
    let (sources, targets) = ends(graph, edge);
    match edge.partitioner.is_pointwise() {
        true => pointwise(producer, sources, targets),
        false => 0..targets,
    }
}

/// The producing tasks that one consuming task of an edge reads from.
#[must_use]
pub fn producers(graph: &JobGraph, edge: &Edge, consumer: u32) -> Range<u32> {
    let (sources, targets) = ends(graph, edge);
    if !edge.partitioner.is_pointwise() {
        return 0..sources;
    }
    let feeds = |from: &u32| pointwise(*from, sources, targets).contains(&consumer);
    let first = (0..sources).find(feeds).unwrap_or(0);
    let count = (first..sources).take_while(feeds).count();
    first..first + u32::try_from(count).unwrap_or(u32::MAX)
}

/// The tasks of an edge in groups: within a group each producing task is joined with each consuming one, and with
/// no other.
#[must_use]
pub fn groups(graph: &JobGraph, edge: &Edge) -> Vec<(Range<u32>, Range<u32>)> {
    let (sources, targets) = ends(graph, edge);
    if !edge.partitioner.is_pointwise() {
        return vec![(0..sources, 0..targets)];
    }
    match targets <= sources {
        true => (0..targets).map(|it| (producers(graph, edge, it), it..it + 1)).collect(),
        false => (0..sources).map(|it| (it..it + 1, pointwise(it, sources, targets))).collect(),
    }
}

/// The consuming tasks of one of `sources` producing tasks.
fn pointwise(source: u32, sources: u32, targets: u32) -> Range<u32> {
    if sources < targets {
        return (source * targets).div_ceil(sources)..((source + 1) * targets).div_ceil(sources);
    }
    // Target i reads from floor(i * S / T) up to floor((i + 1) * S / T).
    let target = (0..targets).find(|target| source < (target + 1) * sources / targets);
    target.map_or(0..0, |target| target..target + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        exchange::ExchangeType,
        graph::{Node, Partitioner},
        ids::NodeId,
    };

    fn joined(partitioner: Partitioner, sources: u32, targets: u32) -> (JobGraph, Edge) {
        let operator = |name: &str, parallelism| Node { name: name.to_owned(), parallelism };
        let edge = Edge {
            from: NodeId(0),
            output: 0,
            to: NodeId(1),
            input: 0,
            partitioner,
            exchange: ExchangeType::PipelinedBounded,
        };
        let operators = vec![operator("from", sources), operator("to", targets)];
        (JobGraph::new(operators, vec![edge]).expect("a graph"), edge)
    }

    #[test]
    fn pointwise_ranges_cover_every_task_once() {
        for (sources, targets) in [(1, 1), (2, 5), (5, 2), (3, 3), (4, 6), (7, 3)] {
            let ranges = (0..sources).map(|source| pointwise(source, sources, targets));
            let mut reached: Vec<u32> = ranges.clone().flatten().collect();
            reached.dedup();
            assert!(reached.into_iter().eq(0..targets), "{sources} -> {targets}");
            let each = if sources < targets { targets / sources } else { 1 };
            assert!(ranges.into_iter().all(|range| each <= range.len() as u32));
        }
        assert_eq!((0..2).map(|s| pointwise(s, 2, 5)).collect::<Vec<_>>(), [0..3, 3..5]);
    }

    #[test]
    fn both_ends_and_the_groups_say_the_same_of_every_edge() {
        let partitioners = [
            Partitioner::Hash,
            Partitioner::Rebalance,
            Partitioner::Broadcast,
            Partitioner::Global,
            Partitioner::Rescale,
        ];
        // Under miri each takes seconds.
        let end = if cfg!(miri) { 4 } else { 9 };
        for partitioner in partitioners {
            for (sources, targets) in (1..end).flat_map(|s| (1..end).map(move |t| (s, t))) {
                let (graph, edge) = joined(partitioner, sources, targets);
                let groups = groups(&graph, &edge);
                for (from, to) in (0..sources).flat_map(|s| (0..targets).map(move |t| (s, t))) {
                    let forth = consumers(&graph, &edge, from).contains(&to);
                    let back = producers(&graph, &edge, to).contains(&from);
                    let grouped = groups.iter().any(|(s, t)| s.contains(&from) && t.contains(&to));
                    let what = format!("{partitioner:?}, {from} of {sources} to {to} of {targets}");
                    assert_eq!((forth, back), (grouped, grouped), "{what}");
                }
            }
        }
    }
}
