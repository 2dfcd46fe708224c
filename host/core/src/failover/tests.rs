//! Flink's own tests of regions and failover, each named after its row.

use std::collections::BTreeSet;

use super::{
    topology::{PartitionGroup, strongly_connected_components},
    *,
};
use crate::{exchange::ExchangeType, ids::NodeId};

/// Task `v4` is operator 4, index 0; tasks are numbered by the test's own letters.
fn task(name: &str) -> TaskId {
    let (letter, number) = name.split_at(1);
    let letter = u32::from(letter.as_bytes()[0]);
    TaskId { node: NodeId(letter), index: number.parse().expect("a number") }
}

fn name(task: TaskId) -> String {
    let letter = char::from_u32(task.node.0).expect("a letter");
    format!("{letter}{}", task.index)
}

fn exchange_of(short: &str) -> ExchangeType {
    match short {
        "P" => ExchangeType::PipelinedBounded,
        "B" => ExchangeType::Blocking,
        "BP" => ExchangeType::BlockingPersistent,
        "HF" => ExchangeType::HybridFull,
        "HS" => ExchangeType::HybridSelective,
        "PA" => ExchangeType::PipelinedApproximate,
        other => panic!("{other}"),
    }
}

/// Edges like `v1 v2 -B-> v3`; each line has partitions of its own, read by all on its right.
fn topology(tasks: &str, edges: &[&str]) -> Topology {
    let tasks: Vec<TaskId> = tasks.split_whitespace().map(task).collect();
    let groups = edges.iter().enumerate().map(|(edge, line)| {
        let (left, right) = line.split_once("->").expect("an arrow");
        let (producers, exchange) = left.split_once('-').expect("an exchange");
        let list = |names: &str| names.split_whitespace().map(task).collect();
        PartitionGroup {
            edge,
            exchange: exchange_of(exchange),
            producers: list(producers),
            consumers: list(right),
        }
    });
    Topology::of_groups(&tasks, groups.collect())
}

fn regions(topology: &Topology) -> BTreeSet<String> {
    let show = |region: &Vec<TaskId>| region.iter().map(|task| name(*task)).collect::<Vec<_>>();
    topology.regions().iter().map(|region| show(region).join(" ")).collect()
}

fn check_regions(tasks: &str, edges: &[&str], expected: &[&str]) {
    let expected: BTreeSet<String> = expected.iter().map(|&region| region.to_owned()).collect();
    assert_eq!(regions(&topology(tasks, edges)), expected, "{edges:?}");
}

/// The restart set; `lost` are places of edges whose partition of `producer` is lost.
fn restarts(topology: &Topology, failed: &str, lost: &[(usize, &str)], created: &[&str]) -> String {
    let lost: Vec<PartitionId> = lost
        .iter()
        .map(|(edge, producer)| PartitionId { edge: *edge, producer: task(producer) })
        .collect();
    let created: Vec<TaskId> = created.iter().map(|name| task(name)).collect();
    let situation = Situation {
        is_lost: &|partition| lost.contains(&partition),
        is_created: &|task| created.contains(&task),
        is_exact: false,
    };
    let set = tasks_to_restart(FailoverStrategy::Region, topology, task(failed), situation);
    set.keys().map(|task| name(*task)).collect::<Vec<_>>().join(" ")
}

fn six_regions() -> Topology {
    topology("v1 v2 v3 v4 v5 v6", &["v1-B->v4", "v1-B->v5", "v2-B->v4", "v2-B->v5", "v3-B->v6"])
}

/// Flink: `RegionInternalErrors`.
#[test]
fn a_task_that_fails_restarts_its_region_and_all_that_read_from_it() {
    let topology = six_regions();
    assert_eq!(topology.regions().len(), 6);
    let rows = [
        ("v1", "v1 v4 v5"),
        ("v2", "v2 v4 v5"),
        ("v3", "v3 v6"),
        ("v4", "v4"),
        ("v5", "v5"),
        ("v6", "v6"),
    ];
    for (failed, expected) in rows {
        assert_eq!(restarts(&topology, failed, &[], &[]), expected, "{failed} fails");
    }
}

