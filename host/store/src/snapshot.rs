//! Writes snapshots and manifests in the order that makes them durable, and reads them back.
//!
//! A task's state is a chain: one full snapshot, then increments, each named by the checkpoint it
//! was taken for, whether or not that checkpoint completed. A manifest lists the chain of every
//! task; what no manifest lists does not exist. What later snapshots have replaced is given up as they
//! are written (see [`super::chain`]); where that does not do, [`SnapshotStore::compact`] merges every
//! chain into a new generation.
//!
//! **Invariant:** data, flush, manifest, flush, and only then is a checkpoint complete.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    sync::Arc,
    time::Instant,
};

use cofferdam_connector::identity::Lineage;
use cofferdam_core::ids::micros;
use cofferdam_sandbox::{
    Component, Digest, INVENTORY, Image, MemoryDelta, MemorySnapshot, memory::PAGE_BYTES,
};
use serde::{Deserialize, Serialize};

use crate::{
    Generation, Result, Storage, StorageError,
    chain::{Chain, Footprint, PackPages, Written, carried_with, checkpoint_of},
    changes::Changes,
    declared::{Entries, Entry, Merge, each_block, first_part, within},
    head::{Head, Kept},
    in_flight::ChannelState,
    manifest::{Manifest, ManifestTask, SnapshotStats, TaskIdentity, seal, seal_into, unseal},
    memory::MemoryStorage,
    run::Run,
};

/// Pages in one stored value: 256 KiB.
const PACK_PAGES: usize = 64;
/// Bytes of declared state in one stored value.
const PACK_BYTES: usize = 64 << 10;
/// A generation is replaced when what does not count in it is larger than this, and than half of what
/// does: with the new one beside it, the directory then stays within 2.5 times the size of the state.
const COMPACT_BYTES_MIN: u64 = 4 << 20;
/// Snapshots that could not be written are made one where they are larger than this.
const FOLD_BYTES_MIN: u64 = 64 << 20;
/// How much of merged changes is in memory at once.
const MERGED_AT_ONCE: usize = 16 << 20;
/// Or when a chain is longer than this, so that a restore reads a bounded number of snapshots.
const CHAIN_LENGTH_MAX: usize = 256;

/// Why something was not carried forward.
enum NotCarried {
    /// It cannot be read: a checkpoint can do without it being elsewhere.
    Unread(StorageError),
    /// The store did not take it, nor what else was written since the last flush.
    Unwritten(StorageError),
}

/// What one task hands over at a barrier.
#[derive(Debug, Default)]
pub struct TaskSnapshot {
    /// A source's position, a sink's transactions: small, and always whole.
    pub state: Vec<u8>,
    /// The task has processed the end of its inputs.
    pub is_drained: bool,
    /// The pages that changed.
    pub memory: Option<Arc<MemorySnapshot>>,
    /// The entries of declared state that changed. `None`: it is in the memory alone, where there is any.
    pub declared: Option<Arc<Changes>>,
    /// They are all there are: those of earlier snapshots count no more.
    pub is_declared_whole: bool,
    /// Records that the barrier has overtaken: always whole.
    pub in_flight: Arc<Vec<ChannelState>>,
    /// What it has cost so far.
    pub stats: SnapshotStats,
    /// When the task went on.
    pub taken_at: Option<Instant>,
}

impl TaskSnapshot {
    /// How much memory it takes up.
    pub fn bytes(&self) -> u64 {
        let pages = self.memory.as_ref().map_or(0, |memory| memory.changed_bytes());
        pages + self.declared.as_ref().map_or(0, |declared| declared.bytes())
    }

    /// The same with other pages.
    fn with_memory(&self, memory: Option<Arc<MemorySnapshot>>) -> Self {
        Self {
            state: self.state.clone(),
            is_drained: self.is_drained,
            memory,
            declared: self.declared.clone(),
            is_declared_whole: self.is_declared_whole,
            in_flight: self.in_flight.clone(),
            stats: self.stats,
            taken_at: self.taken_at,
        }
    }

    /// One that says what several say that follow each other; `None` where they cannot be made one.
    pub fn as_one(apart: &[&Self], max_parallelism: u32) -> Option<Self> {
        let last = apart.last()?;
        let memories: Vec<&MemorySnapshot> =
            apart.iter().filter_map(|it| it.memory.as_deref()).collect();
        let declared: Vec<&Changes> =
            apart.iter().filter_map(|it| it.declared.as_deref()).collect();
        let all_or_none = [0, apart.len()];
        if !all_or_none.contains(&memories.len()) || !all_or_none.contains(&declared.len()) {
            return None;
        }
        // Those before are none of it any more.
        let first = apart.iter().rposition(|it| it.is_declared_whole);
        let counting = declared.get(first.unwrap_or(0)..).unwrap_or_default();
        let declared = match declared.is_empty() {
            true => None,
            false => Some(Arc::new(Changes::as_one(counting, max_parallelism)?)),
        };
        Some(Self {
            state: last.state.clone(),
            is_drained: last.is_drained,
            memory: MemorySnapshot::merged(memories).map(Arc::new),
            declared,
            is_declared_whole: first.is_some(),
            in_flight: last.in_flight.clone(),
            stats: last.stats,
            taken_at: last.taken_at,
        })
    }
}

/// A snapshot that is to be written: its task, and the checkpoint that it is for.
type Unwritten = (usize, u64, Arc<TaskSnapshot>);

/// A task's state, read back; its declared state is read by [`SnapshotStore::declared`].
#[derive(Debug, Default)]
pub struct LoadedTask {
    /// See [`TaskSnapshot::state`].
    pub state: Vec<u8>,
    /// See [`TaskSnapshot::is_drained`].
    pub is_drained: bool,
    /// Snapshots of the memory, in the order they are applied to an image.
    pub memory: Vec<MemorySnapshot>,
    /// See [`TaskSnapshot::in_flight`].
    pub in_flight: Arc<Vec<ChannelState>>,
    /// What was read, in bytes.
    pub bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    state: Vec<u8>,
    is_drained: bool,
    /// See [`INVENTORY`].
    inventory: u16,
    globals: Vec<i64>,
    monotonic_ns: u64,
    /// Size and changed pages of each memory.
    memories: Vec<(u64, u64)>,
    memory_packs: u32,
    declared_packs: u32,
    is_declared_whole: bool,
    /// Packs of declared state belong to this snapshot, though there may be none. If not, and it has pages,
    /// declared state is in the image alone: packs of earlier snapshots are older than it.
    holds_declared: bool,
    in_flight_packs: u32,
    /// Every pack is an LZ4 block behind its size.
    is_compressed: bool,
}

/// What a task begins with: state that was read, and whose declared state.
#[derive(Debug, Default)]
pub struct Share {
    /// Everything but declared state.
    pub state: LoadedTask,
    /// The tasks of the checkpoint whose declared state it takes over.
    pub declared_from: Vec<usize>,
    /// Of these key groups; `None`: all of it.
    pub key_groups: Option<Range<u32>>,
    /// The number that each of the states of the checkpoint has now; `None`: it is left behind. Empty:
    /// as they were.
    pub states: Vec<Option<u32>>,
    /// The declared state itself, where it had to be converted to the schemas of now.
    pub converted: Option<Run>,
    /// The declared state of tasks whose checkpoint holds it in the image of their memory alone: it was read
    /// out of that.
    pub read_out: BTreeMap<usize, Arc<Run>>,
    /// It takes over the image, with the declared state that is in it and nowhere else.
    pub is_in_image: bool,
}

/// Reads declared state out of the memory that it lies in.
pub trait ReadOut: Send + Sync {
    /// The declared state of a task in an image of its memory.
    ///
    /// # Errors
    /// What the component makes of it.
    fn read(&self, task: usize, image: &Image) -> std::result::Result<Run, String>;
}

impl Share {
    /// The declared state that it takes over, as it was written.
    ///
    /// # Errors
    /// The store's.
    pub fn entries<'a>(&'a self, from: &'a SnapshotStore, checkpoint: u64) -> Result<Entries<'a>> {
        let groups = self.key_groups.as_ref();
        let runs = self.declared_from.iter().map(|old| match self.read_out.get(old) {
            Some(run) => Ok(run.entries(groups)),
            None => from.declared_within(*old, checkpoint, groups.cloned()),
        });
        renumbered(Merge::of(runs.collect::<Result<_>>()?).live(), &self.states)
    }
}

/// What opening a store has found.
#[derive(Debug, Default)]
pub struct Found {
    /// The manifests that are whole, oldest first.
    pub manifests: Vec<Manifest>,
    /// Checkpoints that were complete and cannot be used, and whatever else is wrong.
    pub damaged: Vec<String>,
    /// Nobody knows what the store has held: its head is lost.
    pub is_headless: bool,
}

/// The snapshots and manifests of one job.
pub struct SnapshotStore {
    storage: Box<dyn Storage>,
    current: Place,
    /// Generations before the current one that hold a checkpoint which is still kept.
    older: Vec<Place>,
    /// What is durable of the store as a whole.
    head: Head,
    /// The copy of the head that is written next.
    next_copy: usize,
    job: String,
    lineage: Lineage,
    tasks: Vec<TaskIdentity>,
    /// The snapshots that make up each task's state, were it complete now.
    chains: Vec<Chain>,
    /// What the snapshots of pending checkpoints have cost, by checkpoint and task.
    stats: BTreeMap<(u64, usize), SnapshotStats>,
    is_compressing: bool,
    /// Snapshots that could not be written: the next write tries them first, or the chain would
    /// have a gap.
    unwritten: Vec<Unwritten>,
    /// No checkpoint before this one will complete any more.
    needed_from: u64,
    highest_id: u64,
    /// A restart has left snapshots behind that nothing stands on.
    has_leftovers: bool,
    /// The components that the tasks run, by digest. Where declared state is in images alone, they are kept
    /// in every generation: no other component can read it out.
    components: BTreeMap<[u8; 16], Component>,
    /// Whether the current generation has them.
    has_components: bool,
    read_out: Option<Arc<dyn ReadOut>>,
}

/// An open generation.
struct Place {
    number: u64,
    generation: Box<dyn Generation>,
    /// The checkpoints whose manifests are in it, ascending.
    checkpoints: Vec<u64>,
}

/// One task's part of a checkpoint, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskReport {
    /// `operator/index`.
    pub name: String,
    /// How many snapshots its state is the sum of: a full one and increments.
    pub snapshots: usize,
    /// The size of its linear memory.
    pub memory_bytes: u64,
    /// Pages in all of its snapshots.
    pub stored_pages: u64,
    /// Pages in the newest of them.
    pub increment_pages: u64,
    /// Entries of declared state; `None`: it has none, or it is in the image of its memory alone.
    pub declared_entries: Option<usize>,
    /// Whether it has declared state, and that is in the image of its memory alone.
    pub is_in_image: bool,
    /// A source's position, or a sink's transactions.
    pub state_bytes: u64,
    /// The task had processed the end of its inputs.
    pub is_drained: bool,
    /// What its newest snapshot has cost.
    pub stats: SnapshotStats,
}

/// Opens the generations that the head names for reading, and compares each of their manifests with
/// what it says.
fn open_places(storage: &dyn Storage, head: &Head, found: &mut Found) -> Result<Vec<Place>> {
    let mut places: Vec<Place> = Vec::new();
    for Kept { checkpoint, generation: number, checksum, .. } in &head.checkpoints {
        let place = match places.iter().position(|place| place.number == *number) {
            Some(place) => &mut places[place],
            None => {
                match storage.read(*number, head.end_of(*number)) {
                    Ok(generation) => {
                        let checkpoints = Vec::new();
                        places.push(Place { number: *number, generation, checkpoints });
                        let last = places.len() - 1;
                        &mut places[last]
                    }
                    // What cannot be reached may be whole: an older one must not be taken for it.
                    Err(error @ StorageError::Unreachable { .. }) => return Err(error),
                    Err(error) => {
                        found.damaged.push(format!("checkpoint {checkpoint}: {error}"));
                        continue;
                    }
                }
            }
        };
        match read_manifest_as_stored(&*place.generation, &manifest_key(*checkpoint)) {
            Ok((manifest, found_checksum)) if found_checksum == *checksum => {
                place.checkpoints.push(*checkpoint);
                found.manifests.push(manifest);
            }
            Ok(_) => found.damaged.push(format!("checkpoint {checkpoint}: it is another one")),
            Err(error @ StorageError::Unreachable { .. }) => return Err(error),
            Err(error) => found.damaged.push(format!("checkpoint {checkpoint}: {error}")),
        }
    }
    found.manifests.sort_by_key(|manifest| manifest.checkpoint);
    places.retain(|place| !place.checkpoints.is_empty());
    Ok(places)
}

