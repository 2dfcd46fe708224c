//! What becomes of values, whatever happens to the files.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

use super::{
    PACK,
    generation::{PACKED_BYTES_MIN, SledGeneration},
    pack_file::{Extents, Pack, PackExtent, read_extent},
    read::copy_dir,
    *,
};
use crate::{Generation, Result, Storage, StorageError, log::Entries};

fn open(dir: &Path) -> Box<dyn Generation> {
    SledStorage::new(dir.to_owned()).open(1, 0).expect("opens")
}

#[test]
fn small_and_large_values_survive_reopening() {
    let dir = tempfile::tempdir().expect("dir");
    let large = |byte: u8| vec![byte; PACKED_BYTES_MIN];
    let mut generation = open(dir.path());
    generation.put(b"small", b"1").expect("put");
    generation.put(b"a", &large(1)).expect("put");
    generation.put(b"b", &large(2)).expect("put");
    generation.put(b"a", &large(3)).expect("put again");
    generation.flush().expect("flush");
    drop(generation);
    let mut generation = open(dir.path());
    generation.put(b"c", &large(4)).expect("put");
    let get = |key: &[u8]| generation.get(key).expect("readable");
    assert_eq!(get(b"small"), Some(b"1".to_vec()));
    assert_eq!(get(b"a"), Some(large(3)));
    assert_eq!(get(b"b"), Some(large(2)));
    assert_eq!(get(b"c"), Some(large(4)));
    assert_eq!(get(b"d"), None);
    generation.delete(b"a").expect("delete");
    assert_eq!(generation.get(b"a").expect("readable"), None);
    assert_eq!(generation.keys(b"").expect("list"), [&b"b"[..], b"c", b"small"]);
}

#[test]
fn space_of_deleted_values_is_given_back_after_the_flush() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().expect("dir");
    let mut generation = open(dir.path());
    let pack = dir.path().join("gen-00000001").join(PACK);
    let blocks = || fs::metadata(&pack).expect("there").blocks() * 512;
    for n in 0..12u8 {
        generation.put(&[n], &[n; 1 << 20]).expect("put");
    }
    generation.flush().expect("flush");
    let full = blocks();
    (1..12u8).for_each(|n| generation.delete(&[n]).expect("delete"));
    assert_eq!(blocks(), full, "a crash may still ask for it");
    generation.flush().expect("flush");
    assert!(blocks() + (7 << 20) <= full, "{full} bytes before, {} after", blocks());
    assert_eq!(generation.get(&[0]).expect("readable"), Some(vec![0; 1 << 20]));
}

#[test]
fn a_value_takes_the_place_of_one_that_is_gone_durably_and_of_no_other() {
    let dir = tempfile::tempdir().expect("dir");
    let mut generation = open(dir.path());
    let pack = dir.path().join("gen-00000001").join(PACK);
    let len = || fs::metadata(&pack).expect("there").len();
    let value = |n: u8, len: usize| vec![n; len - usize::from(n)];
    for n in 0..50u8 {
        generation.put(b"a", &value(n, 200_000)).expect("put");
        generation.put(&[n], &value(n, 3_000)).expect("put");
        generation.put(b"b", &value(n, 100_000)).expect("put");
        if n % 2 == 0 {
            // What is not flushed is there, and what it replaces is not given away.
            let durable = SledStorage::new(dir.path().to_owned()).read(1, 0).expect("reads");
            if let Some(a) = durable.get(b"a").expect("readable") {
                assert_eq!(a, value(n - 1, 200_000));
            }
            generation.flush().expect("flush");
            generation.put(b"a", &value(n + 1, 200_000)).expect("put again");
        }
        generation.flush().expect("flush");
        let kept = if n % 2 == 0 { n + 1 } else { n };
        assert_eq!(generation.get(b"a").expect("readable"), Some(value(kept, 200_000)));
        assert_eq!(generation.get(b"b").expect("readable"), Some(value(n, 100_000)));
    }
    assert!(len() < 50 * 4_096 + 1_200_000, "{} bytes", len());
    drop(generation);
    let mut generation = open(dir.path());
    generation.put(b"c", &value(7, 200_000)).expect("put");
    for n in 0..50u8 {
        assert_eq!(generation.get(&[n]).expect("readable"), Some(value(n, 3_000)));
    }
    assert_eq!(generation.get(b"a").expect("readable"), Some(value(49, 200_000)));
}

#[test]
fn blocks_are_given_away_once_and_come_together_again() {
    let mut random = cofferdam_core::random::Random::new(3);
    let mut extents = Extents::default();
    extents.insert(0, 1000);
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for _ in 0..5_000 {
        if random.one_in(2) {
            let count = random.between(1, 40);
            if let Some(first) = extents.take(count) {
                assert!(first + count <= 1000);
                assert!(taken.iter().all(|(at, n)| at + n <= first || first + count <= *at));
                taken.push((first, count));
            }
        } else if !taken.is_empty() {
            let index = random.between(0, taken.len() as u64 - 1) as usize;
            let (first, count) = taken.swap_remove(index);
            extents.insert(first, count);
        }
        let used: u64 = taken.iter().map(|(_, count)| count).sum();
        assert_eq!(extents.blocks + used, 1000);
    }
    taken.into_iter().for_each(|(first, count)| extents.insert(first, count));
    assert_eq!(extents.by_first, BTreeMap::from([(0, 1000)]));
}