/// Flink: `DataConsumptionErrors`.
#[test]
fn a_partition_that_cannot_be_read_restarts_its_producer() {
    let topology = six_regions();
    let rows = [
        ("v4", (0, "v1"), "v1 v4 v5"),
        ("v4", (2, "v2"), "v2 v4 v5"),
        ("v5", (1, "v1"), "v1 v4 v5"),
        ("v5", (3, "v2"), "v2 v4 v5"),
        ("v6", (4, "v3"), "v3 v6"),
    ];
    for (failed, lost, expected) in rows {
        assert_eq!(restarts(&topology, failed, &[lost], &[]), expected, "{failed}: {lost:?}");
    }
}

/// Flink: `RegionFailoverForVariousPartitionAvailability`.
#[test]
fn what_is_not_available_any_more_is_produced_again() {
    let topology = topology("v1 v2 v3", &["v1-B->v3", "v2-B->v3"]);
    assert_eq!(restarts(&topology, "v1", &[], &[]), "v1 v3");
    assert_eq!(restarts(&topology, "v2", &[], &[]), "v2 v3");
    assert_eq!(restarts(&topology, "v3", &[], &[]), "v3");
    // What is not available draws its producer in, whichever task fails.
    assert_eq!(restarts(&topology, "v1", &[(1, "v2")], &[]), "v1 v2 v3");
    assert_eq!(restarts(&topology, "v3", &[(0, "v1")], &[]), "v1 v3");
    assert_eq!(restarts(&topology, "v3", &[(0, "v1"), (1, "v2")], &[]), "v1 v2 v3");
}

/// Flink: `MultipleVerticesInARegion`.
#[test]
fn tasks_of_one_region_restart_together() {
    let topology = topology(
        "v1 v2 v3 v4 v5 v6",
        &["v1-P->v2", "v2-B->v3", "v3-P->v4", "v4-B->v5", "v5-P->v6"],
    );
    assert_eq!(restarts(&topology, "v3", &[], &[]), "v3 v4 v5 v6");
    assert_eq!(restarts(&topology, "v3", &[(1, "v2")], &[]), "v1 v2 v3 v4 v5 v6");
}

/// Flink: `DoesNotRestartCreatedExecutions`.
#[test]
fn tasks_that_were_never_started_do_not_restart() {
    let topology = topology("v1 v2", &["v1-B->v2"]);
    assert_eq!(restarts(&topology, "v2", &[], &["v1", "v2"]), "");
    assert_eq!(restarts(&topology, "v2", &[(0, "v1")], &["v1", "v2"]), "");
    assert_eq!(restarts(&topology, "v1", &[], &["v2"]), "v1");
}

#[test]
fn hybrid_selective_cannot_be_read_again_and_hybrid_full_can() {
    assert_eq!(restarts(&topology("v1 v2", &["v1-HS->v2"]), "v2", &[], &[]), "v1 v2");
    assert_eq!(restarts(&topology("v1 v2", &["v1-HF->v2"]), "v2", &[], &[]), "v2");
    assert_eq!(restarts(&topology("v1 v2", &["v1-BP->v2"]), "v2", &[], &[]), "v2");
    assert_eq!(restarts(&topology("v1 v2", &["v1-PA->v2"]), "v2", &[], &[]), "v2");
    assert_eq!(restarts(&topology("v1 v2", &["v1-PA->v2"]), "v2", &[(0, "v1")], &[]), "v1 v2");
}

/// Flink: `RestartAllFailoverStrategyTest`.
#[test]
fn full_restarts_every_task_whatever_fails() {
    let topology = topology("v1 v2 v3", &["v1-P->v2", "v2-B->v3"]);
    // Also what was never started.
    let situation = Situation { is_lost: &|_| false, is_created: &|_| true, is_exact: false };
    let set = tasks_to_restart(FailoverStrategy::Full, &topology, task("v1"), situation);
    assert_eq!(set.keys().map(|task| name(*task)).collect::<Vec<_>>(), ["v1", "v2", "v3"]);
    assert_eq!(set[&task("v1")], RestartReason::Failed);
}

