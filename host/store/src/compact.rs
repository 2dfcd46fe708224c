//! Moves checkpoints from one generation to the next, to a savepoint and from one; removes what nobody needs.

use std::collections::BTreeSet;

use cofferdam_core::checkpoint::chain::{Footprint, SnapshotChain, Written};
use cofferdam_sandbox::{Image, MemorySnapshot};

use crate::{
    Generation, Result, Storage, StorageError,
    declared::{Entries, Merge},
    generations::{OpenGeneration, metadata_checksum},
    head::{Head, Kept},
    merge::{copy_merged, merge, renumbered, write_merged},
    metadata::{CheckpointMetadata, SnapshotStats, TaskMetadata},
    run::Run,
    snapshot::TaskRestore,
    store::{CHAIN_LENGTH_MAX, COMPACT_BYTES_MIN, SnapshotStore, put_components},
    unpack::{declared_of, is_in_image, load_chain},
};

impl SnapshotStore {
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
        let metadata = self.metadata_of(checkpoint, written_at_ms);
        let mut generation = target.open(1, 0)?;
        let from = &*self.current.generation;
        let merged = |task: usize| {
            let (identity, chain) = (&metadata.tasks[task].identity, &metadata.tasks[task].chain);
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
        let (metadata, written) =
            write_merged(&merged, &metadata, self.is_compressing, &mut *generation)?;
        let checksum = metadata_checksum(&metadata)?;
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
        let image = Image::of(memory)
            .map_err(|error| StorageError::at("read declared state out", &name, error))?;
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
        let longest = self.chains.iter().map(SnapshotChain::len).max().unwrap_or(0);
        let all = self.chains.iter().map(SnapshotChain::footprint);
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
        for opened in &mut self.older {
            opened.checkpoints.retain(is_other);
        }
        self.remove_empty_generations()
    }

    fn remove_empty_generations(&mut self) -> Result<()> {
        let (empty, kept) =
            std::mem::take(&mut self.older).into_iter().partition(|p| p.checkpoints.is_empty());
        self.older = kept;
        let empty: Vec<OpenGeneration> = empty;
        for OpenGeneration { number, generation, .. } in empty {
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
        let metadata = self.metadata(checkpoint)?;
        // Increments taken since belong to a checkpoint that is still pending: they would be lost.
        let is_whole = metadata
            .tasks
            .iter()
            .zip(&self.chains)
            .all(|(task, chain)| chain.ids().eq(task.chain.iter().copied()));
        if !is_whole || !self.unwritten.is_empty() {
            return Ok(());
        }
        self.begin_generation(|store, next| {
            let from = &*store.current.generation;
            copy_merged(from, &metadata, store.is_compressing, next)
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
        restores: &[TaskRestore],
    ) -> Result<()> {
        self.highest_id = self.highest_id.max(checkpoint);
        self.begin_generation(|store, next| {
            let tasks = store.tasks.iter().map(|identity| TaskMetadata {
                identity: identity.clone(),
                chain: Vec::new(),
                stats: SnapshotStats::default(),
            });
            let (job, lineage) = (store.job.clone(), store.lineage.clone());
            let tasks = tasks.collect();
            let metadata = CheckpointMetadata { job, lineage, checkpoint, written_at_ms, tasks };
            let from = other.unwrap_or(store);
            let merged = |task: usize| {
                let restore = &restores[task];
                let declared = match &restore.converted {
                    // Packs beside the pages of a task that hands nothing over would be older than they are
                    // from its next checkpoint on.
                    _ if restore.is_in_image || !store.tasks[task].has_declared => None,
                    Some(run) => Some(run.entries(None)),
                    None => Some(restore.entries(from, checkpoint)?),
                };
                Ok((merge(&restore.state), declared))
            };
            write_merged(&merged, &metadata, store.is_compressing, next)
        })
    }

    /// Fills a new generation and continues in it. `fill` gives the metadata that it wrote, and what of
    /// each task.
    fn begin_generation(
        &mut self,
        fill: impl FnOnce(&Self, &mut dyn Generation) -> Result<(CheckpointMetadata, Vec<Written>)>,
    ) -> Result<()> {
        let numbers = self.storage.generations()?;
        // A generation without anything in it need not be listed.
        let number = numbers.last().copied().unwrap_or(0).max(self.current.number) + 1;
        let mut next = self.storage.open(number, 0)?;
        let components = self.needed_components();
        let filled = put_components(&components, &mut *next).and_then(|_| fill(self, &mut *next));
        let (metadata, written) = match filled {
            Ok(filled) => filled,
            Err(error) => {
                drop(next);
                self.storage.remove(number)?;
                return Err(error);
            }
        };
        let checkpoint = metadata.checkpoint;
        let mut head = self.head.clone();
        // From here on the new one counts; the same checkpoint in an older generation may be of another
        // parallelism.
        head.checkpoints.retain(|kept| kept.checkpoint != checkpoint);
        let checksum = metadata_checksum(&metadata)?;
        head.checkpoints.push(Kept { checkpoint, generation: number, end: next.end(), checksum });
        head.checkpoints.sort_unstable_by_key(|kept| kept.checkpoint);
        head.generation = number;
        // What is in doubt is not removed: the next run sees which one the head names.
        self.commit_head(head, checkpoint)?;
        self.has_components = true;
        self.chains =
            written.into_iter().map(|it| SnapshotChain::begun_with(checkpoint, it)).collect();
        let next = OpenGeneration { number, generation: next, checkpoints: vec![checkpoint] };
        let old = std::mem::replace(&mut self.current, next);
        self.older.push(old);
        for opened in &mut self.older {
            opened.checkpoints.retain(|id| *id != checkpoint);
        }
        self.remove_empty_generations()
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

    /// Removes generations that a finished compaction has left. Later ones than the head's may be
    /// somebody else's, who is writing them just now; they go when this run has gone past them.
    pub(crate) fn remove_other_generations(&mut self) {
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

    /// The job resumes from a checkpoint that is not the newest: later ones, and those that are not
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
        for opened in self.older.iter_mut().chain([&mut self.current]) {
            opened.checkpoints.retain(|id| *id <= after);
        }
        self.older.retain(|opened| !opened.checkpoints.is_empty());
        for number in left.difference(&kept).filter(|number| **number != self.current.number) {
            if let Err(error) = self.storage.set_aside(*number) {
                tracing::warn!(number, %error, "set a damaged generation aside");
            }
        }
        Ok(())
    }
}

impl TaskRestore {
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
