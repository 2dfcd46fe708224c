//! Declared state that the host keeps because it is larger than a guest's memory: what one task reads
//! and writes, as of now and as of every checkpoint that may still be gone back to.
//!
//! The state is a table as of a completed checkpoint, and over it a layer of changes for each barrier
//! since. A checkpoint hands the newest layer to the storage as it is, so the task does not wait for a
//! copy; when the checkpoint has completed, the layer is written into the table. A restart forgets the
//! layers above its checkpoint, which takes the same time however large the state is.

mod layer;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    fmt,
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use cofferdam_contract::{StateChanges, StateEntry};
use cofferdam_core::{checkpoint::chain::are_worth_merging, ids::CheckpointId};
use cofferdam_sandbox::{Limit, StateError};
use cofferdam_store::{
    Result, StorageError,
    changes::HostChanges,
    declared::{DeclaredKey, Entries, Entry, Merge, OwnKeys, changes_of},
    table::{Table, Tables},
};

use self::layer::{ENTRY_BYTES, Layer, decode, encode, unspilled};
use super::as_of::AsOf;
use crate::threads::wait_for_disk;

/// Completed layers that wait for the table: from so many write buffers on, anyone who writes helps.
const BEHIND_MAX: u64 = 2;
/// What a scan gives at a time.
const SCAN_BYTES: usize = 256 << 10;
/// What a key counts for beside its bytes and those of its value: the table's index of it, in memory.
const KEY_BYTES: u64 = 24;

/// Entries that a load takes before it looks whether it is still wanted.
const LOADED_AT_ONCE: usize = 1_000;

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
    /// Held by anyone who writes into the table.
    applying: Mutex<()>,
    /// Keys and values in the table.
    base_bytes: AtomicU64,
}

/// What makes an attempt's load its own: one that was aborted may have left a load behind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LoadToken(u64);

impl LoadToken {
    /// Another attempt begins.
    pub(crate) fn renew(&mut self) {
        self.0 += 1;
    }
}

