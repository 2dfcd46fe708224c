//! Declared state that the host keeps because it is larger than a guest's memory: what one task reads
//! and writes, as of now and as of every checkpoint that may still be gone back to.
//!
//! The state is a table as of a completed checkpoint, and over it a layer of changes for each barrier
//! since. A checkpoint hands the newest layer to the storage as it is, so the task does not wait for a
//! copy; when the checkpoint has completed, the layer is written into the table. A restart forgets the
//! layers above its checkpoint, which takes the same time however large the state is.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use cofferdam_contract::{StateChanges, StateEntry};
use cofferdam_sandbox::{Limit, StateError};
use cofferdam_store::{
    Result, StorageError, are_worth_merging,
    changes::HostChanges,
    declared::{DeclaredKey, Entries, Entry, Merge, OwnKeys, changes_of},
    table::{Table, Tables},
};

/// What an entry takes beside its bytes while its layer is in memory.
const ENTRY_BYTES: u64 = 128;
/// Completed layers that wait for the table: from so many write buffers on, whoever writes helps.
const BEHIND_MAX: u64 = 2;
/// What a scan gives at a time.
const SCAN_BYTES: usize = 256 << 10;
/// What a key counts for beside its bytes and those of its value: the table's index of it, in memory.
const KEY_BYTES: u64 = 24;

/// Entries that a load takes before it looks whether it is still wanted.
const LOADED_AT_ONCE: usize = 1_000;

/// In the table of a layer: the first byte of an entry that is there, and all of one that was removed.
const PRESENT: u8 = 1;
const REMOVED: u8 = 0;

/// What bounds the state of one task.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyedLimits {
    /// Keys and values with what they take beside that, all layers together.
    pub(crate) bytes_max: u64,
    /// A layer that is larger moves to disk.
    pub(crate) write_buffer_bytes: u64,
    /// How many key groups there are.
    pub(crate) max_parallelism: u32,
    /// The keys of the task's records, where these come by their key.
    pub(crate) own_keys: Option<OwnKeys>,
}

/// The declared state of one task.
pub(crate) struct KeyedState {
    tables: Tables,
    limits: KeyedLimits,
    inner: Mutex<Inner>,
    /// Held by whoever writes into the table.
    settling: Mutex<()>,
    /// Keys and values in the table.
    base_bytes: AtomicU64,
}

/// What makes an attempt's load its own: one that was aborted may have left a load behind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Turn(u64);

impl Turn {
    /// Another attempt begins.
    pub(crate) fn pass(&mut self) {
        self.0 += 1;
    }
}

struct Inner {
    base: Arc<Table>,
    /// The checkpoint that the table is of, 0 for the beginning; `None`: its content is not known.
    at: Option<u64>,
    /// That of the newest attempt.
    turn: Turn,
    /// By the barriers that ended them, oldest first.
    pending: VecDeque<(u64, Arc<Layer>)>,
    /// The newest checkpoint that is known to be complete.
    completed: u64,
    current: Layer,
    /// What was written since the last call that ended well, while the task is guarded.
    unsecured: Option<Layer>,
}

/// What was changed between two barriers.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    changed: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Bytes of `changed`.
    buffered_bytes: u64,
    /// Bytes of all of it.
    bytes: u64,
    spilled: Option<Arc<Spilled>>,
}

