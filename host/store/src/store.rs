//! Writes snapshots and metadata in the order that makes them durable, and reads them back.
//!
//! A task's state is a chain: one full snapshot, then increments, each named by the checkpoint it
//! was taken for, whether or not that checkpoint completed. The metadata lists the chain of every
//! task; what no metadata lists does not exist. What later snapshots have replaced is given up as they
//! are written (see [`SnapshotChain`]); where that does not do, [`SnapshotStore::compact`] merges every
//! chain into a new generation.
//!
//! **Invariant:** data, flush, metadata, flush, and only then is a checkpoint complete.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use cofferdam_connector::identity::Lineage;
use cofferdam_core::checkpoint::chain::{SnapshotChain, checkpoint_of};
use cofferdam_sandbox::{Component, Digest};

use crate::{
    Generation, Result, Storage, StorageError,
    declared::Entries,
    generations::{
        OpenGeneration, OpenedStore, head_of_generations, open_generations, read_metadata,
    },
    head::Head,
    key::{component_key, key_parts, metadata_key},
    memory::MemoryStorage,
    metadata::{CheckpointMetadata, SnapshotStats, TaskIdentity, seal, unseal},
    snapshot::{LoadedTask, ReadOut},
    unpack::{declared_of, lies_in_image, load_chain},
    unwritten::Unwritten,
};

/// A generation is replaced when what does not count in it is larger than this, and than half of what
/// does: with the new one beside it, the directory then stays within 2.5 times the size of the state.
pub(crate) const COMPACT_BYTES_MIN: u64 = 4 << 20;
/// Or when a chain is longer than this, so that a restore reads a bounded number of snapshots.
pub(crate) const CHAIN_LENGTH_MAX: usize = 256;

/// The snapshots and metadata of one job.
pub struct SnapshotStore {
    pub(crate) storage: Box<dyn Storage>,
    pub(crate) current: OpenGeneration,
    /// Generations before the current one that hold a checkpoint which is still kept.
    pub(crate) older: Vec<OpenGeneration>,
    /// What is durable of the store as a whole.
    pub(crate) head: Head,
    /// The copy of the head that is written next.
    next_copy: usize,
    pub(crate) job: String,
    pub(crate) lineage: Lineage,
    pub(crate) tasks: Vec<TaskIdentity>,
    /// The snapshots that make up each task's state, were it complete now.
    pub(crate) chains: Vec<SnapshotChain>,
    /// What the snapshots of pending checkpoints have cost, by checkpoint and task.
    pub(crate) stats: BTreeMap<(u64, usize), SnapshotStats>,
    pub(crate) is_compressing: bool,
    /// Snapshots that could not be written: the next write tries them first, or the chain would
    /// have a gap.
    pub(crate) unwritten: Vec<Unwritten>,
    /// No checkpoint before this one will complete any more.
    pub(crate) needed_from: u64,
    pub(crate) highest_id: u64,
    /// A restart has left snapshots behind that nothing stands on.
    pub(crate) has_leftovers: bool,
    /// The components that the tasks run, by digest. Where declared state is in images alone, they are kept
    /// in every generation: no other component can read it out.
    components: BTreeMap<[u8; 16], Component>,
    /// Whether the current generation has them.
    pub(crate) has_components: bool,
    pub(crate) read_out: Option<Arc<dyn ReadOut>>,
}

