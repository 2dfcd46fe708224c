//! What is there after a flush, for this run and for another.

use std::{collections::BTreeMap, fs, sync::Arc};

use object_store::{ObjectStore, memory::InMemory, path::Path as ObjectPath};
use proptest::prelude::*;

use super::*;
use crate::Storage;

fn over(store: &Arc<dyn ObjectStore>) -> ObjectStorage {
    ObjectStorage::over(store.clone(), ObjectPath::from("jobs/words"), None, "memory")
        .expect("made")
}

fn bytes_in(store: &Arc<dyn ObjectStore>) -> u64 {
    let listed = over(store).objects.list(ObjectPath::default());
    listed.expect("listed").iter().map(|object| object.size).sum()
}

#[test]
fn values_are_there_after_a_flush_and_for_whoever_opens_it_next() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let mut storage = over(&store);
    let mut generation = storage.open(3, 0).expect("opened");
    generation.put(b"a", b"one").expect("put");
    generation.put(b"b", &[7; 20 << 20]).expect("put");
    assert_eq!(generation.get(b"a").expect("readable").as_deref(), Some(&b"one"[..]));
    generation.flush().expect("flush");
    generation.put(b"a", b"two").expect("put");
    generation.delete(b"b").expect("delete");
    generation.put(b"c", b"").expect("put");
    generation.flush().expect("flush");
    generation.put(b"d", b"never flushed").expect("put");
    drop(generation);
    let mut again = over(&store);
    assert_eq!(again.generations().expect("listed"), [3]);
    let generation = again.open(3, 0).expect("opened");
    assert_eq!(generation.keys(b"").expect("listed"), [b"a", b"c"]);
    assert_eq!(generation.get(b"a").expect("readable").as_deref(), Some(&b"two"[..]));
    assert_eq!(generation.get(b"c").expect("readable").as_deref(), Some(&b""[..]));
    assert!(bytes_in(&store) < 1_000, "the space of what was deleted is given back");
    drop(generation);
    again.remove(3).expect("removed");
    assert_eq!((again.generations().expect("listed"), bytes_in(&store)), (Vec::new(), 0));
}

#[test]
fn second_run_at_the_same_place_fails_and_harms_nothing() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let (mut first, mut second) = (over(&store), over(&store));
    let mut one = first.open(1, 0).expect("opened");
    let mut two = second.open(1, 0).expect("opened");
    one.put(b"k", b"first").expect("put");
    one.flush().expect("flush");
    two.put(b"k", b"second").expect("put");
    let error = two.flush().expect_err("somebody else was here").to_string();
    assert!(error.contains("another run writes to the same place"), "{error}");
    two.put(b"k", b"again").expect("collected");
    assert!(two.flush().is_err(), "it stays so");
    let generation = over(&store).open(1, 0).expect("opened");
    assert_eq!(generation.get(b"k").expect("readable").as_deref(), Some(&b"first"[..]));
}

#[test]
fn removal_that_was_cut_short_is_finished_and_nothing_of_it_counts() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let mut storage = over(&store);
    for number in [1, 2] {
        let mut generation = storage.open(number, 0).expect("opened");
        generation.put(b"k", b"v").expect("put");
        generation.flush().expect("flush");
    }
    storage.objects.put(storage.folder(1).join(REMOVED)).expect("marked");
    assert_eq!(over(&store).generations().expect("listed"), [2]);
    let left = storage.objects.list(storage.folder(1)).expect("listed");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn damaged_index_is_found_and_named() {
    let dir = tempfile::tempdir().expect("dir");
    let mut storage = ObjectStorage::new(&dir.path().display().to_string()).expect("made");
    let mut generation = storage.open(1, 0).expect("opened");
    generation.put(b"key", &[1; 100]).expect("put");
    generation.flush().expect("flush");
    drop(generation);
    let path = dir.path().join("gen-00000001/segment-00000001");
    let whole = fs::read(&path).expect("there");
    for (cut, why) in [(whole.len() - 3, "does not end"), (10, "cut short")] {
        fs::write(&path, &whole[..cut]).expect("written");
        let error = storage.open(1, 0).err().expect("damaged").to_string();
        assert!(error.contains(why) && error.contains("segment-00000001"), "{error}");
    }
    for place in 100..whole.len() {
        let mut flipped = whole.clone();
        flipped[place] ^= 16;
        fs::write(&path, &flipped).expect("written");
        assert!(storage.open(1, 0).is_err(), "byte {place}");
    }
}

#[test]
fn unknown_places_are_refused() {
    let error = ObjectStorage::new("gopher://host/words").err().expect("unknown").to_string();
    assert!(error.contains("gopher:// is not known, file:// and s3:// are"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Against a map: whatever is put, deleted, flushed and opened again.
    #[test]
    fn generation_is_a_map(steps in proptest::collection::vec((0u8..5, 0u8..12, 0usize..60_000), 1..80)) {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let mut storage = over(&store);
        let mut generation = storage.open(1, 0).expect("opened");
        let mut expected = BTreeMap::<Vec<u8>, Vec<u8>>::new();
        // What was put since the last flush lies in the newest segment, deleted since or not.
        let mut newest = 0;
        for (what, key, len) in steps {
            match what {
                0..=1 => {
                    let value = vec![key ^ len as u8; len];
                    generation.put(&[key], &value).expect("put");
                    newest += len as u64;
                    expected.insert(vec![key], value);
                }
                2 => {
                    generation.delete(&[key]).expect("delete");
                    expected.remove(&[key][..]);
                }
                3 => {
                    generation.flush().expect("flush");
                    newest = 0;
                }
                _ => {
                    generation.flush().expect("flush");
                    newest = 0;
                    generation = storage.open(1, 0).expect("opened");
                }
            }
            let keys: Vec<Vec<u8>> = expected.keys().cloned().collect();
            prop_assert_eq!(generation.keys(b"").expect("listed"), keys);
        }
        generation.flush().expect("flush");
        for (key, value) in &expected {
            let found = generation.get(key).expect("readable");
            prop_assert_eq!(found.as_ref(), Some(value));
        }
        let live: u64 = expected.values().map(|value| value.len() as u64).sum();
        let stored = bytes_in(&store);
        prop_assert!(stored <= 2 * live + newest + 40_000, "{stored} bytes for {live}");
    }
}