/// The part of a layer that is on disk. Its space comes back with the last who reads it.
#[derive(Debug)]
struct Spilled(Table);

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
    fn entries_from(&self, from: Bound<Vec<u8>>) -> Entries<'_> {
        let buffered = self.changed.range::<Vec<u8>, _>((from.clone(), Bound::Unbounded));
        let buffered = buffered.map(|(key, value)| Ok((decode(key)?, value.clone())));
        let Some(spilled) = &self.spilled else { return Box::new(buffered) };
        let spilled = spilled.0.range(from).map(|entry| {
            let (key, value) = entry?;
            Ok((decode(&key)?, unspilled(&value)))
        });
        Box::new(Merge::of(vec![Box::new(spilled), Box::new(buffered)]))
    }

    fn set(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) {
        let len = |value: &Option<Vec<u8>>| value.as_ref().map_or(0, Vec::len) as u64;
        let (added, key_bytes) = (len(&value), key.len() as u64 + ENTRY_BYTES);
        let gone = self.changed.insert(key, value).map_or(0, |before| len(&before) + key_bytes);
        let change = |bytes: &mut u64| *bytes = (*bytes + key_bytes + added).saturating_sub(gone);
        change(&mut self.buffered_bytes);
        change(&mut self.bytes);
    }

    /// Moves what is buffered to disk.
    fn spill(&mut self, tables: &Tables) -> Result<()> {
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

fn unspilled(value: &[u8]) -> Option<Vec<u8>> {
    value.split_first().filter(|(tag, _)| **tag == PRESENT).map(|(_, value)| value.to_vec())
}

/// Bytes that sort as the key does.
fn encode(key: &DeclaredKey) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + key.key.len());
    bytes.extend_from_slice(&key.key_group.to_be_bytes());
    bytes.extend_from_slice(&key.state.to_be_bytes());
    bytes.extend_from_slice(&key.namespace.to_be_bytes());
    bytes.extend_from_slice(&key.key);
    bytes
}