#[test]
fn every_task_has_its_reason() {
    let topology = topology("v1 v2 v3 v4", &["v1-B->v2", "v2-P->v3", "v2-B->v4"]);
    let situation = Situation { is_lost: &|_| true, is_created: &|_| false, is_exact: false };
    let set = tasks_to_restart(FailoverStrategy::Region, &topology, task("v3"), situation);
    let partition = PartitionId { edge: 0, producer: task("v1") };
    assert_eq!(set[&task("v3")], RestartReason::Failed);
    assert_eq!(set[&task("v2")], RestartReason::SameRegion { as_task: task("v3") });
    assert_eq!(set[&task("v1")], RestartReason::ProducesLost { partition, reader: task("v2") });
    assert_eq!(set[&task("v4")], RestartReason::ReadsFrom { producer: task("v2") });
    assert!(
        tasks_to_restart(FailoverStrategy::Region, &topology, task("v9"), situation).is_empty()
    );
}

/// Flink: `IndividualVertices`.
#[test]
fn tasks_without_edges_are_regions_of_their_own() {
    check_regions("v1 v2 v3", &[], &["v1", "v2", "v3"]);
}

/// Flink: `EmbarrassinglyParallel`.
#[test]
fn parallel_forward_chains_are_regions_of_their_own() {
    let edges = ["a1-P->b1", "a2-P->b2", "a3-P->b3"];
    check_regions("a1 a2 a3 b1 b2 b3", &edges, &["a1 b1", "a2 b2", "a3 b3"]);
}

/// Flink: `OneComponentViaTwoExchanges`.
#[test]
fn two_exchanges_of_all_with_all_make_one_region() {
    let edges = ["a1 a2-P->b1 b2", "b1 b2-P->c1 c2"];
    check_regions("a1 a2 b1 b2 c1 c2", &edges, &["a1 a2 b1 b2 c1 c2"]);
}

/// Flink: `OneComponentViaCascadeOfJoins`.
#[test]
fn a_cascade_of_joins_makes_one_region() {
    let edges = ["v1-P->v5", "v2-P->v5", "v3-P->v6", "v4-P->v6", "v5-P->v7", "v6-P->v7"];
    check_regions("v1 v2 v3 v4 v5 v6 v7", &edges, &["v1 v2 v3 v4 v5 v6 v7"]);
}

/// Flink: `OneComponentInstanceFromOneSource`.
#[test]
fn one_source_of_all_makes_one_region() {
    let edges = ["v1-P->v2", "v1-P->v3", "v2-P->v4", "v2-P->v5", "v3-P->v6", "v3-P->v7"];
    check_regions("v1 v2 v3 v4 v5 v6 v7", &edges, &["v1 v2 v3 v4 v5 v6 v7"]);
}

/// Flink: `TwoComponentsViaBlockingExchange`.
#[test]
fn a_blocking_exchange_parts_regions() {
    let edges = ["a1 a2-P->b1 b2", "b1-B->c1", "b2-B->c2"];
    check_regions("a1 a2 b1 b2 c1 c2", &edges, &["a1 a2 b1 b2", "c1", "c2"]);
}

/// Flink: `TwoComponentsViaBlockingExchange2`.
#[test]
fn a_blocking_exchange_parts_what_is_pipelined_before_it() {
    let edges = ["a1 a2-P->b1 b2", "b1 b2-B->c1 c2"];
    check_regions("a1 a2 b1 b2 c1 c2", &edges, &["a1 a2 b1 b2", "c1", "c2"]);
}

/// Flink: `PipelinedApproximateDiamond`.
#[test]
fn an_approximate_exchange_parts_regions() {
    let edges = ["v1-PA->v2", "v1-PA->v3", "v2-PA->v4", "v3-PA->v4"];
    check_regions("v1 v2 v3 v4", &edges, &["v1", "v2", "v3", "v4"]);
}

