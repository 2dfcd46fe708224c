//! Turns the graph of operators into tasks, the result partitions between them, and regions.
//!
//! A region is what must run together: tasks joined by exchanges that must be pipelined, and, so
//! that no region waits for itself, regions joined by a cycle of the other exchanges. Flink:
//! `SchedulingPipelinedRegionComputeUtil` (2.0).

use std::collections::BTreeMap;

use crate::{
    channel,
    exchange::ExchangeType,
    graph::JobGraph,
    ids::{NodeId, TaskId},
};

/// The result partitions that the same consumers read: all of an edge that sends to everyone, or
/// those of a few tasks where the edge is pointwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionGroup {
    /// Which edge of the graph.
    pub edge: usize,
    /// How the records travel.
    pub exchange: ExchangeType,
    /// Who produces a partition each.
    pub producers: Vec<TaskId>,
    /// Who reads all of them.
    pub consumers: Vec<TaskId>,
}

/// One task's output for one edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartitionId {
    /// The edge, by its place in the graph.
    pub edge: usize,
    /// Who produces it.
    pub producer: TaskId,
}

/// The place of a region in [`Topology::regions`].
pub type RegionId = usize;

/// Tasks, partitions and regions of a job. Costs memory in proportion to tasks and edges between
/// operators, not to pairs of tasks.
#[derive(Debug, Clone)]
pub struct Topology {
    groups: Vec<PartitionGroup>,
    regions: Vec<Vec<TaskId>>,
    region_of: BTreeMap<TaskId, RegionId>,
    consumed: Vec<Vec<usize>>,
    produced: Vec<Vec<usize>>,
}

impl Topology {
    /// Computes partitions and regions.
    #[must_use]
    pub fn new(graph: &JobGraph) -> Self {
        let tasks: Vec<TaskId> = graph.tasks().into_iter().collect();
        Self::of_groups(&tasks, partition_groups(graph))
    }

    /// The topology of tasks whose partitions are known.
    #[must_use]
    pub fn of_groups(tasks: &[TaskId], groups: Vec<PartitionGroup>) -> Self {
        let mut regions = compute_regions(tasks, &groups);
        regions.iter_mut().for_each(|region| region.sort_unstable());
        regions.sort_unstable();
        let region_of: BTreeMap<TaskId, RegionId> = regions
            .iter()
            .enumerate()
            .flat_map(|(id, tasks)| tasks.iter().map(move |task| (*task, id)))
            .collect();
        let by_region = |tasks_of: &dyn Fn(&PartitionGroup) -> &[TaskId]| {
            let mut lists = vec![Vec::new(); regions.len()];
            for (place, group) in groups.iter().enumerate() {
                for task in tasks_of(group) {
                    let list: &mut Vec<usize> = &mut lists[region_of[task]];
                    if list.last() != Some(&place) {
                        list.push(place);
                    }
                }
            }
            lists
        };
        let consumed = by_region(&|group| &group.consumers);
        let produced = by_region(&|group| &group.producers);
        Self { groups, regions, region_of, consumed, produced }
    }

    /// Every region, its tasks ascending.
    #[must_use]
    pub fn regions(&self) -> &[Vec<TaskId>] {
        &self.regions
    }

    /// The region of a task; `None` if there is no such task.
    #[must_use]
    pub fn region_of(&self, task: TaskId) -> Option<RegionId> {
        self.region_of.get(&task).copied()
    }

    /// The partitions that a region reads.
    pub fn consumed_by(&self, region: RegionId) -> impl Iterator<Item = &PartitionGroup> {
        self.consumed[region].iter().map(|group| &self.groups[*group])
    }

    /// The partitions that a region produces.
    pub fn produced_by(&self, region: RegionId) -> impl Iterator<Item = &PartitionGroup> {
        self.produced[region].iter().map(|group| &self.groups[*group])
    }
}

fn partition_groups(graph: &JobGraph) -> Vec<PartitionGroup> {
    let tasks = |node: NodeId, indices: std::ops::Range<u32>| {
        indices.map(move |index| TaskId { node, index }).collect()
    };
    let mut groups = Vec::new();
    for (place, edge) in graph.edges().iter().enumerate() {
        for (producers, consumers) in channel::groups(graph, edge) {
            groups.push(PartitionGroup {
                edge: place,
                exchange: edge.exchange,
                producers: tasks(edge.from, producers),
                consumers: tasks(edge.to, consumers),
            });
        }
    }
    groups
}

