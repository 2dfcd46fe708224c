//! The store as a whole: what was written is read, whatever is merged, given up, folded or carried.

mod connector_state;
mod unwritten;

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use cofferdam_contract::{Batch, RecordRef};
use cofferdam_core::checkpoint::chain::carried_with;
use cofferdam_sandbox::{MemoryDelta, MemorySnapshot, memory::PAGE_BYTES};

use crate::{
    Result,
    changes::Changes,
    declared::{DeclaredKey, Entry, changes_of, first_part},
    in_flight::{ChannelState, InFlight},
    key::{KIND_MEMORY, snapshot_prefix, value_key},
    memory::MemoryStorage,
    merge::renumbered,
    metadata::{SnapshotStats, TaskIdentity},
    snapshot::TaskSnapshot,
    store::SnapshotStore,
    unpack::{decompress, first_pack},
};

pub(crate) fn identity() -> TaskIdentity {
    TaskIdentity {
        operator: "count".to_owned(),
        index: 0,
        parallelism: 1,
        max_parallelism: 128,
        digest: Some([1; 16]),
        has_memory: true,
        has_declared: true,
        has_host_state: false,
        uid: "count".to_owned(),
        is_sink: false,
        connector: None,
        directories: None,
        config: 0,
        is_keyed: true,
        states: Vec::new(),
    }
}

fn open() -> SnapshotStore {
    SnapshotStore::open(Box::new(MemoryStorage::default()), "job", vec![identity()])
        .expect("opens")
        .0
}

fn snapshot(pages: &[(u32, u8)], entries: &[(&str, Option<u8>)]) -> Arc<TaskSnapshot> {
    let mut delta = MemoryDelta::new(1 << 20);
    pages.iter().for_each(|(page, byte)| delta.push(*page, &[*byte; PAGE_BYTES]));
    let entries: Vec<Entry> = entries
        .iter()
        .map(|(key, value)| {
            (DeclaredKey::new(0, key.as_bytes(), 0, 128), value.map(|value| vec![value]))
        })
        .collect();
    Arc::new(TaskSnapshot {
        state: vec![pages.len() as u8].into(),
        is_drained: false,
        memory: Some(Arc::new(MemorySnapshot {
            memories: vec![delta],
            globals: vec![5],
            monotonic_ns: 1,
        })),
        declared: Some(Arc::new(Changes::Guest(vec![changes_of(entries.iter())]))),
        ..TaskSnapshot::default()
    })
}

type Contents = (BTreeMap<u32, u8>, Vec<(Vec<u8>, Vec<u8>)>);

/// Page -> byte of the whole state, and its declared entries.
fn contents(store: &SnapshotStore, checkpoint: u64) -> Contents {
    let loaded = store.load(0, checkpoint).expect("whole");
    let pages = loaded.memory.iter().flat_map(|snapshot| snapshot.memories[0].pages());
    let pages = pages.map(|(page, bytes)| (page, bytes[0])).collect();
    let entries = store.declared(0, checkpoint).expect("whole");
    let mut entries: Vec<_> = entries
        .map(|entry| entry.map(|(key, value)| (key.key, value.unwrap_or_default())))
        .collect::<Result<_>>()
        .expect("whole");
    entries.sort();
    (pages, entries)
}

fn written(store: &mut SnapshotStore) {
    let steps = [
        (1, snapshot(&[(0, 1), (1, 1), (40, 1)], &[("a", Some(1)), ("b", Some(1))])),
        (2, snapshot(&[(1, 2)], &[("b", None), ("c", Some(2))])),
        (3, snapshot(&[(40, 3), (41, 3)], &[("a", Some(3))])),
    ];
    for (checkpoint, snapshot) in steps {
        store.write(vec![(0, checkpoint, snapshot)]).expect("written");
        store.complete(checkpoint, 0).expect("complete");
    }
}

#[test]
fn state_is_the_sum_of_its_chain_and_survives_compaction() {
    let mut store = open();
    written(&mut store);
    let pages = BTreeMap::from([(0, 1), (1, 2), (40, 3), (41, 3)]);
    let entries = vec![(b"a".to_vec(), vec![3]), (b"c".to_vec(), vec![2])];
    assert_eq!(contents(&store, 3), (pages.clone(), entries.clone()));
    store.compact(3).expect("compacts");
    assert_eq!(store.storage.generations().expect("listed"), [1, 2], "1 and 2 are kept");
    (1..=2).for_each(|id| store.delete(id).expect("deleted"));
    assert_eq!(store.storage.generations().expect("listed"), [2]);
    assert_eq!(contents(&store, 3), (pages.clone(), entries.clone()));
    store.write(vec![(0, 4, snapshot(&[(7, 4)], &[]))]).expect("written");
    store.complete(4, 0).expect("complete");
    assert_eq!(contents(&store, 4).0.get(&7), Some(&4));
    assert_eq!(contents(&store, 4).1, entries);
}