fn decode(bytes: &[u8]) -> Result<DeclaredKey> {
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

impl fmt::Debug for KeyedState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedState").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl KeyedState {
    /// An empty state, as it is at the beginning of a job.
    pub(crate) fn new(tables: Tables, limits: KeyedLimits) -> Result<Self> {
        let inner = Inner {
            base: Arc::new(tables.table()?),
            at: Some(0),
            turn: Turn::default(),
            pending: VecDeque::new(),
            completed: 0,
            current: Layer::default(),
            unsecured: None,
        };
        let (settling, base_bytes) = (Mutex::default(), AtomicU64::new(0));
        Ok(Self { tables, limits, inner: Mutex::new(inner), settling, base_bytes })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, state: u32, key: &[u8], namespace: u32) -> Vec<u8> {
        encode(&DeclaredKey::new(state, key, namespace, self.limits.max_parallelism))
    }

    /// The value of a key, as the task has last written it.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    pub(crate) fn get(
        &self,
        state: u32,
        key: &[u8],
        namespace: u32,
    ) -> std::result::Result<Option<Vec<u8>>, StateError> {
        let key = self.key(state, key, namespace);
        let (mut spilled, mut buffered) = (Vec::new(), None);
        let base = {
            let inner = self.lock();
            for layer in inner.layers().rev() {
                buffered = layer.changed.get(&key).cloned();
                if buffered.is_some() {
                    break;
                }
                spilled.extend(layer.spilled.clone());
            }
            inner.base.clone()
        };
        // All of them are newer than what was found in memory.
        for table in spilled {
            if let Some(value) = table.0.get(&key).map_err(unavailable)? {
                return Ok(unspilled(&value));
            }
        }
        match buffered {
            Some(value) => Ok(value),
            None => base.get(&key).map_err(unavailable),
        }
    }

    /// Takes what the task writes behind.
    ///
    /// # Errors
    /// Where it would have more state than it may, or the disk does not take it.
    pub(crate) fn put(&self, changes: &StateChanges) -> std::result::Result<(), StateError> {
        let mut inner = self.lock();
        self.write(&mut inner, changes)?;
        let buffered_bytes = inner.top().buffered_bytes;
        self.spill_beyond(buffered_bytes, inner.top()).map_err(unavailable)?;
        let is_behind = BEHIND_MAX * self.limits.write_buffer_bytes < inner.behind_bytes();
        drop(inner);
        if is_behind {
            tokio::task::block_in_place(|| self.settle()).map_err(unavailable)?;
        }
        Ok(())
    }

    /// Moves a layer to disk where so many bytes are more than the memory that a task may take.
    fn spill_beyond(&self, buffered_bytes: u64, layer: &mut Layer) -> Result<()> {
        if buffered_bytes <= self.limits.write_buffer_bytes {
            return Ok(());
        }
        tokio::task::block_in_place(|| layer.spill(&self.tables))
    }

    fn write(
        &self,
        inner: &mut Inner,
        changes: &StateChanges,
    ) -> std::result::Result<(), StateError> {
        if let Some(own) = &self.limits.own_keys {
            own.check(changes).map_err(StateError::ForeignKey)?;
        }
        for StateEntry { state, key, namespace, value } in changes.entries() {
            let key = self.key(state, key, namespace);
            inner.top().set(key, value.map(<[u8]>::to_vec));
        }
        let wanted_bytes = self.base_bytes.load(Ordering::Relaxed)
            + inner.layers().map(|layer| layer.bytes).sum::<u64>();
        let bytes_max = self.limits.bytes_max;
        if bytes_max < wanted_bytes {
            return Err(StateError::Limit(Limit::State { wanted_bytes, bytes_max }));
        }
        Ok(())
    }

    /// Entries of a state after a key, ascending by key group and key; none: there are no more. Seeks to
    /// the state in each key group, past the entries of others.
    ///
    /// # Errors
    /// Where the disk cannot be read.
    pub(crate) fn scan(
        &self,
        state: u32,
        after: Option<(&[u8], u32)>,
    ) -> std::result::Result<StateChanges, StateError> {
        let seek = |key_group| {
            Bound::Included(encode(&DeclaredKey {
                key_group,
                state,
                namespace: 0,
                key: Vec::new(),
            }))
        };
        let mut from = after
            .map_or(seek(0), |(key, namespace)| Bound::Excluded(self.key(state, key, namespace)));
        let inner = self.lock();
        let (mut page, mut bytes) = (Vec::<Entry>::new(), 0);
        'seeks: loop {
            for entry in inner.entries_from(&from) {
                let (key, value) = entry.map_err(unavailable)?;
                if key.state != state {
                    let behind = u32::from(state < key.state);
                    from = seek(key.key_group + behind);
                    continue 'seeks;
                }
                bytes += key.key.len() + value.as_ref().map_or(0, Vec::len) + ENTRY_BYTES as usize;
                page.push((key, value));
                if SCAN_BYTES <= bytes {
                    break;
                }
            }
            return Ok(changes_of(page.iter()));
        }
    }

    /// A barrier: what was written up to here belongs to its checkpoint, and so do the changes that the
    /// guest hands over. These come from its cache, so they fit into memory, and the guest waits.
    ///
    /// # Errors
    /// As those of [`put`](Self::put).
    pub(crate) fn cut(
        &self,
        checkpoint: u64,
        pieces: &[StateChanges],
    ) -> std::result::Result<Arc<Layer>, StateError> {
        let mut inner = self.lock();
        pieces.iter().try_for_each(|changes| self.write(&mut inner, changes))?;
        inner.merge_unsecured().map_err(unavailable)?;
        // Checkpoints that never complete leave their layers here: together they take no more memory
        // than one may.
        let buffered_bytes = inner.layers().map(|layer| layer.buffered_bytes).sum();
        self.spill_beyond(buffered_bytes, &mut inner.current).map_err(unavailable)?;
        let layer = Arc::new(std::mem::take(&mut inner.current));
        inner.pending.push_back((checkpoint, layer.clone()));
        Ok(layer)
    }

    /// A checkpoint is complete: writes what belongs to it into the table. Not to be called where a
    /// guest waits.
    ///
    /// # Errors
    /// Where the disk does not take it; the state is as it was, and the next call tries again.
    pub(crate) fn complete(&self, checkpoint: u64) -> Result<()> {
        {
            let mut inner = self.lock();
            inner.completed = inner.completed.max(checkpoint);
        }
        self.settle()
    }

    /// No checkpoint before this one will complete any more: their layers count only together, and are made
    /// one where that is worth it, so that they do not become more and more. Not to be called where a guest waits.
    ///
    /// # Errors
    /// Where they cannot be read, or the disk does not take the whole; the state is as it was.
    pub(crate) fn fold(&self, completed: u64, needed_from: u64) -> Result<()> {
        let _turn = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let (apart, turn) = {
            let inner = self.lock();
            let completed = completed.max(inner.completed);
            let is_given_up = |(id, _): &&(u64, Arc<Layer>)| completed < *id && *id < needed_from;
            let apart: Vec<(u64, Arc<Layer>)> =
                inner.pending.iter().filter(is_given_up).cloned().collect();
            (apart, inner.turn)
        };
        let sizes = apart.iter().map(|(_, layer)| layer.bytes);
        let is_due = are_worth_merging(sizes, self.limits.write_buffer_bytes);
        let Some((newest, _)) = apart.last().filter(|_| is_due) else { return Ok(()) };
        let mut whole = Layer::default();
        let runs = apart.iter().map(|(_, layer)| layer.entries()).collect();
        for (number, entry) in Merge::of(runs).enumerate() {
            // A restart waits, and has forgotten them.
            if number % LOADED_AT_ONCE == 0 && self.lock().turn != turn {
                return Ok(());
            }
            let (key, value) = entry?;
            whole.set(encode(&key), value);
            if self.limits.write_buffer_bytes < whole.buffered_bytes {
                whole.spill(&self.tables)?;
            }
        }
        let mut inner = self.lock();
        // A restart has forgotten them.
        if inner.turn != turn {
            return Ok(());
        }
        let at = inner.pending.iter().position(|(id, _)| *id == apart[0].0).unwrap_or(0);
        inner.pending.drain(at..at + apart.len());
        inner.pending.insert(at, (*newest, Arc::new(whole)));
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        let _turn = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (checkpoint, layer, base) = {
                let inner = self.lock();
                match inner.pending.front() {
                    Some((checkpoint, layer)) if *checkpoint <= inner.completed => {
                        (*checkpoint, layer.clone(), inner.base.clone())
                    }
                    _ => return Ok(()),
                }
            };
            for entry in layer.entries() {
                let (key, value) = entry?;
                self.write_into(&base, &encode(&key), value.as_deref())?;
            }
            // Only now: whoever has not found it in the layer finds it in the table.
            let mut inner = self.lock();
            inner.pending.pop_front_if(|(id, _)| *id == checkpoint);
            inner.at = Some(checkpoint);
        }
    }

    fn write_into(&self, base: &Table, key: &[u8], value: Option<&[u8]>) -> Result<()> {
        let entry_bytes = |value: usize| (key.len() + value) as u64 + KEY_BYTES;
        let gone = match value {
            Some(value) => {
                self.base_bytes.fetch_add(entry_bytes(value.len()), Ordering::Relaxed);
                base.insert(key, value)?
            }
            None => base.remove(key)?,
        };
        self.base_bytes.fetch_sub(gone.map_or(0, entry_bytes), Ordering::Relaxed);
        Ok(())
    }

    /// An attempt begins at a checkpoint; 0: at the beginning. What the state was then may not be here,
    /// and must be [loaded](Self::load) in the turn that is given.
    pub(crate) fn rewind(&self, checkpoint: u64) -> Option<Turn> {
        let mut inner = self.lock();
        inner.turn.pass();
        (inner.current, inner.unsecured) = (Layer::default(), None);
        inner.pending.retain(|(id, _)| *id <= checkpoint);
        inner.completed = inner.completed.max(checkpoint);
        let newest = inner.pending.back().map(|(id, _)| *id).or(inner.at);
        let is_here = inner.at.is_some() && newest == Some(checkpoint) && !inner.is_broken();
        (!is_here).then_some(inner.turn)
    }

    /// Takes over what was read from the storage, or nothing for the beginning. Does nothing if
    /// another attempt has begun meanwhile.
    ///
    /// # Errors
    /// Where it cannot be read, or not be written here; the state is then not known.
    pub(crate) fn load(&self, turn: Turn, checkpoint: u64, entries: Entries<'_>) -> Result<()> {
        let _settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let base = Arc::new(self.tables.table()?);
        let before = {
            let mut inner = self.lock();
            if inner.turn != turn {
                base.drop_table();
                return Ok(());
            }
            inner.at = None;
            inner.pending.clear();
            (inner.current, inner.unsecured) = (Layer::default(), None);
            std::mem::replace(&mut inner.base, base.clone())
        };
        before.drop_table();
        self.base_bytes.store(0, Ordering::Relaxed);
        for (number, entry) in entries.enumerate() {
            // Its successor waits.
            if number % LOADED_AT_ONCE == 0 && self.lock().turn != turn {
                return Ok(());
            }
            let (key, value) = entry?;
            self.write_into(&base, &encode(&key), value.as_deref())?;
        }
        self.lock().at = Some(checkpoint);
        Ok(())
    }

    /// From now on [`discard`](Self::discard) goes back to the last [`secure`](Self::secure).
    pub(crate) fn guard(&self) {
        self.lock().unsecured.get_or_insert_default();
    }

    /// A call has ended well: what it has written stays.
    pub(crate) fn secure(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.merge_unsecured()?;
        self.spill_beyond(inner.current.buffered_bytes, &mut inner.current)
    }

    /// A call has trapped: what it has written is gone.
    pub(crate) fn discard(&self) {
        if let Some(unsecured) = &mut self.lock().unsecured {
            *unsecured = Layer::default();
        }
    }

    /// The guard ends after a call that ended well.
    pub(crate) fn unguard(&self) -> Result<()> {
        self.secure()?;
        self.lock().unsecured = None;
        Ok(())
    }
}

