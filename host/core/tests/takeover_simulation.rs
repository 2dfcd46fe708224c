//! Simulates an operator whose job changes again and again: its parallelism, its component, where its state is kept and
//! what its states are called. Whatever [`fit`] accepts, the tasks that take over have all that the operator had
//! counted, each key with the task that its records reach; what it refuses leaves the job as it was.

#![allow(clippy::expect_used, reason = "a test fails by a panic")]

use std::collections::BTreeMap;

use cofferdam_core::{
    fit::{Misfit, OperatorState, StateName, fit, origin},
    key_group::{key_group, task_index},
    random::Random,
    redistribute::{Takeover, takeovers},
};

const MAX_PARALLELISM: u32 = 12;

/// How often each key was seen.
type Counts = BTreeMap<u32, u64>;

/// What a task has counted: in memory that nobody can look into, and in each of its declared states.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Task {
    memory: Counts,
    declared: BTreeMap<String, Counts>,
}

/// An operator, its tasks, and what all of them together are to have counted.
struct World {
    operator: OperatorState,
    tasks: Vec<Task>,
    memory: Counts,
    declared: BTreeMap<String, Counts>,
    renames: u32,
}

fn group(key: u32) -> u32 {
    key_group(&key.to_le_bytes(), MAX_PARALLELISM)
}

impl World {
    fn new(random: &mut Random) -> Self {
        let parallelism = random.between(1, 5) as u32;
        let operator = OperatorState {
            parallelism,
            max_parallelism: MAX_PARALLELISM,
            is_keyed: true,
            has_memory: random.one_in(2),
            has_declared: true,
            has_host_state: false,
            directories: None,
            component: Some([1; 16]),
            source: None,
            states: ["counts", "totals"].map(|name| named(name, None)).to_vec(),
        };
        let tasks = vec![Task::default(); parallelism as usize];
        let (memory, declared) = (Counts::new(), BTreeMap::new());
        Self { operator, tasks, memory, declared, renames: 0 }
    }

    fn process(&mut self, random: &mut Random) {
        for _ in 0..random.between(0, 60) {
            let key = random.between(0, 40) as u32;
            let owner = task_index(group(key), self.operator.parallelism, MAX_PARALLELISM);
            let task = &mut self.tasks[owner as usize];
            if self.operator.has_memory {
                *task.memory.entry(key).or_default() += 1;
                *self.memory.entry(key).or_default() += 1;
            }
            if self.operator.has_declared {
                for StateName { name, .. } in &self.operator.states {
                    *task.declared.entry(name.clone()).or_default().entry(key).or_default() += 1;
                    *self.declared.entry(name.clone()).or_default().entry(key).or_default() += 1;
                }
            }
        }
    }

    /// The operator as somebody has changed it.
    fn changed(&mut self, random: &mut Random) -> OperatorState {
        let mut next = self.operator.clone();
        for _ in 0..random.between(1, 2) {
            match random.between(0, 7) {
                0 | 1 => next.parallelism = random.between(1, 7) as u32,
                2 => next.component = Some([random.between(1, 2) as u8; 16]),
                3 => next.has_memory = !next.has_memory,
                4 => next.has_declared = !next.has_declared,
                5 => next.has_host_state = !next.has_host_state,
                6 => {
                    self.renames += 1;
                    let state = &mut next.states[0];
                    *state = named(&format!("state-{}", self.renames), Some(&state.name));
                }
                _ => next.states.truncate(1),
            }
        }
        next
    }