#[test]
fn key_groups_are_read_without_what_lies_around_them() {
    let mut store = open();
    for checkpoint in 1..=3_u8 {
        let keys: Vec<String> = (0..9_000_u32)
            .filter(|at| at % 3 <= u32::from(checkpoint))
            .map(|at| format!("key {at}"))
            .collect();
        let value = |at: usize| (at % 7 != usize::from(checkpoint)).then_some(checkpoint);
        let entries: Vec<_> =
            keys.iter().enumerate().map(|(at, key)| (key.as_str(), value(at))).collect();
        let id = u64::from(checkpoint);
        store.write(vec![(0, id, snapshot(&[], &entries))]).expect("written");
        store.complete(id, 0).expect("complete");
    }
    let read = |groups: Option<Range<u32>>| -> Vec<Entry> {
        store.declared_within(0, 3, groups).and_then(Iterator::collect).expect("whole")
    };
    let all = read(None);
    assert!(7_000 < all.len());
    for groups in [0..128, 0..1, 5..6, 31..64, 100..u32::MAX, 127..128, 60..60] {
        let owned = all.iter().filter(|(key, _)| groups.contains(&key.key_group));
        assert!(owned.eq(&read(Some(groups.clone()))), "{groups:?}");
    }
    // Of the packs of each snapshot those that are behind the first group are not even looked for.
    let packs = |groups: Range<u32>| {
        let read = |sequence: u32| {
            assert!(sequence < 64);
            Ok(vec![(
                DeclaredKey { key_group: 2 * sequence, state: 0, namespace: 0, key: vec![] },
                None,
            )])
        };
        first_pack(64, groups.start, &read).expect("readable")
    };
    assert_eq!(
        [packs(0..1), packs(1..2), packs(2..3), packs(80..90), packs(127..128)],
        [0, 0, 0, 39, 63]
    );
    let mut entries = store.declared(0, 3).expect("whole");
    let (first, next) = first_part(Box::new(entries.by_ref()), 4_000).expect("whole");
    let next = next.expect("there is more");
    let (rest, end) = store
        .declared_within(0, 3, Some(next..u32::MAX))
        .and_then(|rest| first_part(rest, usize::MAX))
        .expect("whole");
    assert_eq!(end, None);
    assert!(first.into_iter().chain(rest).eq(all), "parts make up the whole");
}

/// The numbers of states come behind the key group, and before the key.
#[test]
fn entries_with_other_numbers_are_in_order_again() {
    let entry = |state: u32, group: u32, key: u8| {
        (DeclaredKey { key_group: group, state, namespace: 0, key: vec![key] }, Some(vec![key]))
    };
    let mut entries: Vec<Entry> = (0..300).map(|at| entry(at % 3, at / 60, at as u8)).collect();
    entries.sort();
    let states = [Some(2), None, Some(0)];
    let run = entries.iter().cloned().map(Ok);
    let renumbered: Vec<Entry> =
        renumbered(run, &states).and_then(Iterator::collect).expect("no error");
    let mut expected: Vec<Entry> = entries
        .into_iter()
        .filter_map(|(mut key, value)| {
            key.state = states[key.state as usize]?;
            Some((key, value))
        })
        .collect();
    expected.sort();
    assert!(renumbered == expected);
}

fn pages_of(store: &SnapshotStore, checkpoint: u64) -> BTreeMap<u32, u8> {
    let loaded = store.load(0, checkpoint).expect("whole");
    let merged = MemorySnapshot::merged(&loaded.memory).expect("pages");
    merged.memories[0].pages().map(|(page, bytes)| (page, bytes[0])).collect()
}

fn pages(pages: &BTreeMap<u32, u8>) -> Arc<TaskSnapshot> {
    let mut delta = MemoryDelta::new(4 << 20);
    pages.iter().for_each(|(page, byte)| delta.push(*page, &[*byte; PAGE_BYTES]));
    let memory = MemorySnapshot { memories: vec![delta], ..MemorySnapshot::default() };
    Arc::new(TaskSnapshot { memory: Some(Arc::new(memory)), ..TaskSnapshot::default() })
}

