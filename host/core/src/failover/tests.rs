//! Flink's own tests of regions and failover, each named after its row.

use std::collections::BTreeSet;

use super::{
    topology::{PartitionGroup, strongly_connected_components},
    *,
};
use crate::{exchange::ExchangeType, ids::OperatorId};

/// Task `v4` is operator 4, index 0; tasks are numbered by the test's own letters.
fn task(name: &str) -> TaskId {
    let (letter, number) = name.split_at(1);
    let letter = u32::from(letter.as_bytes()[0]);
    TaskId { operator: OperatorId(letter), index: number.parse().expect("a number") }
}

fn name(task: TaskId) -> String {
    let letter = char::from_u32(task.operator.0).expect("a letter");
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

#[test]
fn r1_region_internal_errors() {
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

#[test]
fn r2_data_consumption_errors() {
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

#[test]
fn r3_region_failover_for_various_partition_availability() {
    let topology = topology("v1 v2 v3", &["v1-B->v3", "v2-B->v3"]);
    assert_eq!(restarts(&topology, "v1", &[], &[]), "v1 v3");
    assert_eq!(restarts(&topology, "v2", &[], &[]), "v2 v3");
    assert_eq!(restarts(&topology, "v3", &[], &[]), "v3");
    // What is not available draws its producer in, whoever fails.
    assert_eq!(restarts(&topology, "v1", &[(1, "v2")], &[]), "v1 v2 v3");
    assert_eq!(restarts(&topology, "v3", &[(0, "v1")], &[]), "v1 v3");
    assert_eq!(restarts(&topology, "v3", &[(0, "v1"), (1, "v2")], &[]), "v1 v2 v3");
}

#[test]
fn r4_multiple_vertices_in_a_region() {
    let topology = topology(
        "v1 v2 v3 v4 v5 v6",
        &["v1-P->v2", "v2-B->v3", "v3-P->v4", "v4-B->v5", "v5-P->v6"],
    );
    assert_eq!(restarts(&topology, "v3", &[], &[]), "v3 v4 v5 v6");
    assert_eq!(restarts(&topology, "v3", &[(1, "v2")], &[]), "v1 v2 v3 v4 v5 v6");
}

#[test]
fn r5_does_not_restart_created_executions() {
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

#[test]
fn restart_all_failover_strategy_test() {
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

#[test]
fn g1_individual_vertices() {
    check_regions("v1 v2 v3", &[], &["v1", "v2", "v3"]);
}

#[test]
fn g2_embarrassingly_parallel() {
    let edges = ["a1-P->b1", "a2-P->b2", "a3-P->b3"];
    check_regions("a1 a2 a3 b1 b2 b3", &edges, &["a1 b1", "a2 b2", "a3 b3"]);
}

#[test]
fn g3_one_component_via_two_exchanges() {
    let edges = ["a1 a2-P->b1 b2", "b1 b2-P->c1 c2"];
    check_regions("a1 a2 b1 b2 c1 c2", &edges, &["a1 a2 b1 b2 c1 c2"]);
}

#[test]
fn g4_one_component_via_cascade_of_joins() {
    let edges = ["v1-P->v5", "v2-P->v5", "v3-P->v6", "v4-P->v6", "v5-P->v7", "v6-P->v7"];
    check_regions("v1 v2 v3 v4 v5 v6 v7", &edges, &["v1 v2 v3 v4 v5 v6 v7"]);
}

#[test]
fn g5_one_component_instance_from_one_source() {
    let edges = ["v1-P->v2", "v1-P->v3", "v2-P->v4", "v2-P->v5", "v3-P->v6", "v3-P->v7"];
    check_regions("v1 v2 v3 v4 v5 v6 v7", &edges, &["v1 v2 v3 v4 v5 v6 v7"]);
}

#[test]
fn g6_two_components_via_blocking_exchange() {
    let edges = ["a1 a2-P->b1 b2", "b1-B->c1", "b2-B->c2"];
    check_regions("a1 a2 b1 b2 c1 c2", &edges, &["a1 a2 b1 b2", "c1", "c2"]);
}

#[test]
fn g7_two_components_via_blocking_exchange_2() {
    let edges = ["a1 a2-P->b1 b2", "b1 b2-B->c1 c2"];
    check_regions("a1 a2 b1 b2 c1 c2", &edges, &["a1 a2 b1 b2", "c1", "c2"]);
}

#[test]
fn g11_pipelined_approximate_diamond() {
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

#[test]
fn logical_pipelined_region_compute_util_test() {
    check_regions("v1 v2 v3", &["v1-B->v2", "v2-P->v3"], &["v1", "v2 v3"]);
    check_regions("v1 v2 v3", &["v1-B->v2", "v2-B->v3"], &["v1", "v2", "v3"]);
    check_regions("v1 v2 v3", &["v1-P->v2", "v2-P->v3"], &["v1 v2 v3"]);
    check_regions("v1 v2 v3 v4", &["v1-P->v3", "v2-B->v3", "v3-P->v4"], &["v1 v3 v4", "v2"]);
    check_regions("v1 v2 v3 v4", &["v1-P->v2", "v2-P->v3", "v2-B->v4"], &["v1 v2 v3", "v4"]);
}

#[test]
fn strongly_connected_components_compute_utils_test() {
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
    let ring: Vec<Vec<usize>> = (0..100_000).map(|node| vec![(node + 1) % 100_000]).collect();
    assert_eq!(strongly_connected_components(&ring).len(), 1);
}
