//! Jobs whose regions run one after the other, by seeds: random graphs, exchange types, failures and
//! lost partitions. Every task reads what its producers have made last, and every job ends.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and reports a long run"
)]
#![expect(clippy::disallowed_methods, reason = "the test's own settings come from the environment")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use cofferdam_core::{
    checkpoint::{CheckpointSettings, Purpose},
    exchange::ExchangeType::{
        self, Blocking, BlockingPersistent, HybridFull, HybridSelective, Pipelined,
        PipelinedBounded,
    },
    failover::{
        FailoverStrategy,
        topology::{PartitionId, Topology},
    },
    failure::{EnvironmentError, FailureCause},
    ids::{Attempt, Millis, TaskId},
    job::{Effect, Event, Job, JobSettings, Outcome, Resume, TaskAttempt},
    random::Random,
    restart::RestartStrategy,
};

use common::{Pair, pairs, random_graph};

/// Every type that can be run.
const EXCHANGES: [ExchangeType; 6] =
    [Pipelined, PipelinedBounded, Blocking, BlockingPersistent, HybridFull, HybridSelective];
/// From here on nothing fails, and the job must end.
const QUIET_AT: u64 = 3_000;
const END_AT: u64 = 60_000;

#[derive(Debug, Clone)]
struct Task {
    is_running: bool,
    is_drained: bool,
    attempt: Attempt,
    /// The attempt of each partition that it has read to its end.
    has_read: BTreeMap<PartitionId, Attempt>,
}

#[derive(Debug, Clone, Copy)]
struct Partition {
    attempt: Attempt,
    is_finished: bool,
    /// Removed by somebody, or unreadable.
    is_lost: bool,
    /// Removed because the job said so.
    is_released: bool,
}

impl Task {
    fn of(attempt: Attempt) -> Self {
        Self { is_running: false, is_drained: false, attempt, has_read: BTreeMap::new() }
    }
}

struct World {
    random: Random,
    now: u64,
    pairs: Vec<Pair>,
    topology: Topology,
    tasks: BTreeMap<TaskId, Task>,
    partitions: BTreeMap<PartitionId, Partition>,
    queue: BTreeMap<(u64, u64), Event>,
    sequence: u64,
    outcome: Option<Outcome>,
    faults: u64,
    releases: u64,
    lost: u64,
}

fn cause() -> FailureCause {
    FailureCause::Environment(EnvironmentError::new("no luck"))
}

impl World {
    fn later(&mut self, event: Event) {
        self.sequence += 1;
        let at = self.now + self.random.between(0, 20);
        self.queue.insert((at, self.sequence), event);
    }