/// Pages that are in the current generation, whether or not they count.
fn stored_pages(store: &SnapshotStore) -> usize {
    let generation = &store.current.generation;
    let keys = generation.keys(b"s").expect("listed");
    let values = keys.iter().map(|key| generation.get(key).expect("read").expect("there"));
    values.map(|value| value.len() / PAGE_BYTES).sum()
}

#[test]
fn what_is_written_over_everywhere_is_written_once_and_goes() {
    let mut store = open();
    let hot = |byte: u8| pages(&(0..500).map(|page| (page, byte)).collect());
    let mut first: BTreeMap<u32, u8> = (0..500).map(|page| (page, 0)).collect();
    // Half of it is never written over.
    let cold: BTreeMap<u32, u8> = (500..1000).map(|page| (page, 7)).collect();
    first.extend(&cold);
    store.write(vec![(0, 1, pages(&first))]).expect("written");
    store.complete(1, 0).expect("complete");
    let generation = store.current.number;
    let mut twice = 0;
    for id in 2..40 {
        let bytes = store.write(vec![(0, id, hot(id as u8))]).expect("written")[0];
        twice += usize::from(520 * PAGE_BYTES as u64 <= bytes);
        store.complete(id, 0).expect("complete");
        store.subsume(id - 1, id, None).expect("forgotten");
        let mut expected: BTreeMap<u32, u8> = (0..500).map(|page| (page, id as u8)).collect();
        expected.extend(&cold);
        assert_eq!(pages_of(&store, id), expected);
        assert!(stored_pages(&store) <= 2000, "{}", stored_pages(&store));
    }
    assert_eq!(twice, 1, "what is not written over is carried forward once");
    assert_eq!(store.current.number, generation, "nothing was compacted");
}

#[test]
fn whatever_is_written_a_checkpoint_has_the_newest_of_every_page() {
    let mut carried = 0;
    for seed in 0..60 {
        let mut random = cofferdam_core::random::Random::new(seed);
        let mut below = move |end: u64| random.between(0, end.max(1) - 1);
        let mut store = open();
        let mut state = BTreeMap::new();
        let mut complete: Vec<(u64, BTreeMap<u32, u8>)> = Vec::new();
        let (size, kept) = (1 + below(599), 1 + below(3) as usize);
        for step in 1..60u64 {
            let id = store.next_id();
            let count = [3, size / 10, size / 2, size][below(4) as usize];
            let mut batch = Vec::new();
            // Sometimes two checkpoints are written at once, and only the later one completes.
            for id in id..=id + u64::from(below(6) == 0) {
                let start = below(size);
                let changed =
                    (0..count).map(|at| (((start + at) % size) as u32, (step % 251) as u8));
                let changed: BTreeMap<u32, u8> = changed.collect();
                state.extend(&changed);
                batch.push((0, id, pages(&changed)));
            }
            let newest = batch.last().expect("one").1;
            let changed = batch
                .iter()
                .map(|(.., it)| it.memory.as_ref().expect("pages").memories[0].page_count() as u64);
            let changed: u64 = changed.sum::<u64>() * PAGE_BYTES as u64;
            let bytes: u64 = store.write(batch).expect("written").iter().sum();
            carried += usize::from(changed + 16 * PAGE_BYTES as u64 <= bytes);
            match below(8) {
                // It never completes.
                0 => {
                    store.release(complete.last().map_or(newest + 1, |(id, _)| *id));
                    continue;
                }
                1 if !complete.is_empty() => {
                    let (id, before) = complete.last().expect("one").clone();
                    if store.is_current(id) {
                        store.begin_attempt(&[0], Some(id)).expect("begins");
                        state = before;
                    }
                    continue;
                }
                _ => {}
            }
            store.complete(newest, 0).expect("complete");
            complete.push((newest, state.clone()));
            if kept < complete.len() {
                let (oldest, _) = complete.remove(0);
                store.subsume(oldest, newest, None).expect("forgotten");
            }
            for (id, state) in &complete {
                assert_eq!(pages_of(&store, *id), *state, "seed {seed}, checkpoint {id}");
            }
            if kept == 1 {
                let (stored, live) = (stored_pages(&store), state.len());
                assert!(stored <= 2 * live + 1200, "seed {seed}: {stored} for {live}");
            }
        }
    }
    assert!(50 < carried, "{carried}");
}

