//! Regions that run one after the other: `PipelinedRegionSchedulingStrategyTest`, the release of
//! partitions, and what the older suites say of failures in such jobs, each row by its name.

use super::*;
use crate::{
    checkpoint::CheckpointSettings,
    exchange::ExchangeType::{
        self, Blocking, BlockingPersistent, HybridFull, HybridSelective, PipelinedBounded,
    },
    failure::EnvironmentError,
    graph::{
        Edge, JobGraph, Node,
        Partitioner::{self, Forward, Hash},
    },
    ids::NodeId,
    restart::RestartStrategy,
};

/// A job whose shell does at once what it is told.
struct Rig {
    job: Job,
    names: Vec<String>,
    now: u64,
    /// Every attempt that was started, in the order of the effects; not yet asked for.
    started: Vec<String>,
    released: Vec<String>,
    outcome: Option<Outcome>,
}

/// Operators by name and parallelism; edges from place to place.
fn rig(operators: &[(&str, u32)], edges: &[(u32, u32, Partitioner, ExchangeType)]) -> Rig {
    let nodes = operators
        .iter()
        .map(|(name, parallelism)| Node { name: (*name).to_owned(), parallelism: *parallelism })
        .collect();
    let edge = |&(from, to, partitioner, exchange): &(u32, u32, Partitioner, ExchangeType)| Edge {
        from: NodeId(from),
        output: 0,
        to: NodeId(to),
        input: 0,
        partitioner,
        exchange,
    };
    let settings = JobSettings {
        graph: JobGraph::new(nodes, edges.iter().map(edge).collect()).expect("a job"),
        failover: FailoverStrategy::Region,
        checkpoint: CheckpointSettings::default(),
        restart: RestartStrategy::FixedDelay { attempts: 100, delay_ms: 10 },
        is_merging_failures: false,
        escalates_after: None,
        seed: 1,
    };
    let (job, first) = Job::new(settings, Resume::default());
    let names = operators.iter().map(|(name, _)| (*name).to_owned()).collect();
    let mut rig =
        Rig { job, names, now: 0, started: Vec::new(), released: Vec::new(), outcome: None };
    rig.perform(vec![first]);
    rig
}

impl Rig {
    fn task(&self, name: &str) -> TaskId {
        let (operator, index) = name.split_once('/').expect("operator/index");
        let place = self.names.iter().position(|known| known == operator).expect("an operator");
        TaskId { node: NodeId(place as u32), index: index.parse().expect("an index") }
    }

    fn name(&self, task: TaskId) -> String {
        format!("{}/{}", self.names[task.node.0 as usize], task.index)
    }

    fn step(&mut self, event: Event) {
        let mut effects = Vec::new();
        self.job.step(Millis(self.now), event, &mut effects);
        self.perform(effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::StartTasks { tasks, .. } => {
                    let shown = |(task, attempt): &TaskAttempt| match attempt.0 {
                        0 => self.name(*task),
                        attempt => format!("{}@{attempt}", self.name(*task)),
                    };
                    let shown: Vec<String> = tasks.iter().map(shown).collect();
                    self.started.extend(shown);
                    self.step(Event::TasksStarted { tasks });
                }
                Effect::CancelTasks { tasks } => self.step(Event::TasksStopped { tasks }),
                Effect::ReleasePartitions { partitions } => {
                    let shown = partitions.iter().map(|partition| self.name(partition.producer));
                    let shown: Vec<String> = shown.collect();
                    self.released.extend(shown);
                }
                Effect::Finish { outcome } => self.outcome = Some(outcome),
                _ => {}
            }
        }
    }

    /// What was started since the last time somebody asked.
    fn started(&mut self) -> String {
        std::mem::take(&mut self.started).join(" ")
    }

    fn released(&mut self) -> String {
        std::mem::take(&mut self.released).join(" ")
    }

    /// Tasks process the end of their inputs.
    fn finish(&mut self, tasks: &str) -> &mut Self {
        for name in tasks.split_whitespace() {
            let task = self.task(name);
            let attempt = self.job.attempt(task).expect("known");
            self.step(Event::TaskDrained { task, attempt });
        }
        self
    }

    /// A task fails, and the delay passes; `lost` is a producer whose partition for the first edge
    /// between both could not be read.
    fn fail(&mut self, name: &str, lost: Option<&str>) -> &mut Self {
        let task = self.task(name);
        let attempt = self.job.attempt(task).expect("known");
        let cause = FailureCause::Environment(EnvironmentError::new("no luck"));
        let lost = lost.map(|producer| PartitionId { edge: 0, producer: self.task(producer) });
        self.step(Event::TaskFailed { task: Some((task, attempt)), cause, lost });
        self.wait()
    }

    fn wait(&mut self) -> &mut Self {
        self.now += 10;
        self.step(Event::Tick);
        self
    }
}

