//! Declared state in the order of its keys: each snapshot is a sorted run, and a task's state is the
//! merge of the runs of its chain.
//!
//! A chain is read as a log-structured merge tree reads its levels (O'Neil et al., 1996): of a key that
//! is in several runs the newest entry counts. Reading takes the memory of one pack a run, whatever
//! the size of the state.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    ops::Range,
};

use cofferdam_contract::{StateChanges, StateEntry};
use cofferdam_core::key_group::{key_group, key_groups_of, task_index};
use serde::{Deserialize, Serialize};
use serde_bytes::{ByteBuf, Bytes};

use crate::Result;

/// An entry of declared state: by key group, so that a range of groups is a range of entries.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeclaredKey {
    /// The key's group.
    pub key_group: u32,
    /// The state's number in the operator's description.
    pub state: u32,
    /// How many bytes at the end of the key are its namespace.
    pub namespace: u32,
    /// The key of the records that it belongs to, and behind it the namespace.
    #[serde(with = "serde_bytes")]
    pub key: Vec<u8>,
}

impl DeclaredKey {
    /// The key of a state, in the group of the records that it belongs to.
    pub fn new(state: u32, key: &[u8], namespace: u32, max_parallelism: u32) -> Self {
        let record = &key[..key.len().saturating_sub(namespace as usize)];
        let key_group = key_group(record, max_parallelism.max(1));
        Self { key_group, state, namespace, key: key.to_vec() }
    }
}

/// A key with its value; no value: the entry was removed.
pub type Entry = (DeclaredKey, Option<Vec<u8>>);

/// Entries as they are stored. Values are copied as a whole and not byte by byte.
pub(crate) fn encode_entries(entries: &[Entry]) -> postcard::Result<Vec<u8>> {
    let entries: Vec<(&DeclaredKey, Option<&Bytes>)> =
        entries.iter().map(|(key, value)| (key, value.as_deref().map(Bytes::new))).collect();
    postcard::to_stdvec(&entries)
}

/// Reads what [`encode_entries`] wrote.
pub(crate) fn decode_entries(bytes: &[u8]) -> postcard::Result<Vec<Entry>> {
    let entries: Vec<(DeclaredKey, Option<ByteBuf>)> = postcard::from_bytes(bytes)?;
    Ok(entries.into_iter().map(|(key, value)| (key, value.map(ByteBuf::into_vec))).collect())
}

/// What an entry takes up, in bytes, where it is written.
fn entry_bytes((key, value): &Entry) -> usize {
    key.key.len() + value.as_ref().map_or(0, Vec::len) + 16
}

/// Entries with ascending keys.
pub type Entries<'a> = Box<dyn Iterator<Item = Result<Entry>> + 'a>;

/// Those of some key groups alone, where they are given.
pub(crate) fn within(entries: Entries<'_>, key_groups: Option<Range<u32>>) -> Entries<'_> {
    let Some(Range { start, end }) = key_groups else { return entries };
    let group = |entry: &Result<Entry>| entry.as_ref().ok().map(|(key, _)| key.key_group);
    let is_before = move |entry: &Result<Entry>| group(entry).is_some_and(|it| it < start);
    let is_in = move |entry: &Result<Entry>| group(entry).is_none_or(|it| it < end);
    Box::new(entries.skip_while(is_before).take_while(is_in))
}

/// Gives the entries block by block: one is closed when its entries have so many bytes.
pub(crate) fn each_block(
    entries: Entries<'_>,
    bytes_max: usize,
    mut take: impl FnMut(&[Entry]) -> Result<()>,
) -> Result<()> {
    let (mut block, mut bytes) = (Vec::new(), 0);
    for entry in entries {
        let entry = entry?;
        bytes += entry_bytes(&entry);
        block.push(entry);
        if bytes_max <= bytes {
            take(&block)?;
            block.clear();
            bytes = 0;
        }
    }
    if block.is_empty() { Ok(()) } else { take(&block) }
}

/// The first entries, up to the end of the key group in which they reach `bytes_min`; and the group of the
/// next one, if there are more.
pub fn first_part(entries: Entries<'_>, bytes_min: usize) -> Result<(Vec<Entry>, Option<u32>)> {
    let (mut part, mut bytes) = (Vec::<Entry>::new(), 0);
    for entry in entries {
        let entry = entry?;
        let group = entry.0.key_group;
        if bytes_min <= bytes && part.last().is_some_and(|(last, _)| last.key_group != group) {
            return Ok((part, Some(group)));
        }
        bytes += entry_bytes(&entry);
        part.push(entry);
    }
    Ok((part, None))
}

/// What was handed over in pieces, in whatever order, as one run. Of a key that was handed over twice the last
/// entry counts.
pub(crate) fn sorted(pieces: &[StateChanges], max_parallelism: u32) -> Entries<'_> {
    let mut entries: Vec<_> = pieces
        .iter()
        .flat_map(StateChanges::entries)
        .map(|StateEntry { state, key, namespace, value }| {
            (DeclaredKey::new(state, key, namespace, max_parallelism), value)
        })
        .collect();
    entries.reverse();
    entries.sort_by(|(left, _), (right, _)| left.cmp(right));
    entries.dedup_by(|(later, _), (first, _)| later == first);
    Box::new(entries.into_iter().map(|(key, value)| Ok((key, value.map(<[u8]>::to_vec)))))
}

