//! Entries of declared state as the columns that cross to the host.

use crate::{bindings::cofferdam::operator::types::StateChanges, key::StateKey};

/// The host guarantees that ends ascend and lie within their column.
#[inline]
pub(crate) fn column(bytes: &[u8], start: u32, end: u32) -> &[u8] {
    &bytes[start as usize..end as usize]
}

pub(crate) fn empty_changes() -> StateChanges {
    StateChanges {
        states: Vec::new(),
        keys: Vec::new(),
        key_ends: Vec::new(),
        namespaces: Vec::new(),
        values: Vec::new(),
        value_ends: Vec::new(),
        removed: Vec::new(),
    }
}

/// State, key and value of each change; no value where the entry was removed.
pub(crate) fn entries(
    changes: &StateChanges,
) -> impl Iterator<Item = (u32, StateKey<'_>, Option<&[u8]>)> {
    let mut start = (0, 0);
    changes.states.iter().enumerate().map(move |(place, &state)| {
        let (key_end, value_end) = (changes.key_ends[place], changes.value_ends[place]);
        let namespace = changes.namespaces.get(place).copied().unwrap_or(0);
        let middle = key_end.saturating_sub(namespace).max(start.0);
        let key = StateKey::new(column(&changes.keys, start.0, middle));
        let key = key.with(column(&changes.keys, middle, key_end));
        let value = column(&changes.values, start.1, value_end);
        start = (key_end, value_end);
        (state, key, (!changes.removed[place]).then_some(value))
    })
}
