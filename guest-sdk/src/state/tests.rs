//! What a state keeps, hands over and takes back.

use std::collections::BTreeMap;

use super::*;
use crate::{
    key::OwnedStateKey,
    state::{PIECE_BYTES, encoding},
};

fn handed_over(state: &mut ValueState<u32>, is_full: bool) -> Vec<(Vec<u8>, Option<u32>)> {
    let mut all = Vec::new();
    state.begin_hand_over(is_full);
    loop {
        let mut columns = empty_changes();
        let is_last = state.hand_over(&mut Changes { state: 0, columns: &mut columns });
        all.extend(entries(&columns).map(|(_, key, value)| {
            let value = value.map(|bytes| postcard::from_bytes(bytes).expect("a u32"));
            (key.key.to_vec(), value)
        }));
        if is_last {
            return all;
        }
    }
}

#[test]
fn only_changes_are_handed_over_and_each_once() {
    let mut state = ValueState::default();
    state.set(b"a".as_slice(), 1u32);
    *state.get_or_default(b"b".as_slice()) += 2;
    *state.get_or_default(b"b".as_slice()) += 2;
    assert_eq!(
        handed_over(&mut state, false),
        [(b"a".to_vec(), Some(1)), (b"b".to_vec(), Some(4))]
    );
    assert_eq!(handed_over(&mut state, false), []);
    assert_eq!(state.remove(b"a".as_slice()), Some(1));
    assert_eq!(state.get(b"a".as_slice()), None);
    assert_eq!(handed_over(&mut state, false), [(b"a".to_vec(), None)]);
    assert_eq!(handed_over(&mut state, true), [(b"b".to_vec(), Some(4))]);
}

#[test]
fn a_key_may_come_back_before_and_after_its_removal_was_handed_over() {
    let mut state = ValueState::default();
    state.set(b"a".as_slice(), 1u32);
    state.remove(b"a".as_slice());
    state.set(b"a".as_slice(), 2);
    assert_eq!(handed_over(&mut state, false), [(b"a".to_vec(), Some(2))]);
    state.remove(b"a".as_slice());
    assert_eq!(handed_over(&mut state, false), [(b"a".to_vec(), None)]);
    state.set(b"other".as_slice(), 3);
    state.set(b"a".as_slice(), 4);
    assert_eq!(state.entries.len(), 2, "the freed entry is used again");
    assert_eq!(all(&mut state).len(), 2);
    assert_eq!(state.get(b"a".as_slice()), Some(&4));
}

#[test]
fn keys_of_every_length_are_told_apart() {
    let keys: Vec<Vec<u8>> = (0..40usize)
        .flat_map(|len| {
            (0..len.max(1)).map(move |at| (0..len).map(|place| u8::from(place == at)).collect())
        })
        .collect();
    for left in &keys {
        for right in &keys {
            assert_eq!(is_same(left, right), left == right, "{left:?} {right:?}");
            if left == right {
                assert_eq!(hash(left), hash(right));
            }
        }
    }
    let hashes: std::collections::BTreeSet<u64> = keys.iter().map(|key| hash(key)).collect();
    assert!(keys.len() * 9 / 10 < hashes.len(), "{} of {}", hashes.len(), keys.len());
}

fn all(state: &mut ValueState<u32>) -> BTreeMap<Vec<u8>, u32> {
    let mut all = BTreeMap::new();
    state.for_each(|key, value| {
        assert_eq!(all.insert(key.key.to_vec(), *value), None, "each key comes once");
    });
    all
}

