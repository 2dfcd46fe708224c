//! A value for each key.

use postcard::experimental::serialized_size;
use serde::{Serialize, de::DeserializeOwned};
use smallvec::SmallVec;

use super::{Changes, StateField};
use crate::{
    bindings::cofferdam::operator::types::StateKind,
    changes::{empty_changes, entries},
    host,
    index::Index,
    key::{Joined, Keyed, StateKey, joined},
    schema::{Schema, schema_of},
    short::{hash, is_same},
};

/// What an entry takes beside its key and its value: its part of the list and of the index.
const ENTRY_BYTES: usize = 64;

/// What is written behind at a time.
const PUT_BYTES: usize = 256 << 10;

/// One value for each key.
///
/// Lives in the guest's memory as a dense list of entries with an index over them; what changes is
/// noted, so that a checkpoint costs in proportion to the changes. Keys up to 16 bytes need no
/// allocation of their own.
///
/// It may be written once [`open`](crate::Operator::open) has ended: what a checkpoint holds of it is
/// restored then.
///
/// With `state.backend.type = "sled"` the host keeps it, on disk if need be, and the list is a
/// cache: what is not in it is fetched, and what was used longest ago (by the clock algorithm of
/// Corbató, 1968) makes room, written behind if it has changed. Nothing else differs. A value that owns
/// memory is measured after each change, at the cost of encoding it.
#[derive(Debug)]
pub struct ValueState<V> {
    entries: Vec<Entry<V>>,
    /// Places in `entries`, by the hash of the key.
    index: Index,
    /// Places of entries that changed since the last hand-over. Not kept by a cache.
    changed: Vec<u32>,
    /// Places of entries that were removed and handed over: free for another key.
    free: Vec<u32>,
    /// Present where the host has the state.
    cache: Option<Cache>,
    /// Whether changes are remembered until they are handed over.
    is_tracking: bool,
    /// A hand-over that has begun.
    handing: Handing,
}

/// How far a hand-over has come.
#[derive(Debug, Default)]
enum Handing {
    #[default]
    Done,
    /// Every entry from this place on.
    All(usize),
    /// The entries at these places, the last first.
    Changed(Vec<u32>),
}

#[derive(Debug)]
struct Entry<V> {
    /// With the namespace behind it.
    key: SmallVec<[u8; 16]>,
    /// How long that is.
    namespace: u32,
    /// `None`: removed, or free.
    value: Option<V>,
    /// What it counted for in the cache when it was last read or written.
    bytes: u32,
    is_changed: bool,
    /// It was used since the clock's hand came by.
    is_used: bool,
    /// Its place is in no index, and waits for another key.
    is_free: bool,
}

/// What a state needs to know of itself where the host has it.
#[derive(Debug)]
struct Cache {
    /// Its number there.
    state: u32,
    bytes: usize,
    bytes_max: usize,
    /// The place that is next to make room.
    hand: usize,
    /// The entry that was changed last: what it has become is counted when another is changed.
    last_changed: Option<u32>,
}

impl Cache {
    /// Counts an entry again whose value takes so many bytes when it is written.
    fn count<V>(&mut self, entry: &mut Entry<V>, value_bytes: usize) {
        let bytes = ENTRY_BYTES + entry.key.len() + value_bytes.max(size_of::<V>());
        self.bytes -= (entry.bytes as usize).min(self.bytes);
        entry.bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.bytes += entry.bytes as usize;
    }
}

impl<V> Default for ValueState<V> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            index: Index::default(),
            changed: Vec::new(),
            free: Vec::new(),
            cache: None,
            is_tracking: true,
            handing: Handing::Done,
        }
    }
}

impl<V: Serialize + DeserializeOwned> ValueState<V> {
    /// The value of a key.
    #[must_use]
    #[inline]
    pub fn get(&mut self, key: &(impl Keyed + ?Sized)) -> Option<&V> {
        joined!(key, key);
        let place = self.find_or_fetch(key)?;
        let entry = &mut self.entries[place as usize];
        if self.cache.is_some() {
            entry.is_used = true;
        }
        entry.value.as_ref()
    }