    fn strikes(&mut self, n: u64) -> bool {
        let strikes = self.now < QUIET_AT && self.random.one_in(n);
        self.faults += u64::from(strikes);
        strikes
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::StartTasks { tasks, restore_from: None, .. } => self.start(tasks),
            Effect::StartTasks { tasks, restore_from: Some(_), .. } => self.restore(tasks),
            Effect::CancelTasks { tasks } => {
                for (id, attempt) in &tasks {
                    let task = self.tasks.get_mut(id).expect("known");
                    assert_eq!(task.attempt, *attempt, "cancelled an attempt that is over");
                    task.is_running = false;
                }
                self.later(Event::TasksStopped { tasks });
            }
            Effect::ReleasePartitions { partitions } => {
                for id in partitions {
                    for (producer, consumer, partition, _) in &self.pairs {
                        let is_done = self.tasks[consumer].is_drained;
                        assert!(*partition != id || is_done, "{producer:?} is still read");
                    }
                    self.partitions.get_mut(&id).expect("made").is_released = true;
                    self.releases += 1;
                }
            }
            Effect::InjectBarrier { checkpoint, .. } => {
                self.check_all_read();
                for (id, task) in self.tasks.clone() {
                    let attempt = task.attempt;
                    self.later(Event::SnapshotAcked { task: id, attempt, checkpoint });
                }
            }
            Effect::PersistMetadata { checkpoint } => {
                self.later(Event::MetadataDurable { checkpoint });
            }
            Effect::NotifyComplete { purpose: Purpose::Last, .. } => {
                for (id, task) in self.tasks.clone() {
                    let attempt = task.attempt;
                    self.tasks.get_mut(&id).expect("known").is_running = false;
                    self.later(Event::TaskFinished { task: id, attempt });
                }
            }
            Effect::Finish { outcome } => self.outcome = Some(outcome),
            _ => {}
        }
    }

    fn start(&mut self, tasks: Vec<TaskAttempt>) {
        let starting: BTreeSet<TaskId> = tasks.iter().map(|(task, _)| *task).collect();
        for (id, attempt) in &tasks {
            assert!(!self.tasks[id].is_running, "a task twice at once: {id:?}");
            for (producer, consumer, partition, exchange) in &self.pairs {
                let region = self.topology.region_of(*id);
                if consumer != id || self.topology.region_of(*producer) == region {
                    continue;
                }
                let made_by = &self.tasks[producer];
                if exchange.is_blocking() {
                    let made = self.partitions[partition];
                    assert!(made.is_finished, "{id:?} begins before {producer:?} has finished");
                    assert!(!made.is_released, "{id:?} would read what was given up");
                    assert_eq!(made.attempt, made_by.attempt, "an older attempt's");
                } else {
                    let has_begun = made_by.is_running || starting.contains(producer);
                    assert!(has_begun, "{id:?} begins before {producer:?}");
                }
            }
            let fresh = Task { is_running: true, ..Task::of(*attempt) };
            self.tasks.insert(*id, fresh);
            for (producer, _, partition, _) in &self.pairs {
                if producer == id {
                    let made = Partition {
                        attempt: *attempt,
                        is_finished: false,
                        is_lost: false,
                        is_released: false,
                    };
                    self.partitions.insert(*partition, made);
                }
            }
        }
        self.later(Event::TasksStarted { tasks });
    }

    /// Every task has read what its producers have made last.
    fn check_all_read(&self) {
        assert!(self.tasks.values().all(|task| task.is_drained), "a state half-way");
        for (producer, consumer, partition, _) in &self.pairs {
            let (made, read) = (&self.tasks[producer], &self.tasks[consumer]);
            let has_read = read.has_read.get(partition);
            assert_eq!(has_read, Some(&made.attempt), "{consumer:?} of {producer:?}");
        }
    }

    /// The only checkpoint there is holds the end of every task.
    fn restore(&mut self, tasks: Vec<TaskAttempt>) {
        for (id, attempt) in &tasks {
            assert!(!self.tasks[id].is_running, "a task twice at once: {id:?}");
            let has_read = self
                .pairs
                .iter()
                .filter(|(_, consumer, ..)| consumer == id)
                .map(|(producer, _, partition, _)| {
                    let restored = tasks.iter().find(|(task, _)| task == producer);
                    let attempt = restored.map_or(self.tasks[producer].attempt, |(_, it)| *it);
                    (*partition, attempt)
                })
                .collect();
            let (is_running, is_drained, attempt) = (true, true, *attempt);
            self.tasks.insert(*id, Task { is_running, is_drained, attempt, has_read });
            self.later(Event::TaskDrained { task: *id, attempt });
        }
        self.later(Event::TasksStarted { tasks });
    }

    /// Some tasks get to the end of what they read.
    fn work(&mut self) {
        for id in self.tasks.keys().copied().collect::<Vec<_>>() {
            let task = self.tasks[&id].clone();
            if !task.is_running || task.is_drained || !self.random.one_in(3) {
                continue;
            }
            let inputs: Vec<Pair> =
                self.pairs.iter().filter(|(_, to, ..)| *to == id).copied().collect();
            let missing = inputs.iter().find(|(_, _, partition, exchange)| {
                let made = self.partitions[partition];
                !exchange.must_be_pipelined() && (made.is_lost || made.is_released)
            });
            let attempt = task.attempt;
            if let Some((_, _, partition, _)) = missing {
                let lost = Some(*partition);
                self.lost += 1;
                self.later(Event::TaskFailed { task: Some((id, attempt)), cause: cause(), lost });
                continue;
            }
            let finished = |(producer, ..): &Pair| self.tasks[producer].is_drained;
            if inputs.iter().all(finished) {
                let read =
                    |(_, _, partition, _): &Pair| (*partition, self.partitions[partition].attempt);
                let has_read = inputs.iter().map(read).collect();
                let task = self.tasks.get_mut(&id).expect("known");
                (task.is_drained, task.has_read) = (true, has_read);
                for (partition, made) in &mut self.partitions {
                    made.is_finished |= partition.producer == id;
                }
                self.later(Event::TaskDrained { task: id, attempt });
            }
        }
        if self.strikes(25) {
            let running: Vec<TaskAttempt> = self
                .tasks
                .iter()
                .filter(|(_, task)| task.is_running)
                .map(|(id, task)| (*id, task.attempt))
                .collect();
            if !running.is_empty() {
                let task = running[self.random.between(0, running.len() as u64 - 1) as usize];
                let task = (!self.random.one_in(15)).then_some(task);
                self.later(Event::TaskFailed { task, cause: cause(), lost: None });
            }
        }
        if self.strikes(40) {
            let finished: Vec<PartitionId> = self
                .partitions
                .iter()
                .filter(|(_, made)| made.is_finished)
                .map(|(id, _)| *id)
                .collect();
            if !finished.is_empty() {
                let id = finished[self.random.between(0, finished.len() as u64 - 1) as usize];
                self.partitions.get_mut(&id).expect("made").is_lost = true;
            }
        }
    }
}