/// Random changes equal a plain map, and what is handed over adds up to it. With a cache, the host
/// has what was handed over, as it does in a job.
fn random_changes(cache_bytes: Option<usize>) -> ValueState<u32> {
    let mut state = ValueState::<u32>::default();
    if let Some(bytes) = cache_bytes {
        state.move_to_host(0, bytes);
    }
    let (mut model, mut replica) = (BTreeMap::new(), BTreeMap::new());
    let mut seed = 1u64;
    for round in 0..20_000u32 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let key = format!("key-{}{}", (seed >> 33) % 300, "x".repeat((seed >> 60) as usize * 3));
        let key = key.as_bytes();
        match (seed >> 20) % 8 {
            0 | 1 => assert_eq!(state.remove(key), model.remove(key)),
            2 => {
                state.set(key, round);
                model.insert(key.to_vec(), round);
            }
            3 => assert_eq!(state.get(key), model.get(key)),
            4 => {
                let value = state.get_mut(key).map(|value| {
                    *value += 1;
                    *value
                });
                let expected = model.get_mut(key).map(|value| {
                    *value += 1;
                    *value
                });
                assert_eq!(value, expected);
            }
            _ => {
                *state.get_or_default(key) += 1;
                *model.entry(key.to_vec()).or_default() += 1;
            }
        }
        if round % 500 == 0 {
            for (key, value) in handed_over(&mut state, false) {
                if cache_bytes.is_some() {
                    let mut columns = empty_changes();
                    let mut changes = Changes { state: 0, columns: &mut columns };
                    changes.push(StateKey::new(&key), value.as_ref());
                    host::put_state(&columns);
                }
                match value {
                    Some(value) => replica.insert(key, value),
                    None => replica.remove(&key),
                };
            }
            if cache_bytes.is_none() {
                assert_eq!(replica, model);
            }
            assert_eq!(all(&mut state), model);
        }
    }
    assert_eq!(all(&mut state), model);
    state
}

#[test]
fn thousands_of_random_changes_equal_a_plain_map() {
    random_changes(None);
}

#[test]
fn a_state_that_the_host_keeps_equals_a_plain_map_and_stays_within_its_cache() {
    for bytes_max in [200, 2_000, 10_000, 1 << 20] {
        host::clear_state();
        let state = random_changes(Some(bytes_max));
        let cache = state.cache.as_ref().expect("a cache");
        let held = state.entries.iter().filter(|entry| !entry.is_free);
        let bytes: usize = held.map(|entry| entry.bytes as usize).sum();
        assert_eq!(bytes, cache.bytes);
        // One entry more than it has room for: that which is in use.
        assert!(bytes <= bytes_max + 200, "{bytes} of {bytes_max}");
        assert!(state.changed.is_empty(), "a list of changes would grow without end");
    }
}

#[test]
fn values_that_grow_stay_within_the_cache() {
    for way in 0..3 {
        host::clear_state();
        let mut state = ValueState::<Vec<u8>>::default();
        state.move_to_host(0, 50_000);
        for round in 0..2_000u32 {
            let key = (round % 40).to_le_bytes();
            match way {
                0 => state.set(key.as_slice(), vec![1; round as usize * 10]),
                1 => state.get_or_default(key.as_slice()).extend([1; 200]),
                _ => match state.get_mut(key.as_slice()) {
                    Some(value) => value.extend([1; 200]),
                    None => state.set(key.as_slice(), vec![1; 200]),
                },
            }
            let held: usize = state.entries.iter().flat_map(|e| &e.value).map(Vec::len).sum();
            // But for the one in use.
            assert!(held <= 50_000 + 20_000, "way {way}, round {round}: {held} bytes");
        }
        let mut bytes = 0;
        state.for_each(|_, value| bytes += value.len());
        let expected = [(1_960..2_000).sum::<usize>() * 10, 2_000 * 200, 2_000 * 200];
        assert_eq!(bytes, expected[way]);
    }
}

#[test]
fn what_a_cache_hands_over_is_written_behind_and_not_in_one_answer() {
    host::clear_state();
    let mut state = ValueState::<Vec<u8>>::default();
    state.move_to_host(0, 1 << 20);
    for number in 0..90u8 {
        state.set([number].as_slice(), vec![number; 10_000]);
    }
    state.remove([5].as_slice());
    let is_changed = |state: &ValueState<Vec<u8>>| state.entries.iter().any(|it| it.is_changed);
    assert!(is_changed(&state));
    let mut columns = empty_changes();
    state.begin_hand_over(false);
    assert!(state.hand_over(&mut Changes { state: 0, columns: &mut columns }));
    assert!(columns.states.is_empty());
    assert!(!is_changed(&state));
    let kept = host::state(0, &[7], 0).expect("written behind");
    assert_eq!(decoded::<Vec<u8>>(&kept), [7; 10_000]);
    assert_eq!(host::state(0, &[5], 0), None);
    let held = state.entries.iter().filter(|entry| !entry.is_free);
    assert_eq!(held.count(), 89, "what was removed takes no room");
}