/// Flink: `StartSchedulingAndLastRegionOfHybridAndBlockingEdges`.
#[test]
fn a_region_begins_when_its_blocking_inputs_have_ended_and_its_hybrid_ones_have_begun() {
    let edges = [
        (0, 1, Forward, PipelinedBounded),
        (1, 2, Forward, HybridFull),
        (2, 3, Forward, HybridSelective),
        (3, 4, Hash, Blocking),
    ];
    let operators = [("source", 2), ("map1", 2), ("map2", 2), ("map3", 2), ("sink", 2)];
    let mut rig = rig(&operators, &edges);
    let all = "source/0 source/1 map1/0 map1/1 map2/0 map2/1 map3/0 map3/1";
    assert_eq!(rig.started(), all, "not the sinks");
    assert_eq!(rig.finish("map3/0").started(), "");
    assert_eq!(rig.finish("map3/1").started(), "sink/0 sink/1");
}

#[test]
fn regions_behind_pointwise_blocking_edges_begin_one_by_one() {
    let edges = [(0, 1, Forward, Blocking), (1, 2, Forward, HybridFull), (2, 3, Hash, Blocking)];
    let mut rig = rig(&[("source", 2), ("map1", 2), ("map2", 2), ("sink", 2)], &edges);
    assert_eq!(rig.started(), "source/0 source/1");
    assert_eq!(rig.finish("source/1").started(), "map1/1 map2/1");
    assert_eq!(rig.finish("source/0").started(), "map1/0 map2/0");
    assert_eq!(rig.finish("map1/0 map2/0 map1/1 map2/1").started(), "sink/0 sink/1");
}

/// Flink: `SchedulingRegionWithBlockingPersistentEdge`.
#[test]
fn a_persistent_blocking_exchange_is_read_as_a_blocking_one() {
    let mut rig = rig(&[("v1", 1), ("v2", 1)], &[(0, 1, Forward, BlockingPersistent)]);
    assert_eq!(rig.started(), "v1/0");
    assert_eq!(rig.finish("v1/0").started(), "v2/0");
    assert_eq!(rig.finish("v2/0").released(), "", "it is kept");
}

/// Flink: `SchedulingTopologyWithBlockingEdgesBetweenPipelinedRegions`.
#[test]
fn regions_begin_one_after_the_other_where_blocking_exchanges_part_them() {
    let edges = [(0, 1, Hash, PipelinedBounded), (1, 2, Hash, Blocking)];
    let mut rig = rig(&[("v1", 2), ("v2", 3), ("v3", 4)], &edges);
    assert_eq!(rig.started(), "v1/0 v1/1 v2/0 v2/1 v2/2");
    assert_eq!(rig.finish("v1/0 v1/1 v2/0 v2/1").started(), "");
    assert_eq!(rig.finish("v2/2").started(), "v3/0 v3/1 v3/2 v3/3");
}

#[test]
fn pointwise_blocking_edges_start_one_consumer_after_the_other() {
    let mut rig = rig(&[("v1", 2), ("v2", 2)], &[(0, 1, Forward, Blocking)]);
    assert_eq!(rig.started(), "v1/0 v1/1");
    assert_eq!(rig.finish("v1/0").started(), "v2/0");
    assert_eq!(rig.finish("v1/1").started(), "v2/1");
}

#[test]
fn consumers_of_hybrid_exchanges_are_not_started_again_when_their_producer_finishes() {
    let edges = [(0, 1, Forward, HybridFull), (0, 2, Forward, HybridSelective)];
    let mut rig = rig(&[("v1", 1), ("v2", 1), ("v3", 1)], &edges);
    assert_eq!(rig.started(), "v1/0 v2/0 v3/0");
    assert_eq!(rig.finish("v1/0").started(), "");
}

#[test]
fn a_producer_may_end_before_its_start_is_reported() {
    let mut rig = rig(&[("p", 2), ("c", 1)], &[(0, 1, Hash, Blocking)]);
    rig.started();
    rig.finish("p/1");
    let task = rig.task("p/0");
    let cause = FailureCause::Environment(EnvironmentError::new("no luck"));
    rig.step(Event::TaskFailed { task: Some((task, Attempt(0))), cause, lost: None });
    rig.now += 10;
    let mut effects = Vec::new();
    rig.job.step(Millis(rig.now), Event::Tick, &mut effects);
    assert!(matches!(effects.as_slice(), [Effect::StartTasks { .. }]), "{effects:?}");
    // The word that it runs is still on its way.
    let drained = Event::TaskDrained { task, attempt: Attempt(1) };
    rig.step(drained);
    assert_eq!(rig.started(), "c/0");
}

