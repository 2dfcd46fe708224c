//! Declared state: what an operator keeps by key, at the speed of its own memory, and hands over
//! to the host as changes since the last checkpoint.

use postcard::experimental::serialized_size;
use serde::{Serialize, de::DeserializeOwned};
use smallvec::SmallVec;

use crate::{
    bindings::cofferdam::operator::types::{StateChanges, StateKind},
    host,
    index::Index,
    runtime::{empty_changes, entries},
    schema::{Schema, schema_of},
    short::{append, hash, is_same},
};

/// What an entry of state belongs to: the key of a [`Record`](crate::Record), and within that a
/// namespace, such as the window that the entry is for. Entries go where the records of their key go,
/// also to another parallelism; so a key is always that of a record.
pub trait Keyed {
    /// The key of the records that the entry belongs to.
    fn key_bytes(&self) -> &[u8];

    /// What tells the entry from others of that key; empty unless somebody says otherwise.
    fn namespace_bytes(&self) -> &[u8] {
        &[]
    }
}

/// The key of an entry with its namespace.
///
/// ```
/// use cofferdam_sdk::state::{Keyed, StateKey, ValueState};
///
/// let mut windows = ValueState::<u64>::default();
/// let key = StateKey::new(b"JFK").with(b"2013-01-01");
/// windows.set(&key, 7);
/// let mut ended = Vec::new();
/// windows.for_each(|key, count| ended.push((key.to_owned(), *count)));
/// assert_eq!(ended[0].0.namespace_bytes(), b"2013-01-01");
/// assert_eq!(windows.remove(&ended[0].0), Some(7));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StateKey<'a> {
    key: &'a [u8],
    namespace: &'a [u8],
}

impl<'a> StateKey<'a> {
    /// The bytes of a record's key.
    #[must_use]
    pub fn new(key: &'a [u8]) -> Self {
        Self { key, namespace: &[] }
    }

    /// The same key with a namespace.
    #[must_use]
    pub fn with(self, namespace: &'a (impl AsRef<[u8]> + ?Sized)) -> Self {
        Self { key: self.key, namespace: namespace.as_ref() }
    }

    /// A copy that outlives the state.
    #[must_use]
    pub fn to_owned(&self) -> OwnedStateKey {
        OwnedStateKey {
            bytes: SmallVec::from_iter(self.key.iter().chain(self.namespace).copied()),
            namespace: self.namespace.len(),
        }
    }
}

impl Keyed for StateKey<'_> {
    fn key_bytes(&self) -> &[u8] {
        self.key
    }

    fn namespace_bytes(&self) -> &[u8] {
        self.namespace
    }
}

/// A [`StateKey`] that owns its bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnedStateKey {
    bytes: SmallVec<[u8; 16]>,
    namespace: usize,
}

impl Keyed for OwnedStateKey {
    fn key_bytes(&self) -> &[u8] {
        &self.bytes[..self.bytes.len() - self.namespace]
    }

    fn namespace_bytes(&self) -> &[u8] {
        &self.bytes[self.bytes.len() - self.namespace..]
    }
}

#[cfg(test)]
impl Keyed for [u8] {
    fn key_bytes(&self) -> &[u8] {
        self
    }
}

/// A key and its namespace in one, and the length of the namespace.
#[derive(Clone, Copy)]
struct Joined<'a> {
    bytes: &'a [u8],
    namespace: u32,
}

/// Puts both together where there is a namespace; most keys have none, and are used as they are.
macro_rules! joined {
    ($name:ident, $key:expr) => {
        let (key, namespace) = ($key.key_bytes(), $key.namespace_bytes());
        let both: SmallVec<[u8; 64]>;
        let $name = match namespace {
            [] => Joined { bytes: key, namespace: 0 },
            namespace => {
                both = key.iter().chain(namespace).copied().collect();
                Joined { bytes: &both, namespace: namespace.len() as u32 }
            }
        };
    };
}

/// The declared states of an operator, found by the `#[operator]` attribute.
pub trait DeclaredState {
    /// Every field marked `#[state]`, in the order of the struct.
    fn states(&mut self) -> Vec<NamedState<'_>>;
}

/// A field with the name of its state.
pub struct NamedState<'a> {
    /// The name.
    pub name: &'static str,
    /// A name that it had before.
    pub renamed_from: Option<&'static str>,
    /// The field.
    pub field: &'a mut dyn StateField,
}