struct Inner {
    base: Arc<Table>,
    /// What the table is of.
    at: AsOf,
    /// That of the newest attempt.
    token: LoadToken,
    /// By the barriers that ended them, oldest first.
    pending: VecDeque<(CheckpointId, Arc<Layer>)>,
    /// The newest checkpoint that is known to be complete.
    completed: Option<CheckpointId>,
    current: Layer,
    /// What was written since the last call that ended well, while the task is guarded.
    uncommitted: Option<Layer>,
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
            at: AsOf::Beginning,
            token: LoadToken::default(),
            pending: VecDeque::new(),
            completed: None,
            current: Layer::default(),
            uncommitted: None,
        };
        let (applying, base_bytes) = (Mutex::default(), AtomicU64::new(0));
        Ok(Self { tables, limits, inner: Mutex::new(inner), applying, base_bytes })
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
            wait_for_disk(|| self.apply_completed()).map_err(unavailable)?;
        }
        Ok(())
    }

    /// Moves a layer to disk where so many bytes are more than the memory that a task may take.
    fn spill_beyond(&self, buffered_bytes: u64, layer: &mut Layer) -> Result<()> {
        if buffered_bytes <= self.limits.write_buffer_bytes {
            return Ok(());
        }
        wait_for_disk(|| layer.spill(&self.tables))
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
        let mut from = after.map_or_else(
            || seek(0),
            |(key, namespace)| Bound::Excluded(self.key(state, key, namespace)),
        );
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
        checkpoint: CheckpointId,
        pieces: &[StateChanges],
    ) -> std::result::Result<Arc<Layer>, StateError> {
        let mut inner = self.lock();
        pieces.iter().try_for_each(|changes| self.write(&mut inner, changes))?;
        inner.merge_uncommitted().map_err(unavailable)?;
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
    pub(crate) fn complete(&self, checkpoint: CheckpointId) -> Result<()> {
        {
            let mut inner = self.lock();
            inner.completed = inner.completed.max(Some(checkpoint));
        }
        self.apply_completed()
    }

    /// No checkpoint before this one will complete any more: their layers count only together, and are made
    /// one where that is worth it, so that they do not become more and more. Not to be called where a guest waits.
    ///
    /// # Errors
    /// Where they cannot be read, or the disk does not take the whole; the state is as it was.
    pub(crate) fn fold(
        &self,
        completed: Option<CheckpointId>,
        needed_from: CheckpointId,
    ) -> Result<()> {
        let _applying = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        let (apart, token) = {
            let inner = self.lock();
            let completed = completed.max(inner.completed);
            let is_given_up =
                |(id, _): &&(CheckpointId, Arc<Layer>)| completed < Some(*id) && *id < needed_from;
            let apart: Vec<(CheckpointId, Arc<Layer>)> =
                inner.pending.iter().filter(is_given_up).cloned().collect();
            (apart, inner.token)
        };
        let sizes = apart.iter().map(|(_, layer)| layer.bytes);
        let is_due = are_worth_merging(sizes, self.limits.write_buffer_bytes);
        let Some((newest, _)) = apart.last().filter(|_| is_due) else { return Ok(()) };
        let mut whole = Layer::default();
        let runs = apart.iter().map(|(_, layer)| layer.entries()).collect();
        for (number, entry) in Merge::of(runs).enumerate() {
            // A restart waits, and has forgotten them.
            if number % LOADED_AT_ONCE == 0 && self.lock().token != token {
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
        if inner.token != token {
            return Ok(());
        }
        let at = inner.pending.iter().position(|(id, _)| *id == apart[0].0).unwrap_or(0);
        inner.pending.drain(at..at + apart.len());
        inner.pending.insert(at, (*newest, Arc::new(whole)));
        Ok(())
    }

    fn apply_completed(&self) -> Result<()> {
        let _applying = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (checkpoint, layer, base) = {
                let inner = self.lock();
                match inner.pending.front() {
                    Some((checkpoint, layer)) if Some(*checkpoint) <= inner.completed => {
                        (*checkpoint, layer.clone(), inner.base.clone())
                    }
                    _ => return Ok(()),
                }
            };
            for entry in layer.entries() {
                let (key, value) = entry?;
                self.write_into(&base, &encode(&key), value.as_deref())?;
            }
            // Only now: a reader that has not found it in the layer finds it in the table.
            let mut inner = self.lock();
            inner.pending.pop_front_if(|(id, _)| *id == checkpoint);
            inner.at = AsOf::Checkpoint(checkpoint);
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

    /// An attempt begins at a checkpoint; `None`: at the beginning. What the state was then may not be here,
    /// and must be [loaded](Self::load) with the token that is returned.
    pub(crate) fn rewind(&self, checkpoint: Option<CheckpointId>) -> Option<LoadToken> {
        let mut inner = self.lock();
        inner.token.renew();
        (inner.current, inner.uncommitted) = (Layer::default(), None);
        inner.pending.retain(|(id, _)| Some(*id) <= checkpoint);
        inner.completed = inner.completed.max(checkpoint);
        let newest = inner.pending.back().map_or(inner.at, |(id, _)| AsOf::Checkpoint(*id));
        let is_known = inner.at != AsOf::Unknown && !inner.is_broken();
        let is_here = is_known && newest == AsOf::from(checkpoint);
        (!is_here).then_some(inner.token)
    }

    /// Takes over what was read from the storage, or nothing for the beginning. Does nothing if
    /// another attempt has begun meanwhile.
    ///
    /// # Errors
    /// Where it cannot be read, or not be written here; the state is then not known.
    pub(crate) fn load(
        &self,
        token: LoadToken,
        checkpoint: Option<CheckpointId>,
        entries: Entries<'_>,
    ) -> Result<()> {
        let _applying = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        let base = Arc::new(self.tables.table()?);
        let before = {
            let mut inner = self.lock();
            if inner.token != token {
                base.drop_table();
                return Ok(());
            }
            inner.at = AsOf::Unknown;
            inner.pending.clear();
            (inner.current, inner.uncommitted) = (Layer::default(), None);
            std::mem::replace(&mut inner.base, base.clone())
        };
        before.drop_table();
        self.base_bytes.store(0, Ordering::Relaxed);
        for (number, entry) in entries.enumerate() {
            // Its successor waits.
            if number % LOADED_AT_ONCE == 0 && self.lock().token != token {
                return Ok(());
            }
            let (key, value) = entry?;
            self.write_into(&base, &encode(&key), value.as_deref())?;
        }
        self.lock().at = checkpoint.into();
        Ok(())
    }

    /// From now on [`discard`](Self::discard) goes back to the last [`commit_call`](Self::commit_call).
    pub(crate) fn guard(&self) {
        self.lock().uncommitted.get_or_insert_default();
    }

    /// A call has ended well: what it has written stays.
    pub(crate) fn commit_call(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.merge_uncommitted()?;
        self.spill_beyond(inner.current.buffered_bytes, &mut inner.current)
    }

    /// A call has trapped: what it has written is gone.
    pub(crate) fn discard(&self) {
        if let Some(uncommitted) = &mut self.lock().uncommitted {
            *uncommitted = Layer::default();
        }
    }

    /// The guard ends after a call that ended well.
    pub(crate) fn unguard(&self) -> Result<()> {
        self.commit_call()?;
        self.lock().uncommitted = None;
        Ok(())
    }
}

impl Inner {
    /// Oldest first.
    fn layers(&self) -> impl DoubleEndedIterator<Item = &Layer> {
        let pending = self.pending.iter().map(|(_, layer)| &**layer);
        pending.chain([&self.current]).chain(&self.uncommitted)
    }

    /// Where a write goes.
    fn top(&mut self) -> &mut Layer {
        self.uncommitted.as_mut().unwrap_or(&mut self.current)
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
    fn merge_uncommitted(&mut self) -> Result<()> {
        let Some(uncommitted) = &mut self.uncommitted else { return Ok(()) };
        let written = std::mem::take(uncommitted);
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
        let is_complete = |entry: &&(CheckpointId, Arc<Layer>)| Some(entry.0) <= self.completed;
        self.pending.iter().filter(is_complete).map(|(_, layer)| layer.bytes).sum()
    }
}

fn unavailable(error: StorageError) -> StateError {
    StateError::Unavailable { message: error.to_string(), os_error: error.os_error() }
}