#[test]
fn hybrid_consumers_wait_for_producers_that_wait() {
    let edges =
        [(0, 1, Forward, HybridFull), (1, 2, Forward, Blocking), (2, 3, Forward, HybridSelective)];
    let mut rig = rig(&[("v1", 1), ("v2", 1), ("v3", 1), ("v4", 1)], &edges);
    assert_eq!(rig.started(), "v1/0 v2/0");
    assert_eq!(rig.finish("v2/0").started(), "v3/0 v4/0");
}

#[test]
fn inner_non_pipelined_edges_do_not_block() {
    let edges = [
        (0, 1, Forward, PipelinedBounded),
        (1, 2, Forward, PipelinedBounded),
        (1, 3, Forward, PipelinedBounded),
        (1, 4, Forward, PipelinedBounded),
        (0, 2, Forward, HybridFull),
        (0, 3, Forward, HybridSelective),
        (0, 3, Forward, Blocking),
    ];
    let mut rig = rig(&[("v1", 1), ("v2", 1), ("v3", 1), ("v4", 1), ("v5", 1)], &edges);
    assert_eq!(rig.started(), "v1/0 v2/0 v3/0 v4/0 v5/0");
}

/// `a(2) -> b(2) -B-> c(2) -> d(1)`.
fn multi_regions() -> Rig {
    let edges =
        [(1, 2, Hash, Blocking), (0, 1, Forward, PipelinedBounded), (2, 3, Hash, PipelinedBounded)];
    rig(&[("a", 2), ("b", 2), ("c", 2), ("d", 1)], &edges)
}

/// Flink: `FailoverRegionTestMultiRegions`.
#[test]
fn a_failure_restarts_its_region_and_those_behind_it() {
    let mut rig = multi_regions();
    assert_eq!(rig.started(), "a/0 a/1 b/0 b/1");
    assert_eq!(rig.fail("b/0", None).started(), "a/0@1 b/0@1", "the other pipeline goes on");
    assert_eq!(rig.finish("a/0 a/1 b/0 b/1").started(), "c/0 c/1 d/0");
    assert_eq!(rig.fail("c/0", None).started(), "c/0@1 c/1@1 d/0@1", "what was read is there");
}

#[test]
fn failure_of_a_producer_takes_its_finished_consumers_back() {
    // FailoverRegionTest, "status reset": nothing is consumable until the producer finishes again.
    let mut rig = rig(&[("v1", 2), ("v2", 2)], &[(0, 1, Hash, Blocking)]);
    rig.finish("v1/0 v1/1");
    assert_eq!(rig.started(), "v1/0 v1/1 v2/0 v2/1");
    assert_eq!(rig.fail("v1/0", None).started(), "v1/0@1", "its readers wait again");
    assert_eq!(rig.finish("v1/0").started(), "v2/0@1 v2/1@1");
}

#[test]
fn lost_partition_restarts_its_producer_and_all_that_read_it() {
    // "ev21 fails with partition error on ev11": {ev11, ev21, ev22} restart.
    let mut rig = rig(&[("v1", 2), ("v2", 2)], &[(0, 1, Hash, Blocking)]);
    rig.finish("v1/0 v1/1").started();
    assert_eq!(rig.fail("v2/0", Some("v1/0")).started(), "v1/0@1");
    assert_eq!(rig.finish("v1/0").started(), "v2/0@1 v2/1@1");
}

#[test]
fn tasks_that_were_never_started_have_nothing_to_restart() {
    let mut rig = rig(&[("v1", 2), ("v2", 2)], &[(0, 1, Hash, Blocking)]);
    rig.started();
    assert_eq!(rig.fail("v1/0", None).started(), "v1/0@1");
    assert_eq!(rig.finish("v1/0 v1/1").started(), "v2/0 v2/1", "in their first attempt");
}

#[test]
fn concurrent_failures_of_two_producers_restart_each_once() {
    let mut rig = rig(&[("v1", 2), ("v2", 2)], &[(0, 1, Hash, Blocking)]);
    rig.started();
    for index in ["v1/0", "v1/1"] {
        let task = rig.task(index);
        let cause = FailureCause::Environment(EnvironmentError::new("no luck"));
        let task = Some((task, Attempt(0)));
        rig.step(Event::TaskFailed { task, cause, lost: None });
    }
    assert_eq!(rig.wait().started(), "v1/0@1 v1/1@1");
}

