//! Whose turn it is: shares the time of a few threads among many jobs, by their weights.
//!
//! Each job has the time that its tasks have used, divided by its weight; the next task is one of the job that has
//! the least. So the number of a job's tasks, and how long each of them keeps its thread, change nothing about what
//! the other jobs get.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The weight of a job of which nothing else is said.
pub const WEIGHT_DEFAULT: u32 = 100;

/// What a task that runs is taken to use until it is known: with it, a job that has one thread is behind a job that
/// has none.
const TURN_NS: u64 = 10_000_000;

/// A turn ends early for a task whose job has used less by more than this, so that jobs do not take turns all the time.
const MARGIN_NS: u64 = 1_000_000;

/// A job that has waited for something else keeps the claim to so much of the time that it did not use.
const CLAIM_NS: u64 = 10_000_000;

/// Names a job's share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShareId(u64);

/// The tasks that can continue, in the order of their turns. Each operation costs the logarithm of the number of jobs.
#[derive(Debug)]
pub struct FairQueue<T> {
    shares: BTreeMap<ShareId, Share<T>>,
    /// The shares that have waiting tasks, the one that has used the least first.
    ready: BTreeSet<(u64, ShareId)>,
    /// What the share whose turn was last had used: a new one begins there.
    now: u64,
    last_id: u64,
}

#[derive(Debug)]
struct Share<T> {
    weight: u64,
    /// Nanoseconds of a share of the default weight.
    used: u64,
    waiting: VecDeque<T>,
    running: usize,
}

impl<T> Share<T> {
    fn weighted(&self, ns: u64) -> u64 {
        // At least 1, so that turns of no time at all do not last for ever.
        (ns.saturating_mul(u64::from(WEIGHT_DEFAULT)) / self.weight).max(1)
    }

    /// With a turn that was charged as [`TURN_NS`] and has taken this long.
    fn used_after(&self, ns: u64) -> u64 {
        self.used.saturating_sub(self.weighted(TURN_NS)).saturating_add(self.weighted(ns))
    }
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { shares: BTreeMap::new(), ready: BTreeSet::new(), now: 0, last_id: 0 }
    }
}

impl<T> FairQueue<T> {
    /// A new share. A weight of 0 counts as 1.
    pub fn add(&mut self, weight: u32) -> ShareId {
        self.last_id += 1;
        let (id, weight) = (ShareId(self.last_id), u64::from(weight.max(1)));
        let share = Share { weight, used: self.now, waiting: VecDeque::new(), running: 0 };
        self.shares.insert(id, share);
        id
    }

    /// Ends a share, and gives back what still waits in it.
    pub fn remove(&mut self, id: ShareId) -> VecDeque<T> {
        let Some(share) = self.shares.remove(&id) else { return VecDeque::new() };
        self.ready.remove(&(share.used, id));
        share.waiting
    }

    /// A task of a share can continue. Given back where the share has ended.
    pub fn push(&mut self, id: ShareId, task: T) -> Option<T> {
        let now = self.now;
        let Some(share) = self.shares.get_mut(&id) else { return Some(task) };
        if share.waiting.is_empty() {
            if share.running == 0 {
                let claim = share.weighted(CLAIM_NS);
                share.used = share.used.max(now.saturating_sub(claim));
            }
            self.ready.insert((share.used, id));
        }
        share.waiting.push_back(task);
        None
    }

    /// Whether no task waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// The next task. [`ran`](Self::ran) says what it has used.
    pub fn pop(&mut self) -> Option<(ShareId, T)> {
        let (used, id) = self.ready.pop_first()?;
        self.now = self.now.max(used);
        let share = self.shares.get_mut(&id)?;
        let task = share.waiting.pop_front()?;
        share.running += 1;
        share.used = share.used.saturating_add(share.weighted(TURN_NS));
        if !share.waiting.is_empty() {
            self.ready.insert((share.used, id));
        }
        Some((id, task))
    }

    /// Whether a task that has had its thread for so long should leave it to one that waits, because the other's job
    /// has used less.
    #[must_use]
    pub fn outranks(&self, waiting: ShareId, running: ShareId, ran_ns: u64) -> bool {
        let (Some(first), Some(second)) = (self.shares.get(&waiting), self.shares.get(&running))
        else {
            return false;
        };
        let used = second.used_after(ran_ns);
        waiting != running && first.used.saturating_add(first.weighted(MARGIN_NS)) < used
    }

