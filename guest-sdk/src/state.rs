//! Declared state: what an operator keeps by key, at the speed of its own memory, and hands over
//! to the host as changes since the last checkpoint.

use serde::{Serialize, de::DeserializeOwned};
use smallvec::SmallVec;

use crate::{
    bindings::cofferdam::operator::types::{StateChanges, StateKind},
    index::Index,
    short::{append, hash, is_same},
};

/// Something that has a key in bytes: a [`Record`](crate::Record), or the bytes themselves.
pub trait Keyed {
    /// The key.
    fn key_bytes(&self) -> &[u8];
}

impl Keyed for [u8] {
    fn key_bytes(&self) -> &[u8] {
        self
    }
}

/// The declared states of an operator, found by the `#[operator]` attribute.
pub trait DeclaredState {
    /// Every field marked `#[state]`, by name, in the order of the struct.
    fn states(&mut self) -> Vec<(&'static str, &mut dyn StateField)>;
}

/// A field that can be marked `#[state]`.
pub trait StateField {
    /// Its shape.
    fn kind(&self) -> StateKind;
    /// The type of its values.
    fn schema(&self) -> &'static str;
    /// Hands over what changed since the last time, or everything.
    fn hand_over(&mut self, is_full: bool, changes: &mut Changes<'_>);
    /// Takes one entry back; `None` removes it.
    ///
    /// # Errors
    /// Where the bytes are not a value of this state.
    fn take_back(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), String>;
}

/// One value for each key.
///
/// Lives in the guest's memory as a dense list of entries with an index over them; what changes is
/// noted, so that a checkpoint costs in proportion to the changes. Keys up to 16 bytes need no
/// allocation of their own.
#[derive(Debug)]
pub struct ValueState<V> {
    entries: Vec<Entry<V>>,
    /// Places in `entries`, by the hash of the key.
    index: Index,
    /// Places of entries that changed since the last hand-over.
    changed: Vec<u32>,
    /// Places of entries that were removed and handed over: free for another key.
    free: Vec<u32>,
}

#[derive(Debug)]
struct Entry<V> {
    key: SmallVec<[u8; 16]>,
    /// `None`: removed, or free.
    value: Option<V>,
    is_changed: bool,
    /// Its place is in no index, and waits for another key.
    is_free: bool,
}

impl<V> Default for ValueState<V> {
    fn default() -> Self {
        Self { entries: Vec::new(), index: Index::default(), changed: Vec::new(), free: Vec::new() }
    }
}

impl<V> ValueState<V> {
    /// The value of a key.
    #[must_use]
    #[inline]
    pub fn get(&self, key: &(impl Keyed + ?Sized)) -> Option<&V> {
        let place = self.find(key.key_bytes())?;
        self.entries[place as usize].value.as_ref()
    }

    /// The value of a key, to change it. Counts as changed even if it is not.
    #[inline]
    pub fn get_mut(&mut self, key: &(impl Keyed + ?Sized)) -> Option<&mut V> {
        let place = self.find(key.key_bytes())?;
        self.entries[place as usize].value.as_ref()?;
        self.note_change(place).value.as_mut()
    }

    /// The value of a key, to change it; inserts the default where there is none.
    #[inline]
    pub fn get_or_default(&mut self, key: &(impl Keyed + ?Sized)) -> &mut V
    where
        V: Default,
    {
        let place = self.find_or_insert(key.key_bytes());
        self.note_change(place).value.get_or_insert_with(V::default)
    }

    /// Sets the value of a key.
    pub fn set(&mut self, key: &(impl Keyed + ?Sized), value: V) {
        let place = self.find_or_insert(key.key_bytes());
        self.note_change(place).value = Some(value);
    }

    /// Removes a key; gives the value it had.
    pub fn remove(&mut self, key: &(impl Keyed + ?Sized)) -> Option<V> {
        let place = self.find(key.key_bytes())?;
        self.entries[place as usize].value.as_ref()?;
        self.note_change(place).value.take()
    }

    /// Every key with its value, in the order in which keys came first.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &V)> {
        self.entries.iter().filter_map(|entry| Some((entry.key.as_slice(), entry.value.as_ref()?)))
    }

    #[inline]
    fn find(&self, key: &[u8]) -> Option<u32> {
        self.index.find(hash(key), |place| is_same(&self.entries[place as usize].key, key))
    }

    #[inline]
    fn find_or_insert(&mut self, key: &[u8]) -> u32 {
        match self.find(key) {
            Some(place) => place,
            None => self.insert(key),
        }
    }

