//! A thousand checkpoints: the directory stays in proportion to the state.

use std::{fs, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use cofferdam_core::random::Random;
use cofferdam_engine::storage::{
    sled::SledStorage,
    snapshot::{SnapshotStore, TaskSnapshot},
};
use cofferdam_sandbox::{MemoryDelta, MemorySnapshot};
use cofferdam_tests::job::lone_task;

const PAGES: u64 = 8192;
const PAGE: usize = 4096;
/// sled's own file, which does not grow with the state.
const INDEX_BYTES: u64 = 4 << 20;

fn disk_bytes(dir: &Path) -> u64 {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).expect("listed").flatten() {
        let metadata = entry.metadata().expect("readable");
        bytes += match metadata.is_dir() {
            true => disk_bytes(&entry.path()),
            false => metadata.blocks() * 512,
        };
    }
    bytes
}

/// Takes checkpoints whose changed pages come from `page`; gives the largest size of the directory,
/// in shares of the state, and checks the last state page by page.
fn soak(checkpoints: u64, mut page: impl FnMut(&mut Random) -> u64) -> f64 {
    let dir = tempfile::tempdir().expect("a directory");
    let storage = Box::new(SledStorage::new(dir.path().to_owned()));
    let (mut store, _) =
        SnapshotStore::open(storage, "soak", vec![lone_task("op")]).expect("opens");
    let mut random = Random::new(1);
    let mut newest = vec![0u8; PAGES as usize];
    let mut largest = 0;
    for id in 1..=checkpoints {
        let mut delta = MemoryDelta::new(PAGES * PAGE as u64);
        let changed: Vec<u64> = match id {
            1 => (0..PAGES).collect(),
            _ => (0..PAGES / 100).map(|_| page(&mut random)).collect(),
        };
        for page in changed {
            newest[page as usize] = id as u8;
            delta.push(page as u32, &[id as u8; PAGE]);
        }
        let memory = MemorySnapshot { memories: vec![delta], ..MemorySnapshot::default() };
        let snapshot = TaskSnapshot { memory: Some(memory), ..TaskSnapshot::default() };
        store.write(vec![(0, id, Arc::new(snapshot))]).expect("written");
        store.complete(id, 0).expect("complete");
        if 1 < id {
            store.subsume(id - 1, id, None).expect("subsumed");
        }
        largest = largest.max(disk_bytes(dir.path()));
    }
    let loaded = store.load(0, checkpoints).expect("whole");
    let mut read = vec![0u8; PAGES as usize];
    for (page, bytes) in loaded.memory.iter().flat_map(|memory| memory.memories[0].pages()) {
        read[page as usize] = bytes[0];
    }
    assert!(read == newest, "the state is not what was written");
    largest.saturating_sub(INDEX_BYTES) as f64 / (PAGES as f64 * PAGE as f64)
}

#[test]
fn directory_stays_below_two_and_a_half_times_the_state() {
    let share = soak(1_000, |random| random.between(0, PAGES - 1));
    assert!(share < 2.5, "{share:.2} times the state");
}

#[test]
fn pages_that_change_again_and_again_take_no_more_space() {
    let mut next = 0;
    let share = soak(300, |_| {
        next = (next + 1) % 200;
        next
    });
    assert!(share < 1.3, "{share:.2} times the state");
}