    /// The value of a key, to change it. Counts as changed even if it is not.
    #[inline]
    pub fn get_mut(&mut self, key: &(impl Keyed + ?Sized)) -> Option<&mut V> {
        joined!(key, key);
        let place = self.find_or_fetch(key)?;
        self.entries[place as usize].value.as_ref()?;
        self.note_change(place).value.as_mut()
    }

    /// The value of a key, to change it; inserts the default where there is none.
    #[inline]
    pub fn get_or_default(&mut self, key: &(impl Keyed + ?Sized)) -> &mut V
    where
        V: Default,
    {
        joined!(key, key);
        let place = match self.find_or_fetch(key) {
            Some(place) => place,
            None => self.insert(key, None, 0),
        };
        self.note_change(place).value.get_or_insert_with(V::default)
    }

    /// Sets the value of a key.
    pub fn set(&mut self, key: &(impl Keyed + ?Sized), value: V) {
        // What the host has need not be fetched to be replaced.
        joined!(key, key);
        let place = self.find_or_insert(key);
        self.note_change(place).value = Some(value);
    }

    /// Removes a key; gives the value it had.
    pub fn remove(&mut self, key: &(impl Keyed + ?Sized)) -> Option<V> {
        joined!(key, key);
        let place = self.find_or_fetch(key)?;
        self.entries[place as usize].value.as_ref()?;
        let value = self.note_change(place).value.take();
        if !self.is_tracking && self.cache.is_none() {
            // Nobody will ask what became of it.
            self.release(place);
        }
        value
    }

