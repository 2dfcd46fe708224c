//! What cannot be written now: nothing is lost, and it does not take more and more memory.

use std::{collections::BTreeMap, sync::Arc};

use cofferdam_sandbox::MemorySnapshot;

use super::*;
use crate::{
    Result,
    changes::{Changes, HostChanges},
    declared::{DeclaredKey, Entries, Entry, Merge, changes_of},
    snapshot::TaskSnapshot,
    store::SnapshotStore,
    unwritten::{FOLD_BYTES_MIN, Unwritten, kept_for_later},
};

#[test]
fn no_snapshot_is_lost_while_the_store_cannot_be_opened() {
    let dir = tempfile::tempdir().expect("a directory");
    let storage = crate::sled::SledStorage::new(dir.path().to_owned());
    let opened = SnapshotStore::open(Box::new(storage), "job", vec![identity()]);
    let mut store = opened.expect("opens").0;
    let page = |page: u32, byte: u8| pages(&BTreeMap::from([(page, byte)]));
    let all = pages(&BTreeMap::from([(0, 1), (1, 1), (2, 1)]));
    store.write(vec![(0, 1, all)]).expect("written");
    store.complete(1, 0).expect("complete");
    store.write(vec![(0, 2, page(0, 2))]).expect("written");
    store.write(vec![(0, 3, page(0, 3))]).expect("written");
    let (there, away) = (dir.path().join("gen-00000001"), dir.path().join("away"));
    std::fs::rename(&there, &away).expect("moved");
    // What no log takes: an error closes the files.
    store.current.generation.put(&vec![0; 70_000], b"").expect_err("too long a key");
    store.write(vec![(0, 4, page(0, 4))]).expect_err("it is not there");
    // 2 expires, and what 3 has replaced goes with the next write.
    store.release(3);
    assert!(store.has_leftovers);
    store.write(vec![(0, 5, page(1, 5))]).expect_err("it is still not there");
    std::fs::rename(&away, &there).expect("moved back");
    store.write(vec![(0, 6, page(2, 6))]).expect("written");
    store.complete(6, 0).expect("complete");
    assert_eq!(pages_of(&store, 6), BTreeMap::from([(0, 4), (1, 5), (2, 6)]));
}

#[test]
fn what_cannot_be_written_for_long_takes_no_more_memory_than_the_state() {
    let dir = tempfile::tempdir().expect("a directory");
    let storage = crate::sled::SledStorage::new(dir.path().to_owned());
    let opened = SnapshotStore::open(Box::new(storage), "job", vec![identity(); 2]);
    let mut store = opened.expect("opens").0;
    let both = |pages: &[(u32, u8)], entries: &[(&str, Option<u8>)]| {
        let snapshot = snapshot(pages, entries);
        [(0, snapshot.clone()), (1, snapshot)]
    };
    let write = |store: &mut SnapshotStore, id: u64, of: [(usize, Arc<TaskSnapshot>); 2]| {
        store.write(of.map(|(task, snapshot)| (task, id, snapshot)).to_vec())
    };
    write(&mut store, 1, both(&[(9_999, 1)], &[("a", Some(1))])).expect("written");
    store.complete(1, 0).expect("complete");
    let (there, away) = (dir.path().join("gen-00000001"), dir.path().join("away"));
    std::fs::rename(&there, &away).expect("moved");
    store.current.generation.put(&vec![0; 70_000], b"").expect_err("too long a key");
    let many = |id: u64| -> Vec<(u32, u8)> { (0..3_000).map(|page| (page, id as u8)).collect() };
    for id in 2..12u64 {
        let key = format!("k{id}");
        let snapshots = both(&many(id), &[(&key, Some(id as u8)), ("a", Some(id as u8))]);
        write(&mut store, id, snapshots).expect_err("it is not there");
    }
    let waiting: u64 = store.unwritten.iter().map(|(.., it)| it.bytes()).sum();
    assert!(waiting <= FOLD_BYTES_MIN + (48 << 20), "{waiting} bytes");
    std::fs::rename(&away, &there).expect("moved back");
    write(&mut store, 12, both(&[(5, 12)], &[])).expect("written");
    store.complete(12, 0).expect("complete");
    for task in 0..2 {
        let loaded = store.load(task, 12).expect("whole");
        let merged = MemorySnapshot::merged(&loaded.memory).expect("pages");
        let pages: BTreeMap<u32, u8> =
            merged.memories[0].pages().map(|(page, bytes)| (page, bytes[0])).collect();
        let mut expected: BTreeMap<u32, u8> = many(11).into_iter().collect();
        expected.extend([(5, 12), (9_999, 1)]);
        assert!(pages == expected);
        let entries = store.declared(task, 12).expect("whole").map(|entry| {
            let (key, value) = entry.expect("whole");
            (String::from_utf8_lossy(&key.key).into_owned(), value.expect("there")[0])
        });
        let mut expected: BTreeMap<String, u8> =
            (2..12).map(|id: u8| (format!("k{id}"), id)).collect();
        expected.insert("a".to_owned(), 11);
        assert_eq!(entries.collect::<BTreeMap<_, _>>(), expected);
    }
}

