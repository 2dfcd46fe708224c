//! Decides which tasks restart when one fails.
//!
//! The two strategies are Flink's (`RestartAllFailoverStrategy`,
//! `RestartPipelinedRegionFailoverStrategy`, 2.0). By region, three rules: the region of the failed
//! task restarts; so does a task that produces a partition that a restarting region must read and that
//! cannot be read (again); so does every region that reads what a restarting region produces.

use std::collections::{BTreeMap, VecDeque, btree_map::Entry};

use crate::ids::TaskId;

pub mod topology;

use self::topology::{PartitionId, RegionId, Topology};
use crate::graph::JobGraph;

/// What restarts when a task fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FailoverStrategy {
    /// Every task of the job.
    Full,
    /// The regions that the failure concerns. Flink's default.
    #[default]
    Region,
}

impl FailoverStrategy {
    /// Its name in a manifest.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Region => "region",
        }
    }
}

/// Why a task restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartReason {
    /// It failed.
    Failed,
    /// With `full`, every task restarts.
    EveryTask,
    /// Restarting less has not helped.
    Escalated,
    /// A task of its region restarts for a reason of its own.
    SameRegion {
        /// That task.
        as_task: TaskId,
    },
    /// It produces what a restarting region must read, and that cannot be read again.
    ProducesLost {
        /// The partition that is not available.
        partition: PartitionId,
        /// One of its restarting readers.
        reader: TaskId,
    },
    /// It reads what a restarting task produces.
    ReadsFrom {
        /// The restarting producer.
        producer: TaskId,
    },
}

impl RestartReason {
    /// The reason, for people.
    #[must_use]
    pub fn words(self, graph: &JobGraph) -> String {
        match self {
            Self::Failed => "it failed".to_owned(),
            Self::EveryTask => "every task restarts".to_owned(),
            Self::Escalated => {
                "failovers in a row have led to no new checkpoint, so every task restarts"
                    .to_owned()
            }
            Self::SameRegion { as_task } => {
                format!("it is in the region of {}", graph.task_name(as_task))
            }
            Self::ProducesLost { partition, reader } => format!(
                "it produces {}->{}, which {} must read and which is not available",
                graph.task_name(partition.producer),
                graph.node(graph.edges()[partition.edge].to).name,
                graph.task_name(reader)
            ),
            Self::ReadsFrom { producer } => {
                format!("it reads what {} produces", graph.task_name(producer))
            }
        }
    }
}

/// What is known of the job when a task fails.
#[derive(Clone, Copy)]
pub struct Situation<'a> {
    /// True for a partition that is lost, corrupt or not tracked. What its type does not allow to
    /// be read again is not asked for.
    pub is_lost: &'a dyn Fn(PartitionId) -> bool,
    /// True for a task that was never started: it has nothing to restart.
    pub is_created: &'a dyn Fn(TaskId) -> bool,
    /// No record may be lost: readers of approximate exchanges do not do without what they cannot
    /// read again.
    pub is_exact: bool,
}

/// The tasks that restart because `failed` did, each with the reason; empty if it is not a task.
#[must_use]
pub fn tasks_to_restart(
    strategy: FailoverStrategy,
    topology: &Topology,
    failed: TaskId,
    situation: Situation<'_>,
) -> BTreeMap<TaskId, RestartReason> {
    let Some(region) = topology.region_of(failed) else { return BTreeMap::new() };
    if strategy == FailoverStrategy::Full {
        let every = topology.regions().iter().flatten();
        let mut reasons: BTreeMap<_, _> =
            every.map(|task| (*task, RestartReason::EveryTask)).collect();
        reasons.insert(failed, RestartReason::Failed);
        return reasons;
    }
    let mut reasons = BTreeMap::new();
    for (region, (cause, reason)) in regions_to_restart(topology, region, failed, situation) {
        for task in &topology.regions()[region] {
            let reason = match *task == cause {
                true => reason,
                false => RestartReason::SameRegion { as_task: cause },
            };
            if !(situation.is_created)(*task) {
                reasons.insert(*task, reason);
            }
        }
    }
    reasons
}

/// Each region with the task that drew it in, and why.
fn regions_to_restart(
    topology: &Topology,
    first: RegionId,
    failed: TaskId,
    situation: Situation<'_>,
) -> BTreeMap<RegionId, (TaskId, RestartReason)> {
    let mut found = BTreeMap::from([(first, (failed, RestartReason::Failed))]);
    let mut waiting = VecDeque::from([first]);
    while let Some(region) = waiting.pop_front() {
        let mut draw_in = |task: &TaskId, reason| {
            if let Some(region) = topology.region_of(*task)
                && let Entry::Vacant(entry) = found.entry(region)
            {
                entry.insert((*task, reason));
                waiting.push_back(region);
            }
        };
        let is_inside = |task: &&TaskId| topology.region_of(**task) == Some(region);
        for group in topology.consumed_by(region) {
            let Some(reader) = group.consumers.iter().copied().find(|task| is_inside(&task)) else {
                continue;
            };
            for producer in &group.producers {
                let partition = PartitionId { edge: group.edge, producer: *producer };
                let is_readable_again = group.exchange.is_reconsumable()
                    || !situation.is_exact && group.exchange.is_approximate();
                if !is_readable_again || (situation.is_lost)(partition) {
                    draw_in(producer, RestartReason::ProducesLost { partition, reader });
                }
            }
        }
        for group in topology.produced_by(region) {
            let Some(producer) = group.producers.iter().copied().find(|task| is_inside(&task))
            else {
                continue;
            };
            for consumer in &group.consumers {
                draw_in(consumer, RestartReason::ReadsFrom { producer });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests;