/// Runs one job to its end; gives the faults, the partitions found lost, and those released.
fn simulate(seed: u64) -> (u64, u64, u64) {
    let mut random = Random::new(seed);
    let graph = random_graph(&mut random, &EXCHANGES);
    let settings = JobSettings {
        graph: graph.clone(),
        failover: [FailoverStrategy::Region, FailoverStrategy::Full]
            [usize::from(seed.is_multiple_of(9))],
        checkpoint: CheckpointSettings::default(),
        restart: RestartStrategy::FixedDelay { attempts: u64::MAX, delay_ms: seed % 40 },
        is_merging_failures: false,
        escalates_after: None,
        seed,
    };
    let (mut job, first) = Job::new(settings, Resume::default());
    let mut world = World {
        random,
        now: 0,
        pairs: pairs(&graph),
        topology: Topology::new(&graph),
        tasks: graph.tasks().into_iter().map(|task| (task, Task::of(Attempt(0)))).collect(),
        partitions: BTreeMap::new(),
        queue: BTreeMap::new(),
        sequence: 0,
        outcome: None,
        faults: 0,
        releases: 0,
        lost: 0,
    };
    world.perform(first);
    let mut effects = Vec::new();
    while world.outcome.is_none() {
        world.now += 5;
        assert!(world.now < END_AT, "the job does not end");
        world.work();
        loop {
            let due = world.queue.first_entry().filter(|entry| entry.key().0 <= world.now);
            let event = due.map(|entry| entry.remove());
            let is_over = event.is_none();
            job.step(Millis(world.now), event.unwrap_or(Event::Tick), &mut effects);
            effects.drain(..).for_each(|effect| world.perform(effect));
            if is_over {
                break;
            }
        }
    }
    assert_eq!(world.outcome, Some(Outcome::Finished));
    world.check_all_read();
    (world.faults, world.lost, world.releases)
}

fn check(seeds: std::ops::Range<u64>) -> (u64, u64, u64) {
    seeds.fold((0, 0, 0), |(faults, lost, releases), seed| {
        let result = std::panic::catch_unwind(|| simulate(seed));
        let (f, l, r) = result.unwrap_or_else(|_| panic!("SEED={seed} of the batch simulation"));
        (faults + f, lost + l, releases + r)
    })
}

#[test]
fn five_hundred_seeds_hold() {
    let (faults, lost, releases) = check(0..500);
    assert!(1_000 < faults, "only {faults} faults struck");
    assert!(50 < lost, "only {lost} partitions were found lost");
    assert!(500 < releases, "only {releases} partitions were released");
}

#[test]
#[ignore = "the long run: cargo xtask sim N"]
fn many_seeds() {
    let seeds =
        std::env::var("SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000);
    let (faults, lost, releases) = check(0..seeds);
    println!(
        "{seeds} seeds of batch jobs, {faults} faults, {lost} partitions lost, {releases} released: all held"
    );
}

#[test]
#[ignore = "replays one seed: cargo xtask seed N"]
fn one_seed() {
    let seed = std::env::var("SEED").ok().and_then(|text| text.parse().ok()).expect("SEED=number");
    println!("SEED={seed}: held, {:?} faults, lost and released", simulate(seed));
}