#[test]
fn changes_that_cannot_be_written_for_long_are_made_one() {
    let entry = |key: u32, value: Option<u8>| {
        let value = value.map(|byte| vec![byte; 1 << 20]);
        (DeclaredKey::new(0, format!("k{key}").as_bytes(), 0, 128), value)
    };
    let mut expected = BTreeMap::new();
    let mut pending = Vec::new();
    for id in 1..=40_u64 {
        // Some are written again and again, one of them is removed in between.
        let value = |key: u32| (key != 3 || !id.is_multiple_of(5)).then_some(id as u8);
        let entries: Vec<Entry> = (0..6)
            .map(|key| entry(key, value(key)))
            .chain([entry(100 + id as u32 % 7, Some(id as u8))])
            .collect();
        expected.extend(entries.clone());
        let snapshot = TaskSnapshot {
            state: vec![id as u8].into(),
            declared: Some(Arc::new(Changes::Guest(vec![changes_of(entries.iter())]))),
            is_declared_whole: id == 1,
            ..TaskSnapshot::default()
        };
        pending.push((0, id, Arc::new(snapshot)));
        pending = kept_for_later(pending, &[identity()]);
        let waiting: u64 = pending.iter().map(|(.., it)| it.bytes()).sum();
        assert!(waiting <= FOLD_BYTES_MIN + (8 << 20), "{waiting} bytes at {id}");
    }
    assert!(pending.len() < 40, "what is tested is a merge");
    let first = &pending[0].2;
    assert!(first.is_declared_whole, "it still is all there was");
    let runs = pending.iter().filter_map(|(.., it)| it.declared.as_ref());
    let merged = Merge::of(runs.map(|changes| changes.run(128)).collect());
    let merged: BTreeMap<_, _> = merged.collect::<Result<_>>().expect("readable");
    assert!(merged == expected);
    let (_, id, last) = pending.last().expect("one");
    assert_eq!((*id, last.state.to_vec()), (40, vec![40]));
}

#[derive(Debug)]
struct KeptByHost;

impl HostChanges for KeptByHost {
    fn is_empty(&self) -> bool {
        true
    }

    fn entries(&self) -> Entries<'_> {
        Box::new(std::iter::empty())
    }
}

/// Their layers lie on the host's disk; their pages do not.
#[test]
fn pages_beside_state_that_the_host_keeps_are_made_one_as_well() {
    let mut pending = Vec::new();
    for id in 1..=60_u64 {
        let changed = (0..1_000).map(|page| (page, id as u8)).collect();
        let memory = pages(&changed).memory.clone();
        let declared = Some(Arc::new(Changes::Host(Arc::new(KeptByHost))));
        let snapshot = TaskSnapshot { memory, declared, ..TaskSnapshot::default() };
        pending.push((0, id, Arc::new(snapshot)));
        pending = kept_for_later(pending, &[identity()]);
        let waiting: u64 = pending.iter().map(|(.., it)| it.bytes()).sum();
        assert!(waiting <= FOLD_BYTES_MIN + (8 << 20), "{waiting} bytes at {id}");
    }
    assert_eq!(pending.len(), 60, "each has its layer");
    let memories = pending.iter().filter_map(|(.., it)| it.memory.as_deref());
    let merged = MemorySnapshot::merged(memories).expect("pages");
    let newest = merged.memories[0].pages().all(|(_, bytes)| bytes[0] == 60);
    assert!(newest && merged.memories[0].page_count() == 1_000);
}

/// Those that wait for the disk are written as one where only the last may complete.
#[test]
fn snapshots_that_were_given_up_before_they_were_written_are_written_as_one() {
    let mut store = open();
    let batch = |ids: std::ops::RangeInclusive<u64>| -> Vec<Unwritten> {
        let of = |id: u64| snapshot(&[(id as u32 % 3, id as u8)], &[("a", Some(id as u8))]);
        ids.map(|id| (0, id, of(id))).collect()
    };
    store.write(batch(1..=1)).expect("written");
    store.complete(1, 0).expect("complete");
    store.release(5);
    let bytes = store.write(batch(2..=6)).expect("written");
    assert_eq!(bytes.len(), 5, "each has its answer");
    // What is before the oldest that may complete lies in that.
    assert_eq!(store.chains[0].ids().collect::<Vec<_>>(), [1, 5, 6]);
    store.complete(6, 0).expect("complete");
    let pages = BTreeMap::from([(0, 6), (1, 4), (2, 5)]);
    assert_eq!(contents(&store, 6), (pages, vec![(b"a".to_vec(), vec![6])]));
}
