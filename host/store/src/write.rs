//! The order of commit: snapshots, flush, metadata, flush, head, flush.

use std::{collections::BTreeSet, sync::Arc};

use cofferdam_core::checkpoint::chain::{PackPages, SnapshotChain, Written, carried_with};
use cofferdam_core::ids::micros;
use cofferdam_sandbox::{MemoryDelta, MemorySnapshot};

use crate::{
    Result, StorageError,
    declared::first_part,
    generations::{metadata_checksum, read_metadata},
    head::Kept,
    key::{KIND_MEMORY, key_parts, metadata_key},
    merge::MERGED_AT_ONCE,
    metadata::{CheckpointMetadata, SnapshotStats, TaskMetadata, seal},
    pack::PackWriter,
    snapshot::TaskSnapshot,
    store::{SnapshotStore, put_components},
    unpack::{cut_short, declared_of, each_page, read_header, read_pack},
    unwritten::{Unwritten, folded, kept_for_later},
};

/// Why something was not carried forward.
enum NotCarried {
    /// It cannot be read: a checkpoint can do without it being elsewhere.
    Unread(StorageError),
    /// The store did not take it, nor what else was written since the last flush.
    Unwritten(StorageError),
}

impl SnapshotStore {
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
    /// [`SnapshotChain`].
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
                let pack = read_pack(generation, of, &header, KIND_MEMORY, pack as u32)?;
                each_page(pack.content(), |memory, page, bytes| {
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
    pub(crate) fn metadata_of(&self, checkpoint: u64, written_at_ms: u64) -> CheckpointMetadata {
        let tasks = self.tasks.iter().zip(&self.chains).enumerate();
        let tasks = tasks.map(|(task, (identity, chain))| TaskMetadata {
            identity: identity.clone(),
            chain: chain.as_of(checkpoint),
            stats: self.stats.get(&(checkpoint, task)).copied().unwrap_or_default(),
        });
        let (job, lineage) = (self.job.clone(), self.lineage.clone());
        CheckpointMetadata { job, lineage, checkpoint, written_at_ms, tasks: tasks.collect() }
    }

    /// Makes a checkpoint complete: writes the metadata of the chains as they are, and flushes.
    ///
    /// # Errors
    /// Where the metadata is known not to be there; or, with [`StorageError::InDoubt`], is not.
    pub fn complete(&mut self, checkpoint: u64, written_at_ms: u64) -> Result<()> {
        let metadata = self.metadata_of(checkpoint, written_at_ms);
        let key = metadata_key(checkpoint);
        let value = seal(&key, &metadata.encode()?);
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
        let checksum = metadata_checksum(&metadata)?;
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

    /// Tasks begin a new attempt: their chains resume from this checkpoint, or from the beginning.
    ///
    /// # Errors
    /// Where its metadata cannot be read.
    pub fn begin_attempt(&mut self, tasks: &[usize], restored_from: Option<u64>) -> Result<()> {
        self.unwritten.retain(|(task, ..)| !tasks.contains(task));
        let metadata = restored_from
            .map(|id| read_metadata(&*self.current.generation, &metadata_key(id)))
            .transpose()?;
        for &task in tasks {
            let entry = metadata.as_ref().and_then(|metadata| metadata.tasks.get(task));
            let chain = &mut self.chains[task];
            *chain = entry.map_or_else(SnapshotChain::default, |entry| chain.back_to(&entry.chain));
        }
        // Not now: the tasks are waiting to run.
        self.has_leftovers = true;
        Ok(())
    }

    /// Snapshots that neither a kept checkpoint nor a running task stands on belong to checkpoints
    /// that will never complete, or to ones that are not kept; as do metadata that the head does not name.
    pub(crate) fn delete_leftovers(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.has_leftovers) {
            return Ok(());
        }
        let mut reachable: BTreeSet<(usize, u64)> = BTreeSet::new();
        for (task, chain) in self.chains.iter().enumerate() {
            reachable.extend(chain.ids().map(|id| (task, id)));
        }
        for checkpoint in &self.current.checkpoints {
            let metadata = read_metadata(&*self.current.generation, &metadata_key(*checkpoint))?;
            for (task, entry) in metadata.tasks.iter().enumerate() {
                reachable.extend(entry.chain.iter().map(|id| (task, *id)));
            }
        }
        for key in self.current.generation.keys(b"s")? {
            if key_parts(&key).is_none_or(|parts| !reachable.contains(&parts)) {
                self.current.generation.delete(&key)?;
            }
        }
        let kept: BTreeSet<Vec<u8>> =
            self.current.checkpoints.iter().map(|id| metadata_key(*id)).collect();
        for key in self.current.generation.keys(b"m")? {
            if !kept.contains(&key) {
                self.current.generation.delete(&key)?;
            }
        }
        Ok(())
    }
}