#[test]
fn reader_of_an_approximate_exchange_restarts_alone_unless_nothing_may_be_lost() {
    let topology = topology("v1 v2 v3", &["v1-PA->v2", "v2-PA->v3"]);
    assert_eq!(restarts(&topology, "v2", &[], &[]), "v2 v3");
    assert_eq!(restarts(&topology, "v1", &[], &[]), "v1 v2 v3");
    let exact = Situation { is_lost: &|_| false, is_created: &|_| false, is_exact: true };
    let set = tasks_to_restart(FailoverStrategy::Region, &topology, task("v3"), exact);
    assert_eq!(set.len(), 3, "{set:?}");
}

#[test]
fn regions_joined_by_a_cycle_are_one() {
    // a1 and a2 run together, and so do b1 and b2; each waits for the other.
    let edges = ["a1-P->b1", "a2-P->b2", "a1 a2-B->b1 b2"];
    check_regions("a1 a2 b1 b2", &edges, &["a1 a2 b1 b2"]);
    let diamond = ["v1-B->v2", "v2-P->v4", "v1-P->v3", "v3-P->v4"];
    check_regions("v1 v2 v3 v4", &diamond, &["v1 v2 v3 v4"]);
}

/// Flink: `LogicalPipelinedRegionComputeUtilTest`.
#[test]
fn regions_that_need_each_other_are_one() {
    check_regions("v1 v2 v3", &["v1-B->v2", "v2-P->v3"], &["v1", "v2 v3"]);
    check_regions("v1 v2 v3", &["v1-B->v2", "v2-B->v3"], &["v1", "v2", "v3"]);
    check_regions("v1 v2 v3", &["v1-P->v2", "v2-P->v3"], &["v1 v2 v3"]);
    check_regions("v1 v2 v3 v4", &["v1-P->v3", "v2-B->v3", "v3-P->v4"], &["v1 v3 v4", "v2"]);
    check_regions("v1 v2 v3 v4", &["v1-P->v2", "v2-P->v3", "v2-B->v4"], &["v1 v2 v3", "v4"]);
}

/// Flink: `StronglyConnectedComponentsComputeUtilsTest`.
#[test]
fn what_can_be_reached_both_ways_is_one_component() {
    let check = |followers: &[&[usize]], expected: &[&[usize]]| {
        let followers: Vec<Vec<usize>> = followers.iter().map(|list| list.to_vec()).collect();
        let found: BTreeSet<BTreeSet<usize>> = strongly_connected_components(&followers)
            .into_iter()
            .map(|component| component.into_iter().collect())
            .collect();
        let expected = expected.iter().map(|list| list.iter().copied().collect()).collect();
        assert_eq!(found, expected);
    };
    check(&[&[2, 3], &[0], &[1], &[4], &[]], &[&[0, 1, 2], &[3], &[4]]);
    check(
        &[&[1], &[2], &[0], &[1, 2, 4], &[3, 5], &[2, 6], &[5], &[4, 6, 7]],
        &[&[0, 1, 2], &[3, 4], &[5, 6], &[7]],
    );
    check(
        &[&[1], &[2, 4, 5], &[3, 6], &[2, 7], &[0, 5], &[6], &[5], &[3, 6]],
        &[&[0, 1, 4], &[2, 3, 7], &[5, 6]],
    );
    check(&[&[] as &[usize]; 5], &[&[0], &[1], &[2], &[3], &[4]]);
    check(&[&[1], &[2], &[3], &[4], &[]], &[&[0], &[1], &[2], &[3], &[4]]);
    // So long that recursion would end the stack; miri is too slow for that.
    let size = if cfg!(miri) { 100 } else { 100_000 };
    let ring: Vec<Vec<usize>> = (0..size).map(|node| vec![(node + 1) % size]).collect();
    assert_eq!(strongly_connected_components(&ring).len(), 1);
}
