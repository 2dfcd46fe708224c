//! State on disk is a map, whatever checkpoints complete, fail or are given up.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use cofferdam_sandbox::{Limit, StateError};
use cofferdam_store::{
    Result,
    changes::HostChanges,
    declared::{DeclaredKey, Entries, Entry, changes_of},
    table::Tables,
};

use super::*;

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// A restore point; 0 is the beginning.
fn point(number: u64) -> Option<CheckpointId> {
    (0 < number).then_some(CheckpointId(number))
}

fn state(dir: &tempfile::TempDir, write_buffer_bytes: u64) -> KeyedState {
    let tables = Tables::new(&dir.path().join("tables"), 1 << 20).expect("tables");
    let limits = KeyedLimits {
        bytes_max: 1 << 20,
        write_buffer_bytes,
        max_parallelism: 128,
        own_keys: None,
    };
    KeyedState::new(tables, limits).expect("a state")
}

fn write(state: &KeyedState, number: u32, key: &[u8], value: Option<Vec<u8>>) {
    let entry = (DeclaredKey::new(number, key, 0, 128), value);
    state.put(&changes_of([&entry].into_iter())).expect("room");
}

/// Everything in a state, by the way of a guest that scans it.
fn scanned(state: &KeyedState, number: u32) -> Model {
    let (mut all, mut after) = (Model::new(), None::<Vec<u8>>);
    loop {
        let page = state.scan(number, after.as_deref().map(|key| (key, 0))).expect("readable");
        let Some(last) = page.entries().last() else { return all };
        after = Some(last.key.to_vec());
        for entry in page.entries() {
            all.insert(entry.key.to_vec(), entry.value.expect("none is removed").to_vec());
        }
    }
}

/// Random writes, barriers, completions, restarts and guarded calls: what is read is what a map
/// says, and the runs of the completed checkpoints add up to it.
fn random_life(seed: u64, write_buffer_bytes: u64) {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, write_buffer_bytes);
    assert_eq!(state.rewind(point(0)), None, "an empty table is here");
    let mut random = seed;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % below
    };
    let (mut now, mut at) = (Model::new(), BTreeMap::from([(0, Model::new())]));
    let (mut completed, mut barrier) = (0, 0);
    let mut committed: Option<Model> = None;
    for _ in 0..1_500 {
        let key = format!("key-{}", next(60)).into_bytes();
        match next(40) {
            0..25 => {
                let value = format!("value-{}", next(1_000)).into_bytes();
                write(&state, 1, &key, Some(value.clone()));
                now.insert(key, value);
            }
            25..30 => {
                write(&state, 1, &key, None);
                now.remove(&key);
            }
            30..33 => {
                barrier += 1;
                let entry = (DeclaredKey::new(1, &key, 0, 128), Some(b"handed over".to_vec()));
                state.cut(CheckpointId(barrier), &[changes_of([&entry].into_iter())]).expect("cut");
                now.insert(key, b"handed over".to_vec());
                at.insert(barrier, now.clone());
                committed = committed.map(|_| now.clone());
            }
            33..35 if completed < barrier => {
                // A barrier of an attempt that has ended completes no more.
                let pending: Vec<u64> = at.range(completed + 1..).map(|(id, _)| *id).collect();
                let Some(chosen) = pending.get(next(5) as usize) else { continue };
                completed = *chosen;
                state.complete(CheckpointId(completed)).expect("complete");
            }
            35 => {
                // Sometimes a checkpoint has completed and nobody has said so.
                let known: Vec<u64> = at.range(completed..).map(|(id, _)| *id).collect();
                completed = known[next(known.len() as u64) as usize];
                assert_eq!(state.rewind(point(completed)), None, "{completed} is here");
                now = at[&completed].clone();
                at.retain(|id, _| *id <= completed);
                committed = None;
            }
            36 => {
                state.guard();
                state.commit_call().expect("committed");
                committed = Some(now.clone());
            }
            37 => {
                state.commit_call().expect("committed");
                committed = committed.map(|_| now.clone());
            }
            38 => {
                state.discard();
                now = committed.clone().unwrap_or(now);
            }
            _ => {
                state.unguard().expect("unguarded");
                committed = None;
            }
        }
        let key = format!("key-{}", next(60)).into_bytes();
        assert_eq!(state.get(1, &key, 0).expect("readable"), now.get(&key).cloned());
        assert_eq!(state.get(0, &key, 0).expect("readable"), None);
    }
    assert_eq!(scanned(&state, 1), now);
    assert!(scanned(&state, 0).is_empty());
    assert!(state.rewind(point(barrier + 7)).is_some(), "that one never was");
}