/// The keys of one task of an operator whose records come by their key.
#[derive(Debug, Clone, Copy)]
pub struct OwnKeys {
    /// The task's index.
    pub index: u32,
    /// How many tasks the operator has.
    pub parallelism: u32,
    /// How many key groups it has.
    pub max_parallelism: u32,
}

impl OwnKeys {
    /// What there is to check: nothing where records come otherwise than by their key, or all to one task.
    pub fn if_any(self, is_keyed: bool) -> Option<Self> {
        (is_keyed && 1 < self.parallelism).then_some(self)
    }

    /// Makes sure that state lies under keys of records that come to this task: under any other one it
    /// would not be found again once the parallelism changes.
    pub fn check(&self, changes: &StateChanges) -> std::result::Result<(), String> {
        let own = key_groups_of(self.index, self.parallelism, self.max_parallelism);
        for StateEntry { key, namespace, .. } in changes.entries() {
            let record = &key[..key.len().saturating_sub(namespace as usize)];
            let group = key_group(record, self.max_parallelism);
            if !own.contains(&group) {
                let task = task_index(group, self.parallelism, self.max_parallelism);
                return Err(format!(
                    "it keeps state under the key `{}`, whose records go to task {task} of {}: a state \
                     key is the key of a record, with a namespace behind it if need be",
                    record.get(..SHOWN_BYTES).unwrap_or(record).escape_ascii(),
                    self.parallelism
                ));
            }
        }
        Ok(())
    }
}

/// How much of a key a message shows.
const SHOWN_BYTES: usize = 64;

/// Entries as the columns that a guest takes.
#[must_use]
pub fn changes_of<'a>(entries: impl Iterator<Item = &'a Entry>) -> StateChanges {
    let mut changes = StateChanges::default();
    for (key, value) in entries {
        let (state, namespace, value) = (key.state, key.namespace, value.as_deref());
        changes.push(StateEntry { state, key: &key.key, namespace, value });
    }
    changes
}

/// Several runs as one: of a key that is in more than one, the entry of the last counts, and of one that
/// a run has twice (as format 2 could) the later. Ends with the first error.
pub struct Merge<'a> {
    runs: Vec<Entries<'a>>,
    /// The next entry of each run, the least key in front, and of equal ones that of the last run.
    heads: BinaryHeap<Reverse<Head>>,
    failed: Option<super::StorageError>,
}

struct Head {
    entry: Entry,
    run: usize,
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Head {}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        self.entry.0.cmp(&other.entry.0).then(other.run.cmp(&self.run))
    }
}

impl<'a> Merge<'a> {
    /// Merges runs, oldest first.
    pub fn of(runs: Vec<Entries<'a>>) -> Self {
        let mut merge = Self { heads: BinaryHeap::with_capacity(runs.len()), runs, failed: None };
        (0..merge.runs.len()).for_each(|run| merge.refill(run));
        merge
    }