    /// A task that was popped keeps its thread no longer, and has had it for so long.
    pub fn ran(&mut self, id: ShareId, ns: u64) {
        let Some(share) = self.shares.get_mut(&id) else { return };
        let is_ready = self.ready.remove(&(share.used, id));
        share.running = share.running.saturating_sub(1);
        share.used = share.used_after(ns);
        if is_ready {
            self.ready.insert((share.used, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    const MS: u64 = 1_000_000;

    /// How the tasks of a job behave.
    #[derive(Debug, Clone, Copy)]
    struct Habit {
        weight: u32,
        tasks: usize,
        /// For how long a task keeps a thread, at most.
        turn_ns: u64,
        /// For how long it waits for something else then, at most.
        rest_ns: u64,
        /// It leaves its thread when another task should have it.
        is_polite: bool,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Event {
        TurnEnds { thread: usize },
        Wakes { job: usize },
    }

    /// What a job has got.
    #[derive(Debug, Clone, Copy, Default)]
    struct Got {
        ran_ns: u64,
        turns: u64,
        /// The longest time for which a task that could continue did not.
        waited_ns: u64,
    }

    #[derive(Debug, Clone, Copy)]
    struct Turn {
        job: usize,
        since: u64,
        /// At this time, by the event of this number.
        ends: (u64, u64),
    }

    /// Threads that share their time among jobs.
    struct Machine {
        random: Random,
        queue: FairQueue<(usize, u64)>,
        habits: Vec<Habit>,
        ids: Vec<ShareId>,
        threads: Vec<Option<Turn>>,
        events: BTreeSet<(u64, u64, Event)>,
        number: u64,
        waiting: usize,
        got: Vec<Got>,
    }

    impl Machine {
        fn run(habits: &[Habit], threads: usize, until_ns: u64, seed: u64) -> Vec<Got> {
            let mut queue = FairQueue::default();
            let mut it = Self {
                random: Random::new(seed),
                ids: habits.iter().map(|habit| queue.add(habit.weight)).collect(),
                queue,
                habits: habits.to_vec(),
                threads: vec![None; threads],
                events: BTreeSet::new(),
                number: 0,
                waiting: 0,
                got: vec![Got::default(); habits.len()],
            };
            for (job, habit) in habits.iter().enumerate() {
                for _ in 0..habit.tasks {
                    it.schedule(0, Event::Wakes { job });
                }
            }
            while let Some((at, number, event)) = it.events.pop_first() {
                if until_ns < at {
                    break;
                }
                match event {
                    Event::Wakes { job } => it.wakes(at, job),
                    Event::TurnEnds { thread } => it.ends(at, number, thread),
                }
                it.begin_turns(at);
            }
            it.got
        }

        fn schedule(&mut self, at: u64, event: Event) -> (u64, u64) {
            self.number += 1;
            self.events.insert((at, self.number, event));
            (at, self.number)
        }

        fn wakes(&mut self, at: u64, job: usize) {
            assert!(self.queue.push(self.ids[job], (job, at)).is_none());
            self.waiting += 1;
            for thread in 0..self.threads.len() {
                let Some(turn) = self.threads[thread] else { continue };
                let ran_ns = at - turn.since;
                let is_polite = self.habits[turn.job].is_polite;
                if is_polite && self.queue.outranks(self.ids[job], self.ids[turn.job], ran_ns) {
                    let ends = self.schedule(at, Event::TurnEnds { thread });
                    self.threads[thread] = Some(Turn { ends, ..turn });
                }
            }
        }

        fn ends(&mut self, at: u64, number: u64, thread: usize) {
            // It may have ended early.
            let Some(turn) = self.threads[thread].filter(|turn| turn.ends == (at, number)) else {
                return;
            };
            self.threads[thread] = None;
            let (job, ran_ns) = (turn.job, at - turn.since);
            self.got[job].ran_ns += ran_ns;
            let rest = self.random.between(0, self.habits[job].rest_ns);
            if rest == 0 {
                self.wakes(at, job);
            } else {
                self.schedule(at + rest, Event::Wakes { job });
            }
            self.queue.ran(self.ids[job], ran_ns);
        }

        fn begin_turns(&mut self, at: u64) {
            while let Some(thread) = self.threads.iter().position(Option::is_none)
                && let Some((id, (job, since))) = self.queue.pop()
            {
                assert_eq!(id, self.ids[job]);
                self.waiting -= 1;
                self.got[job].turns += 1;
                self.got[job].waited_ns = self.got[job].waited_ns.max(at - since);
                let until = at + self.random.between(1, self.habits[job].turn_ns);
                let ends = self.schedule(until, Event::TurnEnds { thread });
                self.threads[thread] = Some(Turn { job, since: at, ends });
            }
            let is_idle = self.threads.iter().any(Option::is_none);
            assert!(!is_idle || self.waiting == 0, "a thread is idle while a task waits");
        }
    }

    /// Whatever turns they take: jobs that always have something to do get what their weights say.
    #[test]
    fn greedy_jobs_get_time_by_their_weights() {
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let threads = random.between(1, 4);
            let habits: Vec<Habit> = (0..random.between(2, 5))
                .map(|_| Habit {
                    weight: [50, 100, 100, 200][random.between(0, 3) as usize],
                    // Enough to use every thread.
                    tasks: (threads + random.between(0, 30)) as usize,
                    turn_ns: [MS, 10 * MS, 400 * MS][random.between(0, 2) as usize],
                    rest_ns: 0,
                    is_polite: random.one_in(2),
                })
                .collect();
            let until = 20_000 * MS;
            let got = Machine::run(&habits, threads as usize, until, seed);
            let weights: u64 = habits.iter().map(|habit| u64::from(habit.weight)).sum();
            for (habit, got) in habits.iter().zip(&got) {
                let fair = until * threads * u64::from(habit.weight) / weights;
                // The last turns of every job may be missing, or just over.
                let off_max = fair / 20 + 2 * 400 * MS;
                assert!(
                    got.ran_ns.abs_diff(fair) <= off_max,
                    "seed {seed}: not {fair}: {habit:?} of {habits:?} got {got:?}"
                );
            }
        }
    }

    const BESIDE: Habit = Habit { weight: 100, tasks: 2, turn_ns: MS, rest_ns: 0, is_polite: true };

    /// A hundred times as many tasks that keep their threads for as long as they can: the neighbour gets its half.
    #[test]
    fn a_neighbours_share_does_not_depend_on_how_a_job_behaves() {
        let twin = Machine::run(&[BESIDE, BESIDE], 2, 20_000 * MS, 1)[0];
        for (tasks, turn_ns, is_polite) in
            [(2, 10 * MS, true), (20, 10 * MS, true), (200, 10 * MS, true), (20, 400 * MS, false)]
        {
            let hostile = Habit { tasks, turn_ns, is_polite, ..BESIDE };
            let beside = Machine::run(&[BESIDE, hostile], 2, 20_000 * MS, 1)[0];
            assert!(twin.ran_ns * 95 / 100 < beside.ran_ns, "{hostile:?}: {beside:?}, {twin:?}");
        }
    }

    /// A job that mostly waits for something else is served at once, though others compute without end.
    #[test]
    fn a_job_that_rests_does_not_wait_for_those_that_only_compute() {
        let modest = Habit { turn_ns: MS / 10, rest_ns: 5 * MS, ..BESIDE };
        let greedy = Habit { tasks: 50, turn_ns: 10 * MS, ..BESIDE };
        for seed in 0..100 {
            let got = Machine::run(&[modest, greedy, greedy], 2, 20_000 * MS, seed)[0];
            // Its other task may have the thread; and at the beginning nobody has used anything.
            assert!(got.waited_ns <= 10 * MS && 12_000 < got.turns, "seed {seed}: {got:?}");
        }
        // Calls of the host end when they end.
        let hostile = Habit { turn_ns: 400 * MS, is_polite: false, ..greedy };
        let got = Machine::run(&[modest, hostile], 2, 20_000 * MS, 1)[0];
        assert!(got.waited_ns <= 400 * MS, "{got:?}");
    }

    /// What was not used is no claim to the threads later on.
    #[test]
    fn a_job_that_has_waited_for_long_takes_no_more_than_its_share() {
        let mut queue = FairQueue::default();
        let (old, new) = (queue.add(100), queue.add(100));
        for _ in 0..1_000 {
            assert!(queue.push(old, "old").is_none());
            let (id, _) = queue.pop().expect("waits");
            queue.ran(id, 10 * MS);
        }
        let mut turns = (0, 0);
        assert!(queue.push(old, "old").is_none() && queue.push(new, "new").is_none());
        for _ in 0..100 {
            let (id, name) = queue.pop().expect("waits");
            queue.ran(id, 10 * MS);
            if name == "old" {
                turns.0 += 1
            } else {
                turns.1 += 1
            }
            assert!(queue.push(id, name).is_none());
        }
        assert!((49..=51).contains(&turns.0) && (49..=51).contains(&turns.1), "{turns:?}");
    }

    #[test]
    fn what_waits_in_a_share_that_ends_is_given_back() {
        let mut queue = FairQueue::default();
        let (ended, other) = (queue.add(100), queue.add(0));
        for task in 1..=3 {
            assert_eq!(queue.push(ended, task), None);
        }
        assert_eq!(queue.push(other, 4), None);
        let (id, first) = queue.pop().expect("waits");
        assert_eq!((id, first), (ended, 1));
        assert_eq!(queue.remove(ended), [2, 3]);
        queue.ran(ended, 1);
        assert_eq!(queue.push(ended, 5), Some(5));
        assert_eq!(queue.pop(), Some((other, 4)));
        assert_eq!(queue.pop(), None);
    }
}