#[test]
fn random_lives_equal_a_map_in_memory_and_on_disk() {
    for seed in 0..6 {
        random_life(seed, 1 << 20);
        random_life(seed, 300);
    }
}

#[test]
fn what_is_cut_off_is_what_has_changed_since_the_barrier_before() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 100);
    for (barrier, count) in [(1, 20u8), (2, 0), (3, 5)] {
        for number in 0..count {
            write(&state, 0, &[number], Some(vec![barrier]));
        }
        let layer = state.cut(CheckpointId(u64::from(barrier)), &[]).expect("cut");
        let entries: Vec<Entry> = layer.entries().collect::<Result<_>>().expect("readable");
        assert_eq!(entries.len(), usize::from(count));
        assert_eq!(layer.is_empty(), count == 0);
        assert!(entries.is_sorted(), "a run is sorted");
        assert!(entries.iter().all(|(_, value)| *value == Some(vec![barrier])));
    }
}

#[test]
fn more_than_the_limit_is_refused_and_what_was_removed_does_not_count() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 1 << 10);
    for round in 1..=40u64 {
        for number in 0..10u8 {
            write(&state, 0, &[number], Some(vec![7; 2_000]));
        }
        state.cut(CheckpointId(round), &[]).expect("cut");
        state.complete(CheckpointId(round)).expect("complete");
    }
    assert_eq!(state.base_bytes.load(Ordering::Relaxed), 10 * (13 + 2_000 + KEY_BYTES));
    let entry = (DeclaredKey::new(0, b"large", 0, 128), Some(vec![0; 1 << 20]));
    let error = state.put(&changes_of([&entry].into_iter())).expect_err("too much");
    assert!(matches!(error, StateError::Limit(Limit::State { .. })), "{error:?}");
}

#[test]
fn what_was_loaded_is_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 1 << 10);
    let token = state.rewind(point(4)).expect("nothing is here");
    state.load(token, point(4), numbers(100)).expect("loaded");
    assert_eq!(state.rewind(point(4)), None);
    assert_eq!(scanned(&state, 2), (0..100).map(|n| (vec![n], vec![n])).collect());
}

fn numbers(count: u8) -> Entries<'static> {
    let mut entries: Vec<Entry> =
        (0..count).map(|n| (DeclaredKey::new(2, &[n], 0, 128), Some(vec![n]))).collect();
    entries.sort();
    Box::new(entries.into_iter().map(Ok))
}

#[test]
fn what_an_aborted_attempt_still_loads_is_not_what_the_next_one_finds() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 1 << 10);
    let aborted = state.rewind(point(4)).expect("nothing is here");
    let next = state.rewind(point(5)).expect("nothing is here");
    state.load(next, point(5), numbers(7)).expect("loaded");
    state.load(aborted, point(4), numbers(100)).expect("nothing is done");
    assert_eq!(scanned(&state, 2).len(), 7);
    assert_eq!(state.rewind(point(5)), None);
    // And the next may begin while the one before is at it: it ends soon, or is whole.
    let aborted = state.rewind(point(6)).expect("nothing is here");
    let while_loading = numbers(9).enumerate().map(|(number, entry)| {
        assert!(number == 0 || state.rewind(point(6)).is_some(), "not yet");
        entry
    });
    state.load(aborted, point(6), Box::new(while_loading)).expect("loaded");
    assert_eq!(state.rewind(point(6)), None, "whole, whoever has loaded it");
    assert_eq!(scanned(&state, 2).len(), 9);
    let aborted = state.rewind(point(7)).expect("nothing is here");
    let mut taken = 0;
    let without_end = std::iter::repeat_with(|| {
        assert!(state.rewind(point(7)).is_some(), "not yet");
        taken += 1;
        Ok((DeclaredKey::new(2, b"the same", 0, 128), Some(vec![1])))
    });
    state.load(aborted, point(7), Box::new(without_end)).expect("ended");
    assert!(taken <= LOADED_AT_ONCE + 1, "{taken}");
    assert!(state.rewind(point(7)).is_some(), "not whole");
}