/// The batch was forgotten whose write found the store closed, and the next one had a gap before it.
/// Bytes of all snapshots.
fn stored_bytes(store: &SnapshotStore) -> usize {
    let generation = &*store.current.generation;
    let keys = generation.keys(b"s").expect("listed");
    keys.iter().map(|key| generation.get(key).expect("read").map_or(0, |it| it.len())).sum()
}

/// Of declared state, too; and it does not become more and more while no checkpoint completes.
#[test]
fn whatever_is_given_up_a_checkpoint_has_the_newest_of_every_entry() {
    type Known = (u64, BTreeMap<DeclaredKey, u8>, BTreeMap<u32, u8>);
    const VALUE_BYTES: usize = 50_000;
    let mut merged = 0;
    for seed in 0..16 {
        let mut random = cofferdam_core::random::Random::new(seed);
        let mut below = move |end: u64| random.between(0, end.max(1) - 1);
        // With pages beside it, as where the host keeps declared state; and where the guest does, without.
        let has_pages = seed % 2 == 0;
        let mut store = open();
        let (mut state, mut page_state) = (BTreeMap::new(), BTreeMap::new());
        let mut complete: Option<Known> = None;
        let mut pending = Vec::new();
        for step in 1..160u64 {
            let id = store.next_id();
            let byte = (step % 251) as u8;
            let mut changed = BTreeMap::new();
            for _ in 0..1 + below(12) {
                let key = format!("key {}", below(40));
                let value = (below(5) != 0).then_some(byte);
                changed.insert(DeclaredKey::new(0, key.as_bytes(), 0, 128), value);
            }
            for (key, value) in &changed {
                match value {
                    Some(byte) => drop(state.insert(key.clone(), *byte)),
                    None => drop(state.remove(key)),
                }
            }
            let entry = |(key, value): (DeclaredKey, Option<u8>)| {
                (key, value.map(|byte| vec![byte; VALUE_BYTES]))
            };
            let entries: Vec<Entry> = changed.into_iter().map(entry).collect();
            let mut delta = MemoryDelta::new(1 << 20);
            for page in 0..below(4) as u32 {
                delta.push(page * 7 + (step % 5) as u32, &[byte; PAGE_BYTES]);
            }
            page_state.extend(delta.pages().map(|(page, bytes)| (page, bytes[0])));
            let snapshot = TaskSnapshot {
                state: vec![byte].into(),
                memory: has_pages.then(|| {
                    let (memories, globals) = (vec![delta], vec![5]);
                    Arc::new(MemorySnapshot { memories, globals, monotonic_ns: 1 })
                }),
                declared: Some(Arc::new(Changes::Guest(vec![changes_of(entries.iter())]))),
                is_declared_whole: step == 1,
                ..TaskSnapshot::default()
            };
            store.write(vec![(0, id, Arc::new(snapshot))]).expect("written");
            merged += store.chains[0].ids().filter(|it| *it == carried_with(id)).count();
            pending.push((id, state.clone(), page_state.clone()));
            // From some step on nothing completes any more.
            match if step < 60 { below(24) } else { 23 } {
                // It is still under way when the next one is triggered.
                0..=9 if pending.len() < 3 => continue,
                10 => {
                    if let Some((id, before, pages)) = complete.clone()
                        && store.is_current(id)
                    {
                        store.begin_attempt(&[0], Some(id)).expect("begins");
                        (state, page_state) = (before, pages);
                        pending.clear();
                    }
                    continue;
                }
                11 => {
                    let (id, ..) = pending[below(pending.len() as u64) as usize];
                    let at = pending.iter().position(|(it, ..)| *it == id).expect("there");
                    store.complete(id, 0).expect("complete");
                    let before = complete.replace(pending[at].clone());
                    pending.drain(..=at);
                    if let Some((oldest, ..)) = before {
                        let next = pending.first().map(|(id, ..)| *id);
                        store.subsume(oldest, id, next).expect("forgotten");
                    }
                }
                _ => {
                    // The oldest is given up, or all of them.
                    let left = if below(3) != 0 { 1 } else { pending.len() };
                    pending.drain(..left);
                    store.release(pending.first().map_or(id + 1, |(id, ..)| *id));
                }
            }
            if let Some((id, state, pages)) = &complete {
                let entries = store.declared(0, *id).and_then(Iterator::collect::<Result<Vec<_>>>);
                let entries = entries.expect("whole").into_iter();
                let entries = entries.map(|(key, value)| (key, value.expect("there")[0]));
                assert!(entries.eq(state.clone()), "seed {seed}, step {step}, checkpoint {id}");
                if has_pages {
                    assert_eq!(pages_of(&store, *id), *pages, "seed {seed}, checkpoint {id}");
                }
            }
            let stored = stored_bytes(&store);
            // What is complete, what is merged, and half as much again, while the next is written.
            assert!(stored <= 16 << 20, "seed {seed}, step {step}: {stored} bytes");
        }
    }
    assert!(40 < merged, "{merged}");
}

