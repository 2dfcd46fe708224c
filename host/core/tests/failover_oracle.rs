//! Restart sets of random graphs against an oracle that knows only pairs of tasks and fixpoints.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and reports a long run"
)]

mod common;

use std::collections::BTreeSet;

use cofferdam_core::{
    exchange::ExchangeType,
    failover::{
        FailoverStrategy, Situation, tasks_to_restart,
        topology::{PartitionId, Topology},
    },
    ids::TaskId,
    random::Random,
};

use common::{Pair, pairs, random_graph};

/// Regions by repeated joining: first along what must be pipelined, then wherever two regions can
/// reach each other.
fn regions(tasks: &[TaskId], pairs: &[Pair]) -> Vec<usize> {
    let place = |task: &TaskId| tasks.iter().position(|other| other == task).expect("known");
    let mut region: Vec<usize> = (0..tasks.len()).collect();
    let join = |region: &mut Vec<usize>, left: usize, right: usize| {
        let (from, to) = (region[left], region[right]);
        region.iter_mut().filter(|id| **id == from).for_each(|id| *id = to);
    };
    for (producer, consumer, _, exchange) in pairs {
        if matches!(exchange, ExchangeType::Pipelined | ExchangeType::PipelinedBounded) {
            join(&mut region, place(producer), place(consumer));
        }
    }
    loop {
        let count = tasks.len();
        let mut reaches = vec![vec![false; count]; count];
        for (producer, consumer, ..) in pairs {
            reaches[region[place(producer)]][region[place(consumer)]] = true;
        }
        for middle in 0..count {
            for from in 0..count {
                for to in 0..count {
                    reaches[from][to] |= reaches[from][middle] && reaches[middle][to];
                }
            }
        }
        let cycle = (0..count).find_map(|a| {
            let b = (0..count).find(|&b| {
                region[a] != region[b]
                    && reaches[region[a]][region[b]]
                    && reaches[region[b]][region[a]]
            });
            b.map(|b| (a, b))
        });
        match cycle {
            Some((a, b)) => join(&mut region, a, b),
            None => return region,
        }
    }
}

fn oracle(
    tasks: &[TaskId],
    pairs: &[Pair],
    failed: TaskId,
    lost: &BTreeSet<PartitionId>,
    created: &BTreeSet<TaskId>,
    is_exact: bool,
) -> BTreeSet<TaskId> {
    let region = regions(tasks, pairs);
    let region_of = |task: &TaskId| region[tasks.iter().position(|t| t == task).expect("known")];
    let mut restarting = BTreeSet::from([region_of(&failed)]);
    loop {
        let before = restarting.len();
        for (producer, consumer, partition, exchange) in pairs {
            let (from, to) = (region_of(producer), region_of(consumer));
            let can_be_read = match exchange {
                ExchangeType::Blocking
                | ExchangeType::BlockingPersistent
                | ExchangeType::HybridFull => !lost.contains(partition),
                ExchangeType::PipelinedApproximate => !is_exact && !lost.contains(partition),
                _ => false,
            };
            if restarting.contains(&to) && !can_be_read {
                restarting.insert(from);
            }
            if restarting.contains(&from) {
                restarting.insert(to);
            }
        }
        if restarting.len() == before {
            break;
        }
    }
    tasks
        .iter()
        .filter(|task| restarting.contains(&region_of(task)) && !created.contains(task))
        .copied()
        .collect()
}

fn check(seed: u64) -> usize {
    let mut random = Random::new(seed);
    let graph = random_graph(&mut random, &ExchangeType::ALL);
    let tasks: Vec<TaskId> = graph.tasks().into_iter().collect();
    let pairs = pairs(&graph);
    let topology = Topology::new(&graph);
    for task in &tasks {
        let lost: BTreeSet<PartitionId> =
            pairs.iter().map(|pair| pair.2).filter(|_| random.one_in(5)).collect();
        let created: BTreeSet<TaskId> =
            tasks.iter().copied().filter(|_| random.one_in(6)).collect();
        let is_exact = random.one_in(3);
        let situation = Situation {
            is_lost: &|partition| lost.contains(&partition),
            is_created: &|task| created.contains(&task),
            is_exact,
        };
        let decided: BTreeSet<TaskId> =
            tasks_to_restart(FailoverStrategy::Region, &topology, *task, situation)
                .into_keys()
                .collect();
        let expected = oracle(&tasks, &pairs, *task, &lost, &created, is_exact);
        assert_eq!(decided, expected, "SEED={seed}: {task:?} fails in {graph:#?}");
    }
    topology.regions().len()
}

#[test]
fn restart_sets_of_random_graphs_equal_the_oracle() {
    let regions: usize = (0..3_000).map(check).sum();
    assert!(6_000 < regions, "the graphs have hardly any regions: {regions}");
}