impl SnapshotStore {
    /// Opens a store to continue in it: the generation that its head names, or a first one.
    ///
    /// # Errors
    /// Where the storage cannot be listed, or not even an empty generation can be made.
    pub fn open(
        mut storage: Box<dyn Storage>,
        job: &str,
        tasks: Vec<TaskIdentity>,
    ) -> Result<(Self, OpenedStore)> {
        let (mut head, mut found) = Self::find_head(&*storage)?;
        let mut generations = open_generations(&*storage, &head, &mut found)?;
        let current = generations.iter().position(|opened| opened.number == head.generation);
        // Only a generation that is whole as far as anybody knows is written to.
        let current = match current.filter(|_| found.damaged.is_empty()) {
            Some(current) => {
                let OpenGeneration { number, checkpoints, .. } = generations.remove(current);
                OpenGeneration {
                    number,
                    generation: storage.open(number, head.end_of(number))?,
                    checkpoints,
                }
            }
            None => {
                let last = storage.generations()?.last().copied().unwrap_or(0);
                let number = last.max(head.generation) + 1;
                if head.sequence == 0 && !found.is_headless {
                    // Before the first generation is made: one without a head has lost its head.
                    head.sequence = 1;
                    storage.write_head(1, &head.encode()?)?;
                }
                OpenGeneration {
                    number,
                    generation: storage.open(number, 0)?,
                    checkpoints: Vec::new(),
                }
            }
        };
        let mut store = Self::of(storage, current, generations, job, tasks, head);
        let keys = store.current.generation.keys(b"s")?;
        let ids = keys.iter().filter_map(|key| key_parts(key)).map(|(_, id)| checkpoint_of(id));
        let newest = ids.max().unwrap_or(0);
        store.highest_id = store.head.highest_id.max(newest);
        if !found.is_headless {
            let generation = store.current.number;
            store.write_head(Head { generation, ..store.head.clone() })?;
        }
        if found.damaged.is_empty() {
            store.remove_other_generations();
        }
        Ok((store, found))
    }