#[test]
fn checkpoints_that_never_complete_do_not_fill_the_memory() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 4 << 10);
    for barrier in 1..=50 {
        for number in 0..10u8 {
            write(&state, 0, &[number], Some(vec![barrier; 100]));
        }
        state.cut(CheckpointId(u64::from(barrier)), &[]).expect("cut");
        let buffered: u64 = state.lock().layers().map(|layer| layer.buffered_bytes).sum();
        assert!(buffered <= 2 * (4 << 10), "{buffered} bytes after {barrier} barriers");
    }
    assert_eq!(state.get(0, &[3], 0).expect("readable"), Some(vec![50; 100]));
}

#[test]
fn layers_of_checkpoints_that_never_complete_are_made_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 500);
    write(&state, 0, b"base", Some(vec![1; 10]));
    state.cut(CheckpointId(1), &[]).expect("cut");
    state.complete(CheckpointId(1)).expect("complete");
    let mut expected = Model::from([(b"base".to_vec(), vec![1; 10])]);
    for id in 2..200_u8 {
        let key = [b'k', id % 7];
        let value = (!id.is_multiple_of(3)).then(|| vec![id; 20]);
        write(&state, 0, &key, value.clone());
        match value {
            Some(value) => expected.insert(key.to_vec(), value),
            None => expected.remove(&key[..]),
        };
        state.cut(CheckpointId(id.into()), &[]).expect("cut");
        // One is still under way, and lies over them.
        state.fold(point(1), CheckpointId(u64::from(id) - 1)).expect("folded");
        assert!(state.lock().pending.len() <= 20, "{}", state.lock().pending.len());
        assert_eq!(scanned(&state, 0), expected, "after {id}");
    }
    state.complete(CheckpointId(199)).expect("complete");
    assert_eq!(state.lock().pending.len(), 0);
    assert_eq!(scanned(&state, 0), expected);
    // A restart forgets what was made one, with the rest.
    write(&state, 0, b"later", Some(vec![2]));
    for id in 200..220 {
        write(&state, 0, b"later", Some(vec![3; 100]));
        state.cut(CheckpointId(id), &[]).expect("cut");
        state.fold(point(199), CheckpointId(id + 1)).expect("folded");
    }
    assert_eq!(state.rewind(point(199)), None, "it is here");
    assert_eq!(scanned(&state, 0), expected);
}

#[test]
fn what_calls_have_committed_moves_to_disk_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 1 << 10);
    state.guard();
    for number in 0..200u8 {
        write(&state, 0, &[number], Some(vec![number; 20]));
        state.commit_call().expect("committed");
        assert!(state.lock().current.buffered_bytes <= 1 << 10);
    }
    assert_eq!(scanned(&state, 0).len(), 200);
}

#[test]
fn a_scan_finds_its_state_among_others() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 1 << 10);
    for number in 0..200u8 {
        write(&state, u32::from(number % 5), &[number], Some(vec![number; 2_000]));
        if number % 50 == 0 {
            state.cut(CheckpointId(u64::from(number) + 1), &[]).expect("cut");
            state.complete(CheckpointId(u64::from(number) + 1)).expect("complete");
        }
    }
    for wanted in 0..5 {
        let found: Vec<u8> = scanned(&state, wanted).into_keys().flatten().collect();
        let expected: Vec<u8> = (0..200).filter(|n| u32::from(n % 5) == wanted).collect();
        assert_eq!(found, expected);
    }
    assert!(scanned(&state, 5).is_empty());
}

#[test]
fn a_database_that_has_failed_is_replaced() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 1 << 10);
    write(&state, 2, &[1], Some(vec![1]));
    state.cut(CheckpointId(1), &[]).expect("cut");
    state.complete(CheckpointId(1)).expect("complete");
    state.tables.break_database();
    assert!(matches!(state.get(2, &[9], 0), Err(StateError::Unavailable { .. })));
    let token = state.rewind(point(1)).expect("what is here cannot be read");
    state.load(token, point(1), numbers(3)).expect("there is a new database");
    assert_eq!(state.rewind(point(1)), None);
    assert_eq!(scanned(&state, 2).len(), 3);
}

#[test]
fn state_moves_to_disk_on_a_runtime_of_one_thread_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = state(&dir, 1 << 10);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        for number in 0..20u32 {
            write(&state, 0, &number.to_le_bytes(), Some(vec![7; 500]));
        }
    });
    assert_eq!(scanned(&state, 0).len(), 20);
    assert!(state.lock().current.spilled.is_some(), "nothing was too large for the memory");
}
