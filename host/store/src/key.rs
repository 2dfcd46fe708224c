//! The keys of a generation.

/// The kinds of a snapshot's values, in the order of their keys.
pub(crate) const KIND_HEADER: u8 = 0;

pub(crate) const KIND_MEMORY: u8 = 1;

pub(crate) const KIND_DECLARED: u8 = 2;

pub(crate) const KIND_IN_FLIGHT: u8 = 3;

pub(crate) const KIND_STATE: u8 = 4;

/// How the folder of a generation begins; its number follows.
pub(crate) const GENERATION: &str = "gen-";

/// How the object of a segment begins; its number follows.
pub(crate) const SEGMENT: &str = "segment-";

pub(crate) fn snapshot_prefix(checkpoint: u64) -> Vec<u8> {
    let mut key = vec![b's'];
    key.extend_from_slice(&checkpoint.to_be_bytes());
    key
}

pub(crate) fn value_key(checkpoint: u64, task: usize, kind: u8, sequence: u32) -> Vec<u8> {
    let mut key = snapshot_prefix(checkpoint);
    key.extend_from_slice(&(task as u32).to_be_bytes());
    key.push(kind);
    key.extend_from_slice(&sequence.to_be_bytes());
    key
}

/// The task and the snapshot that the key of a value names.
pub(crate) fn key_parts(key: &[u8]) -> Option<(usize, u64)> {
    let (checkpoint, rest) = key.get(1..)?.split_first_chunk::<8>()?;
    let task = rest.first_chunk::<4>()?;
    Some((u32::from_be_bytes(*task) as usize, u64::from_be_bytes(*checkpoint)))
}

pub(crate) fn component_key(digest: &[u8; 16]) -> Vec<u8> {
    let mut key = vec![b'c'];
    key.extend_from_slice(digest);
    key
}

pub(crate) fn metadata_key(checkpoint: u64) -> Vec<u8> {
    let mut key = vec![b'm'];
    key.extend_from_slice(&checkpoint.to_be_bytes());
    key
}