#[test]
fn global_failure_begins_with_the_first_regions_again() {
    let mut rig = multi_regions();
    rig.finish("a/0 a/1 b/0 b/1").started();
    let cause = FailureCause::Environment(EnvironmentError::new("no luck"));
    rig.step(Event::TaskFailed { task: None, cause, lost: None });
    assert_eq!(rig.wait().started(), "a/0@1 a/1@1 b/0@1 b/1@1");
    assert_eq!(rig.finish("a/0 a/1 b/0 b/1").started(), "c/0@1 c/1@1 d/0@1");
}

#[test]
fn partition_is_released_when_its_consumer_has_finished() {
    let mut rig = rig(&[("p", 1), ("c", 1)], &[(0, 1, Forward, Blocking)]);
    assert_eq!(rig.finish("p/0").released(), "");
    assert_eq!(rig.finish("c/0").released(), "p/0");
}

#[test]
fn partition_is_released_when_the_whole_consumer_region_has_finished() {
    let edges = [(0, 1, Forward, Blocking), (1, 2, Forward, PipelinedBounded)];
    let mut rig = rig(&[("src", 1), ("mid", 1), ("sink", 1)], &edges);
    assert_eq!(rig.finish("src/0 mid/0").released(), "");
    assert_eq!(rig.finish("sink/0").released(), "src/0");
}

#[test]
fn partition_with_two_consumers_is_released_by_the_second() {
    let mut rig = rig(&[("p", 1), ("c", 2)], &[(0, 1, Hash, Blocking)]);
    assert_eq!(rig.finish("p/0 c/0").released(), "");
    assert_eq!(rig.fail("c/0", None).released(), "");
    assert_eq!(rig.finish("c/1").released(), "", "the first has begun again");
    assert_eq!(rig.finish("c/0").released(), "p/0");
}

#[test]
fn partition_of_a_reader_that_is_about_to_restart_is_kept() {
    let mut rig = rig(&[("p", 1), ("c", 2)], &[(0, 1, Hash, Blocking)]);
    rig.finish("p/0 c/0").started();
    let task = Some((rig.task("c/0"), Attempt(0)));
    let cause = FailureCause::Environment(EnvironmentError::new("no luck"));
    rig.step(Event::TaskFailed { task, cause, lost: None });
    // Within the delay the other reader finishes.
    assert_eq!(rig.finish("c/1").released(), "");
    assert_eq!(rig.wait().started(), "c/0@1");
    assert_eq!(rig.finish("c/0").released(), "p/0");
}

#[test]
fn released_partition_that_is_needed_again_restarts_its_producer() {
    // v1 -B-> v2 -B-> v3: v3 cannot read v2's partition, and v1's was released.
    let edges = [(1, 2, Forward, Blocking), (0, 1, Forward, Blocking)];
    let mut rig = rig(&[("v1", 1), ("v2", 1), ("v3", 1)], &edges);
    assert_eq!(rig.finish("v1/0 v2/0").released(), "v1/0");
    rig.started();
    assert_eq!(rig.fail("v3/0", Some("v2/0")).started(), "v1/0@1");
    assert_eq!(rig.finish("v1/0").started(), "v2/0@1");
    assert_eq!(rig.finish("v2/0").started(), "v3/0@1");
    assert_eq!(rig.released(), "v1/0", "once more, by its second reader");
}

#[test]
fn job_ends_with_the_checkpoint_of_all_regions_and_nothing_before() {
    let mut rig = rig(&[("p", 1), ("c", 1)], &[(0, 1, Forward, Blocking)]);
    let ticket = 5;
    let mut effects = Vec::new();
    rig.job.step(Millis(1), Event::SavepointRequested { ticket }, &mut effects);
    let refused = Err(AbortReason::BlockingOutputExists);
    assert_eq!(effects, [Effect::Answer { ticket, result: refused }]);
    rig.finish("p/0");
    let (task, mut effects) = (rig.task("c/0"), Vec::new());
    let drained = Event::TaskDrained { task, attempt: Attempt(0) };
    rig.job.step(Millis(2), drained, &mut effects);
    let (checkpoint, purpose) = (CheckpointId(1), Purpose::Last);
    assert!(effects.contains(&Effect::InjectBarrier { checkpoint, purpose }), "{effects:?}");
}

#[test]
fn stop_ends_such_a_job_where_it_stands() {
    let mut rig = rig(&[("p", 1), ("c", 1)], &[(0, 1, Forward, Blocking)]);
    rig.step(Event::StopRequested { savepoint: None, drain: false });
    assert!(matches!(rig.outcome, Some(Outcome::Stopped { checkpoint: None, .. })));
}