#[test]
fn what_a_pending_checkpoint_stands_on_stays_though_a_later_one_has_replaced_it() {
    let mut store = open();
    let all = |byte: u8| pages(&(0..300).map(|page| (page, byte)).collect());
    for id in 1..=2u8 {
        store.write(vec![(0, u64::from(id), all(id))]).expect("written");
    }
    store.complete(2, 0).expect("complete");
    store.subsume(1, 2, None).expect("forgotten");
    let few = pages(&BTreeMap::from([(5, 3)]));
    store.write(vec![(0, 3, few)]).expect("written");
    for id in 4..=6u8 {
        store.write(vec![(0, u64::from(id), all(id))]).expect("written");
        // 3 is pending still.
        store.release(2);
    }
    store.complete(3, 0).expect("complete");
    let expected = (0..300).map(|page| (page, if page == 5 { 3 } else { 2 })).collect();
    assert_eq!(pages_of(&store, 3), expected);
    store.complete(6, 0).expect("complete");
    store.subsume(2, 6, None).expect("forgotten");
    store.subsume(3, 6, None).expect("forgotten");
    assert_eq!(pages_of(&store, 6), (0..300).map(|page| (page, 6)).collect());
    assert!(stored_pages(&store) <= 310, "{}", stored_pages(&store));
}

#[test]
fn nothing_is_left_of_checkpoints_that_are_not_kept() {
    let mut store = open();
    let position = |len: usize| {
        Arc::new(TaskSnapshot { state: vec![1; len].into(), ..TaskSnapshot::default() })
    };
    for id in 1..50u64 {
        store.write(vec![(0, id, position(5 << 20))]).expect("written");
        store.complete(id, 0).expect("complete");
        if 1 < id {
            store.subsume(id - 1, id, None).expect("forgotten");
        }
    }
    assert_eq!(store.current.number, 1, "there was nothing to compact");
    let generation = &store.current.generation;
    assert_eq!(generation.keys(b"m").expect("listed").len(), 1);
    // Two checkpoints, each of a header and 20 packs.
    assert!(generation.keys(b"s").expect("listed").len() <= 42);
}

#[test]
fn what_cannot_be_read_is_not_carried_and_ends_no_checkpoint() {
    let mut store = open();
    let all = |byte: u8| pages(&(0..500).map(|page| (page, byte)).collect());
    store.write(vec![(0, 1, all(0))]).expect("written");
    store.complete(1, 0).expect("complete");
    for key in store.current.generation.keys(&snapshot_prefix(1)).expect("listed") {
        let mut value = store.current.generation.get(&key).expect("read").expect("there");
        value[20] ^= 1;
        store.current.generation.put(&key, &value).expect("put");
    }
    let most = |byte: u8| pages(&(0..400).map(|page| (page, byte)).collect());
    for id in 2..6u8 {
        store.write(vec![(0, u64::from(id), most(id))]).expect("written");
        store.complete(u64::from(id), 0).expect("complete");
        assert!(store.load(0, u64::from(id)).is_err(), "it stands on what is damaged");
    }
    store.write(vec![(0, 6, all(6))]).expect("written");
    store.complete(6, 0).expect("complete");
    assert_eq!(pages_of(&store, 6), (0..500).map(|page| (page, 6)).collect());
}

#[test]
fn attempt_begins_from_its_checkpoint_and_leftovers_are_gone() {
    let mut store = open();
    written(&mut store);
    store.write(vec![(0, 4, snapshot(&[(0, 9)], &[]))]).expect("written");
    store.begin_attempt(&[0], Some(3)).expect("begins");
    store.subsume(2, 3, None).expect("forgotten");
    assert!(store.current.generation.keys(&snapshot_prefix(4)).expect("listed").is_empty());
    store.write(vec![(0, 5, snapshot(&[(1, 5)], &[]))]).expect("written");
    store.complete(5, 0).expect("complete");
    assert_eq!(contents(&store, 5).0, BTreeMap::from([(0, 1), (1, 5), (40, 3), (41, 3)]));
    assert_eq!(store.next_id(), 6);
}