#[test]
fn a_value_that_cannot_be_encoded_is_named() {
    #[derive(serde::Deserialize)]
    struct Picky(u32);
    impl Serialize for Picky {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            assert_ne!(self.0, 7, "seven is not for writing down");
            serializer.serialize_u32(self.0)
        }
    }
    let mut state = ValueState::<Picky>::default();
    state.set(b"six".as_slice(), Picky(6));
    state.set(b"seven".as_slice(), Picky(7));
    state.begin_hand_over(true);
    encoding::of_state(Some("counts"));
    let mut columns = empty_changes();
    let mut changes = Changes { state: 0, columns: &mut columns };
    let handed_over = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        state.hand_over(&mut changes);
    }));
    handed_over.expect_err("it panics");
    let words = encoding::words().expect("it was encoding");
    assert_eq!(words, "the value of state \"counts\" under the key `seven`");
}

#[test]
fn a_large_hand_over_comes_in_pieces() {
    let mut state = ValueState::<Vec<u8>>::default();
    for number in 0..100u32 {
        state.set(number.to_le_bytes().as_slice(), vec![7; 100_000]);
    }
    for is_full in [false, true] {
        let (mut pieces, mut count) = (0, 0);
        state.begin_hand_over(is_full);
        loop {
            let mut columns = empty_changes();
            let is_last = state.hand_over(&mut Changes { state: 0, columns: &mut columns });
            assert!(columns.values.len() <= PIECE_BYTES + 100_000, "{}", columns.values.len());
            (pieces, count) = (pieces + 1, count + columns.states.len());
            if is_last {
                break;
            }
        }
        assert_eq!((pieces, count), (10, 100));
    }
}

/// A guest without live state ran out of memory: removed keys were kept for a hand-over that never
/// came.
#[test]
fn what_is_removed_makes_room_at_once_where_changes_are_not_tracked() {
    let mut state = ValueState::<u32>::default();
    state.track(false);
    for number in 0..10_000u32 {
        let key = number.to_le_bytes();
        state.set(key.as_slice(), number);
        assert_eq!(state.remove(key.as_slice()), Some(number));
    }
    assert_eq!(state.entries.len(), 1);
    assert!(state.changed.is_empty());
    state.set([1].as_slice(), 1);
    assert_eq!(handed_over(&mut state, false), [(vec![1], Some(1))], "all there is");
}

#[test]
fn a_namespace_is_no_part_of_the_key_and_goes_with_it() {
    let mut state = ValueState::<u32>::default();
    let (short, long) = (StateKey::new(b"a"), StateKey::new(b"ab"));
    state.set(&short.with(b"bc"), 1);
    state.set(&long.with(b"c"), 2);
    state.set(&StateKey::new(b"abc"), 3);
    assert_eq!(state.get(&short.with(b"bc")), Some(&1));
    assert_eq!(state.get(&long.with(b"c")), Some(&2));
    assert_eq!(state.get(&StateKey::new(b"abc")), Some(&3));
    assert_eq!(state.get(&long), None);
    let mut columns = empty_changes();
    state.begin_hand_over(true);
    assert!(state.hand_over(&mut Changes { state: 0, columns: &mut columns }));
    let handed: Vec<_> = entries(&columns).map(|(_, key, _)| key.to_owned()).collect();
    let of = |key: &OwnedStateKey| (key.key_bytes().to_vec(), key.namespace_bytes().to_vec());
    let expected = [("a", "bc"), ("ab", "c"), ("abc", "")];
    let expected = expected.map(|(key, ns)| (key.as_bytes().to_vec(), ns.as_bytes().to_vec()));
    assert_eq!(handed.iter().map(of).collect::<Vec<_>>(), expected);
}