/// A store whose head is lost: what its generations say has to do.
fn head_of_generations(storage: &dyn Storage, numbers: &[u64], found: &mut Found) -> Head {
    let mut head = Head::default();
    for &number in numbers {
        let manifests = storage.read(number, 0).and_then(|generation| {
            let keys = generation.keys(b"m")?;
            let read = |key: &Vec<u8>| read_manifest_as_stored(&*generation, key);
            Ok(keys.iter().map(read).collect::<Vec<_>>())
        });
        match manifests {
            Ok(manifests) => {
                for manifest in manifests {
                    match manifest {
                        Ok((Manifest { checkpoint, .. }, checksum)) => {
                            head.checkpoints.retain(|kept| kept.checkpoint != checkpoint);
                            head.checkpoints.push(Kept {
                                checkpoint,
                                generation: number,
                                end: 0,
                                checksum,
                            });
                        }
                        Err(error) => found.damaged.push(error.to_string()),
                    }
                }
            }
            Err(error) => found.damaged.push(format!("generation {number}: {error}")),
        }
    }
    head.generation = numbers.last().copied().unwrap_or(0);
    head.highest_id = head.checkpoints.iter().map(|kept| kept.checkpoint).max().unwrap_or(0);
    head
}

fn manifest_checksum(manifest: &Manifest) -> Result<u64> {
    Ok(twox_hash::XxHash3_64::oneshot(&manifest.encode()?))
}

/// The kinds of a snapshot's values, in the order of their keys.
const KIND_HEADER: u8 = 0;
const KIND_MEMORY: u8 = 1;
const KIND_DECLARED: u8 = 2;
const KIND_IN_FLIGHT: u8 = 3;

fn snapshot_prefix(checkpoint: u64) -> Vec<u8> {
    let mut key = vec![b's'];
    key.extend_from_slice(&checkpoint.to_be_bytes());
    key
}

fn value_key(checkpoint: u64, task: usize, kind: u8, sequence: u32) -> Vec<u8> {
    let mut key = snapshot_prefix(checkpoint);
    key.extend_from_slice(&(task as u32).to_be_bytes());
    key.push(kind);
    key.extend_from_slice(&sequence.to_be_bytes());
    key
}

/// The task and the snapshot that the key of a value names.
fn key_parts(key: &[u8]) -> Option<(usize, u64)> {
    let (checkpoint, rest) = key.get(1..)?.split_first_chunk::<8>()?;
    let task = rest.first_chunk::<4>()?;
    Some((u32::from_be_bytes(*task) as usize, u64::from_be_bytes(*checkpoint)))
}