fn compute_regions(tasks: &[TaskId], groups: &[PartitionGroup]) -> Vec<Vec<TaskId>> {
    let place_of: BTreeMap<TaskId, usize> =
        tasks.iter().enumerate().map(|(place, task)| (*task, place)).collect();
    let mut sets = DisjointSets::new(tasks.len());
    for group in groups.iter().filter(|group| group.exchange.must_be_pipelined()) {
        let mut all = group.producers.iter().chain(&group.consumers);
        let Some(first) = all.next() else { continue };
        all.for_each(|task| sets.join(place_of[first], place_of[task]));
    }
    // Regions joined by a cycle would wait for each other for ever: they are one.
    let mut followers: Vec<Vec<usize>> = vec![Vec::new(); tasks.len()];
    for group in groups.iter().filter(|group| !group.exchange.must_be_pipelined()) {
        // A node between both sides keeps the count of edges down to the sum of the sides.
        let between = followers.len();
        followers.push(group.consumers.iter().map(|task| sets.find(place_of[task])).collect());
        for producer in &group.producers {
            followers[sets.find(place_of[producer])].push(between);
        }
    }
    for component in strongly_connected_components(&followers) {
        let mut members = component.into_iter().filter(|node| *node < tasks.len());
        if let Some(first) = members.next() {
            members.for_each(|node| sets.join(first, node));
        }
    }
    let mut regions: BTreeMap<usize, Vec<TaskId>> = BTreeMap::new();
    for (place, task) in tasks.iter().enumerate() {
        regions.entry(sets.find(place)).or_default().push(*task);
    }
    regions.into_values().collect()
}

/// Union-find by size, with path halving.
struct DisjointSets {
    parent: Vec<usize>,
    size: Vec<usize>,
}

impl DisjointSets {
    fn new(count: usize) -> Self {
        Self { parent: (0..count).collect(), size: vec![1; count] }
    }

    fn find(&mut self, mut node: usize) -> usize {
        while self.parent[node] != node {
            self.parent[node] = self.parent[self.parent[node]];
            node = self.parent[node];
        }
        node
    }

    fn join(&mut self, left: usize, right: usize) {
        let (mut large, mut small) = (self.find(left), self.find(right));
        if large == small {
            return;
        }
        if self.size[large] < self.size[small] {
            (large, small) = (small, large);
        }
        self.parent[small] = large;
        self.size[large] += self.size[small];
    }
}

/// Tarjan's algorithm with a stack of its own: a graph may be deeper than the thread's stack.
/// `followers[n]` are the nodes that `n` points at; every node is in exactly one component.
#[must_use]
pub fn strongly_connected_components(followers: &[Vec<usize>]) -> Vec<Vec<usize>> {
    const UNSEEN: usize = usize::MAX;
    let count = followers.len();
    let (mut number, mut low) = (vec![UNSEEN; count], vec![0; count]);
    let mut is_open = vec![false; count];
    let (mut open, mut components, mut next) = (Vec::new(), Vec::new(), 0);
    for root in 0..count {
        if number[root] != UNSEEN {
            continue;
        }
        let mut path = vec![(root, 0)];
        while let Some((node, step)) = path.last_mut() {
            let node = *node;
            if *step == 0 {
                (number[node], low[node]) = (next, next);
                next += 1;
                open.push(node);
                is_open[node] = true;
            }
            if let Some(&follower) = followers[node].get(*step) {
                *step += 1;
                if number[follower] == UNSEEN {
                    path.push((follower, 0));
                } else if is_open[follower] {
                    low[node] = low[node].min(number[follower]);
                }
                continue;
            }
            path.pop();
            if let Some((parent, _)) = path.last() {
                low[*parent] = low[*parent].min(low[node]);
            }
            if low[node] == number[node] {
                let start = open.iter().rposition(|other| *other == node).unwrap_or(0);
                let component = open.split_off(start);
                component.iter().for_each(|member| is_open[*member] = false);
                components.push(component);
            }
        }
    }
    components
}