impl Inner {
    /// Oldest first.
    fn layers(&self) -> impl DoubleEndedIterator<Item = &Layer> {
        let pending = self.pending.iter().map(|(_, layer)| &**layer);
        pending.chain([&self.current]).chain(&self.unsecured)
    }

    /// Where a write goes.
    fn top(&mut self) -> &mut Layer {
        self.unsecured.as_mut().unwrap_or(&mut self.current)
    }

    /// Everything from a key on.
    fn entries_from(&self, from: &Bound<Vec<u8>>) -> Entries<'_> {
        let base = self.base.range(from.clone()).map(|entry| {
            let (key, value) = entry?;
            Ok((decode(&key)?, Some(value)))
        });
        let mut runs: Vec<Entries<'_>> = vec![Box::new(base)];
        runs.extend(self.layers().map(|layer| layer.entries_from(from.clone())));
        Merge::of(runs).live()
    }

    /// What was written since the last call that ended well stays.
    fn merge_unsecured(&mut self) -> Result<()> {
        let Some(unsecured) = &mut self.unsecured else { return Ok(()) };
        let written = std::mem::take(unsecured);
        for entry in written.entries() {
            let (key, value) = entry?;
            self.current.set(encode(&key), value);
        }
        Ok(())
    }

    /// Whether something of it lies in a database that has failed.
    fn is_broken(&self) -> bool {
        let spilled = self.layers().filter_map(|layer| layer.spilled.as_ref());
        self.base.is_broken() || spilled.into_iter().any(|spilled| spilled.0.is_broken())
    }

    /// What is complete and waits for the table.
    fn behind_bytes(&self) -> u64 {
        let is_complete = |entry: &&(u64, Arc<Layer>)| entry.0 <= self.completed;
        self.pending.iter().filter(is_complete).map(|(_, layer)| layer.bytes).sum()
    }
}

