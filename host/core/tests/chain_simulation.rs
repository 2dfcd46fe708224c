//! Simulates the chain of one task: whatever is written, given up, restored or replaced, the snapshots that a
//! checkpoint is made of give the state that the task had, and what does not count stays in proportion.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and reports a long run"
)]

use std::collections::{BTreeMap, BTreeSet};

use cofferdam_core::{
    checkpoint::chain::{SnapshotChain, Written, carried_with, checkpoint_of},
    random::Random,
};

const PAGES: u64 = 300;
const PAGE_BYTES: u64 = 4096;

/// The version of each page and of each entry of declared state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct State {
    pages: BTreeMap<u32, u64>,
    entries: BTreeMap<u32, u64>,
}

impl State {
    fn apply(&mut self, newer: &Self) {
        self.pages.extend(&newer.pages);
        self.entries.extend(&newer.entries);
    }
}

/// A store, the task that is snapshotted into it, and the chain that decides.
struct World {
    chain: SnapshotChain,
    stored: BTreeMap<u64, State>,
    /// The snapshots of each completed checkpoint that is kept, and what they are to give.
    completed: BTreeMap<u64, (Vec<u64>, State)>,
    /// What checkpoints that are neither complete nor given up are to give.
    pending: BTreeMap<u64, State>,
    now: State,
    changed: State,
    next: u64,
    has_entries: bool,
    /// How often pages were carried forward, snapshots merged, and chains cut back.
    struck: [u64; 3],
}

impl World {
    fn new(has_entries: bool) -> Self {
        let pages = (0..PAGES as u32).map(|page| (page, 0)).collect();
        let now = State { pages, entries: BTreeMap::new() };
        Self {
            chain: SnapshotChain::default(),
            stored: BTreeMap::new(),
            completed: BTreeMap::new(),
            pending: BTreeMap::new(),
            changed: now.clone(),
            now,
            next: 1,
            has_entries,
            struck: [0; 3],
        }
    }

    /// The task processes records. Most pages change seldom, some always.
    fn work(&mut self, random: &mut Random) {
        let span = if random.one_in(4) { PAGES } else { 40 };
        for _ in 0..random.between(0, span) {
            let page = random.between(0, span - 1) as u32;
            self.changed.pages.insert(page, self.next);
        }
        if self.has_entries {
            for _ in 0..random.between(0, 20) {
                self.changed.entries.insert(random.between(0, 200) as u32, self.next);
            }
        }
        let changed = self.changed.clone();
        self.now.apply(&changed);
    }

    fn oldest_needed(&self) -> u64 {
        self.pending.keys().next().copied().unwrap_or(self.next)
    }

    fn put(&mut self, id: u64, state: State, replaces: Vec<u64>) {
        let pages: Vec<u32> = state.pages.keys().copied().collect();
        let is_lasting = !state.entries.is_empty();
        let bytes = pages.len() as u64 * PAGE_BYTES + state.entries.len() as u64 * 100_000 + 10;
        // More than one pack, so that some of them count and others do not.
        let packs = pages.chunks(50).map(|pages| (0, pages.to_vec())).collect();
        self.chain.push(id, Written { bytes, packs, is_lasting, replaces });
        assert!(self.stored.insert(id, state).is_none(), "{id} is written twice");
    }

    /// Takes a snapshot, and before it what the chain wants carried forward.
    fn snapshot(&mut self) {
        let id = self.next;
        let changed = std::mem::take(&mut self.changed);
        let packs = vec![(0, changed.pages.keys().copied().collect::<Vec<u32>>())];
        let completed = self.completed.keys().last().copied().unwrap_or(0);
        let given_up = self.chain.given_up(completed, self.oldest_needed());
        let sparse = self.chain.sparse_without(&packs);
        let mut carried = State::default();
        for from in sparse.iter().chain(&given_up) {
            let of = &self.stored[from];
            let pages: Vec<u32> = of.pages.keys().copied().collect();
            for pack in self.chain.live_packs(*from) {
                for page in pages.chunks(50).nth(pack).expect("a pack") {
                    if self.chain.owner(0, *page) == *from && !changed.pages.contains_key(page) {
                        carried.pages.insert(*page, of.pages[page]);
                    }
                }
            }
        }
        for from in &given_up {
            assert!(completed < checkpoint_of(*from), "{from} belongs to a completed checkpoint");
            carried.entries.extend(&self.stored[from].entries);
        }
        self.struck[0] += u64::from(!sparse.is_empty());
        self.struck[1] += u64::from(!given_up.is_empty());
        if carried != State::default() {
            self.put(carried_with(id), carried, given_up);
        }
        self.put(id, changed, Vec::new());
        self.pending.insert(id, self.now.clone());
        self.next += 1;
    }

