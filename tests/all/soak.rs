//! A thousand checkpoints: the directory stays in proportion to the state, and the process as it is.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    path::Path,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_core::random::Random;
use cofferdam_sandbox::{MemoryDelta, MemorySnapshot};
use cofferdam_store::{
    SnapshotStore, Storage, objects::ObjectStorage, sled::SledStorage, snapshot::TaskSnapshot,
};
use cofferdam_tests::{
    guest,
    job::{Harness, lone_task, rounds},
};

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

fn sled(dir: &Path) -> Box<dyn Storage> {
    Box::new(SledStorage::new(dir.to_owned()))
}

fn objects(dir: &Path) -> Box<dyn Storage> {
    Box::new(ObjectStorage::new(&dir.display().to_string()).expect("a directory"))
}

/// Takes checkpoints whose changed pages come from `page`; gives the largest size of the directory,
/// in shares of the state, and checks the last state page by page.
fn soak(
    open: fn(&Path) -> Box<dyn Storage>,
    checkpoints: u64,
    mut page: impl FnMut(&mut Random) -> u64,
) -> f64 {
    let dir = tempfile::tempdir().expect("a directory");
    let storage = open(dir.path());
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
        let snapshot = TaskSnapshot { memory: Some(memory.into()), ..TaskSnapshot::default() };
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
    let share = soak(sled, 1_000, |random| random.between(0, PAGES - 1));
    assert!(share < 2.5, "{share:.2} times the state");
}

#[test]
fn pages_that_change_again_and_again_take_no_more_space() {
    let mut next = 0;
    let share = soak(sled, 300, |_| {
        next = (next + 1) % 200;
        next
    });
    assert!(share < 1.3, "{share:.2} times the state");
}

#[test]
fn objects_stay_below_two_and_a_half_times_the_state() {
    let share = soak(objects, 300, |random| random.between(0, PAGES - 1));
    assert!(share < 2.5, "{share:.2} times the state");
}

#[test]
fn process_does_not_grow_from_checkpoint_to_checkpoint() {
    let count = rounds("SOAK_CHECKPOINTS", 600);
    let dir = tempfile::tempdir().expect("a directory");
    let harness = Harness {
        count: u64::MAX >> 1,
        rate: Some(50_000),
        interval_ms: 10,
        config: "ballast = 8388608, dirty = 1, quiet = true".to_owned(),
        ..Harness::default()
    };
    let mut job = guest::start(&["run", "--json"], &harness.write(dir.path()), Stdio::piped());
    let lines = BufReader::new(job.stdout.take().expect("piped")).lines();
    let completed = lines.map_while(Result::ok).filter(|line| {
        let event: serde_json::Value = serde_json::from_str(line).expect("one object a line");
        event["event"] == "checkpoint-completed"
    });
    let mut sizes = Vec::new();
    for number in (1..=count).zip(completed).map(|(number, _)| number) {
        if number % (count / 10) == 0 {
            sizes.push(resident_bytes(job.id()));
        }
    }
    job.kill().expect("it runs");
    job.wait().expect("it has ended");
    // By the half the allocator has what it keeps for its threads.
    let (early, late) = (sizes[4], sizes[9]);
    assert!(late < early + early / 10 + (4 << 20), "resident bytes: {sizes:?}");
}

fn resident_bytes(process: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/statm")).expect("it runs");
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("a number of pages") * PAGE as u64
}

#[test]
fn state_on_disk_grows_and_the_process_does_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = Harness {
        count: u64::MAX >> 1,
        vocabulary: 5_000_000,
        parallelism: 1,
        interval_ms: 500,
        config: "quiet = true }\nlimits = { memory = \"64MiB\", call = \"20s\"".to_owned(),
        checkpointing: "\n[state.backend]\ntype = \"sled\"\n\
             sled = { cache = \"32MiB\", write-buffer = \"8MiB\", guest-cache = \"2MiB\" }"
            .to_owned(),
        ..Harness::default()
    };
    let manifest = harness.write(dir.path());
    // Every record another word, nearly.
    let text = fs::read_to_string(&manifest).expect("readable");
    let text = text.replace("vocabulary = ", "exponent = 0\nvocabulary = ");
    fs::write(&manifest, text).expect("written");
    let mut job = guest::start(&["run", "--no-progress"], &manifest, Stdio::null());
    let working = dir.path().join("probe.cofferdam/working");
    let mut sizes = Vec::new();
    for disk in [40, 80, 120].map(|mib| mib << 20) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let size = || if working.is_dir() { disk_bytes(&working) } else { 0 };
        while size() < disk && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(disk <= size(), "the state has not grown: {sizes:?}");
        sizes.push(resident_bytes(job.id()));
    }
    job.kill().expect("it runs");
    job.wait().expect("it has ended");
    assert!(sizes[2] < sizes[0] + sizes[0] / 2, "resident bytes: {sizes:?}");
    println!("resident bytes: {sizes:?}");
}