/// Puts the components that are not there, or not whole; whether there were any.
fn put_components(components: &[Component], generation: &mut dyn Generation) -> Result<bool> {
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

fn component_key(digest: &[u8; 16]) -> Vec<u8> {
    let mut key = vec![b'c'];
    key.extend_from_slice(digest);
    key
}

fn manifest_key(checkpoint: u64) -> Vec<u8> {
    let mut key = vec![b'm'];
    key.extend_from_slice(&checkpoint.to_be_bytes());
    key
}

impl SnapshotStore {
    /// Opens a store to go on in it: the generation that its head names, or a first one.
    ///
    /// # Errors
    /// Where the storage cannot be listed, or not even an empty generation can be made.
    pub fn open(
        mut storage: Box<dyn Storage>,
        job: &str,
        tasks: Vec<TaskIdentity>,
    ) -> Result<(Self, Found)> {
        let (mut head, mut found) = Self::find_head(&*storage)?;
        let mut places = open_places(&*storage, &head, &mut found)?;
        let current = places.iter().position(|place| place.number == head.generation);
        // Only a generation that is whole as far as anybody knows is written to.
        let current = match current.filter(|_| found.damaged.is_empty()) {
            Some(current) => {
                let Place { number, checkpoints, .. } = places.remove(current);
                Place {
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
                Place { number, generation: storage.open(number, 0)?, checkpoints: Vec::new() }
            }
        };
        let mut store = Self::of(storage, current, places, job, tasks, head);
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
    pub fn look(storage: Box<dyn Storage>) -> Result<(Self, Found)> {
        let (head, mut found) = Self::find_head(&*storage)?;
        let mut places = open_places(&*storage, &head, &mut found)?;
        let nothing = || -> Result<Place> {
            let generation = MemoryStorage::default().open(0, 0)?;
            Ok(Place { number: 0, generation, checkpoints: Vec::new() })
        };
        let current = places.pop().map_or_else(nothing, Ok)?;
        // Nothing is written, so there are no tasks to write for.
        Ok((Self::of(storage, current, places, "", Vec::new(), head), found))
    }

    /// Looks into a store that must hold something.
    ///
    /// # Errors
    /// Where there is none, or none that can be read.
    pub fn open_existing(storage: Box<dyn Storage>) -> Result<(Self, Found)> {
        let (store, found) = Self::look(storage)?;
        match found.damaged.first() {
            _ if 0 < store.current.number => Ok((store, found)),
            Some(damage) => Err(StorageError::damaged("the store", damage)),
            None => Err(StorageError::store("open a store", "there is no checkpoint in it")),
        }
    }

    fn find_head(storage: &dyn Storage) -> Result<(Head, Found)> {
        let mut found = Found::default();
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
        let head = head_of_generations(storage, &numbers, &mut found);
        Ok((head, found))
    }

    fn of(
        storage: Box<dyn Storage>,
        current: Place,
        older: Vec<Place>,
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
            chains: tasks.iter().map(|_| Chain::default()).collect(),
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
    fn needed_components(&self) -> Vec<Component> {
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
        let place = self.place_of(checkpoint)?;
        let manifest = read_manifest(&*place.generation, &manifest_key(checkpoint))?;
        let identity = manifest.tasks.get(task).map(|entry| &entry.identity);
        let Some(digest) = identity.and_then(|identity| identity.digest) else {
            let name = format!("checkpoint {checkpoint}");
            return Err(StorageError::damaged(name, "the task has no component"));
        };
        let name = format!("the component {}", Digest(digest));
        let key = component_key(&digest);
        let Some(framed) = place.generation.get(&key)? else {
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
        let generation = &*self.place_of(checkpoint)?.generation;
        let manifest = read_manifest(generation, &manifest_key(checkpoint))?;
        match manifest.tasks.get(task) {
            Some(entry) => lies_in_image(generation, task, entry),
            None => Ok(false),
        }
    }

    /// The newest checkpoint that was ever complete here, whether or not it is whole.
    #[must_use]
    pub fn newest_known(&self) -> Option<u64> {
        self.head.checkpoints.last().map(|kept| kept.checkpoint)
    }

    /// The job goes on from a checkpoint that is not the newest: later ones, and those that are not
    /// whole, count no more. What is left of them is set aside.
    ///
    /// # Errors
    /// The store's.
    pub fn leave_behind(&mut self, after: u64) -> Result<()> {
        let whole = self.checkpoints();
        let mut head = self.head.clone();
        head.checkpoints
            .retain(|kept| kept.checkpoint <= after && whole.contains(&kept.checkpoint));
        let left: BTreeSet<u64> =
            self.head.checkpoints.iter().map(|kept| kept.generation).collect();
        let kept: BTreeSet<u64> = head.checkpoints.iter().map(|kept| kept.generation).collect();
        self.commit_head(head, after)?;
        for place in self.older.iter_mut().chain([&mut self.current]) {
            place.checkpoints.retain(|id| *id <= after);
        }
        self.older.retain(|place| !place.checkpoints.is_empty());
        for number in left.difference(&kept).filter(|number| **number != self.current.number) {
            if let Err(error) = self.storage.set_aside(*number) {
                tracing::warn!(number, %error, "set a damaged generation aside");
            }
        }
        Ok(())
    }

    /// Whose checkpoints these are from now on.
    pub fn set_lineage(&mut self, lineage: Lineage) {
        self.lineage = lineage;
    }

    /// Makes a head durable. After an error nobody knows which of both is, and the next one is written
    /// over the same copy.
    fn write_head(&mut self, mut head: Head) -> Result<()> {
        self.head.sequence += 1;
        head.sequence = self.head.sequence;
        head.highest_id = head.highest_id.max(self.highest_id);
        self.storage.write_head(self.next_copy, &head.encode()?)?;
        self.next_copy = 1 - self.next_copy;
        self.head = head;
        Ok(())
    }

    /// Makes a head durable, or the one before: afterwards it is known which.
    fn commit_head(&mut self, head: Head, checkpoint: u64) -> Result<()> {
        let Err(error) = self.write_head(head) else { return Ok(()) };
        match self.write_head(self.head.clone()) {
            Ok(()) => Err(error),
            Err(again) => {
                let reason = format!("{error}; and it could not be withdrawn: {again}");
                Err(StorageError::InDoubt { checkpoint, reason })
            }
        }
    }

    /// After an error of the current generation: what was not flushed is undone.
    fn reopened<T>(&mut self, error: StorageError) -> Result<T> {
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

    /// What a completed checkpoint consists of, task by task. Reads headers, no pages.
    ///
    /// # Errors
    /// Where it is missing or damaged.
    pub fn inspect(&self, checkpoint: u64) -> Result<Vec<TaskReport>> {
        let place = self.place_of(checkpoint)?;
        let manifest = self.manifest(checkpoint)?;
        let reports = manifest.tasks.iter().enumerate().map(|(task, entry)| {
            let identity = &entry.identity;
            let mut report = TaskReport {
                name: format!("{}/{}", identity.operator, identity.index),
                snapshots: entry.chain.len(),
                stats: entry.stats,
                ..TaskReport::default()
            };
            for id in &entry.chain {
                let header = read_header(&*place.generation, task, *id)?;
                report.memory_bytes = header.memories.iter().map(|(size, _)| size).sum();
                report.increment_pages = header.memories.iter().map(|(_, pages)| pages).sum();
                report.stored_pages += report.increment_pages;
                report.state_bytes = header.state.len() as u64;
                report.is_drained = header.is_drained;
            }
            if identity.has_declared {
                report.declared_entries = match is_in_image(&*place.generation, task, &entry.chain)?
                {
                    true => None,
                    false => Some(self.check_declared(task, checkpoint)?),
                };
                report.is_in_image = report.declared_entries.is_none();
            }
            Ok(report)
        });
        reports.collect()
    }

    /// Removes generations that a finished compaction has left. Later ones than the head's may be
    /// somebody else's, who is writing them just now; they go when this run has gone past them.
    fn remove_other_generations(&mut self) {
        for number in self.storage.generations().unwrap_or_default() {
            let is_kept = self.head.checkpoints.iter().any(|kept| kept.generation == number);
            if number < self.current.number
                && !is_kept
                && let Err(error) = self.storage.remove(number)
            {
                tracing::warn!(number, %error, "remove a generation that is not needed");
            }
        }
    }

    fn places(&self) -> impl Iterator<Item = &Place> {
        self.older.iter().chain([&self.current])
    }

    /// The generation that holds a completed checkpoint.
    fn place_of(&self, checkpoint: u64) -> Result<&Place> {
        self.places().find(|place| place.checkpoints.contains(&checkpoint)).ok_or_else(|| {
            StorageError::damaged(format!("checkpoint {checkpoint}"), "it is not in the store")
        })
    }

    /// True for a checkpoint whose snapshots increments can follow.
    #[must_use]
    pub fn is_current(&self, checkpoint: u64) -> bool {
        self.current.checkpoints.contains(&checkpoint)
    }

    /// Every checkpoint that is kept, ascending.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<u64> {
        self.places().flat_map(|place| place.checkpoints.iter().copied()).collect()
    }

    /// An id above every one that was ever used for a snapshot.
    #[must_use]
    pub fn next_id(&self) -> u64 {
        self.highest_id + 1
    }

    /// What is damaged in the generations of its checkpoints, though everything can still be read.
    #[must_use]
    pub fn flaws(&self) -> Vec<String> {
        self.places().flat_map(|place| place.generation.flaws()).collect()
    }

    /// Where the store is, for messages.
    #[must_use]
    pub fn location(&self) -> String {
        self.storage.location()
    }

    /// Tasks begin a new attempt: their chains go on from this checkpoint, or anew.
    ///
    /// # Errors
    /// Where its manifest cannot be read.
    pub fn begin_attempt(&mut self, tasks: &[usize], restored_from: Option<u64>) -> Result<()> {
        self.unwritten.retain(|(task, ..)| !tasks.contains(task));
        let manifest = restored_from
            .map(|id| read_manifest(&*self.current.generation, &manifest_key(id)))
            .transpose()?;
        for &task in tasks {
            let entry = manifest.as_ref().and_then(|manifest| manifest.tasks.get(task));
            let chain = &mut self.chains[task];
            *chain = entry.map_or_else(Chain::default, |entry| chain.back_to(&entry.chain));
        }
        // Not now: the tasks are waiting to run.
        self.has_leftovers = true;
        Ok(())
    }

    /// Snapshots that neither a kept checkpoint nor a running task stands on belong to checkpoints
    /// that will never complete, or to ones that are not kept; as do manifests that the head does not name.
    fn delete_leftovers(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.has_leftovers) {
            return Ok(());
        }
        let mut reachable: BTreeSet<(usize, u64)> = BTreeSet::new();
        for (task, chain) in self.chains.iter().enumerate() {
            reachable.extend(chain.ids().map(|id| (task, id)));
        }
        for checkpoint in &self.current.checkpoints {
            let manifest = read_manifest(&*self.current.generation, &manifest_key(*checkpoint))?;
            for (task, entry) in manifest.tasks.iter().enumerate() {
                reachable.extend(entry.chain.iter().map(|id| (task, *id)));
            }
        }
        for key in self.current.generation.keys(b"s")? {
            if key_parts(&key).is_none_or(|parts| !reachable.contains(&parts)) {
                self.current.generation.delete(&key)?;
            }
        }
        let kept: BTreeSet<Vec<u8>> =
            self.current.checkpoints.iter().map(|id| manifest_key(*id)).collect();
        for key in self.current.generation.keys(b"m")? {
            if !kept.contains(&key) {
                self.current.generation.delete(&key)?;
            }
        }
        Ok(())
    }

    /// Reads the manifest of a completed checkpoint.
    ///
    /// # Errors
    /// Where it is missing or damaged.
    pub fn manifest(&self, checkpoint: u64) -> Result<Manifest> {
        read_manifest(&*self.place_of(checkpoint)?.generation, &manifest_key(checkpoint))
    }

    /// Writes snapshots and flushes once: all of them are durable afterwards, or the error is for
    /// all. Gives the bytes written for each.
    ///
    /// # Errors
    /// The store's. The snapshots are tried again with the next ones.
    pub fn write(&mut self, snapshots: Vec<(usize, u64, Arc<TaskSnapshot>)>) -> Result<Vec<u64>> {
        // Before anything can fail: an increment that is lost is a gap in its chain.
        let first = self.unwritten.len();
        self.unwritten.extend(snapshots);
        let pending = std::mem::take(&mut self.unwritten);
        // Where the disk is slower than checkpoints are given up, only what is new of them is written.
        let needed_from = self.needed_from;
        let is_given_up = |(_, id, _): &Unwritten| *id < needed_from;
        let (pending, places) = folded(pending, &self.tasks, is_given_up);
        let written = self.tidied().and_then(|()| self.write_all(&pending));
        match written {
            Ok(written) => {
                let mut all = Vec::with_capacity(pending.len());
                for ((task, checkpoint, snapshot), parts) in pending.iter().zip(written) {
                    let bytes = parts.iter().map(|(_, written)| written.bytes).sum();
                    let async_us = snapshot.taken_at.map_or(0, |at| micros(at.elapsed()));
                    let stats = SnapshotStats { bytes, async_us, ..snapshot.stats };
                    self.stats.insert((*checkpoint, *task), stats);
                    let chain = &mut self.chains[*task];
                    parts.into_iter().for_each(|(id, written)| chain.push(id, written));
                    all.push(bytes);
                }
                Ok(places[first..].iter().map(|place| all[*place]).collect())
            }
            Err(error) => {
                self.unwritten = kept_for_later(pending, &self.tasks);
                self.reopened(error)
            }
        }
    }

    /// Opens the generation again if an error has closed it, and deletes what is left over, if that can be.
    fn tidied(&mut self) -> Result<()> {
        self.current.generation.reopen()?;
        if let Err(error) = self.delete_leftovers() {
            tracing::debug!(%error, "what is left over stays until the next write");
            self.has_leftovers = true;
            self.current.generation.reopen()?;
        }
        Ok(())
    }

    /// Gives what was written for each: it, and before it what was carried forward.
    fn write_all(&mut self, snapshots: &[Unwritten]) -> Result<Vec<Vec<(u64, Written)>>> {
        let highest = snapshots.iter().map(|(_, checkpoint, _)| *checkpoint).max().unwrap_or(0);
        self.highest_id = self.highest_id.max(highest);
        let mut all = Vec::with_capacity(snapshots.len());
        for (at, (task, checkpoint, snapshot)) in snapshots.iter().enumerate() {
            let mut parts = Vec::new();
            // Where the chain ends is known only of the first of a task.
            let is_next = snapshots[..at].iter().all(|(other, ..)| other != task);
            let id = carried_with(*checkpoint);
            let carried = if is_next { self.put_carried(*task, id, snapshot) } else { Ok(None) };
            match carried {
                Ok(carried) => parts.extend(carried.map(|written| (id, written))),
                // What is written now is whole whether or not something older can be read.
                Err(NotCarried::Unread(error)) => {
                    tracing::warn!(%error, "what a checkpoint stands on cannot be read");
                    self.has_leftovers = true;
                }
                Err(NotCarried::Unwritten(error)) => return Err(error),
            }
            parts.push(self.put_snapshot(*task, *checkpoint, snapshot)?);
            all.push(parts);
        }
        self.current.generation.flush()?;
        Ok(all)
    }

    fn put_snapshot(
        &mut self,
        task: usize,
        id: u64,
        snapshot: &TaskSnapshot,
    ) -> Result<(u64, Written)> {
        let groups = self.tasks[task].max_parallelism;
        let generation = &mut *self.current.generation;
        let mut writer = PackWriter::new(generation, task, id, self.is_compressing);
        let declared = snapshot.declared.as_ref().map(|changes| changes.run(groups));
        Ok((id, writer.snapshot(snapshot, declared)?))
    }

    /// Writes what is to be carried forward with the next snapshot, if there is something: see
    /// [`super::chain`].
    fn put_carried(
        &mut self,
        task: usize,
        id: u64,
        next: &TaskSnapshot,
    ) -> std::result::Result<Option<Written>, NotCarried> {
        let chain = &self.chains[task];
        let completed = self.current.checkpoints.last().copied().unwrap_or(0);
        let mut given_up = chain.given_up(completed, self.needed_from);
        // Pages go forward only with others.
        if next.memory.is_none() && given_up.iter().any(|id| chain.live_packs(*id).next().is_some())
        {
            given_up.clear();
        }
        let memory = match &next.memory {
            Some(memory) => {
                let pages = self.carried_pages(task, memory, &given_up);
                pages.map_err(NotCarried::Unread)?.map(Arc::new)
            }
            None => None,
        };
        if memory.is_none() && given_up.is_empty() {
            return Ok(None);
        }
        let mut carried = TaskSnapshot { memory, ..TaskSnapshot::default() };
        let (mut declared_packs, mut bytes) = (None, 0);
        if !given_up.is_empty() {
            for id in &given_up {
                let header = read_header(&*self.current.generation, task, *id);
                let header = header.map_err(NotCarried::Unread)?;
                carried.is_declared_whole |= header.is_declared_whole;
            }
            let (packs, packs_bytes) = self.put_merged(task, id, &given_up)?;
            (declared_packs, bytes) = (Some(packs), packs_bytes);
        }
        let generation = &mut *self.current.generation;
        let mut writer = PackWriter::new(generation, task, id, self.is_compressing);
        let written = writer.snapshot_with(&carried, declared_packs);
        let written = written.map_err(NotCarried::Unwritten)?;
        Ok(Some(Written { bytes: written.bytes + bytes, replaces: given_up, ..written }))
    }

    /// Writes the declared state of several snapshots as one, a part at a time: it may be larger than the
    /// memory. Gives the number of packs, and their bytes.
    fn put_merged(
        &mut self,
        task: usize,
        id: u64,
        of: &[u64],
    ) -> std::result::Result<(u32, u64), NotCarried> {
        let (mut packs, mut bytes, mut next_group) = (0, 0, Some(0));
        while let Some(group) = next_group {
            let generation = &*self.current.generation;
            let part = declared_of(generation, task, of, Some(group..u32::MAX))
                .and_then(|rest| first_part(Box::new(rest), MERGED_AT_ONCE));
            let (part, next) = part.map_err(NotCarried::Unread)?;
            let generation = &mut *self.current.generation;
            let mut writer = PackWriter::new(generation, task, id, self.is_compressing);
            let written = writer.declared(packs, Box::new(part.into_iter().map(Ok)));
            packs = written.map_err(NotCarried::Unwritten)?;
            (bytes, next_group) = (bytes + writer.bytes, next);
        }
        Ok((packs, bytes))
    }

    /// The pages that count of snapshots which are sparse, or were given up.
    fn carried_pages(
        &self,
        task: usize,
        memory: &MemorySnapshot,
        given_up: &[u64],
    ) -> Result<Option<MemorySnapshot>> {
        let chain = &self.chains[task];
        let packs: Vec<PackPages> = (0..)
            .zip(&memory.memories)
            .map(|(memory, delta)| (memory, delta.pages().map(|(page, _)| page).collect()))
            .collect();
        let sparse = chain.sparse_without(&packs);
        if sparse.is_empty() && given_up.is_empty() {
            return Ok(None);
        }
        let is_new: Vec<BTreeSet<u32>> =
            packs.into_iter().map(|(_, pages)| pages.into_iter().collect()).collect();
        let empty = |delta: &MemoryDelta| MemoryDelta::new(delta.size_bytes());
        let mut carried: Vec<MemoryDelta> = memory.memories.iter().map(empty).collect();
        let generation = &*self.current.generation;
        for id in sparse.iter().chain(given_up) {
            let header = read_header(generation, task, *id)?;
            for pack in chain.live_packs(*id) {
                let of = (task, *id);
                let (pack, start) = read_pack(generation, of, &header, KIND_MEMORY, pack as u32)?;
                each_page(&pack[start..], |memory, page, bytes| {
                    let place = memory as usize;
                    let is_due = chain.owner(memory, page) == *id
                        && is_new.get(place).is_some_and(|new| !new.contains(&page));
                    if is_due && let Some(delta) = carried.get_mut(place) {
                        delta.push(page, bytes);
                    }
                })
                .ok_or_else(|| cut_short(of.0, of.1))?;
            }
        }
        Ok(Some(MemorySnapshot { memories: carried, ..MemorySnapshot::default() }))
    }

    /// The state of every task as of a checkpoint that all of them have acked.
    fn manifest_of(&self, checkpoint: u64, written_at_ms: u64) -> Manifest {
        let tasks = self.tasks.iter().zip(&self.chains).enumerate();
        let tasks = tasks.map(|(task, (identity, chain))| ManifestTask {
            identity: identity.clone(),
            chain: chain.as_of(checkpoint),
            stats: self.stats.get(&(checkpoint, task)).copied().unwrap_or_default(),
        });
        let (job, lineage) = (self.job.clone(), self.lineage.clone());
        Manifest { job, lineage, checkpoint, written_at_ms, tasks: tasks.collect() }
    }

    /// Makes a checkpoint complete: writes the manifest of the chains as they are, and flushes.
    ///
    /// # Errors
    /// Where the manifest is known not to be there; or, with [`StorageError::InDoubt`], is not.
    pub fn complete(&mut self, checkpoint: u64, written_at_ms: u64) -> Result<()> {
        let manifest = self.manifest_of(checkpoint, written_at_ms);
        let key = manifest_key(checkpoint);
        let value = seal(&key, &manifest.encode()?);
        // Before a checkpoint that cannot do without them.
        let components = if self.has_components { Vec::new() } else { self.needed_components() };
        let generation = &mut *self.current.generation;
        let mut put = || -> Result<()> {
            if put_components(&components, generation)? {
                generation.flush()?;
            }
            generation.put(&key, &value)?;
            generation.flush()
        };
        if let Err(error) = put() {
            // No head names it, so it is not there.
            return self.reopened(error);
        }
        self.has_components = true;
        let mut head = self.head.clone();
        head.generation = self.current.number;
        let checksum = manifest_checksum(&manifest)?;
        let (generation, end) = (self.current.number, self.current.generation.end());
        head.checkpoints.push(Kept { checkpoint, generation, end, checksum });
        head.checkpoints.sort_unstable_by_key(|kept| kept.checkpoint);
        self.commit_head(head, checkpoint)?;
        self.current.checkpoints.push(checkpoint);
        self.current.checkpoints.sort_unstable();
        // Older ones that are still pending lose theirs with it, which is all they lose.
        self.stats.retain(|(pending, _), _| checkpoint < *pending);
        Ok(())
    }

    /// Writes the state as of a checkpoint that all tasks have acked into a store of its own: one
    /// generation, every chain merged, nothing outside of it needed.
    ///
    /// # Errors
    /// Where it could not be written; what is there then is no checkpoint.
    pub fn export(
        &self,
        checkpoint: u64,
        written_at_ms: u64,
        target: &mut dyn Storage,
    ) -> Result<u64> {
        let manifest = self.manifest_of(checkpoint, written_at_ms);
        let mut generation = target.open(1, 0)?;
        let from = &*self.current.generation;
        let merged = |task: usize| {
            let (identity, chain) = (&manifest.tasks[task].identity, &manifest.tasks[task].chain);
            let loaded = load_chain(from, task, chain)?;
            let declared: Option<Entries<'_>> = if !identity.has_declared {
                None
            } else if is_in_image(from, task, chain)? {
                // A savepoint can be read anywhere, without the component.
                Some(self.read_out(task, &loaded.memory)?.into_entries())
            } else {
                Some(declared_of(from, task, chain, None)?.live())
            };
            Ok((merge(&loaded), declared))
        };
        let (manifest, written) =
            write_merged(&merged, &manifest, self.is_compressing, &mut *generation)?;
        let checksum = manifest_checksum(&manifest)?;
        let head = Head {
            sequence: 1,
            generation: 1,
            highest_id: checkpoint,
            checkpoints: vec![Kept { checkpoint, generation: 1, end: generation.end(), checksum }],
        };
        for copy in 0..2 {
            target.write_head(copy, &head.encode()?)?;
        }
        Ok(written.iter().map(|written| written.bytes).sum())
    }

    fn read_out(&self, task: usize, memory: &[MemorySnapshot]) -> Result<Run> {
        let name = self.tasks[task].name();
        let failed =
            |why: String| StorageError::store("read declared state out", format!("{name}: {why}"));
        let Some(read_out) = &self.read_out else {
            return Err(failed("there is no component to do it".to_owned()));
        };
        let image = Image::of(memory).map_err(|error| failed(error.to_string()))?;
        read_out.read(task, &image).map_err(failed)
    }

    /// Forgets a completed checkpoint, gives back the space of what nothing stands on any more, and
    /// compacts if it is time. `oldest_pending` may still need what the newest does not.
    ///
    /// # Errors
    /// The store's; the newest checkpoint is whole all the same.
    pub fn subsume(
        &mut self,
        checkpoint: u64,
        newest: u64,
        oldest_pending: Option<u64>,
    ) -> Result<()> {
        self.delete(checkpoint)?;
        self.release(oldest_pending.map_or(newest, |pending| pending.min(newest)));
        self.delete_leftovers()?;
        let longest = self.chains.iter().map(Chain::len).max().unwrap_or(0);
        let all = self.chains.iter().map(Chain::footprint);
        let Footprint { live, garbage } = all.fold(Footprint::default(), |sum, it| Footprint {
            live: sum.live + it.live,
            garbage: sum.garbage + it.garbage,
        });
        let is_outgrown = COMPACT_BYTES_MIN.max(live / 2) < garbage;
        // An older one that is pending stands on snapshots which the merged one would replace.
        let is_newest = oldest_pending.is_none_or(|pending| newest < pending);
        if is_newest && (is_outgrown || CHAIN_LENGTH_MAX < longest) {
            self.compact(newest)?;
        }
        Ok(())
    }

    /// No checkpoint before this one will complete any more: snapshots that later ones have replaced go
    /// with the next write.
    pub fn release(&mut self, needed_from: u64) {
        self.needed_from = self.needed_from.max(needed_from);
        for chain in &mut self.chains {
            self.has_leftovers |= chain.drop_dead(needed_from);
        }
    }

    /// Removes a completed checkpoint; its generation goes with the last one in it.
    ///
    /// # Errors
    /// The store's.
    pub fn delete(&mut self, checkpoint: u64) -> Result<()> {
        let is_other = |id: &u64| *id != checkpoint;
        let mut head = self.head.clone();
        head.checkpoints.retain(|kept| is_other(&kept.checkpoint));
        if head != self.head {
            self.commit_head(head, checkpoint)?;
        }
        if self.current.checkpoints.contains(&checkpoint) {
            self.current.checkpoints.retain(is_other);
            self.has_leftovers = true;
        }
        for place in &mut self.older {
            place.checkpoints.retain(is_other);
        }
        self.remove_empty_generations()
    }

    fn remove_empty_generations(&mut self) -> Result<()> {
        let (empty, kept) =
            std::mem::take(&mut self.older).into_iter().partition(|p| p.checkpoints.is_empty());
        self.older = kept;
        let empty: Vec<Place> = empty;
        for Place { number, generation, .. } in empty {
            drop(generation);
            self.storage.remove(number)?;
        }
        Ok(())
    }

    /// Merges the chains of a completed checkpoint into a new generation. The old one goes, unless
    /// an older checkpoint in it is kept.
    ///
    /// # Errors
    /// The store's; the old generation is then still there and in use.
    pub fn compact(&mut self, checkpoint: u64) -> Result<()> {
        let manifest = self.manifest(checkpoint)?;
        // Increments taken since belong to a checkpoint that is still pending: they would be lost.
        let is_settled = manifest
            .tasks
            .iter()
            .zip(&self.chains)
            .all(|(task, chain)| chain.ids().eq(task.chain.iter().copied()));
        if !is_settled || !self.unwritten.is_empty() {
            return Ok(());
        }
        self.begin_generation(|store, next| {
            let from = &*store.current.generation;
            copy_merged(from, &manifest, store.is_compressing, next)
        })
    }

    /// Makes a checkpoint of other tasks, or of another store, the newest of this one, from the
    /// whole state of each task. Declared state is read meanwhile, from this store or from `other`.
    ///
    /// # Errors
    /// The store's; what was there before is then still in use.
    pub fn import(
        &mut self,
        checkpoint: u64,
        written_at_ms: u64,
        other: Option<&Self>,
        shares: &[Share],
    ) -> Result<()> {
        self.highest_id = self.highest_id.max(checkpoint);
        self.begin_generation(|store, next| {
            let tasks = store.tasks.iter().map(|identity| ManifestTask {
                identity: identity.clone(),
                chain: Vec::new(),
                stats: SnapshotStats::default(),
            });
            let (job, lineage) = (store.job.clone(), store.lineage.clone());
            let tasks = tasks.collect();
            let manifest = Manifest { job, lineage, checkpoint, written_at_ms, tasks };
            let from = other.unwrap_or(store);
            let merged = |task: usize| {
                let share = &shares[task];
                let declared = match &share.converted {
                    // Packs beside the pages of a task that hands nothing over would be older than they are
                    // from its next checkpoint on.
                    _ if share.is_in_image || !store.tasks[task].has_declared => None,
                    Some(run) => Some(run.entries(None)),
                    None => Some(share.entries(from, checkpoint)?),
                };
                Ok((merge(&share.state), declared))
            };
            write_merged(&merged, &manifest, store.is_compressing, next)
        })
    }

    /// Fills a new generation and goes on in it. `fill` gives the manifest that it wrote, and what of
    /// each task.
    fn begin_generation(
        &mut self,
        fill: impl FnOnce(&Self, &mut dyn Generation) -> Result<(Manifest, Vec<Written>)>,
    ) -> Result<()> {
        let numbers = self.storage.generations()?;
        // A generation without anything in it need not be listed.
        let number = numbers.last().copied().unwrap_or(0).max(self.current.number) + 1;
        let mut next = self.storage.open(number, 0)?;
        let components = self.needed_components();
        let filled = put_components(&components, &mut *next).and_then(|_| fill(self, &mut *next));
        let (manifest, written) = match filled {
            Ok(filled) => filled,
            Err(error) => {
                drop(next);
                self.storage.remove(number)?;
                return Err(error);
            }
        };
        let checkpoint = manifest.checkpoint;
        let mut head = self.head.clone();
        // From here on the new one counts; the same checkpoint in an older generation may be of another
        // parallelism.
        head.checkpoints.retain(|kept| kept.checkpoint != checkpoint);
        let checksum = manifest_checksum(&manifest)?;
        head.checkpoints.push(Kept { checkpoint, generation: number, end: next.end(), checksum });
        head.checkpoints.sort_unstable_by_key(|kept| kept.checkpoint);
        head.generation = number;
        // What is in doubt is not removed: the next run sees which one the head names.
        self.commit_head(head, checkpoint)?;
        self.has_components = true;
        self.chains = written.into_iter().map(|it| Chain::begun_with(checkpoint, it)).collect();
        let next = Place { number, generation: next, checkpoints: vec![checkpoint] };
        let old = std::mem::replace(&mut self.current, next);
        self.older.push(old);
        for place in &mut self.older {
            place.checkpoints.retain(|id| *id != checkpoint);
        }
        self.remove_empty_generations()
    }

    /// Reads a task's declared state as of a completed checkpoint, entry by entry.
    ///
    /// # Errors
    /// Where its manifest is missing or damaged; an entry is an error where a part of it is.
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
        let generation = &*self.place_of(checkpoint)?.generation;
        let manifest = read_manifest(generation, &manifest_key(checkpoint))?;
        let Some(entry) = manifest.tasks.get(task) else { return Ok(Box::new(std::iter::empty())) };
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
        let place = self.place_of(checkpoint)?;
        let manifest = read_manifest(&*place.generation, &manifest_key(checkpoint))?;
        match manifest.tasks.get(task) {
            Some(entry) => load_chain(&*place.generation, task, &entry.chain),
            None => {
                Err(StorageError::damaged(format!("checkpoint {checkpoint}"), "it has fewer tasks"))
            }
        }
    }

    /// The job has finished: nothing of it is needed any more.
    ///
    /// # Errors
    /// Where something is still there.
    pub fn clear(mut self) -> Result<()> {
        self.write_head(Head { checkpoints: Vec::new(), ..self.head.clone() })?;
        drop((self.current, self.older));
        for number in self.storage.generations()? {
            self.storage.remove(number)?;
        }
        self.storage.remove_heads()
    }
}

/// Snapshots that could not be written, those of one task as one where they take up much: a disk may fail
/// for long. Their checkpoints have been given up, so that what is between them is asked for no more.
fn kept_for_later(pending: Vec<Unwritten>, tasks: &[TaskIdentity]) -> Vec<Unwritten> {
    let is_few = pending.iter().map(|(.., it)| it.bytes()).sum::<u64>() <= FOLD_BYTES_MIN;
    if is_few { pending } else { folded(pending, tasks, |_| true).0 }
}

/// Snapshots that only count together with the next one of their task are made one with that; and where
/// each is among the others then.
fn folded(
    pending: Vec<Unwritten>,
    tasks: &[TaskIdentity],
    counts_with_next: impl Fn(&Unwritten) -> bool,
) -> (Vec<Unwritten>, Vec<usize>) {
    // Those that are to be one, by their numbers.
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (number, (task, ..)) in pending.iter().enumerate() {
        let last = |group: &Vec<usize>| group.last().map(|last| &pending[*last]);
        let of_task =
            groups.iter_mut().rev().find(|group| last(group).is_some_and(|it| it.0 == *task));
        match of_task.filter(|group| last(group).is_some_and(&counts_with_next)) {
            Some(group) => group.push(number),
            None => groups.push(vec![number]),
        }
    }
    let (mut folded, mut places) = (Vec::<Unwritten>::new(), vec![0; pending.len()]);
    for group in groups {
        let (task, id, _) = pending[group[group.len() - 1]];
        let max_parallelism = tasks.get(task).map_or(1, |task| task.max_parallelism);
        let apart: Vec<&TaskSnapshot> = group.iter().map(|number| &*pending[*number].2).collect();
        let one =
            (1 < apart.len()).then(|| TaskSnapshot::as_one(&apart, max_parallelism)).flatten();
        if let Some(one) = one {
            group.into_iter().for_each(|number| places[number] = folded.len());
            folded.push((task, id, Arc::new(one)));
            continue;
        }
        // What the host keeps lies on its disk. The pages alone are made one, in the last.
        let memories: Vec<&MemorySnapshot> =
            apart.iter().filter_map(|it| it.memory.as_deref()).collect();
        let merged =
            (1 < memories.len()).then(|| MemorySnapshot::merged(memories)).flatten().map(Arc::new);
        for number in group {
            places[number] = folded.len();
            let (_, of, snapshot) = &pending[number];
            let memory = if *of == id { merged.clone() } else { None };
            folded.push((
                task,
                *of,
                match &merged {
                    Some(_) => Arc::new(snapshot.with_memory(memory)),
                    None => snapshot.clone(),
                },
            ));
        }
    }
    (folded, places)
}

/// Entries under the numbers that their states have now, in the order of their keys.
fn renumbered<'a>(
    entries: impl Iterator<Item = Result<Entry>> + 'a,
    states: &'a [Option<u32>],
) -> Result<Entries<'a>> {
    let is_as_before = (0..).zip(states).all(|(old, new)| *new == Some(old));
    if states.is_empty() || is_as_before {
        return Ok(Box::new(entries));
    }
    let mut entries = entries.peekable();
    // Numbers come behind key groups in the order of keys: each group is sorted by itself.
    let mut group = VecDeque::new();
    Ok(Box::new(std::iter::from_fn(move || {
        while group.is_empty() {
            let first = match entries.next()? {
                Ok(first) => first,
                Err(error) => return Some(Err(error)),
            };
            let number = first.0.key_group;
            let is_same =
                |it: &Result<Entry>| it.as_ref().is_ok_and(|(key, _)| key.key_group == number);
            let others = std::iter::from_fn(|| entries.next_if(is_same)).filter_map(Result::ok);
            group.extend(std::iter::once(first).chain(others).filter_map(|(mut key, value)| {
                key.state = (*states.get(key.state as usize)?)?;
                Some((key, value))
            }));
            group.make_contiguous().sort_by(|(left, _), (right, _)| left.cmp(right));
        }
        group.pop_front().map(Ok)
    })))
}

