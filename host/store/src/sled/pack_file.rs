//! The file of large values, beside the database: values in blocks, and holes where one is gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use cofferdam_files::create_file;
use rustix::fs::FallocateFlags;

use crate::{Result, StorageError, log::Entries};

/// The unit in which file systems give space back.
pub(crate) const BLOCK_BYTES: u64 = 4096;

/// So many blocks may wait for other values, or as many as have one.
pub(crate) const FREE_BLOCKS_MIN: u64 = 1024;

/// The first byte of what sled keeps for a key: the value itself follows, or its extent.
pub(crate) const INLINE: u8 = 0;

pub(crate) const EXTENT: u8 = 1;

/// Large values, each in blocks of its own. What a crash left behind the last flush is never pointed at.
///
/// Where a value was that does not count any more another one is written, if there is room: blocks that
/// the file has cost a third of what new ones do. What is too much of that goes back to the file system,
/// and only the extent is remembered.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) file: File,
    pub(crate) len: u64,
    is_dirty: bool,
    /// Places with blocks.
    free: Extents,
    /// Places without.
    holes: Extents,
    used_blocks: u64,
    /// Blocks that several values touch: earlier formats did not give each its own.
    shared: BTreeSet<u64>,
}

/// Blocks that no value has: how many there are, by the first of them. No two touch each other.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    pub(super) by_first: BTreeMap<u64, u64>,
    pub(super) blocks: u64,
}

impl Extents {
    pub(super) fn insert(&mut self, mut first: u64, mut count: u64) {
        if count == 0 {
            return;
        }
        self.blocks += count;
        if let Some((&before, &blocks)) = self.by_first.range(..first).next_back()
            && before + blocks == first
        {
            self.by_first.remove(&before);
            (first, count) = (before, blocks + count);
        }
        if let Some(blocks) = self.by_first.remove(&(first + count)) {
            count += blocks;
        }
        self.by_first.insert(first, count);
    }

    /// The first extent with so many blocks.
    pub(super) fn take(&mut self, count: u64) -> Option<u64> {
        let (&first, &blocks) = self.by_first.iter().find(|(_, blocks)| count <= **blocks)?;
        self.by_first.remove(&first);
        if count < blocks {
            self.by_first.insert(first + count, blocks - count);
        }
        self.blocks -= count;
        Some(first)
    }

    fn take_last(&mut self) -> Option<(u64, u64)> {
        let (first, blocks) = self.by_first.pop_last()?;
        self.blocks -= blocks;
        Some((first, blocks))
    }
}

/// Where a value lies in the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PackExtent {
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