    /// The checkpoint of the operator becomes the state of what it is now.
    fn take_over(&mut self, next: OperatorState) {
        let are_drained = vec![false; self.tasks.len()];
        let has_memory = self.operator.has_memory && next.has_memory;
        let has_declared = self.operator.has_declared && next.has_declared;
        let mut tasks = Vec::new();
        for takeover in takeovers(&are_drained, next.parallelism, MAX_PARALLELISM) {
            let mut task = Task::default();
            let (from, groups) = match takeover {
                Takeover::Nothing => (Vec::new(), None),
                Takeover::Task(from) => {
                    if has_memory {
                        task.memory = self.tasks[from].memory.clone();
                    }
                    (vec![from], None)
                }
                Takeover::Share { from, key_groups } => {
                    assert!(!has_memory, "memory cannot be distributed");
                    (from, Some(key_groups.expect("it has key groups")))
                }
            };
            for state in next.states.iter().filter(|_| has_declared) {
                let before = state.renamed_from.as_deref();
                let known = origin(&state.name, before, &self.operator.states, |it| &it.name);
                let Some(known) = known.map(|at| &self.operator.states[at].name) else { continue };
                let own = task.declared.entry(state.name.clone()).or_default();
                for counts in from.iter().filter_map(|from| self.tasks[*from].declared.get(known)) {
                    let is_own =
                        |key: &u32| groups.as_ref().is_none_or(|it| it.contains(&group(*key)));
                    for (key, count) in counts.iter().filter(|(key, _)| is_own(key)) {
                        assert!(own.insert(*key, *count).is_none(), "{key} is taken twice");
                    }
                }
            }
            tasks.push(task);
        }
        // What was not in the checkpoint, or is not taken any more, begins empty.
        self.memory.retain(|_, _| has_memory);
        let mut declared = BTreeMap::new();
        for state in next.states.iter().filter(|_| has_declared) {
            let before = state.renamed_from.as_deref();
            let known = origin(&state.name, before, &self.operator.states, |it| &it.name);
            let counts = known.and_then(|at| self.declared.remove(&self.operator.states[at].name));
            declared.extend(counts.map(|counts| (state.name.clone(), counts)));
        }
        assert!(!has_declared || self.declared.values().all(Counts::is_empty), "a state is lost");
        (self.tasks, self.declared, self.operator) = (tasks, declared, next);
    }

    fn check(&self, story: &str) {
        let (mut memory, mut declared) = (Counts::new(), BTreeMap::<String, Counts>::new());
        for (index, task) in (0..).zip(&self.tasks) {
            let all = task.declared.values().flat_map(Counts::keys).chain(task.memory.keys());
            for key in all {
                let owner = task_index(group(*key), self.operator.parallelism, MAX_PARALLELISM);
                assert_eq!(owner, index, "{story}: {key} lies where its records do not come");
            }
            memory.extend(&task.memory);
            for (name, counts) in task.declared.iter().filter(|(_, counts)| !counts.is_empty()) {
                declared.entry(name.clone()).or_default().extend(counts);
            }
        }
        assert_eq!((&memory, &declared), (&self.memory, &self.declared), "{story}");
    }
}

fn named(name: &str, renamed_from: Option<&str>) -> StateName {
    StateName { name: name.to_owned(), renamed_from: renamed_from.map(str::to_owned) }
}

#[test]
fn whatever_fits_has_all_that_was_counted_and_what_does_not_changes_nothing() {
    let (mut accepted, mut rescaled, mut refused) = (0, 0, BTreeMap::<String, u32>::new());
    for seed in 0..2_000 {
        let mut random = Random::new(seed);
        let mut world = World::new(&mut random);
        for step in 0..8 {
            world.process(&mut random);
            let next = world.changed(&mut random);
            let story = format!("seed {seed}, step {step}: {:?} becomes {next:?}", world.operator);
            match fit(&world.operator, &next, false) {
                Ok(()) => {
                    accepted += 1;
                    rescaled += u32::from(next.parallelism != world.operator.parallelism);
                    world.take_over(next);
                }
                Err(misfit) => {
                    let name = format!("{misfit:?}");
                    let name = name.split(' ').next().unwrap_or_default().to_owned();
                    *refused.entry(name).or_default() += 1;
                    assert_eq!(fit(&world.operator, &world.operator, false), Ok(()), "{story}");
                }
            }
            world.check(&story);
        }
    }
    assert!(3_000 < accepted && 500 < rescaled, "{accepted} accepted, {rescaled} with a rescale");
    // Those of keys and of key groups cannot come about here.
    for expected in [
        Misfit::StateLeft { name: String::new() },
        Misfit::MemoryLeft,
        Misfit::NoMemory,
        Misfit::OtherComponent,
        Misfit::OtherBackend,
        Misfit::MemoryParallelism,
    ] {
        let name = format!("{expected:?}");
        let name = name.split(' ').next().unwrap_or_default();
        assert!(refused.contains_key(name), "{name} was never a reason: {refused:?}");
    }
}