    #[cold]
    fn insert(&mut self, key: &[u8]) -> u32 {
        let entry = Entry {
            key: SmallVec::from_slice(key),
            value: None,
            is_changed: false,
            is_free: false,
        };
        let place = match self.free.pop() {
            Some(place) => {
                self.entries[place as usize] = entry;
                place
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        let entries = &self.entries;
        self.index.insert(hash(key), place, |place| hash(&entries[place as usize].key));
        place
    }

    #[inline]
    fn note_change(&mut self, place: u32) -> &mut Entry<V> {
        let entry = &mut self.entries[place as usize];
        if !entry.is_changed {
            entry.is_changed = true;
            self.changed.push(place);
        }
        entry
    }

    /// After a hand-over: nothing has changed, and what was removed makes room.
    fn settle(&mut self) {
        let mut changed = std::mem::take(&mut self.changed);
        for place in changed.drain(..) {
            let entry = &mut self.entries[place as usize];
            entry.is_changed = false;
            if entry.value.is_none() && !entry.is_free {
                let entries = &self.entries;
                let hash_of = |place: u32| hash(&entries[place as usize].key);
                self.index.remove(hash_of(place), place, hash_of);
                let entry = &mut self.entries[place as usize];
                entry.key = SmallVec::new();
                entry.is_free = true;
                self.free.push(place);
            }
        }
        self.changed = changed;
    }
}

impl<V: Serialize + DeserializeOwned> StateField for ValueState<V> {
    fn kind(&self) -> StateKind {
        StateKind::Value
    }

    fn schema(&self) -> &'static str {
        std::any::type_name::<V>()
    }

    fn hand_over(&mut self, is_full: bool, changes: &mut Changes<'_>) {
        if is_full {
            for (key, value) in self.iter() {
                changes.push(key, Some(value));
            }
        } else {
            for place in &self.changed {
                let entry = &self.entries[*place as usize];
                changes.push(&entry.key, entry.value.as_ref());
            }
        }
        self.settle();
    }

    fn take_back(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), String> {
        let place = self.find_or_insert(key);
        let value = value.map(postcard::from_bytes).transpose().map_err(|error| {
            format!("not the postcard encoding of {}: {error}", std::any::type_name::<V>())
        })?;
        self.entries[place as usize].value = value;
        Ok(())
    }
}

/// Where changes are written during a hand-over.
pub struct Changes<'a> {
    pub(crate) state: u32,
    pub(crate) columns: &'a mut StateChanges,
}

impl Changes<'_> {
    fn push<V: Serialize>(&mut self, key: &[u8], value: Option<&V>) {
        let columns = &mut *self.columns;
        columns.states.push(self.state);
        append(&mut columns.keys, key);
        columns.key_ends.push(columns.keys.len() as u32);
        if let Some(value) = value {
            crate::Encode::encode(value, &mut columns.values);
        }
        columns.value_ends.push(columns.values.len() as u32);
        columns.removed.push(value.is_none());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed_over(state: &mut ValueState<u32>, is_full: bool) -> Vec<(Vec<u8>, Option<u32>)> {
        let mut columns = crate::runtime::empty_changes();
        state.hand_over(is_full, &mut Changes { state: 0, columns: &mut columns });
        crate::runtime::entries(&columns)
            .map(|(_, key, value)| {
                let value = value.map(|bytes| postcard::from_bytes(bytes).expect("a u32"));
                (key.to_vec(), value)
            })
            .collect()
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
        assert_eq!(state.iter().count(), 2);
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

    #[test]
    fn thousands_of_random_changes_equal_a_plain_map() {
        let mut state = ValueState::<u32>::default();
        let mut model = std::collections::BTreeMap::<Vec<u8>, u32>::new();
        let mut replica = std::collections::BTreeMap::<Vec<u8>, u32>::new();
        let mut seed = 1u64;
        for round in 0..20_000u32 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let key =
                format!("key-{}{}", (seed >> 33) % 300, "x".repeat((seed >> 60) as usize * 3));
            let key = key.as_bytes();
            match (seed >> 20) % 4 {
                0 => assert_eq!(state.remove(key), model.remove(key)),
                1 => {
                    state.set(key, round);
                    model.insert(key.to_vec(), round);
                }
                _ => {
                    *state.get_or_default(key) += 1;
                    *model.entry(key.to_vec()).or_default() += 1;
                }
            }
            if round % 500 == 0 {
                for (key, value) in handed_over(&mut state, false) {
                    match value {
                        Some(value) => replica.insert(key, value),
                        None => replica.remove(&key),
                    };
                }
                assert_eq!(replica, model);
            }
        }
        assert!(state.iter().all(|(key, value)| model[key] == *value));
        assert_eq!(state.iter().count(), model.len());
    }
}