impl PackExtent {
    pub(crate) fn encode(self) -> [u8; 13] {
        let mut bytes = [EXTENT; 13];
        bytes[1..9].copy_from_slice(&self.offset.to_le_bytes());
        bytes[9..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (offset, rest) = bytes.split_first_chunk::<8>()?;
        let len = rest.try_into().ok()?;
        Some(Self { offset: u64::from_le_bytes(*offset), len: u32::from_le_bytes(len) })
    }

    /// The extent in what is kept for a key, if it has one.
    pub(crate) fn of(kept: &[u8]) -> Option<Self> {
        match kept.split_first() {
            Some((&EXTENT, extent)) => Self::decode(extent),
            _ => None,
        }
    }

    fn end(self) -> u64 {
        self.offset.saturating_add(u64::from(self.len))
    }

    /// The first block that it touches, and how many. Of an earlier format it may share the outer ones
    /// with its neighbours.
    fn blocks(self) -> (u64, u64) {
        let first = self.offset / BLOCK_BYTES;
        (first, self.end().div_ceil(BLOCK_BYTES) - first)
    }
}

/// The bytes of an extent; `None` where the file ends before them.
pub(crate) fn read_extent(
    file: &File,
    len: u64,
    extent: PackExtent,
) -> io::Result<Option<Vec<u8>>> {
    // An extent whose bits have rotted must not make us ask for more memory than there is file.
    if len < extent.end() {
        return Ok(None);
    }
    let mut value = vec![0; extent.len as usize];
    match file.read_exact_at(&mut value, extent.offset) {
        Ok(()) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of what is kept for a key.
pub(crate) fn value_of(kept: &[u8], file: &File, len: u64) -> Result<Option<Vec<u8>>> {
    match kept.split_first() {
        Some((&INLINE, value)) => Ok(Some(value.to_vec())),
        Some((&EXTENT, extent)) => match PackExtent::decode(extent) {
            Some(extent) => read_extent(file, len, extent)
                .map_err(|error| StorageError::store("read the pack file", error)),
            None => Ok(None),
        },
        _ => Ok(None),
    }
}

impl Pack {
    pub(crate) fn open(path: &Path, entries: &Entries) -> io::Result<Self> {
        let file = create_file(path)?;
        // Nothing may take the place of a value that counts, whatever the file has lost: giving it
        // back would take another's.
        let extents = entries.values().filter_map(|kept| PackExtent::of(kept));
        let mut used: Vec<(u64, u64)> = extents.map(PackExtent::blocks).collect();
        used.sort_unstable();
        let mut pack = Self {
            file,
            len: 0,
            is_dirty: false,
            free: Extents::default(),
            holes: Extents::default(),
            used_blocks: 0,
            shared: BTreeSet::new(),
        };
        // What lies between was given up, or written by a flush that has failed.
        let mut end = 0;
        for (first, blocks) in used {
            pack.make_hole(end, first.saturating_sub(end));
            pack.used_blocks += blocks;
            if first < end {
                pack.shared.insert(first);
            }
            end = end.max(first.saturating_add(blocks));
        }
        pack.len = end.saturating_mul(BLOCK_BYTES);
        if pack.len < pack.file.metadata()?.len() {
            pack.file.set_len(pack.len)?;
        }
        Ok(pack)
    }

    pub(crate) fn append(&mut self, value: &[u8]) -> io::Result<PackExtent> {
        let len = u32::try_from(value.len())
            .map_err(|_| io::Error::other("a value of more than 4 GiB"))?;
        let blocks = u64::from(len).div_ceil(BLOCK_BYTES);
        let first = self.free.take(blocks).or_else(|| self.holes.take(blocks));
        let first = first.unwrap_or_else(|| {
            let first = self.len / BLOCK_BYTES;
            self.len += blocks * BLOCK_BYTES;
            first
        });
        self.used_blocks += blocks;
        self.is_dirty = true;
        let offset = first * BLOCK_BYTES;
        self.file.write_all_at(value, offset)?;
        Ok(PackExtent { offset, len })
    }

    /// A value does not count any more, durably: another one may take its place.
    pub(crate) fn give_back(&mut self, extent: PackExtent) {
        let (mut first, mut blocks) = extent.blocks();
        self.used_blocks = self.used_blocks.saturating_sub(blocks);
        if self.shared.contains(&first) {
            (first, blocks) = (first + 1, blocks - 1);
        }
        if 0 < blocks && self.shared.contains(&(first + blocks - 1)) {
            blocks -= 1;
        }
        self.free.insert(first, blocks);
        while self.used_blocks.max(FREE_BLOCKS_MIN) < self.free.blocks
            && let Some((first, blocks)) = self.free.take_last()
        {
            let too_many = self.free.blocks + blocks - self.used_blocks.max(FREE_BLOCKS_MIN);
            let kept = blocks.saturating_sub(too_many);
            self.free.insert(first, kept);
            self.make_hole(first + kept, blocks - kept);
        }
    }

    /// Gives blocks back to the file system. Where that cannot, their space comes back with the
    /// generation.
    fn make_hole(&mut self, first: u64, blocks: u64) {
        if blocks == 0 {
            return;
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (start, len) = (first * BLOCK_BYTES, blocks * BLOCK_BYTES);
        if let Err(error) = rustix::fs::fallocate(&self.file, flags, start, len) {
            tracing::debug!(%error, "give blocks of a pack file back");
        }
        self.holes.insert(first, blocks);
    }

    pub(crate) fn sync(&mut self) -> io::Result<()> {
        if self.is_dirty {
            self.file.sync_data()?;
            self.is_dirty = false;
        }
        Ok(())
    }
}
