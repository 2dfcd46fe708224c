//! Makes one snapshot of several.

use std::{collections::VecDeque, sync::Arc};

use cofferdam_core::checkpoint::chain::Written;
use cofferdam_sandbox::MemorySnapshot;

use crate::{
    Generation, Result,
    declared::{Entries, Entry},
    key::metadata_key,
    metadata::{CheckpointMetadata, TaskMetadata, seal},
    pack::PackWriter,
    snapshot::{LoadedTask, TaskSnapshot},
    unpack::{declared_of, is_in_image, load_chain},
};

/// How much of merged changes is in memory at once.
pub(crate) const MERGED_AT_ONCE: usize = 16 << 20;

/// Entries under the numbers that their states have now, in the order of their keys.
pub(crate) fn renumbered<'a>(
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

/// Copies a checkpoint, every chain merged into one full snapshot. Gives its metadata and what was
/// written of each task.
pub(crate) fn copy_merged(
    from: &dyn Generation,
    metadata: &CheckpointMetadata,
    is_compressing: bool,
    next: &mut dyn Generation,
) -> Result<(CheckpointMetadata, Vec<Written>)> {
    let merged = |task: usize| {
        let TaskMetadata { identity, chain, .. } = &metadata.tasks[task];
        let snapshot = merge(&load_chain(from, task, chain)?);
        let declared = match !identity.has_declared || is_in_image(from, task, chain)? {
            true => None,
            false => Some(declared_of(from, task, chain, None)?.live()),
        };
        Ok((snapshot, declared))
    };
    write_merged(&merged, metadata, is_compressing, next)
}

/// Writes one full snapshot of every task, flushes, writes the metadata, flushes. The chains of
/// `metadata` are not looked at: each becomes that snapshot.
pub(crate) fn write_merged<'a>(
    merged: &dyn Fn(usize) -> Result<(TaskSnapshot, Option<Entries<'a>>)>,
    metadata: &CheckpointMetadata,
    is_compressing: bool,
    next: &mut dyn Generation,
) -> Result<(CheckpointMetadata, Vec<Written>)> {
    let checkpoint = metadata.checkpoint;
    let mut written = Vec::with_capacity(metadata.tasks.len());
    let mut tasks = Vec::with_capacity(metadata.tasks.len());
    for (task, entry) in metadata.tasks.iter().enumerate() {
        let identity = entry.identity.clone();
        let (snapshot, declared) = merged(task)?;
        let mut writer = PackWriter::new(next, task, checkpoint, is_compressing);
        written.push(writer.snapshot(&snapshot, declared)?);
        tasks.push(TaskMetadata { identity, chain: vec![checkpoint], stats: entry.stats });
    }
    next.flush()?;
    let merged = CheckpointMetadata { tasks, ..metadata.clone() };
    let key = metadata_key(checkpoint);
    next.put(&key, &seal(&key, &merged.encode()?))?;
    next.flush()?;
    Ok((merged, written))
}

/// One full snapshot that says what a chain says, but for declared state.
pub(crate) fn merge(loaded: &LoadedTask) -> TaskSnapshot {
    let memory = MemorySnapshot::merged(&loaded.memory).map(Arc::new);
    let (state, is_drained) = (loaded.state.clone().into(), loaded.is_drained);
    let in_flight = loaded.in_flight.clone();
    TaskSnapshot { state, is_drained, memory, in_flight, ..TaskSnapshot::default() }
}