    /// Looks into a store, which may be empty: nothing is made, written or removed.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn look(storage: Box<dyn Storage>) -> Result<(Self, OpenedStore)> {
        let (head, mut found) = Self::find_head(&*storage)?;
        let mut generations = open_generations(&*storage, &head, &mut found)?;
        let nothing = || -> Result<OpenGeneration> {
            let generation = MemoryStorage::default().open(0, 0)?;
            Ok(OpenGeneration { number: 0, generation, checkpoints: Vec::new() })
        };
        let current = generations.pop().map_or_else(nothing, Ok)?;
        // Nothing is written, so there are no tasks to write for.
        Ok((Self::of(storage, current, generations, "", Vec::new(), head), found))
    }

    /// Looks into a store that must hold something.
    ///
    /// # Errors
    /// Where there is none, or none that can be read.
    pub fn open_existing(storage: Box<dyn Storage>) -> Result<(Self, OpenedStore)> {
        let (store, found) = Self::look(storage)?;
        match found.damaged.first() {
            _ if 0 < store.current.number => Ok((store, found)),
            Some(damage) => Err(StorageError::damaged("the store", damage)),
            None => Err(StorageError::store("open a store", "there is no checkpoint in it")),
        }
    }

    fn find_head(storage: &dyn Storage) -> Result<(Head, OpenedStore)> {
        let mut found = OpenedStore::default();
        let numbers = storage.generations()?;
        let error = match Head::newest(&storage.heads()?) {
            Ok(Some(head)) => return Ok((head, found)),
            Ok(None) if numbers.is_empty() => return Ok((Head::default(), found)),
            // A crash has cut short the first thing that is written at all.
            Err(StorageError::Damaged { .. })
                if numbers.is_empty() && storage.heads()?.len() == 1 =>
            {
                return Ok((Head::default(), found));
            }
            Ok(None) => "the head of the store is not there".to_owned(),
            Err(error @ StorageError::Format { .. }) => return Err(error),
            Err(error) => error.to_string(),
        };
        found.damaged.push(error);
        found.is_headless = true;
        let head = head_of_generations(storage, &numbers, &mut found)?;
        Ok((head, found))
    }

    fn of(
        storage: Box<dyn Storage>,
        current: OpenGeneration,
        older: Vec<OpenGeneration>,
        job: &str,
        tasks: Vec<TaskIdentity>,
        head: Head,
    ) -> Self {
        Self {
            storage,
            current,
            older,
            next_copy: usize::from(head.sequence.is_multiple_of(2)),
            highest_id: head.highest_id,
            head,
            job: job.to_owned(),
            lineage: Lineage::default(),
            chains: tasks.iter().map(|_| SnapshotChain::default()).collect(),
            tasks,
            stats: BTreeMap::new(),
            is_compressing: false,
            unwritten: Vec::new(),
            needed_from: 0,
            has_leftovers: false,
            components: BTreeMap::new(),
            has_components: false,
            read_out: None,
        }
    }

    /// Which components the tasks run, and how declared state is read out of their memory.
    pub fn set_components(&mut self, components: Vec<Component>, read_out: Arc<dyn ReadOut>) {
        self.components = components.into_iter().map(|it| (it.digest().0, it)).collect();
        self.read_out = Some(read_out);
        self.has_components = false;
    }

    /// The components that a generation has to have.
    pub(crate) fn needed_components(&self) -> Vec<Component> {
        let digests: BTreeSet<[u8; 16]> = self
            .tasks
            .iter()
            .filter(|task| task.has_memory && task.has_declared && !task.has_host_state)
            .filter_map(|task| task.digest)
            .collect();
        digests.iter().filter_map(|digest| self.components.get(digest)).cloned().collect()
    }

    /// The component that a task of a checkpoint ran, where it is kept: where declared state is in the
    /// image of its memory alone.
    ///
    /// # Errors
    /// Where it is missing or damaged.
    pub fn component(&self, task: usize, checkpoint: u64) -> Result<Vec<u8>> {
        let opened = self.generation_of(checkpoint)?;
        let metadata = read_metadata(&*opened.generation, &metadata_key(checkpoint))?;
        let identity = metadata.tasks.get(task).map(|entry| &entry.identity);
        let Some(digest) = identity.and_then(|identity| identity.digest) else {
            let name = format!("checkpoint {checkpoint}");
            return Err(StorageError::damaged(name, "the task has no component"));
        };
        let name = format!("the component {}", Digest(digest));
        let key = component_key(&digest);
        let Some(framed) = opened.generation.get(&key)? else {
            return Err(StorageError::damaged(name, "it is not there"));
        };
        let bytes = unseal(&name, &key, &framed)?;
        match Digest::of(bytes).0 == digest {
            true => Ok(bytes.to_vec()),
            false => Err(StorageError::damaged(name, "it is another one")),
        }
    }

    /// Whether a task's declared state as of a completed checkpoint is in the image of its memory alone.
    ///
    /// # Errors
    /// Where a part of the checkpoint is missing or damaged.
    pub fn is_in_image(&self, task: usize, checkpoint: u64) -> Result<bool> {
        let generation = &*self.generation_of(checkpoint)?.generation;
        let metadata = read_metadata(generation, &metadata_key(checkpoint))?;
        match metadata.tasks.get(task) {
            Some(entry) => lies_in_image(generation, task, entry),
            None => Ok(false),
        }
    }

    /// The newest checkpoint that was ever complete here, whether or not it is whole.
    #[must_use]
    pub fn newest_known(&self) -> Option<u64> {
        self.head.checkpoints.last().map(|kept| kept.checkpoint)
    }

    /// Whose checkpoints these are from now on.
    pub fn set_lineage(&mut self, lineage: Lineage) {
        self.lineage = lineage;
    }

    /// Makes a head durable. After an error nobody knows which of both is, and the next one is written
    /// over the same copy.
    pub(crate) fn write_head(&mut self, mut head: Head) -> Result<()> {
        self.head.sequence += 1;
        head.sequence = self.head.sequence;
        head.highest_id = head.highest_id.max(self.highest_id);
        self.storage.write_head(self.next_copy, &head.encode()?)?;
        self.next_copy = 1 - self.next_copy;
        self.head = head;
        Ok(())
    }

    /// Makes a head durable, or the one before: afterwards it is known which.
    pub(crate) fn commit_head(&mut self, head: Head, checkpoint: u64) -> Result<()> {
        let Err(error) = self.write_head(head) else { return Ok(()) };
        match self.write_head(self.head.clone()) {
            Ok(()) => Err(error),
            Err(again) => {
                let (failed, again) = (Box::new(error), Box::new(again));
                Err(StorageError::InDoubt { checkpoint, failed, again })
            }
        }
    }

    /// After an error of the current generation: what was not flushed is undone.
    pub(crate) fn reopened<T>(&mut self, error: StorageError) -> Result<T> {
        if let Err(error) = self.current.generation.reopen() {
            tracing::debug!(%error, "it is tried again with the next write");
        }
        Err(error)
    }

    /// Compresses what is written from now on, or does not. What was written is read either way.
    pub fn compress(&mut self, is_compressing: bool) {
        self.is_compressing = is_compressing;
    }

    /// Makes durable what was deleted.
    ///
    /// # Errors
    /// Where that is not certain.
    pub fn flush(&mut self) -> Result<()> {
        self.current.generation.flush()
    }

    fn generations(&self) -> impl Iterator<Item = &OpenGeneration> {
        self.older.iter().chain([&self.current])
    }

    /// The generation that holds a completed checkpoint.
    pub(crate) fn generation_of(&self, checkpoint: u64) -> Result<&OpenGeneration> {
        self.generations().find(|opened| opened.checkpoints.contains(&checkpoint)).ok_or_else(
            || StorageError::damaged(format!("checkpoint {checkpoint}"), "it is not in the store"),
        )
    }

    /// True for a checkpoint whose snapshots increments can follow.
    #[must_use]
    pub fn is_current(&self, checkpoint: u64) -> bool {
        self.current.checkpoints.contains(&checkpoint)
    }

    /// Every checkpoint that is kept, ascending.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<u64> {
        self.generations().flat_map(|opened| opened.checkpoints.iter().copied()).collect()
    }

    /// An id above every one that was ever used for a snapshot.
    #[must_use]
    pub fn next_id(&self) -> u64 {
        self.highest_id + 1
    }

    /// What is damaged in the generations of its checkpoints, though everything can still be read.
    #[must_use]
    pub fn flaws(&self) -> Vec<String> {
        self.generations().flat_map(|opened| opened.generation.flaws()).collect()
    }

    /// Where the store is, for messages.
    #[must_use]
    pub fn location(&self) -> String {
        self.storage.location()
    }

    /// Reads the metadata of a completed checkpoint.
    ///
    /// # Errors
    /// Where it is missing or damaged.
    pub fn metadata(&self, checkpoint: u64) -> Result<CheckpointMetadata> {
        read_metadata(&*self.generation_of(checkpoint)?.generation, &metadata_key(checkpoint))
    }

    /// Reads a task's declared state as of a completed checkpoint, entry by entry.
    ///
    /// # Errors
    /// Where its metadata is missing or damaged; an entry is an error where a part of it is.
    pub fn declared(&self, task: usize, checkpoint: u64) -> Result<Entries<'_>> {
        self.declared_within(task, checkpoint, None)
    }

    /// The same of some key groups alone, where they are given. What lies before and behind them is not
    /// read.
    ///
    /// # Errors
    /// See [`declared`](Self::declared).
    pub fn declared_within(
        &self,
        task: usize,
        checkpoint: u64,
        key_groups: Option<Range<u32>>,
    ) -> Result<Entries<'_>> {
        let generation = &*self.generation_of(checkpoint)?.generation;
        let metadata = read_metadata(generation, &metadata_key(checkpoint))?;
        let Some(entry) = metadata.tasks.get(task) else { return Ok(Box::new(std::iter::empty())) };
        if lies_in_image(generation, task, entry)? {
            let why = "it is in the image of the task's memory alone";
            return Err(StorageError::store("read declared state", why));
        }
        Ok(declared_of(generation, task, &entry.chain, key_groups)?.live())
    }

    /// Reads a task's declared state and keeps nothing of it; gives the number of its entries.
    ///
    /// # Errors
    /// Where a part of it is missing or damaged.
    pub fn check_declared(&self, task: usize, checkpoint: u64) -> Result<usize> {
        self.declared(task, checkpoint)?.try_fold(0, |count, entry| entry.map(|_| count + 1))
    }

    /// Reads a task's state as of a completed checkpoint.
    ///
    /// # Errors
    /// Where a part of it is missing or damaged.
    pub fn load(&self, task: usize, checkpoint: u64) -> Result<LoadedTask> {
        let opened = self.generation_of(checkpoint)?;
        let metadata = read_metadata(&*opened.generation, &metadata_key(checkpoint))?;
        match metadata.tasks.get(task) {
            Some(entry) => load_chain(&*opened.generation, task, &entry.chain),
            None => {
                Err(StorageError::damaged(format!("checkpoint {checkpoint}"), "it has fewer tasks"))
            }
        }
    }
}

/// Puts the components that are not there, or not whole; whether there were any.
pub(crate) fn put_components(
    components: &[Component],
    generation: &mut dyn Generation,
) -> Result<bool> {
    let mut has_put = false;
    for component in components {
        let key = component_key(&component.digest().0);
        let kept = generation.get(&key)?;
        if kept.is_none_or(|kept| unseal("a component", &key, &kept).is_err()) {
            generation.put(&key, &seal(&key, component.bytes()))?;
            has_put = true;
        }
    }
    Ok(has_put)
}
