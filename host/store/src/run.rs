//! A sorted run of declared state in memory, in blocks as they are written to a store.
//!
//! An entry in Rust's own types takes up a hundred bytes more than it says: a state that was read out
//! whole would be several times as large in the memory of the host as it was in that of its guest.

use std::ops::Range;

use cofferdam_contract::StateChanges;

use crate::{
    Result, StorageError,
    declared::{Entries, Entry, Merge, decode_entries, each_block, encode_entries, sorted, within},
};

/// A block is closed when its entries are this large.
const BLOCK_BYTES: usize = 64 << 10;
/// How much is sorted at once.
const SORTED_BYTES: u64 = 32 << 20;

/// Entries of declared state with ascending keys.
#[derive(Debug, Default)]
pub struct Run {
    blocks: Vec<Block>,
    len: usize,
}

#[derive(Debug)]
struct Block {
    /// The key group of its first entry.
    first_group: u32,
    /// The entries, encoded.
    bytes: Vec<u8>,
}

impl Block {
    fn entries(&self) -> Entries<'static> {
        match decode_entries(&self.bytes) {
            Ok(entries) => Box::new(entries.into_iter().map(Ok)),
            Err(error) => {
                let error = StorageError::store("decode a run in memory", error);
                Box::new(std::iter::once(Err(error)))
            }
        }
    }
}

impl Run {
    /// Takes entries whose keys ascend.
    ///
    /// # Errors
    /// The first that is one.
    pub fn of(entries: Entries<'_>) -> Result<Self> {
        let mut run = Self::default();
        each_block(entries, BLOCK_BYTES, |block| run.push(block))?;
        Ok(run)
    }

    fn push(&mut self, entries: &[Entry]) -> Result<()> {
        let Some((first, _)) = entries.first() else { return Ok(()) };
        let mut bytes = encode_entries(entries)
            .map_err(|error| StorageError::store("encode a run in memory", error))?;
        bytes.shrink_to_fit();
        self.blocks.push(Block { first_group: first.key_group, bytes });
        self.len += entries.len();
        Ok(())
    }

    /// How many entries it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// How much memory it takes up.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.bytes.len() as u64).sum()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its entries; those of some key groups alone, where they are given.
    #[must_use]
    pub fn entries(&self, key_groups: Option<&Range<u32>>) -> Entries<'_> {
        let start = key_groups.map_or(0, |groups| groups.start);
        // The block before the first that begins with them may end with them.
        let first = self.blocks.partition_point(|block| block.first_group < start);
        let blocks = &self.blocks[first.saturating_sub(1)..];
        within(Box::new(blocks.iter().flat_map(Block::entries)), key_groups.cloned())
    }

    /// Its entries; what was taken takes up no memory any more.
    #[must_use]
    pub fn into_entries(self) -> Entries<'static> {
        Box::new(self.blocks.into_iter().flat_map(|block| block.entries()))
    }
}

/// Makes a run of what a guest hands over, in whatever order.
#[derive(Debug)]
pub struct RunBuilder {
    max_parallelism: u32,
    waiting: Vec<StateChanges>,
    waiting_bytes: u64,
    runs: Vec<Run>,
}

impl RunBuilder {
    /// Nothing yet, of an operator with so many key groups.
    #[must_use]
    pub fn new(max_parallelism: u32) -> Self {
        Self { max_parallelism, waiting: Vec::new(), waiting_bytes: 0, runs: Vec::new() }
    }

    /// Takes a piece.
    ///
    /// # Errors
    /// Where it cannot be encoded.
    pub fn push(&mut self, piece: StateChanges) -> Result<()> {
        self.waiting_bytes += piece.byte_count();
        self.waiting.push(piece);
        if SORTED_BYTES <= self.waiting_bytes { self.sort() } else { Ok(()) }
    }

    fn sort(&mut self) -> Result<()> {
        self.waiting_bytes = 0;
        let pieces = std::mem::take(&mut self.waiting);
        self.runs.push(Run::of(sorted(&pieces, self.max_parallelism))?);
        Ok(())
    }

    /// All of it. Of a key that was handed over twice the last entry counts.
    ///
    /// # Errors
    /// Where it cannot be encoded.
    pub fn finish(mut self) -> Result<Run> {
        self.sort()?;
        match self.runs.len() {
            1 => Ok(self.runs.pop().unwrap_or_default()),
            _ => {
                let runs = self.runs.into_iter().map(Run::into_entries).collect();
                Run::of(Box::new(Merge::of(runs)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::declared::{DeclaredKey, changes_of};

    fn entry(number: u32, value: u8) -> Entry {
        let value = vec![value; 200];
        (DeclaredKey::new(0, format!("key {number}").as_bytes(), 0, 64), Some(value))
    }

    #[test]
    fn a_run_gives_what_was_pushed_in_the_order_of_keys() {
        let mut builder = RunBuilder::new(64);
        let mut expected = BTreeMap::new();
        for piece in 0..200_u32 {
            // Some keys come again, and the last value counts.
            let entries: Vec<Entry> =
                (0..1_000).map(|at| entry(piece * 900 + at, piece as u8)).collect();
            builder.push(changes_of(entries.iter())).expect("encodable");
            expected.extend(entries);
        }
        let is_merge = !builder.runs.is_empty() && !builder.waiting.is_empty();
        assert!(is_merge, "what is tested is a merge");
        let run = builder.finish().expect("encodable");
        assert_eq!(run.len(), expected.len());
        for groups in [0..64, 0..1, 17..18, 20..43, 63..64, 64..64] {
            let some: Vec<Entry> =
                run.entries(Some(&groups)).map(|entry| entry.expect("decodable")).collect();
            let wanted = expected.iter().filter(|(key, _)| groups.contains(&key.key_group));
            assert!(wanted.map(|(key, value)| (key.clone(), value.clone())).eq(some));
        }
        let all: Vec<Entry> = run.into_entries().map(|entry| entry.expect("decodable")).collect();
        assert!(expected.into_iter().eq(all));
    }

    #[test]
    fn nothing_makes_an_empty_run() {
        let run = RunBuilder::new(1).finish().expect("encodable");
        assert!(run.is_empty());
        assert_eq!(run.entries(None).count(), 0);
    }
}