    fn give(&self, snapshots: &[u64]) -> State {
        let mut state = State::default();
        for id in snapshots {
            state.apply(self.stored.get(id).unwrap_or_else(|| panic!("{id} is gone")));
        }
        state
    }

    fn complete(&mut self, checkpoint: u64) {
        let Some(state) = self.pending.remove(&checkpoint) else { return };
        let snapshots = self.chain.as_of(checkpoint);
        assert_eq!(self.give(&snapshots), state, "checkpoint {checkpoint} of {snapshots:?}");
        self.completed.insert(checkpoint, (snapshots, state));
        self.pending.retain(|older, _| checkpoint < *older);
        while 2 < self.completed.len() {
            self.completed.pop_first();
        }
    }

    /// Removes what no checkpoint and no chain stands on.
    fn clean(&mut self) {
        self.chain.drop_dead(self.oldest_needed());
        let of_completed = self.completed.values().flat_map(|(snapshots, _)| snapshots.iter());
        let needed: BTreeSet<u64> = self.chain.ids().chain(of_completed.copied()).collect();
        self.stored.retain(|id, _| needed.contains(id));
        for (checkpoint, (snapshots, state)) in &self.completed {
            assert_eq!(&self.give(snapshots), state, "kept checkpoint {checkpoint}");
        }
    }

    /// The task failed, or the process: it begins again as of the newest completed checkpoint.
    fn restore(&mut self, is_new_process: bool) {
        self.pending.clear();
        self.struck[2] += 1;
        (self.chain, self.now, self.changed) = match self.completed.last_key_value() {
            Some((_, (snapshots, state))) if is_new_process => {
                (SnapshotChain::of(snapshots), state.clone(), State::default())
            }
            Some((_, (snapshots, state))) => {
                (self.chain.back_to(snapshots), state.clone(), State::default())
            }
            None => {
                let fresh = Self::new(self.has_entries);
                (fresh.chain, fresh.now, fresh.changed)
            }
        };
    }

    /// A compaction writes everything as one snapshot, under the id of the newest checkpoint.
    fn compact(&mut self) {
        let Some((&checkpoint, (_, state))) = self.completed.last_key_value() else { return };
        if !self.pending.is_empty() || self.next != checkpoint + 1 {
            return;
        }
        let state = state.clone();
        let mut compacted = Self::new(self.has_entries);
        compacted.put(checkpoint, state.clone(), Vec::new());
        self.chain = compacted.chain;
        self.stored = compacted.stored;
        self.completed = BTreeMap::from([(checkpoint, (vec![checkpoint], state))]);
    }
}

fn simulate(seed: u64) -> [u64; 3] {
    let mut random = Random::new(seed);
    let mut world = World::new(seed % 3 == 1);
    let has_restores = seed % 2 == 1;
    // Where hardly any checkpoint completes, what was given up piles up.
    let completes_one_in = if world.has_entries { 10 } else { 1 };
    for step in 0..120 {
        world.work(&mut random);
        world.snapshot();
        let pending: Vec<u64> = world.pending.keys().copied().collect();
        let any = pending[random.between(0, pending.len() as u64 - 1) as usize];
        match random.between(0, 9) {
            0..5 if random.one_in(completes_one_in) => world.complete(any),
            0..7 => drop(world.pending.remove(&any)),
            7 if world.has_entries => world.pending.clear(),
            8 if has_restores => world.restore(random.one_in(3)),
            9 if random.one_in(5) => world.compact(),
            _ => {}
        }
        world.clean();
        // Where every page is known, nothing waits and nothing lasts, garbage has its bound.
        if !has_restores && !world.has_entries && world.pending.is_empty() {
            let stored: usize = world.chain.ids().map(|id| world.stored[&id].pages.len()).sum();
            let bound = PAGES as usize + 64.max(PAGES as usize / 3);
            assert!(stored <= bound + 1, "step {step}: {stored} pages, wanted {bound}");
        }
    }
    world.struck
}

#[test]
fn a_chain_gives_every_checkpoint_back_whatever_happens() {
    let mut struck = [0; 3];
    for seed in 0..90 {
        let result = std::panic::catch_unwind(|| simulate(seed));
        let of_seed = result.unwrap_or_else(|_| panic!("SEED={seed}"));
        struck.iter_mut().zip(of_seed).for_each(|(all, one)| *all += one);
    }
    assert!(struck.iter().all(|count| 50 < *count), "{struck:?}: hardly anything struck");
}
