//! The state of a connector, which may be whole epochs.

use cofferdam_connector::state::ConnectorState;

use super::*;
use crate::{key::KIND_STATE, pack::STATE_PACK_BYTES};

/// A state of this size, in chunks of many sizes.
fn state(len: usize) -> (ConnectorState, Vec<u8>) {
    let bytes: Vec<u8> = (0..len).map(|at| (at * at % 251) as u8).collect();
    let (mut state, mut rest, mut size) = (ConnectorState::default(), &bytes[..], 1);
    while !rest.is_empty() {
        let (chunk, behind) = rest.split_at(rest.len().min(size));
        state.push(chunk.to_vec());
        (rest, size) = (behind, size * 3);
    }
    assert_eq!((state.len(), state.to_vec()), (len, bytes.clone()));
    (state, bytes)
}

#[test]
fn a_large_state_is_written_in_packs_and_read_back_whole() {
    for is_compressing in [false, true] {
        let sizes = [0, 1, STATE_PACK_BYTES - 1, STATE_PACK_BYTES, STATE_PACK_BYTES + 1, 3 << 20];
        for (id, len) in (1..).zip(sizes) {
            let mut store = open();
            store.compress(is_compressing);
            let (state, bytes) = state(len);
            let snapshot = TaskSnapshot { state, ..TaskSnapshot::default() };
            store.write(vec![(0, id, Arc::new(snapshot))]).expect("written");
            store.complete(id, 0).expect("complete");
            let packs = store.current.generation.keys(&snapshot_prefix(id)).expect("listed");
            let expected = if len < STATE_PACK_BYTES { 0 } else { len.div_ceil(STATE_PACK_BYTES) };
            assert_eq!(packs.len(), 1 + expected, "{len} bytes: a header and packs");
            assert!(store.load(0, id).expect("whole").state == bytes, "{len} bytes");
            assert_eq!(store.inspect(id).expect("whole")[0].state_bytes, len as u64);
            store.compact(id).expect("compacts");
            assert!(store.load(0, id).expect("whole").state == bytes, "{len} bytes, compacted");
        }
    }
}

#[test]
fn a_state_with_a_pack_too_few_is_damage() {
    let mut store = open();
    let snapshot = TaskSnapshot { state: state(1 << 20).0, ..TaskSnapshot::default() };
    store.write(vec![(0, 1, Arc::new(snapshot))]).expect("written");
    store.complete(1, 0).expect("complete");
    store.current.generation.delete(&value_key(1, 0, KIND_STATE, 2)).expect("deleted");
    let error = store.load(0, 1).expect_err("damaged").to_string();
    assert!(error.ends_with("is damaged: a part of it is not there"), "{error}");
}