/// Copies a checkpoint, every chain merged into one full snapshot. Gives its manifest and what was
/// written of each task.
fn copy_merged(
    from: &dyn Generation,
    manifest: &Manifest,
    is_compressing: bool,
    next: &mut dyn Generation,
) -> Result<(Manifest, Vec<Written>)> {
    let merged = |task: usize| {
        let ManifestTask { identity, chain, .. } = &manifest.tasks[task];
        let snapshot = merge(&load_chain(from, task, chain)?);
        let declared = match !identity.has_declared || is_in_image(from, task, chain)? {
            true => None,
            false => Some(declared_of(from, task, chain, None)?.live()),
        };
        Ok((snapshot, declared))
    };
    write_merged(&merged, manifest, is_compressing, next)
}

/// Writes one full snapshot of every task, flushes, writes the manifest, flushes. The chains of
/// `manifest` are not looked at: each becomes that snapshot.
fn write_merged<'a>(
    merged: &dyn Fn(usize) -> Result<(TaskSnapshot, Option<Entries<'a>>)>,
    manifest: &Manifest,
    is_compressing: bool,
    next: &mut dyn Generation,
) -> Result<(Manifest, Vec<Written>)> {
    let checkpoint = manifest.checkpoint;
    let mut written = Vec::with_capacity(manifest.tasks.len());
    let mut tasks = Vec::with_capacity(manifest.tasks.len());
    for (task, entry) in manifest.tasks.iter().enumerate() {
        let identity = entry.identity.clone();
        let (snapshot, declared) = merged(task)?;
        let mut writer = PackWriter::new(next, task, checkpoint, is_compressing);
        written.push(writer.snapshot(&snapshot, declared)?);
        tasks.push(ManifestTask { identity, chain: vec![checkpoint], stats: entry.stats });
    }
    next.flush()?;
    let merged = Manifest { tasks, ..manifest.clone() };
    let key = manifest_key(checkpoint);
    next.put(&key, &seal(&key, &merged.encode()?))?;
    next.flush()?;
    Ok((merged, written))
}