fn unavailable(error: StorageError) -> StateError {
    StateError::Unavailable(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Model = BTreeMap<Vec<u8>, Vec<u8>>;

    fn state(dir: &tempfile::TempDir, write_buffer_bytes: u64) -> KeyedState {
        let tables = Tables::new(&dir.path().join("tables"), 1 << 20).expect("tables");
        let limits = KeyedLimits {
            bytes_max: 1 << 20,
            write_buffer_bytes,
            max_parallelism: 128,
            own_keys: None,
        };
        KeyedState::new(tables, limits).expect("a state")
    }

    fn write(state: &KeyedState, number: u32, key: &[u8], value: Option<Vec<u8>>) {
        let entry = (DeclaredKey::new(number, key, 0, 128), value);
        state.put(&changes_of([&entry].into_iter())).expect("room");
    }

    /// Everything in a state, by the way of a guest that scans it.
    fn scanned(state: &KeyedState, number: u32) -> Model {
        let (mut all, mut after) = (Model::new(), None::<Vec<u8>>);
        loop {
            let page = state.scan(number, after.as_deref().map(|key| (key, 0))).expect("readable");
            let Some(last) = page.entries().last() else { return all };
            after = Some(last.key.to_vec());
            for entry in page.entries() {
                all.insert(entry.key.to_vec(), entry.value.expect("none is removed").to_vec());
            }
        }
    }

    /// Random writes, barriers, completions, restarts and guarded calls: what is read is what a map
    /// says, and the runs of the completed checkpoints add up to it.
    fn random_life(seed: u64, write_buffer_bytes: u64) {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, write_buffer_bytes);
        assert_eq!(state.rewind(0), None, "an empty table is here");
        let mut random = seed;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % below
        };
        let (mut now, mut at) = (Model::new(), BTreeMap::from([(0, Model::new())]));
        let (mut completed, mut barrier) = (0, 0);
        let mut secured: Option<Model> = None;
        for _ in 0..1_500 {
            let key = format!("key-{}", next(60)).into_bytes();
            match next(40) {
                0..25 => {
                    let value = format!("value-{}", next(1_000)).into_bytes();
                    write(&state, 1, &key, Some(value.clone()));
                    now.insert(key, value);
                }
                25..30 => {
                    write(&state, 1, &key, None);
                    now.remove(&key);
                }
                30..33 => {
                    barrier += 1;
                    let entry = (DeclaredKey::new(1, &key, 0, 128), Some(b"handed over".to_vec()));
                    state.cut(barrier, &[changes_of([&entry].into_iter())]).expect("cut");
                    now.insert(key, b"handed over".to_vec());
                    at.insert(barrier, now.clone());
                    secured = secured.map(|_| now.clone());
                }
                33..35 if completed < barrier => {
                    // A barrier of an attempt that has ended completes no more.
                    let pending: Vec<u64> = at.range(completed + 1..).map(|(id, _)| *id).collect();
                    let Some(chosen) = pending.get(next(5) as usize) else { continue };
                    completed = *chosen;
                    state.complete(completed).expect("complete");
                }
                35 => {
                    // Sometimes a checkpoint has completed and nobody has said so.
                    let known: Vec<u64> = at.range(completed..).map(|(id, _)| *id).collect();
                    completed = known[next(known.len() as u64) as usize];
                    assert_eq!(state.rewind(completed), None, "{completed} is here");
                    now = at[&completed].clone();
                    at.retain(|id, _| *id <= completed);
                    secured = None;
                }
                36 => {
                    state.guard();
                    state.secure().expect("secured");
                    secured = Some(now.clone());
                }
                37 => {
                    state.secure().expect("secured");
                    secured = secured.map(|_| now.clone());
                }
                38 => {
                    state.discard();
                    now = secured.clone().unwrap_or(now);
                }
                _ => {
                    state.unguard().expect("unguarded");
                    secured = None;
                }
            }
            let key = format!("key-{}", next(60)).into_bytes();
            assert_eq!(state.get(1, &key, 0).expect("readable"), now.get(&key).cloned());
            assert_eq!(state.get(0, &key, 0).expect("readable"), None);
        }
        assert_eq!(scanned(&state, 1), now);
        assert!(scanned(&state, 0).is_empty());
        assert!(state.rewind(barrier + 7).is_some(), "that one never was");
    }

    #[test]
    fn random_lives_equal_a_map_in_memory_and_on_disk() {
        for seed in 0..6 {
            random_life(seed, 1 << 20);
            random_life(seed, 300);
        }
    }

    #[test]
    fn what_is_cut_off_is_what_has_changed_since_the_barrier_before() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, 100);
        for (barrier, count) in [(1, 20u8), (2, 0), (3, 5)] {
            for number in 0..count {
                write(&state, 0, &[number], Some(vec![barrier]));
            }
            let layer = state.cut(u64::from(barrier), &[]).expect("cut");
            let entries: Vec<Entry> = layer.entries().collect::<Result<_>>().expect("readable");
            assert_eq!(entries.len(), usize::from(count));
            assert_eq!(layer.is_empty(), count == 0);
            assert!(entries.is_sorted(), "a run is sorted");
            assert!(entries.iter().all(|(_, value)| *value == Some(vec![barrier])));
        }
    }

    #[test]
    fn more_than_the_limit_is_refused_and_what_was_removed_does_not_count() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, 1 << 10);
        for round in 1..=40u64 {
            for number in 0..10u8 {
                write(&state, 0, &[number], Some(vec![7; 2_000]));
            }
            state.cut(round, &[]).expect("cut");
            state.complete(round).expect("complete");
        }
        assert_eq!(state.base_bytes.load(Ordering::Relaxed), 10 * (13 + 2_000 + KEY_BYTES));
        let entry = (DeclaredKey::new(0, b"large", 0, 128), Some(vec![0; 1 << 20]));
        let error = state.put(&changes_of([&entry].into_iter())).expect_err("too much");
        assert!(matches!(error, StateError::Limit(Limit::State { .. })), "{error:?}");
    }

    #[test]
    fn what_was_loaded_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, 1 << 10);
        let turn = state.rewind(4).expect("nothing is here");
        state.load(turn, 4, numbers(100)).expect("loaded");
        assert_eq!(state.rewind(4), None);
        assert_eq!(scanned(&state, 2), (0..100).map(|n| (vec![n], vec![n])).collect());
    }

    fn numbers(count: u8) -> Entries<'static> {
        let mut entries: Vec<Entry> =
            (0..count).map(|n| (DeclaredKey::new(2, &[n], 0, 128), Some(vec![n]))).collect();
        entries.sort();
        Box::new(entries.into_iter().map(Ok))
    }

    #[test]
    fn what_an_aborted_attempt_still_loads_is_not_what_the_next_one_finds() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, 1 << 10);
        let aborted = state.rewind(4).expect("nothing is here");
        let next = state.rewind(5).expect("nothing is here");
        state.load(next, 5, numbers(7)).expect("loaded");
        state.load(aborted, 4, numbers(100)).expect("nothing is done");
        assert_eq!(scanned(&state, 2).len(), 7);
        assert_eq!(state.rewind(5), None);
        // And the next may begin while the one before is at it: it ends soon, or is whole.
        let aborted = state.rewind(6).expect("nothing is here");
        let while_loading = numbers(9).enumerate().map(|(number, entry)| {
            assert!(number == 0 || state.rewind(6).is_some(), "not yet");
            entry
        });
        state.load(aborted, 6, Box::new(while_loading)).expect("loaded");
        assert_eq!(state.rewind(6), None, "whole, whoever has loaded it");
        assert_eq!(scanned(&state, 2).len(), 9);
        let aborted = state.rewind(7).expect("nothing is here");
        let mut taken = 0;
        let without_end = std::iter::repeat_with(|| {
            assert!(state.rewind(7).is_some(), "not yet");
            taken += 1;
            Ok((DeclaredKey::new(2, b"the same", 0, 128), Some(vec![1])))
        });
        state.load(aborted, 7, Box::new(without_end)).expect("ended");
        assert!(taken <= LOADED_AT_ONCE + 1, "{taken}");
        assert!(state.rewind(7).is_some(), "not whole");
    }

    #[test]
    fn checkpoints_that_never_complete_do_not_fill_the_memory() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, 4 << 10);
        for barrier in 1..=50 {
            for number in 0..10u8 {
                write(&state, 0, &[number], Some(vec![barrier; 100]));
            }
            state.cut(u64::from(barrier), &[]).expect("cut");
            let buffered: u64 = state.lock().layers().map(|layer| layer.buffered_bytes).sum();
            assert!(buffered <= 2 * (4 << 10), "{buffered} bytes after {barrier} barriers");
        }
        assert_eq!(state.get(0, &[3], 0).expect("readable"), Some(vec![50; 100]));
    }

    #[test]
    fn layers_of_checkpoints_that_never_complete_are_made_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, 500);
        write(&state, 0, b"base", Some(vec![1; 10]));
        state.cut(1, &[]).expect("cut");
        state.complete(1).expect("complete");
        let mut expected = Model::from([(b"base".to_vec(), vec![1; 10])]);
        for id in 2..200_u8 {
            let key = [b'k', id % 7];
            let value = (!id.is_multiple_of(3)).then(|| vec![id; 20]);
            write(&state, 0, &key, value.clone());
            match value {
                Some(value) => expected.insert(key.to_vec(), value),
                None => expected.remove(&key[..]),
            };
            state.cut(id.into(), &[]).expect("cut");
            // One is still under way, and lies over them.
            state.fold(1, u64::from(id) - 1).expect("folded");
            assert!(state.lock().pending.len() <= 20, "{}", state.lock().pending.len());
            assert_eq!(scanned(&state, 0), expected, "after {id}");
        }
        state.complete(199).expect("complete");
        assert_eq!(state.lock().pending.len(), 0);
        assert_eq!(scanned(&state, 0), expected);
        // A restart forgets what was made one, with the rest.
        write(&state, 0, b"later", Some(vec![2]));
        for id in 200..220 {
            write(&state, 0, b"later", Some(vec![3; 100]));
            state.cut(id, &[]).expect("cut");
            state.fold(199, id + 1).expect("folded");
        }
        assert_eq!(state.rewind(199), None, "it is here");
        assert_eq!(scanned(&state, 0), expected);
    }

    #[test]
    fn what_was_secured_moves_to_disk_too() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, 1 << 10);
        state.guard();
        for number in 0..200u8 {
            write(&state, 0, &[number], Some(vec![number; 20]));
            state.secure().expect("secured");
            assert!(state.lock().current.buffered_bytes <= 1 << 10);
        }
        assert_eq!(scanned(&state, 0).len(), 200);
    }

    #[test]
    fn a_scan_finds_its_state_among_others() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, 1 << 10);
        for number in 0..200u8 {
            write(&state, u32::from(number % 5), &[number], Some(vec![number; 2_000]));
            if number % 50 == 0 {
                state.cut(u64::from(number) + 1, &[]).expect("cut");
                state.complete(u64::from(number) + 1).expect("complete");
            }
        }
        for wanted in 0..5 {
            let found: Vec<u8> = scanned(&state, wanted).into_keys().flatten().collect();
            let expected: Vec<u8> = (0..200).filter(|n| u32::from(n % 5) == wanted).collect();
            assert_eq!(found, expected);
        }
        assert!(scanned(&state, 5).is_empty());
    }

    #[test]
    fn a_database_that_has_failed_is_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = state(&dir, 1 << 10);
        write(&state, 2, &[1], Some(vec![1]));
        state.cut(1, &[]).expect("cut");
        state.complete(1).expect("complete");
        state.tables.break_database();
        assert!(matches!(state.get(2, &[9], 0), Err(StateError::Unavailable(_))));
        let turn = state.rewind(1).expect("what is here cannot be read");
        state.load(turn, 1, numbers(3)).expect("there is a new database");
        assert_eq!(state.rewind(1), None);
        assert_eq!(scanned(&state, 2).len(), 3);
    }
}