    /// Only the entries that are there: without those that were removed.
    pub fn live(self) -> Entries<'a> {
        Box::new(self.filter(|entry| entry.as_ref().map_or(true, |(_, value)| value.is_some())))
    }

    fn refill(&mut self, run: usize) {
        match self.runs[run].next() {
            Some(Ok(entry)) => self.heads.push(Reverse(Head { entry, run })),
            Some(Err(error)) => self.failed = Some(error),
            None => {}
        }
    }
}

impl Iterator for Merge<'_> {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.heads.pop();
        if let Some(Reverse(Head { mut entry, run })) = next {
            self.refill(run);
            while self.heads.peek().is_some_and(|Reverse(other)| other.entry.0 == entry.0)
                && let Some(Reverse(other)) = self.heads.pop()
            {
                if other.run == run {
                    entry = other.entry;
                }
                self.refill(other.run);
            }
            if self.failed.is_none() {
                return Some(Ok(entry));
            }
        }
        let error = self.failed.take()?;
        self.heads.clear();
        Some(Err(error))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::StorageError;

    fn key(number: u8) -> DeclaredKey {
        DeclaredKey { key_group: u32::from(number / 4), state: 0, namespace: 0, key: vec![number] }
    }

    fn run(entries: &BTreeMap<u8, Option<u8>>) -> Entries<'static> {
        let entries: Vec<Result<Entry>> = entries
            .iter()
            .map(|(number, value)| Ok((key(*number), value.map(|value| vec![value]))))
            .collect();
        Box::new(entries.into_iter())
    }

    proptest! {
        #[test]
        fn a_merge_is_what_the_runs_say_one_after_the_other(
            runs in proptest::collection::vec(
                proptest::collection::btree_map(0u8..20, proptest::option::of(any::<u8>()), 0..12),
                0..6,
            )
        ) {
            let mut model = BTreeMap::new();
            for run in &runs {
                for (number, value) in run {
                    match value {
                        Some(value) => model.insert(*number, *value),
                        None => model.remove(number),
                    };
                }
            }
            let merged = Merge::of(runs.iter().map(run).collect()).live();
            let merged: Vec<Entry> = merged.collect::<Result<_>>().expect("no run fails");
            let expected: Vec<Entry> =
                model.iter().map(|(number, value)| (key(*number), Some(vec![*value]))).collect();
            prop_assert_eq!(merged, expected);
        }
    }

    #[test]
    fn of_a_key_that_a_run_has_twice_the_later_counts() {
        let older = [Ok((key(1), Some(vec![9]))), Ok((key(2), Some(vec![9])))];
        let newer = [Ok((key(1), Some(vec![1]))), Ok((key(1), None)), Ok((key(1), Some(vec![3])))];
        let merged = Merge::of(vec![Box::new(older.into_iter()), Box::new(newer.into_iter())]);
        let merged: Vec<Entry> = merged.collect::<Result<_>>().expect("no error");
        assert_eq!(merged, [(key(1), Some(vec![3])), (key(2), Some(vec![9]))]);
    }

    #[test]
    fn an_error_of_a_run_ends_the_merge() {
        let whole = run(&BTreeMap::from([(1, Some(1)), (3, Some(3)), (9, Some(9))]));
        let broken = [Ok((key(2), None)), Err(StorageError::damaged("a run", "cut short"))];
        let merged = Merge::of(vec![whole, Box::new(broken.into_iter())]);
        let merged: Vec<Result<Entry>> = merged.collect();
        assert_eq!(merged.iter().filter(|entry| entry.is_err()).count(), 1);
        assert!(merged.last().is_some_and(Result::is_err), "nothing comes after it");
    }

    #[test]
    fn of_a_key_that_is_handed_over_twice_the_last_value_counts() {
        let entries = [(key(1), Some(vec![1])), (key(2), Some(vec![2])), (key(1), Some(vec![3]))];
        let pieces = [changes_of(entries.iter())];
        let run: Vec<Entry> = sorted(&pieces, 4).collect::<Result<_>>().expect("no error");
        let values: BTreeMap<Vec<u8>, Option<Vec<u8>>> =
            run.iter().map(|(key, value)| (key.key.clone(), value.clone())).collect();
        assert_eq!(run.len(), 2);
        assert_eq!(values, BTreeMap::from([(vec![1], Some(vec![3])), (vec![2], Some(vec![2]))]));
    }
}