fn load_chain(generation: &dyn Generation, task: usize, chain: &[u64]) -> Result<LoadedTask> {
    let mut loaded = LoadedTask::default();
    for checkpoint in chain {
        read_snapshot(generation, task, *checkpoint, &mut loaded)?;
    }
    Ok(loaded)
}

fn read_manifest(generation: &dyn Generation, key: &[u8]) -> Result<Manifest> {
    read_manifest_as_stored(generation, key).map(|(manifest, _)| manifest)
}

/// A manifest, and the checksum of its bytes, which may be of an earlier format.
fn read_manifest_as_stored(generation: &dyn Generation, key: &[u8]) -> Result<(Manifest, u64)> {
    let checkpoint = key.last_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    let name = format!("the manifest of checkpoint {checkpoint}");
    let Some(framed) = generation.get(key)? else {
        return Err(StorageError::damaged(name, "it is not there"));
    };
    let bytes = unseal(&name, key, &framed)?;
    Ok((Manifest::decode(&name, bytes)?, twox_hash::XxHash3_64::oneshot(bytes)))
}

struct PackWriter<'a> {
    generation: &'a mut dyn Generation,
    task: usize,
    checkpoint: u64,
    is_compressing: bool,
    bytes: u64,
    /// One value, with its checksum in front.
    framed: Vec<u8>,
}

impl<'a> PackWriter<'a> {
    fn new(
        generation: &'a mut dyn Generation,
        task: usize,
        checkpoint: u64,
        is_compressing: bool,
    ) -> Self {
        Self { generation, task, checkpoint, is_compressing, bytes: 0, framed: Vec::new() }
    }

    /// Writes all of a snapshot, with this run of declared state.
    fn snapshot(
        &mut self,
        snapshot: &TaskSnapshot,
        declared: Option<Entries<'_>>,
    ) -> Result<Written> {
        let declared_packs = declared.map(|run| self.declared(0, run)).transpose()?;
        self.snapshot_with(snapshot, declared_packs)
    }

    /// The same where the packs of declared state are written already.
    fn snapshot_with(
        &mut self,
        snapshot: &TaskSnapshot,
        declared_packs: Option<u32>,
    ) -> Result<Written> {
        let holds_declared = declared_packs.is_some();
        let declared_packs = declared_packs.unwrap_or(0);
        let packs = match &snapshot.memory {
            Some(memory) => self.memory(memory)?,
            None => Vec::new(),
        };
        let in_flight_packs = self.in_flight(&snapshot.in_flight)?;
        let memory = snapshot.memory.as_deref();
        let sizes = |memory: &MemorySnapshot| {
            memory
                .memories
                .iter()
                .map(|delta| (delta.size_bytes(), delta.page_count() as u64))
                .collect()
        };
        let header = Header {
            state: snapshot.state.clone(),
            is_drained: snapshot.is_drained,
            inventory: INVENTORY,
            globals: memory.map_or_else(Vec::new, |memory| memory.globals.clone()),
            monotonic_ns: memory.map_or(0, |memory| memory.monotonic_ns),
            memories: memory.map_or_else(Vec::new, sizes),
            memory_packs: packs.len() as u32,
            declared_packs,
            is_declared_whole: snapshot.is_declared_whole,
            holds_declared,
            in_flight_packs,
            is_compressed: self.is_compressing,
        };
        let payload = postcard::to_stdvec(&header)
            .map_err(|error| StorageError::store("encode a header", error))?;
        self.put(KIND_HEADER, 0, |value| value.extend_from_slice(&payload))?;
        let is_lasting = 0 < declared_packs || snapshot.is_declared_whole;
        Ok(Written { bytes: self.bytes, packs, is_lasting, replaces: Vec::new() })
    }

    fn put(&mut self, kind: u8, sequence: u32, fill: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let key = value_key(self.checkpoint, self.task, kind, sequence);
        seal_into(&mut self.framed, &key, fill);
        self.bytes += (key.len() + self.framed.len()) as u64;
        self.generation.put(&key, &self.framed)
    }

    fn put_pack(&mut self, kind: u8, sequence: u32, fill: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        if !self.is_compressing {
            return self.put(kind, sequence, fill);
        }
        let mut payload = Vec::new();
        fill(&mut payload);
        let packed = lz4_flex::compress_prepend_size(&payload);
        self.put(kind, sequence, |value| value.extend_from_slice(&packed))
    }

    /// A pack is what was on its way in one channel.
    fn in_flight(&mut self, channels: &[ChannelState]) -> Result<u32> {
        for (sequence, channel) in (0..).zip(channels) {
            let payload = postcard::to_stdvec(channel)
                .map_err(|error| StorageError::store("encode records in flight", error))?;
            self.put_pack(KIND_IN_FLIGHT, sequence, |value| value.extend_from_slice(&payload))?;
        }
        Ok(channels.len() as u32)
    }

    /// A pack is the memory's number, a count, that many page numbers, and the pages. Gives the pages of
    /// each.
    fn memory(&mut self, snapshot: &MemorySnapshot) -> Result<Vec<PackPages>> {
        let mut packs = Vec::new();
        for (memory, delta) in (0u32..).zip(&snapshot.memories) {
            let pages: Vec<(u32, &[u8])> = delta.pages().collect();
            for pack in pages.chunks(PACK_PAGES) {
                self.put_pack(KIND_MEMORY, packs.len() as u32, |value| {
                    value.extend_from_slice(&memory.to_le_bytes());
                    value.extend_from_slice(&(pack.len() as u32).to_le_bytes());
                    pack.iter().for_each(|(page, _)| value.extend_from_slice(&page.to_le_bytes()));
                    pack.iter().for_each(|(_, bytes)| value.extend_from_slice(bytes));
                })?;
                packs.push((memory, pack.iter().map(|(page, _)| *page).collect()));
            }
        }
        Ok(packs)
    }

    /// A pack is a list of entries in the order of their keys; no value: removed. Gives the number behind the
    /// last one.
    fn declared(&mut self, mut sequence: u32, run: Entries<'_>) -> Result<u32> {
        each_block(run, PACK_BYTES, |pack| {
            self.declared_pack(sequence, pack)?;
            sequence += 1;
            Ok(())
        })?;
        Ok(sequence)
    }

    fn declared_pack(&mut self, sequence: u32, pack: &[Entry]) -> Result<()> {
        let payload = postcard::to_stdvec(pack)
            .map_err(|error| StorageError::store("encode declared state", error))?;
        self.put_pack(KIND_DECLARED, sequence, |value| value.extend_from_slice(&payload))
    }
}

fn value_name(task: usize, checkpoint: u64) -> String {
    let checkpoint = checkpoint_of(checkpoint);
    format!("the snapshot of task {task} for checkpoint {checkpoint}")
}

fn cut_short(task: usize, checkpoint: u64) -> StorageError {
    StorageError::damaged(value_name(task, checkpoint), "a pack is cut short")
}

fn read_value(
    generation: &dyn Generation,
    task: usize,
    checkpoint: u64,
    kind: u8,
    sequence: u32,
) -> Result<Vec<u8>> {
    let key = value_key(checkpoint, task, kind, sequence);
    let name = || value_name(task, checkpoint);
    let Some(framed) = generation.get(&key)? else {
        return Err(StorageError::damaged(name(), "a part of it is not there"));
    };
    unseal(&name(), &key, &framed)?;
    Ok(framed)
}

fn read_header(generation: &dyn Generation, task: usize, checkpoint: u64) -> Result<Header> {
    let framed = read_value(generation, task, checkpoint, KIND_HEADER, 0)?;
    postcard::from_bytes(&framed[8..])
        .map_err(|error| StorageError::damaged(value_name(task, checkpoint), error))
}

/// A part of a snapshot that may be compressed, and where it begins.
fn read_pack(
    generation: &dyn Generation,
    (task, checkpoint): (usize, u64),
    header: &Header,
    kind: u8,
    sequence: u32,
) -> Result<(Vec<u8>, usize)> {
    let framed = read_value(generation, task, checkpoint, kind, sequence)?;
    // Behind its checksum; not copied to take that off.
    match header.is_compressed {
        true => decompress(&framed[8..])
            .map(|pack| (pack, 0))
            .map_err(|error| StorageError::damaged(value_name(task, checkpoint), error)),
        false => Ok((framed, 8)),
    }
}

/// Whether a task has declared state, and that is in the image of its memory alone. Whether its checkpoints
/// were to hold it does not matter: with `snapshot = "memory"` it is nowhere else.
fn lies_in_image(generation: &dyn Generation, task: usize, entry: &ManifestTask) -> Result<bool> {
    let has_own = !entry.identity.states.is_empty() && !entry.identity.has_host_state;
    Ok(has_own && is_in_image(generation, task, &entry.chain)?)
}

/// Whether what a chain has of declared state is in the image of the memory alone: the newest snapshot
/// that says anything about it has pages and no packs. Packs of earlier ones are older than the pages.
fn is_in_image(generation: &dyn Generation, task: usize, chain: &[u64]) -> Result<bool> {
    for id in chain.iter().rev() {
        let header = read_header(generation, task, *id)?;
        if header.holds_declared {
            return Ok(false);
        }
        if !header.memories.is_empty() || !header.globals.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The declared state of a chain, as one run; that of some key groups alone, where they are given. It must
/// not be in the image alone.
fn declared_of<'a>(
    generation: &'a dyn Generation,
    task: usize,
    chain: &[u64],
    key_groups: Option<Range<u32>>,
) -> Result<Merge<'a>> {
    let headers = chain.iter().map(|id| Ok((*id, read_header(generation, task, *id)?)));
    let headers: Vec<(u64, Header)> = headers.collect::<Result<_>>()?;
    let first = headers.iter().rposition(|(_, header)| header.is_declared_whole).unwrap_or(0);
    let run = |(checkpoint, header): (u64, Header)| {
        let (of, count) = ((task, checkpoint), header.declared_packs);
        let read = move |sequence| {
            let (pack, start) = read_pack(generation, of, &header, KIND_DECLARED, sequence)?;
            postcard::from_bytes::<Vec<Entry>>(&pack[start..])
                .map_err(|error| StorageError::damaged(value_name(of.0, of.1), error))
        };
        let first = match &key_groups {
            Some(groups) => first_pack(count, groups.start, &read)?,
            None => 0,
        };
        let entries = (first..count).flat_map(move |sequence| match read(sequence) {
            Ok(entries) => Box::new(entries.into_iter().map(Ok)) as Entries<'static>,
            Err(error) => Box::new(std::iter::once(Err(error))),
        });
        Ok(within(Box::new(entries), key_groups.clone()))
    };
    Ok(Merge::of(headers.into_iter().skip(first).map(run).collect::<Result<_>>()?))
}