    /// Calls `each` with every key and its value, in an order that is the same in each run. Where the
    /// host has the state it is read past the cache, a part at a time.
    pub fn for_each(&mut self, mut each: impl FnMut(StateKey<'_>, &V)) {
        let Some(Cache { state, .. }) = self.cache else {
            for entry in &self.entries {
                if let Some(value) = &entry.value {
                    each(entry.key(), value);
                }
            }
            return;
        };
        self.write_behind(|_| true);
        let mut after: Option<(Vec<u8>, u32)> = None;
        loop {
            let page = host::scan_state(state, after.as_ref());
            let mut last = None;
            for (_, key, value) in entries(&page) {
                if let Some(value) = value {
                    each(key, &decoded(value));
                }
                let bytes = [key.key, key.namespace].concat();
                last = Some((bytes, key.namespace.len() as u32));
            }
            if last.is_none() {
                return;
            }
            after = last;
        }
    }

    #[inline]
    fn find(&self, key: Joined<'_>) -> Option<u32> {
        self.index.find(hash(key.bytes), |place| {
            let entry = &self.entries[place as usize];
            entry.namespace == key.namespace && is_same(&entry.key, key.bytes)
        })
    }

    #[inline]
    fn find_or_fetch(&mut self, key: Joined<'_>) -> Option<u32> {
        match self.find(key) {
            Some(place) => Some(place),
            None => self.fetch(key),
        }
    }

    #[inline]
    fn find_or_insert(&mut self, key: Joined<'_>) -> u32 {
        match self.find(key) {
            Some(place) => place,
            None => self.insert(key, None, 0),
        }
    }

    /// Asks the host for a key that is not here.
    #[cold]
    fn fetch(&mut self, key: Joined<'_>) -> Option<u32> {
        let bytes = host::state(self.cache.as_ref()?.state, key.bytes, key.namespace)?;
        Some(self.insert(key, Some(decoded(&bytes)), bytes.len()))
    }

    #[cold]
    fn insert(&mut self, key: Joined<'_>, value: Option<V>, value_bytes: usize) -> u32 {
        let Joined { bytes: key, namespace } = key;
        let bytes = ENTRY_BYTES + key.len() + value_bytes.max(size_of::<V>());
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        if let Some(cache) = &mut self.cache {
            cache.bytes += bytes as usize;
            if cache.bytes_max < cache.bytes {
                self.make_room(None);
            }
        }
        let entry = Entry {
            key: SmallVec::from_slice(key),
            namespace,
            value,
            bytes,
            is_changed: false,
            is_used: true,
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

    /// Lets go of what was used longest ago, so much at once that one call to the host is worth it;
    /// of everything but the entry that is in use.
    fn make_room(&mut self, in_use: Option<u32>) {
        let Some(cache) = &mut self.cache else { return };
        let (mut left, target) = (cache.bytes, cache.bytes_max / 8 * 7);
        let mut victims = Vec::new();
        // In the second round nothing is used any more.
        for _ in 0..2 * self.entries.len() {
            if left <= target {
                break;
            }
            cache.hand = (cache.hand + 1) % self.entries.len();
            let entry = &mut self.entries[cache.hand];
            let is_in_use = in_use == Some(cache.hand as u32);
            if entry.is_free || is_in_use || std::mem::take(&mut entry.is_used) {
                continue;
            }
            left -= (entry.bytes as usize).min(left);
            // It must not be chosen again.
            entry.is_used = true;
            victims.push(cache.hand as u32);
        }
        victims.sort_unstable();
        self.write_behind(|place| victims.binary_search(&place).is_ok());
        for place in victims {
            if !self.entries[place as usize].is_free {
                self.release(place);
            }
        }
    }

    /// Gives the host those of the changed entries that are meant. What was removed makes room.
    fn write_behind(&mut self, is_meant: impl Fn(u32) -> bool) {
        let Some(Cache { state, .. }) = self.cache else { return };
        let mut columns = empty_changes();
        for place in 0..self.entries.len() as u32 {
            if self.entries[place as usize].is_changed && is_meant(place) {
                self.write(place, &mut Changes { state, columns: &mut columns });
                if self.entries[place as usize].value.is_none() {
                    self.release(place);
                }
                if PUT_BYTES <= columns.keys.len() + columns.values.len() {
                    host::put_state(&columns);
                    columns = empty_changes();
                }
            }
        }
        if !columns.states.is_empty() {
            host::put_state(&columns);
        }
    }

    /// Writes a changed entry, which counts as unchanged from now on.
    fn write(&mut self, place: u32, changes: &mut Changes<'_>) {
        let entry = &mut self.entries[place as usize];
        let before = changes.columns.values.len();
        changes.push(entry.key(), entry.value.as_ref());
        entry.is_changed = false;
        if let Some(cache) = &mut self.cache {
            cache.count(entry, changes.columns.values.len() - before);
        }
    }

    #[inline]
    fn note_change(&mut self, place: u32) -> &mut Entry<V> {
        // A value that owns nothing is as large as its type says, and was counted when it came.
        if self.cache.is_some() && std::mem::needs_drop::<V>() {
            self.count_last_change(place);
        }
        let entry = &mut self.entries[place as usize];
        if !entry.is_changed && (self.is_tracking || self.cache.is_some()) {
            entry.is_changed = true;
            entry.is_used = true;
            if self.cache.is_none() {
                self.changed.push(place);
            }
        }
        entry
    }

    /// Counts what the entry that was changed before this one has become.
    fn count_last_change(&mut self, place: u32) {
        let Some(cache) = &mut self.cache else { return };
        let Some(last) = cache.last_changed.replace(place).filter(|last| *last != place) else {
            return;
        };
        let entry = &mut self.entries[last as usize];
        if let Some(value) = &entry.value {
            // What cannot be written is told when it is.
            cache.count(entry, serialized_size(value).unwrap_or(0));
            if cache.bytes_max < cache.bytes {
                self.make_room(Some(place));
            }
        }
    }

    /// Frees a place: its key is not here any more.
    fn release(&mut self, place: u32) {
        let entries = &self.entries;
        let hash_of = |place: u32| hash(&entries[place as usize].key);
        self.index.remove(hash_of(place), place, hash_of);
        let entry = &mut self.entries[place as usize];
        if let Some(cache) = &mut self.cache {
            cache.bytes -= (entry.bytes as usize).min(cache.bytes);
        }
        entry.key = SmallVec::new();
        entry.namespace = 0;
        entry.value = None;
        entry.is_changed = false;
        entry.is_free = true;
        self.free.push(place);
    }
}

impl<V> Entry<V> {
    fn key(&self) -> StateKey<'_> {
        let (key, namespace) = self.key.split_at(self.key.len() - self.namespace as usize);
        StateKey { key, namespace }
    }
}

/// A value as it was written. What was not written by this state breaks the task.
fn decoded<V: DeserializeOwned>(bytes: &[u8]) -> V {
    decode(bytes).unwrap_or_else(|error| panic!("{error}"))
}

fn decode<V: DeserializeOwned>(bytes: &[u8]) -> Result<V, String> {
    postcard::from_bytes(bytes).map_err(|error| {
        format!("not the postcard encoding of {}: {error}", std::any::type_name::<V>())
    })
}

impl<V: Serialize + DeserializeOwned> StateField for ValueState<V> {
    fn kind(&self) -> StateKind {
        StateKind::Value
    }

    fn schema(&self) -> String {
        schema_of::<V>().to_string()
    }

    fn converts(&self, schema: &str) -> Result<(), String> {
        Schema::parse(schema)?.converts_to::<V>(&schema_of::<V>())
    }

    fn track(&mut self, is_tracking: bool) {
        self.is_tracking = is_tracking;
    }

    fn move_to_host(&mut self, state: u32, cache_bytes: usize) {
        self.cache =
            Some(Cache { state, bytes: 0, bytes_max: cache_bytes, hand: 0, last_changed: None });
    }

    fn is_untouched(&self) -> bool {
        self.entries.iter().all(|entry| entry.is_free)
    }

    fn begin_hand_over(&mut self, is_full: bool) {
        let mut changed = std::mem::take(&mut self.changed);
        changed.retain(|place| self.entries[*place as usize].is_changed);
        if !is_full && self.is_tracking {
            changed.reverse();
            self.handing = Handing::Changed(changed);
            return;
        }
        for place in changed {
            self.entries[place as usize].is_changed = false;
            // What was removed makes room.
            if self.entries[place as usize].value.is_none() {
                self.release(place);
            }
        }
        self.handing = Handing::All(0);
    }

    fn hand_over(&mut self, changes: &mut Changes<'_>) -> bool {
        if self.cache.is_some() {
            // It goes the usual way, some at a time.
            self.write_behind(|_| true);
            return true;
        }
        match std::mem::take(&mut self.handing) {
            Handing::Done => true,
            Handing::All(first) => {
                for (place, entry) in self.entries.iter().enumerate().skip(first) {
                    if changes.is_full() {
                        self.handing = Handing::All(place);
                        return false;
                    }
                    if entry.value.is_some() {
                        changes.push(entry.key(), entry.value.as_ref());
                    }
                }
                true
            }
            Handing::Changed(mut places) => {
                while let Some(place) = places.pop() {
                    if changes.is_full() {
                        places.push(place);
                        self.handing = Handing::Changed(places);
                        return false;
                    }
                    self.write(place, changes);
                    if self.entries[place as usize].value.is_none() {
                        self.release(place);
                    }
                }
                true
            }
        }
    }

    fn take_back(
        &mut self,
        key: StateKey<'_>,
        value: Option<&[u8]>,
        schema: Option<&str>,
    ) -> Result<(), String> {
        joined!(key, key);
        let value = match (value, schema) {
            (Some(bytes), Some(schema)) => Some(Schema::parse(schema)?.convert(bytes)?),
            (Some(bytes), None) => Some(decode(bytes)?),
            (None, _) => None,
        };
        let place = self.find_or_insert(key);
        self.entries[place as usize].value = value;
        Ok(())
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