#[test]
fn compressed_snapshots_are_smaller_and_read_beside_others() {
    let mut store = open();
    let pages: Vec<(u32, u8)> = (0..100).map(|page| (page, page as u8)).collect();
    let plain = store.write(vec![(0, 1, snapshot(&pages, &[("a", Some(1))]))]).expect("written");
    store.complete(1, 0).expect("complete");
    store.compress(true);
    let pages: Vec<(u32, u8)> = (0..100).map(|page| (page, 7 + page as u8)).collect();
    let small = store.write(vec![(0, 2, snapshot(&pages, &[("b", Some(2))]))]).expect("written");
    store.complete(2, 0).expect("complete");
    assert!(small[0] * 10 < plain[0], "{small:?} compressed, {plain:?} plain");
    let entries = vec![(b"a".to_vec(), vec![1]), (b"b".to_vec(), vec![2])];
    let whole = (pages.into_iter().collect(), entries);
    assert_eq!(contents(&store, 2), whole);
    store.compact(2).expect("compacts");
    store.compress(false);
    assert_eq!(contents(&store, 2), whole);
    assert_eq!(decompress(&[255, 255, 255, 255, 0]), Err("a block has an impossible size".into()));
}

#[test]
fn records_in_flight_are_those_of_the_newest_snapshot() {
    let mut store = open();
    let channel = |watermark| ChannelState {
        place: 1,
        input: 1,
        from: "words".to_owned(),
        producer: 2,
        elements: vec![InFlight::Watermark(watermark)],
    };
    for (checkpoint, in_flight) in [(1, vec![channel(5)]), (2, vec![channel(6), channel(7)])] {
        let stats = SnapshotStats { sync_us: checkpoint, ..SnapshotStats::default() };
        let in_flight = Arc::new(in_flight);
        let snapshot = TaskSnapshot { in_flight, stats, ..TaskSnapshot::default() };
        store.write(vec![(0, checkpoint, Arc::new(snapshot))]).expect("written");
        store.complete(checkpoint, 0).expect("complete");
    }
    assert_eq!(*store.load(0, 1).expect("whole").in_flight, [channel(5)]);
    assert_eq!(*store.load(0, 2).expect("whole").in_flight, [channel(6), channel(7)]);
    assert_eq!(store.inspect(2).expect("whole")[0].stats.sync_us, 2);
    store.compact(2).expect("compacts");
    assert_eq!(*store.load(0, 2).expect("whole").in_flight, [channel(6), channel(7)]);
}

#[test]
fn damaged_value_is_found_and_named() {
    let mut store = open();
    written(&mut store);
    let key = value_key(2, 0, KIND_MEMORY, 0);
    let mut value = store.current.generation.get(&key).expect("readable").expect("there");
    value[100] ^= 4;
    store.current.generation.put(&key, &value).expect("written");
    let error = store.load(0, 3).expect_err("damaged").to_string();
    assert_eq!(error, "the snapshot of task 0 for checkpoint 2 is damaged: its checksum is wrong");
    store.current.generation.delete(&key).expect("deleted");
    let error = store.load(0, 3).expect_err("damaged").to_string();
    assert_eq!(
        error,
        "the snapshot of task 0 for checkpoint 2 is damaged: a part of it is not there"
    );
}

/// A checksum has no key: a program that can write to a store can write one.
#[test]
fn records_in_flight_whose_columns_do_not_fit_are_damage() {
    let mut store = open();
    let mut batch = Batch::empty();
    batch.push(RecordRef { key: Some(b"key"), value: b"value", timestamp: None });
    batch.key_ends[0] = 1_000;
    let elements = vec![InFlight::Records(batch)];
    let state = ChannelState { place: 0, input: 0, from: "in".to_owned(), producer: 0, elements };
    let snapshot = TaskSnapshot { in_flight: Arc::new(vec![state]), ..TaskSnapshot::default() };
    let tasks = store.tasks.len();
    let snapshots = (1..tasks).map(|task| (task, 1, Arc::default()));
    store.write(snapshots.chain([(0, 1, Arc::new(snapshot))]).collect()).expect("written");
    store.complete(1, 0).expect("complete");
    let error = store.load(0, 1).expect_err("its keys end behind their bytes").to_string();
    assert!(error.starts_with("the snapshot of task 0 for checkpoint 1 is damaged"), "{error}");
}
