//! Reads snapshots, and the chains that they make.

#![warn(clippy::indexing_slicing, reason = "what is read may be damaged")]

use std::{ops::Range, sync::Arc};

use cofferdam_core::checkpoint::chain::checkpoint_of;
use cofferdam_sandbox::{INVENTORY, MemoryDelta, MemorySnapshot, memory::PAGE_BYTES};

use crate::{
    Generation, Result, StorageError,
    declared::{Entries, Entry, Merge, decode_entries, within},
    in_flight::ChannelState,
    key::{KIND_DECLARED, KIND_HEADER, KIND_IN_FLIGHT, KIND_MEMORY, KIND_STATE, value_key},
    metadata::{TaskMetadata, unseal},
    pack::Header,
    snapshot::LoadedTask,
};

pub(crate) fn load_chain(
    generation: &dyn Generation,
    task: usize,
    chain: &[u64],
) -> Result<LoadedTask> {
    let mut loaded = LoadedTask::default();
    for checkpoint in chain {
        read_snapshot(generation, task, *checkpoint, &mut loaded)?;
    }
    Ok(loaded)
}

pub(crate) fn value_name(task: usize, checkpoint: u64) -> String {
    let checkpoint = checkpoint_of(checkpoint);
    format!("the snapshot of task {task} for checkpoint {checkpoint}")
}

pub(crate) fn cut_short(task: usize, checkpoint: u64) -> StorageError {
    StorageError::damaged(value_name(task, checkpoint), "a pack is cut short")
}

/// A value of the store whose checksum is right, which is not copied to take that off.
pub(crate) struct Value {
    framed: Vec<u8>,
    start: usize,
}

impl Value {
    /// What was written.
    pub(crate) fn content(&self) -> &[u8] {
        self.framed.get(self.start..).unwrap_or_default()
    }
}

fn read_value(
    generation: &dyn Generation,
    task: usize,
    checkpoint: u64,
    kind: u8,
    sequence: u32,
) -> Result<Value> {
    let key = value_key(checkpoint, task, kind, sequence);
    let name = || value_name(task, checkpoint);
    let Some(framed) = generation.get(&key)? else {
        return Err(StorageError::damaged(name(), "a part of it is not there"));
    };
    let start = framed.len() - unseal(&name(), &key, &framed)?.len();
    Ok(Value { framed, start })
}

pub(crate) fn read_header(
    generation: &dyn Generation,
    task: usize,
    checkpoint: u64,
) -> Result<Header> {
    let header = read_value(generation, task, checkpoint, KIND_HEADER, 0)?;
    Header::decode(header.content())
        .map_err(|error| StorageError::damaged(value_name(task, checkpoint), error))
}

/// A part of a snapshot that may be compressed.
pub(crate) fn read_pack(
    generation: &dyn Generation,
    (task, checkpoint): (usize, u64),
    header: &Header,
    kind: u8,
    sequence: u32,
) -> Result<Value> {
    let value = read_value(generation, task, checkpoint, kind, sequence)?;
    if !header.is_compressed {
        return Ok(value);
    }
    decompress(value.content())
        .map(|framed| Value { framed, start: 0 })
        .map_err(|error| StorageError::damaged(value_name(task, checkpoint), error))
}

/// Whether a task has declared state, and that is in the image of its memory alone. Whether its checkpoints
/// were to hold it does not matter: with `snapshot = "memory"` it is nowhere else.
pub(crate) fn lies_in_image(
    generation: &dyn Generation,
    task: usize,
    entry: &TaskMetadata,
) -> Result<bool> {
    let has_own = !entry.identity.states.is_empty() && !entry.identity.has_host_state;
    Ok(has_own && is_in_image(generation, task, &entry.chain)?)
}

/// Whether what a chain has of declared state is in the image of the memory alone: the newest snapshot
/// that says anything about it has pages and no packs. Packs of earlier ones are older than the pages.
pub(crate) fn is_in_image(generation: &dyn Generation, task: usize, chain: &[u64]) -> Result<bool> {
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
pub(crate) fn declared_of<'a>(
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
            let pack = read_pack(generation, of, &header, KIND_DECLARED, sequence)?;
            decode_entries(pack.content())
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
pub(crate) fn first_pack(
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

pub(crate) fn read_snapshot(
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
        let pack = read_pack(generation, of, &header, kind, sequence)?;
        bytes += pack.content().len() as u64;
        Ok::<_, StorageError>(pack)
    };
    if !header.memories.is_empty() || !header.globals.is_empty() {
        if header.inventory != INVENTORY {
            let what = format!("the order of memories in {}", value_name(task, checkpoint));
            return Err(StorageError::Format { what, found: header.inventory, known: INVENTORY });
        }
        let mut memories: Vec<MemoryDelta> =
            header.memories.iter().map(|(size, _)| MemoryDelta::new(*size)).collect();
        for sequence in 0..header.memory_packs {
            let pack = read(KIND_MEMORY, sequence)?;
            unpack_pages(pack.content(), &mut memories)
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
        let pack = read(KIND_IN_FLIGHT, sequence)?;
        let state: ChannelState =
            postcard::from_bytes(pack.content()).map_err(|error| damaged(&error.to_string()))?;
        state.check().map_err(damaged)?;
        Ok(state)
    });
    into.in_flight = Arc::new(in_flight.collect::<Result<_>>()?);
    let (state_packs, state_bytes) = header.state_packs;
    let mut state = Vec::new();
    for sequence in 0..state_packs {
        state.extend_from_slice(read(KIND_STATE, sequence)?.content());
    }
    if state.len() as u64 != state_bytes {
        return Err(damaged("bytes of its connector's state are missing"));
    }
    into.bytes += bytes;
    into.state = if state_packs == 0 { header.state } else { state };
    into.is_drained = header.is_drained;
    Ok(())
}

/// The size in front of a block is bounded by that of the block, so that damage which the checksum
/// has missed cannot ask for any amount of memory: LZ4 makes nothing more than 255 times smaller.
pub(crate) fn decompress(block: &[u8]) -> std::result::Result<Vec<u8>, String> {
    let Some((size, block)) = block.split_first_chunk::<4>() else {
        return Err("a block is cut short".to_owned());
    };
    let size = u32::from_le_bytes(*size) as usize;
    if block.len().saturating_mul(255) < size {
        return Err("a block has an impossible size".to_owned());
    }
    lz4_flex::decompress(block, size).map_err(|error| error.to_string())
}

pub(crate) fn unpack_pages(payload: &[u8], memories: &mut [MemoryDelta]) -> Option<()> {
    let mut is_known = true;
    each_page(payload, |memory, page, bytes| match memories.get_mut(memory as usize) {
        Some(delta) => delta.push(page, bytes),
        None => is_known = false,
    })?;
    is_known.then_some(())
}

/// Gives each page of a pack with the number of its memory and its own; `None` where it is cut short.
pub(crate) fn each_page<'a>(
    payload: &'a [u8],
    mut take: impl FnMut(u32, u32, &'a [u8]),
) -> Option<()> {
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