#[test]
fn values_that_share_a_block_do_not_lose_it_with_one_of_them() {
    let dir = tempfile::tempdir().expect("dir");
    let file = dir.path().join("pack");
    // As format 5 wrote them: the second begins in the last block of the first.
    let extents = [
        PackExtent { offset: 0, len: 10_000 },
        PackExtent { offset: 10_000, len: 3_000 },
        PackExtent { offset: 16_384, len: 8_192 },
    ];
    for gone in extents {
        fs::write(&file, vec![7; 24_576]).expect("written");
        let entries = extents.iter().enumerate();
        let entries =
            entries.map(|(n, extent)| (vec![n as u8], extent.encode().to_vec())).collect();
        let mut pack = Pack::open(&file, &entries).expect("opens");
        pack.give_back(gone);
        for len in [1_000, 5_000, 5_000, 10_000] {
            pack.append(&vec![1; len]).expect("written");
        }
        for extent in extents.iter().filter(|extent| **extent != gone) {
            let value = read_extent(&pack.file, pack.len, *extent).expect("read").expect("there");
            assert!(value.iter().all(|byte| *byte == 7), "{extent:?} without {gone:?}");
        }
    }
}

#[test]
fn a_file_that_is_opened_again_is_no_larger_than_what_is_in_it() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().expect("dir");
    let pack = dir.path().join("gen-00000001").join(PACK);
    for n in 0..20u8 {
        let mut generation = open(dir.path());
        for part in 0..10u8 {
            generation.put(&[part], &vec![n; 300_000 - 3_000 * usize::from(n)]).expect("put");
        }
        generation.flush().expect("flush");
        // Never flushed, as after an error.
        generation.put(b"lost", &[1; 1 << 20]).expect("put");
    }
    let generation = open(dir.path());
    let metadata = fs::metadata(&pack).expect("there");
    assert!(metadata.blocks() * 512 < 4 << 20, "{} bytes", metadata.blocks() * 512);
    assert!(metadata.len() < 8 << 20, "{} bytes", metadata.len());
    assert_eq!(generation.get(&[3]).expect("readable").map(|it| it[0]), Some(19));
}

#[test]
fn value_whose_bytes_are_gone_is_not_there() {
    let dir = tempfile::tempdir().expect("dir");
    let mut generation = open(dir.path());
    generation.put(b"a", &[7; 5000]).expect("put");
    generation.flush().expect("flush");
    drop(generation);
    let pack = dir.path().join("gen-00000001").join(PACK);
    File::options().write(true).open(pack).expect("there").set_len(4999).expect("shorter");
    assert_eq!(open(dir.path()).get(b"a").expect("readable"), None);
}

/// Everything that is kept, by key.
fn all(generation: &dyn Generation) -> Entries {
    let keys = generation.keys(b"").expect("listed");
    let get = |key: &Vec<u8>| generation.get(key).expect("readable").expect("there");
    keys.iter().map(|key| (key.clone(), get(key))).collect()
}

fn filled(dir: &Path) -> (Entries, u64) {
    let mut generation = open(dir);
    for n in 0..60u16 {
        let len = if n % 7 == 0 { 3_000 } else { usize::from(n) };
        generation.put(&n.to_be_bytes(), &vec![n as u8; len]).expect("put");
        if n % 5 == 4 {
            generation.delete(&(n - 3).to_be_bytes()).expect("deleted");
            generation.flush().expect("flush");
        }
    }
    (all(&*generation), generation.end())
}

/// One flipped bit in its file made sled forget everything behind it, without an error.
#[test]
fn whatever_happens_to_one_of_log_and_index_nothing_is_lost() {
    let kept = tempfile::tempdir().expect("dir");
    let (entries, end) = filled(kept.path());
    let generation = PathBuf::from("gen-00000001");
    for file in ["log", "index/db", "index/conf"] {
        let whole = fs::read(kept.path().join(&generation).join(file)).expect("there");
        let step = (whole.len() / 23).max(1);
        let spoilt = (0..whole.len()).step_by(step).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            bytes
        });
        let cut = (0..whole.len()).step_by(step * 3).map(|at| whole[..at].to_vec());
        for bytes in spoilt.chain(cut) {
            let dir = tempfile::tempdir().expect("dir");
            copy_dir(&kept.path().join(&generation), &dir.path().join(&generation))
                .expect("copied");
            fs::write(dir.path().join(&generation).join(file), &bytes).expect("spoilt");
            let storage = SledStorage::new(dir.path().to_owned());
            let looked_at = storage.read(1, end).expect("read");
            assert!(all(&*looked_at) == entries, "{file}, looked at");
            assert_eq!(!looked_at.flaws().is_empty(), file == "log", "what counts is damaged");
            let is_as_before = fs::read(dir.path().join(&generation).join(file));
            assert!(is_as_before.expect("there") == bytes, "looking changes nothing");
            let mut storage = storage;
            let opened = storage.open(1, end).expect("opens");
            assert!(all(&*opened) == entries, "{file}");
        }
    }
}

#[test]
fn what_was_not_flushed_before_an_error_is_undone() {
    let dir = tempfile::tempdir().expect("dir");
    let (entries, _) = filled(dir.path());
    let mut generation = SledGeneration::open(dir.path().join("gen-00000001"), 0).expect("opens");
    generation.put(b"later", &[1; 5_000]).expect("put");
    generation.delete(&9u16.to_be_bytes()).expect("deleted");
    let failed: Result<()> = generation.with(|_| Err(StorageError::store("write", "EIO")));
    assert!(failed.is_err());
    generation.reopen().expect("opened again");
    assert!(all(&generation) == entries);
    generation.put(b"again", &[2; 5_000]).expect("put");
    generation.flush().expect("flush");
    drop(generation);
    assert_eq!(open(dir.path()).get(b"again").expect("readable"), Some(vec![2; 5_000]));
}