/// The first pack of a run that may hold entries of a key group.
fn first_pack(
    count: u32,
    key_group: u32,
    read: &impl Fn(u32) -> Result<Vec<Entry>>,
) -> Result<u32> {
    let (mut low, mut high) = (0, if key_group == 0 { 0 } else { count });
    while low < high {
        let middle = low.midpoint(high);
        let first = read(middle)?;
        match first.first().is_some_and(|(key, _)| key.key_group < key_group) {
            true => low = middle + 1,
            false => high = middle,
        }
    }
    // The pack before the first that begins with it may end with it.
    Ok(low.saturating_sub(1))
}

fn read_snapshot(
    generation: &dyn Generation,
    task: usize,
    checkpoint: u64,
    into: &mut LoadedTask,
) -> Result<()> {
    let header = read_header(generation, task, checkpoint)?;
    let damaged = |why: &str| StorageError::damaged(value_name(task, checkpoint), why);
    let of = (task, checkpoint);
    let mut bytes = 0;
    let mut read = |kind: u8, sequence: u32| {
        let (pack, start) = read_pack(generation, of, &header, kind, sequence)?;
        bytes += pack.len() as u64;
        Ok::<_, StorageError>((pack, start))
    };
    if !header.memories.is_empty() || !header.globals.is_empty() {
        if header.inventory != INVENTORY {
            let what = format!("the order of memories in {}", value_name(task, checkpoint));
            return Err(StorageError::Format { what, found: header.inventory, known: INVENTORY });
        }
        let mut memories: Vec<MemoryDelta> =
            header.memories.iter().map(|(size, _)| MemoryDelta::new(*size)).collect();
        for sequence in 0..header.memory_packs {
            let (pack, start) = read(KIND_MEMORY, sequence)?;
            unpack_pages(&pack[start..], &mut memories)
                .ok_or_else(|| cut_short(task, checkpoint))?;
        }
        let counts = memories.iter().map(|delta| delta.page_count() as u64);
        if !counts.eq(header.memories.iter().map(|(_, pages)| *pages)) {
            return Err(damaged("pages are missing"));
        }
        let (globals, monotonic_ns) = (header.globals.clone(), header.monotonic_ns);
        into.memory.push(MemorySnapshot { memories, globals, monotonic_ns });
    }
    let in_flight = (0..header.in_flight_packs).map(|sequence| {
        let (pack, start) = read(KIND_IN_FLIGHT, sequence)?;
        postcard::from_bytes(&pack[start..]).map_err(|error| damaged(&error.to_string()))
    });
    into.in_flight = Arc::new(in_flight.collect::<Result<_>>()?);
    into.bytes += bytes;
    into.state = header.state;
    into.is_drained = header.is_drained;
    Ok(())
}

/// The size in front of a block is bounded by that of the block, so that damage which the checksum
/// has missed cannot ask for any amount of memory: LZ4 makes nothing more than 255 times smaller.
fn decompress(block: &[u8]) -> std::result::Result<Vec<u8>, String> {
    let Some((size, block)) = block.split_first_chunk::<4>() else {
        return Err("a block is cut short".to_owned());
    };
    let size = u32::from_le_bytes(*size) as usize;
    if block.len().saturating_mul(255) < size {
        return Err("a block has an impossible size".to_owned());
    }
    lz4_flex::decompress(block, size).map_err(|error| error.to_string())
}

fn unpack_pages(payload: &[u8], memories: &mut [MemoryDelta]) -> Option<()> {
    let mut is_known = true;
    each_page(payload, |memory, page, bytes| match memories.get_mut(memory as usize) {
        Some(delta) => delta.push(page, bytes),
        None => is_known = false,
    })?;
    is_known.then_some(())
}

/// Gives each page of a pack with the number of its memory and its own; `None` where it is cut short.
fn each_page<'a>(payload: &'a [u8], mut take: impl FnMut(u32, u32, &'a [u8])) -> Option<()> {
    let (memory, rest) = payload.split_first_chunk::<4>()?;
    let (count, rest) = rest.split_first_chunk::<4>()?;
    let count = u32::from_le_bytes(*count) as usize;
    let (numbers, pages) = rest.split_at_checked(count.checked_mul(4)?)?;
    if pages.len() != count.checked_mul(PAGE_BYTES)? {
        return None;
    }
    for (number, page) in numbers.as_chunks::<4>().0.iter().zip(pages.chunks_exact(PAGE_BYTES)) {
        take(u32::from_le_bytes(*memory), u32::from_le_bytes(*number), page);
    }
    Some(())
}