/// A field that can be marked `#[state]`.
pub trait StateField {
    /// Its shape.
    fn kind(&self) -> StateKind;
    /// What its values look like.
    fn schema(&self) -> String;
    /// Whether values that were written with another schema can be taken back.
    ///
    /// # Errors
    /// Why not.
    fn converts(&self, schema: &str) -> Result<(), String>;
    /// Whether only what has changed will be asked for.
    fn track(&mut self, is_tracking: bool);
    /// From now on the host keeps it, under this number; at most so many bytes of it are kept here.
    fn move_to_host(&mut self, state: u32, cache_bytes: usize);
    /// Whether it has no entries, and none was removed since the last hand-over.
    fn is_untouched(&self) -> bool;
    /// Begins to hand over what changed since the last time, or everything.
    fn begin_hand_over(&mut self, is_full: bool);
    /// Hands over until the columns are full; true if nothing is left.
    fn hand_over(&mut self, changes: &mut Changes<'_>) -> bool;
    /// Takes one entry back; no value removes it. `schema` is the one it was written with, if that is
    /// not this one.
    ///
    /// # Errors
    /// Where the bytes are not a value of this state.
    fn take_back(
        &mut self,
        key: StateKey<'_>,
        value: Option<&[u8]>,
        schema: Option<&str>,
    ) -> Result<(), String>;
}

/// What an entry takes beside its key and its value: its part of the list and of the index.
const ENTRY_BYTES: usize = 64;
/// What is written behind at a time.
const PUT_BYTES: usize = 256 << 10;
/// What is handed over at a time.
const PIECE_BYTES: usize = 1 << 20;

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
    /// Counts an entry anew whose value takes so many bytes when it is written.
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

/// What is being encoded, so that a panic can name it: its message alone says where in the code it was.
#[cfg_attr(
    not(target_arch = "wasm32"),
    allow(dead_code, reason = "only the panic hook of a component asks for it")
)]
pub(crate) mod encoding {
    use std::cell::Cell;

    /// How much of a key is kept.
    const KEY_BYTES: usize = 32;

    #[derive(Clone, Copy)]
    struct Key {
        bytes: [u8; KEY_BYTES],
        len: usize,
    }

    std::thread_local! {
        static STATE: Cell<Option<&'static str>> = const { Cell::new(None) };
        static KEY: Cell<Option<Key>> = const { Cell::new(None) };
    }

    /// The state that the next values are of, by its name.
    pub(crate) fn of_state(name: Option<&'static str>) {
        STATE.set(name);
    }

    #[inline]
    pub(super) fn begin(key: &[u8]) {
        let mut bytes = [0; KEY_BYTES];
        let len = key.len().min(KEY_BYTES);
        bytes[..len].copy_from_slice(&key[..len]);
        KEY.set(Some(Key { bytes, len }));
    }

    #[inline]
    pub(super) fn end() {
        KEY.set(None);
    }

    /// Names the value, if one is being encoded.
    pub(crate) fn words() -> Option<String> {
        let Key { bytes, len } = KEY.get()?;
        let state = STATE.get().map(|name| format!(" of state \"{name}\"")).unwrap_or_default();
        Some(format!("the value{state} under the key `{}`", bytes[..len].escape_ascii()))
    }
}

/// Where changes are written during a hand-over.
pub struct Changes<'a> {
    pub(crate) state: u32,
    pub(crate) columns: &'a mut StateChanges,
}

impl Changes<'_> {
    /// Whether a piece is as large as it should be.
    fn is_full(&self) -> bool {
        let columns = &*self.columns;
        PIECE_BYTES <= columns.keys.len() + columns.values.len() + 16 * columns.states.len()
    }

    fn push<V: Serialize>(&mut self, key: StateKey<'_>, value: Option<&V>) {
        let columns = &mut *self.columns;
        let namespace = key.namespace.len() as u32;
        if 0 < namespace || !columns.namespaces.is_empty() {
            // Until now none had one.
            columns.namespaces.resize(columns.states.len(), 0);
            columns.namespaces.push(namespace);
        }
        columns.states.push(self.state);
        append(&mut columns.keys, key.key);
        append(&mut columns.keys, key.namespace);
        columns.key_ends.push(columns.keys.len() as u32);
        if let Some(value) = value {
            encoding::begin(key.key);
            crate::Encode::encode(value, &mut columns.values);
            encoding::end();
        }
        columns.value_ends.push(columns.values.len() as u32);
        columns.removed.push(value.is_none());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

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
            let key =
                format!("key-{}{}", (seed >> 33) % 300, "x".repeat((seed >> 60) as usize * 3));
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
}
