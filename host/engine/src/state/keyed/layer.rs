//! What was changed between two barriers: in memory, and on disk where it grows too large.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use cofferdam_store::{
    Result, StorageError,
    changes::HostChanges,
    declared::{DeclaredKey, Entries, Merge},
    table::{Table, Tables},
};
/// What an entry takes beside its bytes while its layer is in memory.
pub(super) const ENTRY_BYTES: u64 = 128;

/// In the table of a layer: the first byte of an entry that is there, and all of one that was removed.
pub(super) const PRESENT: u8 = 1;

pub(super) const REMOVED: u8 = 0;

/// What was changed between two barriers.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    pub(super) changed: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Bytes of `changed`.
    pub(super) buffered_bytes: u64,
    /// Bytes of all of it.
    pub(super) bytes: u64,
    pub(super) spilled: Option<Arc<Spilled>>,
}

/// The part of a layer that is on disk. Its space comes back with the last who reads it.
#[derive(Debug)]
pub(super) struct Spilled(pub(super) Table);

impl Drop for Spilled {
    fn drop(&mut self) {
        self.0.drop_table();
    }
}

impl HostChanges for Layer {
    fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.spilled.is_none()
    }

    fn entries(&self) -> Entries<'_> {
        self.entries_from(Bound::Unbounded)
    }
}

impl Layer {
    pub(super) fn entries_from(&self, from: Bound<Vec<u8>>) -> Entries<'_> {
        let buffered = self.changed.range::<Vec<u8>, _>((from.clone(), Bound::Unbounded));
        let buffered = buffered.map(|(key, value)| Ok((decode(key)?, value.clone())));
        let Some(spilled) = &self.spilled else { return Box::new(buffered) };
        let spilled = spilled.0.range(from).map(|entry| {
            let (key, value) = entry?;
            Ok((decode(&key)?, unspilled(&value)))
        });
        Box::new(Merge::of(vec![Box::new(spilled), Box::new(buffered)]))
    }

    pub(super) fn set(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) {
        let len = |value: &Option<Vec<u8>>| value.as_ref().map_or(0, Vec::len) as u64;
        let (added, key_bytes) = (len(&value), key.len() as u64 + ENTRY_BYTES);
        let gone = self.changed.insert(key, value).map_or(0, |before| len(&before) + key_bytes);
        let change = |bytes: &mut u64| *bytes = (*bytes + key_bytes + added).saturating_sub(gone);
        change(&mut self.buffered_bytes);
        change(&mut self.bytes);
    }

    /// Moves what is buffered to disk.
    pub(super) fn spill(&mut self, tables: &Tables) -> Result<()> {
        let table = match &self.spilled {
            Some(table) => table.clone(),
            None => self.spilled.insert(Arc::new(Spilled(tables.table()?))).clone(),
        };
        for (key, value) in &self.changed {
            let replaced = match value {
                Some(value) => table.0.insert(key, &[&[PRESENT], value.as_slice()].concat())?,
                None => table.0.insert(key, &[REMOVED])?,
            };
            // It was counted when it was written, and so was what it replaces.
            if let Some(before) = replaced {
                let entry_bytes = before as u64 - 1 + key.len() as u64 + ENTRY_BYTES;
                self.bytes = self.bytes.saturating_sub(entry_bytes);
            }
        }
        self.changed.clear();
        self.buffered_bytes = 0;
        Ok(())
    }
}

pub(super) fn unspilled(value: &[u8]) -> Option<Vec<u8>> {
    value.split_first().filter(|(tag, _)| **tag == PRESENT).map(|(_, value)| value.to_vec())
}

/// Bytes that sort as the key does.
pub(super) fn encode(key: &DeclaredKey) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + key.key.len());
    bytes.extend_from_slice(&key.key_group.to_be_bytes());
    bytes.extend_from_slice(&key.state.to_be_bytes());
    bytes.extend_from_slice(&key.namespace.to_be_bytes());
    bytes.extend_from_slice(&key.key);
    bytes
}

pub(super) fn decode(bytes: &[u8]) -> Result<DeclaredKey> {
    let parts = bytes.split_first_chunk::<4>();
    let parts = parts.and_then(|(group, rest)| Some((group, rest.split_first_chunk::<4>()?)));
    let parts = parts
        .and_then(|(group, (state, rest))| Some((group, state, rest.split_first_chunk::<4>()?)));
    let Some((group, state, (namespace, key))) = parts else {
        return Err(StorageError::damaged("a table of state", "a key is cut short"));
    };
    let (key_group, state) = (u32::from_be_bytes(*group), u32::from_be_bytes(*state));
    Ok(DeclaredKey {
        key_group,
        state,
        namespace: u32::from_be_bytes(*namespace),
        key: key.to_vec(),
    })
}