/// One full snapshot that says what a chain says, but for declared state.
fn merge(loaded: &LoadedTask) -> TaskSnapshot {
    let memory = MemorySnapshot::merged(&loaded.memory).map(Arc::new);
    let (state, is_drained) = (loaded.state.clone(), loaded.is_drained);
    let in_flight = loaded.in_flight.clone();
    TaskSnapshot { state, is_drained, memory, in_flight, ..TaskSnapshot::default() }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        changes::HostChanges,
        declared::{DeclaredKey, changes_of},
        in_flight::InFlight,
    };

    pub(crate) fn identity() -> TaskIdentity {
        TaskIdentity {
            operator: "count".to_owned(),
            index: 0,
            parallelism: 1,
            max_parallelism: 128,
            digest: Some([1; 16]),
            has_memory: true,
            has_declared: true,
            has_host_state: false,
            uid: "count".to_owned(),
            is_sink: false,
            config: 0,
            is_keyed: true,
            states: Vec::new(),
        }
    }

    fn open() -> SnapshotStore {
        SnapshotStore::open(Box::new(MemoryStorage::default()), "job", vec![identity()])
            .expect("opens")
            .0
    }

    fn snapshot(pages: &[(u32, u8)], entries: &[(&str, Option<u8>)]) -> Arc<TaskSnapshot> {
        let mut delta = MemoryDelta::new(1 << 20);
        pages.iter().for_each(|(page, byte)| delta.push(*page, &[*byte; PAGE_BYTES]));
        let entries: Vec<Entry> = entries
            .iter()
            .map(|(key, value)| {
                (DeclaredKey::new(0, key.as_bytes(), 0, 128), value.map(|value| vec![value]))
            })
            .collect();
        Arc::new(TaskSnapshot {
            state: vec![pages.len() as u8],
            is_drained: false,
            memory: Some(Arc::new(MemorySnapshot {
                memories: vec![delta],
                globals: vec![5],
                monotonic_ns: 1,
            })),
            declared: Some(Arc::new(Changes::Guest(vec![changes_of(entries.iter())]))),
            ..TaskSnapshot::default()
        })
    }

    type Contents = (BTreeMap<u32, u8>, Vec<(Vec<u8>, Vec<u8>)>);

    /// Page -> byte of the whole state, and its declared entries.
    fn contents(store: &SnapshotStore, checkpoint: u64) -> Contents {
        let loaded = store.load(0, checkpoint).expect("whole");
        let pages = loaded.memory.iter().flat_map(|snapshot| snapshot.memories[0].pages());
        let pages = pages.map(|(page, bytes)| (page, bytes[0])).collect();
        let entries = store.declared(0, checkpoint).expect("whole");
        let mut entries: Vec<_> = entries
            .map(|entry| entry.map(|(key, value)| (key.key, value.unwrap_or_default())))
            .collect::<Result<_>>()
            .expect("whole");
        entries.sort();
        (pages, entries)
    }

    fn written(store: &mut SnapshotStore) {
        let steps = [
            (1, snapshot(&[(0, 1), (1, 1), (40, 1)], &[("a", Some(1)), ("b", Some(1))])),
            (2, snapshot(&[(1, 2)], &[("b", None), ("c", Some(2))])),
            (3, snapshot(&[(40, 3), (41, 3)], &[("a", Some(3))])),
        ];
        for (checkpoint, snapshot) in steps {
            store.write(vec![(0, checkpoint, snapshot)]).expect("written");
            store.complete(checkpoint, 0).expect("complete");
        }
    }

    #[test]
    fn state_is_the_sum_of_its_chain_and_survives_compaction() {
        let mut store = open();
        written(&mut store);
        let pages = BTreeMap::from([(0, 1), (1, 2), (40, 3), (41, 3)]);
        let entries = vec![(b"a".to_vec(), vec![3]), (b"c".to_vec(), vec![2])];
        assert_eq!(contents(&store, 3), (pages.clone(), entries.clone()));
        store.compact(3).expect("compacts");
        assert_eq!(store.storage.generations().expect("listed"), [1, 2], "1 and 2 are kept");
        (1..=2).for_each(|id| store.delete(id).expect("deleted"));
        assert_eq!(store.storage.generations().expect("listed"), [2]);
        assert_eq!(contents(&store, 3), (pages.clone(), entries.clone()));
        store.write(vec![(0, 4, snapshot(&[(7, 4)], &[]))]).expect("written");
        store.complete(4, 0).expect("complete");
        assert_eq!(contents(&store, 4).0.get(&7), Some(&4));
        assert_eq!(contents(&store, 4).1, entries);
    }

    #[test]
    fn key_groups_are_read_without_what_lies_around_them() {
        let mut store = open();
        for checkpoint in 1..=3_u8 {
            let keys: Vec<String> = (0..9_000_u32)
                .filter(|at| at % 3 <= u32::from(checkpoint))
                .map(|at| format!("key {at}"))
                .collect();
            let value = |at: usize| (at % 7 != usize::from(checkpoint)).then_some(checkpoint);
            let entries: Vec<_> =
                keys.iter().enumerate().map(|(at, key)| (key.as_str(), value(at))).collect();
            let id = u64::from(checkpoint);
            store.write(vec![(0, id, snapshot(&[], &entries))]).expect("written");
            store.complete(id, 0).expect("complete");
        }
        let read = |groups: Option<Range<u32>>| -> Vec<Entry> {
            store.declared_within(0, 3, groups).and_then(Iterator::collect).expect("whole")
        };
        let all = read(None);
        assert!(7_000 < all.len());
        for groups in [0..128, 0..1, 5..6, 31..64, 100..u32::MAX, 127..128, 60..60] {
            let owned = all.iter().filter(|(key, _)| groups.contains(&key.key_group));
            assert!(owned.eq(&read(Some(groups.clone()))), "{groups:?}");
        }
        // Of the packs of each snapshot those that are behind the first group are not even looked for.
        let packs = |groups: Range<u32>| {
            let read = |sequence: u32| {
                assert!(sequence < 64);
                Ok(vec![(
                    DeclaredKey { key_group: 2 * sequence, state: 0, namespace: 0, key: vec![] },
                    None,
                )])
            };
            first_pack(64, groups.start, &read).expect("readable")
        };
        assert_eq!(
            [packs(0..1), packs(1..2), packs(2..3), packs(80..90), packs(127..128)],
            [0, 0, 0, 39, 63]
        );
        let mut entries = store.declared(0, 3).expect("whole");
        let (first, next) = first_part(Box::new(entries.by_ref()), 4_000).expect("whole");
        let next = next.expect("there is more");
        let (rest, end) = store
            .declared_within(0, 3, Some(next..u32::MAX))
            .and_then(|rest| first_part(rest, usize::MAX))
            .expect("whole");
        assert_eq!(end, None);
        assert!(first.into_iter().chain(rest).eq(all), "parts make up the whole");
    }

    /// The numbers of states come behind the key group, and before the key.
    #[test]
    fn entries_with_other_numbers_are_in_order_again() {
        let entry = |state: u32, group: u32, key: u8| {
            (DeclaredKey { key_group: group, state, namespace: 0, key: vec![key] }, Some(vec![key]))
        };
        let mut entries: Vec<Entry> = (0..300).map(|at| entry(at % 3, at / 60, at as u8)).collect();
        entries.sort();
        let states = [Some(2), None, Some(0)];
        let run = entries.iter().cloned().map(Ok);
        let renumbered: Vec<Entry> =
            renumbered(run, &states).and_then(Iterator::collect).expect("no error");
        let mut expected: Vec<Entry> = entries
            .into_iter()
            .filter_map(|(mut key, value)| {
                key.state = states[key.state as usize]?;
                Some((key, value))
            })
            .collect();
        expected.sort();
        assert!(renumbered == expected);
    }

    fn pages_of(store: &SnapshotStore, checkpoint: u64) -> BTreeMap<u32, u8> {
        let loaded = store.load(0, checkpoint).expect("whole");
        let merged = MemorySnapshot::merged(&loaded.memory).expect("pages");
        merged.memories[0].pages().map(|(page, bytes)| (page, bytes[0])).collect()
    }

    fn pages(pages: &BTreeMap<u32, u8>) -> Arc<TaskSnapshot> {
        let mut delta = MemoryDelta::new(4 << 20);
        pages.iter().for_each(|(page, byte)| delta.push(*page, &[*byte; PAGE_BYTES]));
        let memory = MemorySnapshot { memories: vec![delta], ..MemorySnapshot::default() };
        Arc::new(TaskSnapshot { memory: Some(Arc::new(memory)), ..TaskSnapshot::default() })
    }

    /// Pages that are in the current generation, whether or not they count.
    fn stored_pages(store: &SnapshotStore) -> usize {
        let generation = &store.current.generation;
        let keys = generation.keys(b"s").expect("listed");
        let values = keys.iter().map(|key| generation.get(key).expect("read").expect("there"));
        values.map(|value| value.len() / PAGE_BYTES).sum()
    }

    #[test]
    fn what_is_written_over_everywhere_is_written_once_and_goes() {
        let mut store = open();
        let hot = |byte: u8| pages(&(0..500).map(|page| (page, byte)).collect());
        let mut first: BTreeMap<u32, u8> = (0..500).map(|page| (page, 0)).collect();
        // Half of it is never written over.
        let cold: BTreeMap<u32, u8> = (500..1000).map(|page| (page, 7)).collect();
        first.extend(&cold);
        store.write(vec![(0, 1, pages(&first))]).expect("written");
        store.complete(1, 0).expect("complete");
        let generation = store.current.number;
        let mut twice = 0;
        for id in 2..40 {
            let bytes = store.write(vec![(0, id, hot(id as u8))]).expect("written")[0];
            twice += usize::from(520 * PAGE_BYTES as u64 <= bytes);
            store.complete(id, 0).expect("complete");
            store.subsume(id - 1, id, None).expect("forgotten");
            let mut expected: BTreeMap<u32, u8> = (0..500).map(|page| (page, id as u8)).collect();
            expected.extend(&cold);
            assert_eq!(pages_of(&store, id), expected);
            assert!(stored_pages(&store) <= 2000, "{}", stored_pages(&store));
        }
        assert_eq!(twice, 1, "what is not written over is carried forward once");
        assert_eq!(store.current.number, generation, "nothing was compacted");
    }

    #[test]
    fn whatever_is_written_a_checkpoint_has_the_newest_of_every_page() {
        let mut carried = 0;
        for seed in 0..60 {
            let mut random = cofferdam_core::random::Random::new(seed);
            let mut below = move |end: u64| random.between(0, end.max(1) - 1);
            let mut store = open();
            let mut state = BTreeMap::new();
            let mut complete: Vec<(u64, BTreeMap<u32, u8>)> = Vec::new();
            let (size, kept) = (1 + below(599), 1 + below(3) as usize);
            for step in 1..60u64 {
                let id = store.next_id();
                let count = [3, size / 10, size / 2, size][below(4) as usize];
                let mut batch = Vec::new();
                // Sometimes two checkpoints are written at once, and only the later one completes.
                for id in id..=id + u64::from(below(6) == 0) {
                    let start = below(size);
                    let changed =
                        (0..count).map(|at| (((start + at) % size) as u32, (step % 251) as u8));
                    let changed: BTreeMap<u32, u8> = changed.collect();
                    state.extend(&changed);
                    batch.push((0, id, pages(&changed)));
                }
                let newest = batch.last().expect("one").1;
                let changed = batch.iter().map(|(.., it)| {
                    it.memory.as_ref().expect("pages").memories[0].page_count() as u64
                });
                let changed: u64 = changed.sum::<u64>() * PAGE_BYTES as u64;
                let bytes: u64 = store.write(batch).expect("written").iter().sum();
                carried += usize::from(changed + 16 * PAGE_BYTES as u64 <= bytes);
                match below(8) {
                    // It never completes.
                    0 => {
                        store.release(complete.last().map_or(newest + 1, |(id, _)| *id));
                        continue;
                    }
                    1 if !complete.is_empty() => {
                        let (id, before) = complete.last().expect("one").clone();
                        if store.is_current(id) {
                            store.begin_attempt(&[0], Some(id)).expect("begins");
                            state = before;
                        }
                        continue;
                    }
                    _ => {}
                }
                store.complete(newest, 0).expect("complete");
                complete.push((newest, state.clone()));
                if kept < complete.len() {
                    let (oldest, _) = complete.remove(0);
                    store.subsume(oldest, newest, None).expect("forgotten");
                }
                for (id, state) in &complete {
                    assert_eq!(pages_of(&store, *id), *state, "seed {seed}, checkpoint {id}");
                }
                if kept == 1 {
                    let (stored, live) = (stored_pages(&store), state.len());
                    assert!(stored <= 2 * live + 1200, "seed {seed}: {stored} for {live}");
                }
            }
        }
        assert!(50 < carried, "{carried}");
    }

    /// The batch was forgotten whose write found the store closed, and the next one had a gap before it.
    /// Bytes of all snapshots.
    fn stored_bytes(store: &SnapshotStore) -> usize {
        let generation = &*store.current.generation;
        let keys = generation.keys(b"s").expect("listed");
        keys.iter().map(|key| generation.get(key).expect("read").map_or(0, |it| it.len())).sum()
    }

    /// Of declared state, too; and it does not become more and more while no checkpoint completes.
    #[test]
    fn whatever_is_given_up_a_checkpoint_has_the_newest_of_every_entry() {
        type Known = (u64, BTreeMap<DeclaredKey, u8>, BTreeMap<u32, u8>);
        const VALUE_BYTES: usize = 50_000;
        let mut merged = 0;
        for seed in 0..16 {
            let mut random = cofferdam_core::random::Random::new(seed);
            let mut below = move |end: u64| random.between(0, end.max(1) - 1);
            // With pages beside it, as where the host keeps declared state; and where the guest does, without.
            let has_pages = seed % 2 == 0;
            let mut store = open();
            let (mut state, mut page_state) = (BTreeMap::new(), BTreeMap::new());
            let mut complete: Option<Known> = None;
            let mut pending = Vec::new();
            for step in 1..160u64 {
                let id = store.next_id();
                let byte = (step % 251) as u8;
                let mut changed = BTreeMap::new();
                for _ in 0..1 + below(12) {
                    let key = format!("key {}", below(40));
                    let value = (below(5) != 0).then_some(byte);
                    changed.insert(DeclaredKey::new(0, key.as_bytes(), 0, 128), value);
                }
                for (key, value) in &changed {
                    match value {
                        Some(byte) => drop(state.insert(key.clone(), *byte)),
                        None => drop(state.remove(key)),
                    }
                }
                let entry = |(key, value): (DeclaredKey, Option<u8>)| {
                    (key, value.map(|byte| vec![byte; VALUE_BYTES]))
                };
                let entries: Vec<Entry> = changed.into_iter().map(entry).collect();
                let mut delta = MemoryDelta::new(1 << 20);
                for page in 0..below(4) as u32 {
                    delta.push(page * 7 + (step % 5) as u32, &[byte; PAGE_BYTES]);
                }
                page_state.extend(delta.pages().map(|(page, bytes)| (page, bytes[0])));
                let snapshot = TaskSnapshot {
                    state: vec![byte],
                    memory: has_pages.then(|| {
                        let (memories, globals) = (vec![delta], vec![5]);
                        Arc::new(MemorySnapshot { memories, globals, monotonic_ns: 1 })
                    }),
                    declared: Some(Arc::new(Changes::Guest(vec![changes_of(entries.iter())]))),
                    is_declared_whole: step == 1,
                    ..TaskSnapshot::default()
                };
                store.write(vec![(0, id, Arc::new(snapshot))]).expect("written");
                merged += store.chains[0].ids().filter(|it| *it == carried_with(id)).count();
                pending.push((id, state.clone(), page_state.clone()));
                // From some step on nothing completes any more.
                match if step < 60 { below(24) } else { 23 } {
                    // It is still under way when the next one is triggered.
                    0..=9 if pending.len() < 3 => continue,
                    10 => {
                        if let Some((id, before, pages)) = complete.clone()
                            && store.is_current(id)
                        {
                            store.begin_attempt(&[0], Some(id)).expect("begins");
                            (state, page_state) = (before, pages);
                            pending.clear();
                        }
                        continue;
                    }
                    11 => {
                        let (id, ..) = pending[below(pending.len() as u64) as usize];
                        let at = pending.iter().position(|(it, ..)| *it == id).expect("there");
                        store.complete(id, 0).expect("complete");
                        let before = complete.replace(pending[at].clone());
                        pending.drain(..=at);
                        if let Some((oldest, ..)) = before {
                            let next = pending.first().map(|(id, ..)| *id);
                            store.subsume(oldest, id, next).expect("forgotten");
                        }
                    }
                    _ => {
                        // The oldest is given up, or all of them.
                        let left = if below(3) != 0 { 1 } else { pending.len() };
                        pending.drain(..left);
                        store.release(pending.first().map_or(id + 1, |(id, ..)| *id));
                    }
                }
                if let Some((id, state, pages)) = &complete {
                    let entries =
                        store.declared(0, *id).and_then(Iterator::collect::<Result<Vec<_>>>);
                    let entries = entries.expect("whole").into_iter();
                    let entries = entries.map(|(key, value)| (key, value.expect("there")[0]));
                    assert!(entries.eq(state.clone()), "seed {seed}, step {step}, checkpoint {id}");
                    if has_pages {
                        assert_eq!(pages_of(&store, *id), *pages, "seed {seed}, checkpoint {id}");
                    }
                }
                let stored = stored_bytes(&store);
                // What is complete, what is merged, and half as much again, while the next is written.
                assert!(stored <= 16 << 20, "seed {seed}, step {step}: {stored} bytes");
            }
        }
        assert!(40 < merged, "{merged}");
    }

    #[test]
    fn no_snapshot_is_lost_while_the_store_cannot_be_opened() {
        let dir = tempfile::tempdir().expect("a directory");
        let storage = crate::sled::SledStorage::new(dir.path().to_owned());
        let opened = SnapshotStore::open(Box::new(storage), "job", vec![identity()]);
        let mut store = opened.expect("opens").0;
        let page = |page: u32, byte: u8| pages(&BTreeMap::from([(page, byte)]));
        let all = pages(&BTreeMap::from([(0, 1), (1, 1), (2, 1)]));
        store.write(vec![(0, 1, all)]).expect("written");
        store.complete(1, 0).expect("complete");
        store.write(vec![(0, 2, page(0, 2))]).expect("written");
        store.write(vec![(0, 3, page(0, 3))]).expect("written");
        let (there, away) = (dir.path().join("gen-00000001"), dir.path().join("away"));
        std::fs::rename(&there, &away).expect("moved");
        // What no log takes: an error closes the files.
        store.current.generation.put(&vec![0; 70_000], b"").expect_err("too long a key");
        store.write(vec![(0, 4, page(0, 4))]).expect_err("it is not there");
        // 2 expires, and what 3 has replaced goes with the next write.
        store.release(3);
        assert!(store.has_leftovers);
        store.write(vec![(0, 5, page(1, 5))]).expect_err("it is still not there");
        std::fs::rename(&away, &there).expect("moved back");
        store.write(vec![(0, 6, page(2, 6))]).expect("written");
        store.complete(6, 0).expect("complete");
        assert_eq!(pages_of(&store, 6), BTreeMap::from([(0, 4), (1, 5), (2, 6)]));
    }

    #[test]
    fn what_a_pending_checkpoint_stands_on_stays_though_a_later_one_has_replaced_it() {
        let mut store = open();
        let all = |byte: u8| pages(&(0..300).map(|page| (page, byte)).collect());
        for id in 1..=2u8 {
            store.write(vec![(0, u64::from(id), all(id))]).expect("written");
        }
        store.complete(2, 0).expect("complete");
        store.subsume(1, 2, None).expect("forgotten");
        let few = pages(&BTreeMap::from([(5, 3)]));
        store.write(vec![(0, 3, few)]).expect("written");
        for id in 4..=6u8 {
            store.write(vec![(0, u64::from(id), all(id))]).expect("written");
            // 3 is pending still.
            store.release(2);
        }
        store.complete(3, 0).expect("complete");
        let expected = (0..300).map(|page| (page, if page == 5 { 3 } else { 2 })).collect();
        assert_eq!(pages_of(&store, 3), expected);
        store.complete(6, 0).expect("complete");
        store.subsume(2, 6, None).expect("forgotten");
        store.subsume(3, 6, None).expect("forgotten");
        assert_eq!(pages_of(&store, 6), (0..300).map(|page| (page, 6)).collect());
        assert!(stored_pages(&store) <= 310, "{}", stored_pages(&store));
    }

    #[test]
    fn what_cannot_be_written_for_long_takes_no_more_memory_than_the_state() {
        let dir = tempfile::tempdir().expect("a directory");
        let storage = crate::sled::SledStorage::new(dir.path().to_owned());
        let opened = SnapshotStore::open(Box::new(storage), "job", vec![identity(); 2]);
        let mut store = opened.expect("opens").0;
        let both = |pages: &[(u32, u8)], entries: &[(&str, Option<u8>)]| {
            let snapshot = snapshot(pages, entries);
            [(0, snapshot.clone()), (1, snapshot)]
        };
        let write = |store: &mut SnapshotStore, id: u64, of: [(usize, Arc<TaskSnapshot>); 2]| {
            store.write(of.map(|(task, snapshot)| (task, id, snapshot)).to_vec())
        };
        write(&mut store, 1, both(&[(9_999, 1)], &[("a", Some(1))])).expect("written");
        store.complete(1, 0).expect("complete");
        let (there, away) = (dir.path().join("gen-00000001"), dir.path().join("away"));
        std::fs::rename(&there, &away).expect("moved");
        store.current.generation.put(&vec![0; 70_000], b"").expect_err("too long a key");
        let many =
            |id: u64| -> Vec<(u32, u8)> { (0..3_000).map(|page| (page, id as u8)).collect() };
        for id in 2..12u64 {
            let key = format!("k{id}");
            let snapshots = both(&many(id), &[(&key, Some(id as u8)), ("a", Some(id as u8))]);
            write(&mut store, id, snapshots).expect_err("it is not there");
        }
        let waiting: u64 = store.unwritten.iter().map(|(.., it)| it.bytes()).sum();
        assert!(waiting <= FOLD_BYTES_MIN + (48 << 20), "{waiting} bytes");
        std::fs::rename(&away, &there).expect("moved back");
        write(&mut store, 12, both(&[(5, 12)], &[])).expect("written");
        store.complete(12, 0).expect("complete");
        for task in 0..2 {
            let loaded = store.load(task, 12).expect("whole");
            let merged = MemorySnapshot::merged(&loaded.memory).expect("pages");
            let pages: BTreeMap<u32, u8> =
                merged.memories[0].pages().map(|(page, bytes)| (page, bytes[0])).collect();
            let mut expected: BTreeMap<u32, u8> = many(11).into_iter().collect();
            expected.extend([(5, 12), (9_999, 1)]);
            assert!(pages == expected);
            let entries = store.declared(task, 12).expect("whole").map(|entry| {
                let (key, value) = entry.expect("whole");
                (String::from_utf8_lossy(&key.key).into_owned(), value.expect("there")[0])
            });
            let mut expected: BTreeMap<String, u8> =
                (2..12).map(|id: u8| (format!("k{id}"), id)).collect();
            expected.insert("a".to_owned(), 11);
            assert_eq!(entries.collect::<BTreeMap<_, _>>(), expected);
        }
    }

    #[test]
    fn changes_that_cannot_be_written_for_long_are_made_one() {
        let entry = |key: u32, value: Option<u8>| {
            let value = value.map(|byte| vec![byte; 1 << 20]);
            (DeclaredKey::new(0, format!("k{key}").as_bytes(), 0, 128), value)
        };
        let mut expected = BTreeMap::new();
        let mut pending = Vec::new();
        for id in 1..=40_u64 {
            // Some are written again and again, one of them is removed in between.
            let value = |key: u32| (key != 3 || !id.is_multiple_of(5)).then_some(id as u8);
            let entries: Vec<Entry> = (0..6)
                .map(|key| entry(key, value(key)))
                .chain([entry(100 + id as u32 % 7, Some(id as u8))])
                .collect();
            expected.extend(entries.clone());
            let snapshot = TaskSnapshot {
                state: vec![id as u8],
                declared: Some(Arc::new(Changes::Guest(vec![changes_of(entries.iter())]))),
                is_declared_whole: id == 1,
                ..TaskSnapshot::default()
            };
            pending.push((0, id, Arc::new(snapshot)));
            pending = kept_for_later(pending, &[identity()]);
            let waiting: u64 = pending.iter().map(|(.., it)| it.bytes()).sum();
            assert!(waiting <= FOLD_BYTES_MIN + (8 << 20), "{waiting} bytes at {id}");
        }
        assert!(pending.len() < 40, "what is tested is a merge");
        let first = &pending[0].2;
        assert!(first.is_declared_whole, "it still is all there was");
        let runs = pending.iter().filter_map(|(.., it)| it.declared.as_ref());
        let merged = Merge::of(runs.map(|changes| changes.run(128)).collect());
        let merged: BTreeMap<_, _> = merged.collect::<Result<_>>().expect("readable");
        assert!(merged == expected);
        let (_, id, last) = pending.last().expect("one");
        assert_eq!((*id, &last.state), (40, &vec![40]));
    }

    #[derive(Debug)]
    struct KeptByHost;

    impl HostChanges for KeptByHost {
        fn is_empty(&self) -> bool {
            true
        }

        fn entries(&self) -> Entries<'_> {
            Box::new(std::iter::empty())
        }
    }

    /// Their layers lie on the host's disk; their pages do not.
    #[test]
    fn pages_beside_state_that_the_host_keeps_are_made_one_as_well() {
        let mut pending = Vec::new();
        for id in 1..=60_u64 {
            let changed = (0..1_000).map(|page| (page, id as u8)).collect();
            let memory = pages(&changed).memory.clone();
            let declared = Some(Arc::new(Changes::Host(Arc::new(KeptByHost))));
            let snapshot = TaskSnapshot { memory, declared, ..TaskSnapshot::default() };
            pending.push((0, id, Arc::new(snapshot)));
            pending = kept_for_later(pending, &[identity()]);
            let waiting: u64 = pending.iter().map(|(.., it)| it.bytes()).sum();
            assert!(waiting <= FOLD_BYTES_MIN + (8 << 20), "{waiting} bytes at {id}");
        }
        assert_eq!(pending.len(), 60, "each has its layer");
        let memories = pending.iter().filter_map(|(.., it)| it.memory.as_deref());
        let merged = MemorySnapshot::merged(memories).expect("pages");
        let newest = merged.memories[0].pages().all(|(_, bytes)| bytes[0] == 60);
        assert!(newest && merged.memories[0].page_count() == 1_000);
    }

    /// Those that wait for the disk are written as one where only the last may complete.
    #[test]
    fn snapshots_that_were_given_up_before_they_were_written_are_written_as_one() {
        let mut store = open();
        let batch = |ids: std::ops::RangeInclusive<u64>| -> Vec<Unwritten> {
            let of = |id: u64| snapshot(&[(id as u32 % 3, id as u8)], &[("a", Some(id as u8))]);
            ids.map(|id| (0, id, of(id))).collect()
        };
        store.write(batch(1..=1)).expect("written");
        store.complete(1, 0).expect("complete");
        store.release(5);
        let bytes = store.write(batch(2..=6)).expect("written");
        assert_eq!(bytes.len(), 5, "each has its answer");
        // What is before the oldest that may complete lies in that.
        assert_eq!(store.chains[0].ids().collect::<Vec<_>>(), [1, 5, 6]);
        store.complete(6, 0).expect("complete");
        let pages = BTreeMap::from([(0, 6), (1, 4), (2, 5)]);
        assert_eq!(contents(&store, 6), (pages, vec![(b"a".to_vec(), vec![6])]));
    }

    #[test]
    fn nothing_is_left_of_checkpoints_that_are_not_kept() {
        let mut store = open();
        let position =
            |len: usize| Arc::new(TaskSnapshot { state: vec![1; len], ..TaskSnapshot::default() });
        for id in 1..50u64 {
            store.write(vec![(0, id, position(5 << 20))]).expect("written");
            store.complete(id, 0).expect("complete");
            if 1 < id {
                store.subsume(id - 1, id, None).expect("forgotten");
            }
        }
        assert_eq!(store.current.number, 1, "there was nothing to compact");
        let generation = &store.current.generation;
        assert_eq!(generation.keys(b"m").expect("listed").len(), 1);
        assert!(generation.keys(b"s").expect("listed").len() <= 2);
    }

    #[test]
    fn what_cannot_be_read_is_not_carried_and_ends_no_checkpoint() {
        let mut store = open();
        let all = |byte: u8| pages(&(0..500).map(|page| (page, byte)).collect());
        store.write(vec![(0, 1, all(0))]).expect("written");
        store.complete(1, 0).expect("complete");
        for key in store.current.generation.keys(&snapshot_prefix(1)).expect("listed") {
            let mut value = store.current.generation.get(&key).expect("read").expect("there");
            value[20] ^= 1;
            store.current.generation.put(&key, &value).expect("put");
        }
        let most = |byte: u8| pages(&(0..400).map(|page| (page, byte)).collect());
        for id in 2..6u8 {
            store.write(vec![(0, u64::from(id), most(id))]).expect("written");
            store.complete(u64::from(id), 0).expect("complete");
            assert!(store.load(0, u64::from(id)).is_err(), "it stands on what is damaged");
        }
        store.write(vec![(0, 6, all(6))]).expect("written");
        store.complete(6, 0).expect("complete");
        assert_eq!(pages_of(&store, 6), (0..500).map(|page| (page, 6)).collect());
    }

    #[test]
    fn attempt_begins_from_its_checkpoint_and_leftovers_are_gone() {
        let mut store = open();
        written(&mut store);
        store.write(vec![(0, 4, snapshot(&[(0, 9)], &[]))]).expect("written");
        store.begin_attempt(&[0], Some(3)).expect("begins");
        store.subsume(2, 3, None).expect("forgotten");
        assert!(store.current.generation.keys(&snapshot_prefix(4)).expect("listed").is_empty());
        store.write(vec![(0, 5, snapshot(&[(1, 5)], &[]))]).expect("written");
        store.complete(5, 0).expect("complete");
        assert_eq!(contents(&store, 5).0, BTreeMap::from([(0, 1), (1, 5), (40, 3), (41, 3)]));
        assert_eq!(store.next_id(), 6);
    }

    #[test]
    fn compressed_snapshots_are_smaller_and_read_beside_others() {
        let mut store = open();
        let pages: Vec<(u32, u8)> = (0..100).map(|page| (page, page as u8)).collect();
        let plain =
            store.write(vec![(0, 1, snapshot(&pages, &[("a", Some(1))]))]).expect("written");
        store.complete(1, 0).expect("complete");
        store.compress(true);
        let pages: Vec<(u32, u8)> = (0..100).map(|page| (page, 7 + page as u8)).collect();
        let small =
            store.write(vec![(0, 2, snapshot(&pages, &[("b", Some(2))]))]).expect("written");
        store.complete(2, 0).expect("complete");
        assert!(small[0] * 10 < plain[0], "{small:?} compressed, {plain:?} plain");
        let entries = vec![(b"a".to_vec(), vec![1]), (b"b".to_vec(), vec![2])];
        let whole = (pages.into_iter().collect(), entries);
        assert_eq!(contents(&store, 2), whole);
        store.compact(2).expect("compacts");
        store.compress(false);
        assert_eq!(contents(&store, 2), whole);
        assert_eq!(
            decompress(&[255, 255, 255, 255, 0]),
            Err("a block has an impossible size".into())
        );
    }

    #[test]
    fn records_in_flight_are_those_of_the_newest_snapshot() {
        let mut store = open();
        let channel = |watermark| ChannelState {
            place: 1,
            input: 1,
            from: "words".to_owned(),
            producer: 2,
            elements: vec![InFlight::Watermark(watermark)],
        };
        for (checkpoint, in_flight) in [(1, vec![channel(5)]), (2, vec![channel(6), channel(7)])] {
            let stats = SnapshotStats { sync_us: checkpoint, ..SnapshotStats::default() };
            let in_flight = Arc::new(in_flight);
            let snapshot = TaskSnapshot { in_flight, stats, ..TaskSnapshot::default() };
            store.write(vec![(0, checkpoint, Arc::new(snapshot))]).expect("written");
            store.complete(checkpoint, 0).expect("complete");
        }
        assert_eq!(*store.load(0, 1).expect("whole").in_flight, [channel(5)]);
        assert_eq!(*store.load(0, 2).expect("whole").in_flight, [channel(6), channel(7)]);
        assert_eq!(store.inspect(2).expect("whole")[0].stats.sync_us, 2);
        store.compact(2).expect("compacts");
        assert_eq!(*store.load(0, 2).expect("whole").in_flight, [channel(6), channel(7)]);
    }

    #[test]
    fn damaged_value_is_found_and_named() {
        let mut store = open();
        written(&mut store);
        let key = value_key(2, 0, KIND_MEMORY, 0);
        let mut value = store.current.generation.get(&key).expect("readable").expect("there");
        value[100] ^= 4;
        store.current.generation.put(&key, &value).expect("written");
        let error = store.load(0, 3).expect_err("damaged").to_string();
        assert_eq!(
            error,
            "the snapshot of task 0 for checkpoint 2 is damaged: its checksum is wrong"
        );
        store.current.generation.delete(&key).expect("deleted");
        let error = store.load(0, 3).expect_err("damaged").to_string();
        assert_eq!(
            error,
            "the snapshot of task 0 for checkpoint 2 is damaged: a part of it is not there"
        );
    }
}
