//! Which regions may begin, and which partitions nobody reads any more.

use super::{Job, TaskState, event::TaskAttempt};
use crate::{
    failover::topology::{PartitionId, RegionId},
    ids::TaskId,
};

impl Job {
    /// Starts every region that waits and whose inputs are there: finished partitions of blocking
    /// exchanges, and producers that have begun of all others. Flink:
    /// `PipelinedRegionSchedulingStrategy`.
    pub(super) fn start_ready(&mut self) -> Vec<TaskAttempt> {
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
                    run.state = TaskState::Starting { is_drained: false };
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
                    true => run.is_drained(),
                    false => run.has_begun(),
                }
            })
        })
    }

    /// The partitions that nobody reads any more because the region of a task has finished.
    pub(super) fn unread_partitions(&self, task: TaskId) -> Vec<PartitionId> {
        let Some(region) = self.topology.region_of(task) else { return Vec::new() };
        let has_finished = |task: &TaskId| {
            let region = self.topology.region_of(*task).map(|id| &self.topology.regions()[id]);
            // What is about to restart will read it again, however far it was.
            region.is_some_and(|tasks| tasks.iter().all(|task| self.tasks[task].is_drained()))
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
}
