//! Records as columns: builds batches record by record and takes them apart again.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::check_column;

/// One record of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordRef<'a> {
    /// Its key, if the batch has keys.
    pub key: Option<&'a [u8]>,
    /// Its value.
    pub value: &'a [u8],
    /// Its event time in milliseconds.
    pub timestamp: Option<i64>,
}

/// Records as columns of bytes, so that a thousand of them cost one call and a few copies.
///
/// Record `i` has the bytes of a column from its end `i - 1` (0 for the first) to its end `i`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(
    feature = "lift",
    derive(
        wasmtime::component::ComponentType,
        wasmtime::component::Lift,
        wasmtime::component::Lower
    )
)]
#[cfg_attr(feature = "lift", component(record))]
pub struct Batch {
    /// The keys, one after the other.
    #[serde(with = "serde_bytes")]
    pub keys: Vec<u8>,
    /// Where each key ends; empty where no record has a key, else one end a record.
    #[cfg_attr(feature = "lift", component(name = "key-ends"))]
    pub key_ends: Vec<u32>,
    /// The values, one after the other.
    #[serde(with = "serde_bytes")]
    pub values: Vec<u8>,
    /// Where each value ends: one end a record.
    #[cfg_attr(feature = "lift", component(name = "value-ends"))]
    pub value_ends: Vec<u32>,
    /// Event time in milliseconds, one a record; empty where no record has one.
    pub timestamps: Vec<i64>,
}

impl Batch {
    /// A batch without records.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            keys: Vec::new(),
            key_ends: Vec::new(),
            values: Vec::new(),
            value_ends: Vec::new(),
            timestamps: Vec::new(),
        }
    }

    /// How many records.
    #[must_use]
    #[inline]
    pub fn record_count(&self) -> usize {
        self.value_ends.len()
    }

    /// How many bytes, ends and timestamps included.
    #[must_use]
    #[inline]
    pub fn byte_count(&self) -> usize {
        self.keys.len()
            + self.values.len()
            + 4 * (self.key_ends.len() + self.value_ends.len())
            + 8 * self.timestamps.len()
    }

    /// Whether its records have keys, and whether they have timestamps. Only batches of one shape
    /// can be joined: half a column would give records the keys or times of their neighbours.
    #[must_use]
    #[inline]
    pub fn shape(&self) -> (bool, bool) {
        (!self.key_ends.is_empty(), !self.timestamps.is_empty())
    }

    /// Whether records of another batch can be added.
    #[must_use]
    #[inline]
    pub fn can_join(&self, other: &Self) -> bool {
        let fits = |left: &[u8], right: &[u8]| left.len() + right.len() <= u32::MAX as usize;
        self.value_ends.is_empty()
            || other.value_ends.is_empty()
            || (self.shape() == other.shape()
                && fits(&self.keys, &other.keys)
                && fits(&self.values, &other.values))
    }

    /// Adds a record. All records of a batch have a key and a timestamp, or none has.
    #[inline(always)]
    pub fn push(&mut self, record: RecordRef<'_>) {
        if let Some(key) = record.key {
            self.keys.extend_from_slice(key);
            self.key_ends.push(end_of(&self.keys));
        }
        self.values.extend_from_slice(record.value);
        self.value_ends.push(end_of(&self.values));
        if let Some(timestamp) = record.timestamp {
            self.timestamps.push(timestamp);
        }
    }

    /// Adds record number `index` of another batch, which [can join](Batch::can_join). `key` and
    /// `value` are where its bytes lie there.
    #[inline(always)]
    pub fn push_from(&mut self, other: &Self, index: usize, key: Range<u32>, value: Range<u32>) {
        if !other.key_ends.is_empty() {
            append_range(&mut self.keys, &other.keys, key);
            self.key_ends.push(end_of(&self.keys));
        }
        if !value.is_empty() {
            append_range(&mut self.values, &other.values, value);
        }
        self.value_ends.push(end_of(&self.values));
        if let Some(timestamp) = other.timestamps.get(index) {
            self.timestamps.push(*timestamp);
        }
    }

    /// Every record, in order.
    #[inline]
    pub fn records(&self) -> impl Iterator<Item = RecordRef<'_>> {
        let (mut key_start, mut value_start) = (0, 0);
        self.value_ends.iter().enumerate().map(move |(index, &value_end)| {
            let key = self.key_ends.get(index).map(|&key_end| {
                let key = &self.keys[key_start as usize..key_end as usize];
                key_start = key_end;
                key
            });
            let value = &self.values[value_start as usize..value_end as usize];
            value_start = value_end;
            RecordRef { key, value, timestamp: self.timestamps.get(index).copied() }
        })
    }

    /// The records of a range of indices, which must be within the batch.
    #[must_use]
    pub fn part(&self, indices: Range<usize>) -> Self {
        let (keys, key_ends) = column_part(&self.keys, &self.key_ends, &indices);
        let (values, value_ends) = column_part(&self.values, &self.value_ends, &indices);
        let timestamps = self.timestamps.get(indices).unwrap_or_default().to_vec();
        Self { keys, key_ends, values, value_ends, timestamps }
    }

    /// Adds all records of another batch; gives it back if it cannot join.
    ///
    /// # Errors
    /// Where the two have other columns, or together more bytes than a column can have.
    pub fn append(&mut self, other: Self) -> Result<(), Self> {
        if self.value_ends.is_empty() {
            *self = other;
            return Ok(());
        }
        if !self.can_join(&other) {
            return Err(other);
        }
        let (keys, values) = (end_of(&self.keys), end_of(&self.values));
        self.keys.extend_from_slice(&other.keys);
        self.key_ends.extend(other.key_ends.iter().map(|end| end + keys));
        self.values.extend_from_slice(&other.values);
        self.value_ends.extend(other.value_ends.iter().map(|end| end + values));
        self.timestamps.extend_from_slice(&other.timestamps);
        Ok(())
    }

    /// Whether the columns fit together.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self) -> Result<(), &'static str> {
        let count = self.value_ends.len();
        if !self.key_ends.is_empty() && self.key_ends.len() != count {
            return Err("not one key a record");
        }
        if !self.timestamps.is_empty() && self.timestamps.len() != count {
            return Err("not one timestamp a record");
        }
        check_column(&self.key_ends, self.keys.len())?;
        check_column(&self.value_ends, self.values.len())
    }
}

/// Appends a part of a column. Most keys have at most 16 bytes, and copying 16 and cutting them to
/// size costs less than a copy of a length that the compiler does not know.
#[inline(always)]
pub fn append_range(out: &mut Vec<u8>, column: &[u8], range: Range<u32>) {
    let (start, len) = (range.start as usize, range.len());
    match column[start..].first_chunk::<16>() {
        Some(chunk) if len <= 16 => {
            let end = out.len() + len;
            out.extend_from_slice(chunk);
            out.truncate(end);
        }
        _ => out.extend_from_slice(&column[start..start + len]),
    }
}

/// Batches are cut long before 4 GiB; a single record larger than that cannot cross the boundary
/// of a 32-bit guest anyway and is refused where it enters.
#[inline]
fn end_of(column: &[u8]) -> u32 {
    column.len() as u32
}

/// The bytes and ends of a range of a column's entries.
fn column_part(column: &[u8], ends: &[u32], indices: &Range<usize>) -> (Vec<u8>, Vec<u32>) {
    let Some(part) = ends.get(indices.clone()) else { return Default::default() };
    let start = indices.start.checked_sub(1).map_or(0, |before| ends[before]);
    let end = part.last().copied().unwrap_or(start);
    let ends = part.iter().map(|end| end - start).collect();
    (column[start as usize..end as usize].to_vec(), ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record<'a>(key: &'a str, value: &'a str) -> RecordRef<'a> {
        RecordRef { key: Some(key.as_bytes()), value: value.as_bytes(), timestamp: Some(7) }
    }

    #[test]
    fn a_part_has_the_records_of_its_range_with_all_their_columns() {
        for (has_keys, has_times) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut batch = Batch::empty();
            for n in 0..20_usize {
                let (key, value) = (format!("key{}", n % 3), "v".repeat(n % 4));
                batch.push(RecordRef {
                    key: has_keys.then_some(key.as_bytes()),
                    value: value.as_bytes(),
                    timestamp: has_times.then_some(n as i64),
                });
            }
            for from in 0..=20 {
                for to in from..=20 {
                    let part = batch.part(from..to);
                    assert_eq!(part.check(), Ok(()));
                    let (all, some): (Vec<_>, Vec<_>) =
                        (batch.records().collect(), part.records().collect());
                    assert_eq!(&all[from..to], &some[..], "{from}..{to}");
                }
            }
        }
    }

    #[test]
    fn records_come_out_as_they_went_in() {
        let mut left = Batch::empty();
        let mut right = Batch::empty();
        left.push(record("a", "1"));
        left.push(record("", "22"));
        right.push(record("ccc", ""));
        left.append(right).expect("they have the same columns");
        let records: Vec<_> = left.records().collect();
        assert_eq!(records, [record("a", "1"), record("", "22"), record("ccc", "")]);
        assert_eq!(left.check(), Ok(()));
    }

    #[test]
    fn record_of_another_batch_is_copied_whole_wherever_it_lies() {
        let mut batch = Batch::empty();
        for len in 0..40 {
            let text = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz";
            batch.push(record(&text[len / 2..len], &text[..len % 20]));
        }
        let mut copied = Batch::empty();
        let (mut key, mut value) = (0, 0);
        for index in 0..batch.record_count() {
            let ends = (batch.key_ends[index], batch.value_ends[index]);
            copied.push_from(&batch, index, key..ends.0, value..ends.1);
            (key, value) = ends;
        }
        assert!(copied.records().eq(batch.records()));
    }

    /// They used to be joined blindly: 1,024 records lost their time, 848 had another's.
    #[test]
    fn batches_with_other_columns_are_not_joined() {
        let of = |key: Option<&'static str>, timestamp| {
            let mut batch = Batch::empty();
            batch.push(RecordRef { key: key.map(str::as_bytes), value: b"v", timestamp });
            batch
        };
        let kinds = [(None, None), (Some("k"), None), (None, Some(1)), (Some("k"), Some(1))];
        for (number, (key, time)) in kinds.into_iter().enumerate() {
            for (other_number, (other_key, other_time)) in kinds.into_iter().enumerate() {
                let mut batch = of(key, time);
                let joined = batch.append(of(other_key, other_time));
                assert_eq!(joined.is_ok(), number == other_number);
                assert_eq!(batch.check(), Ok(()));
                assert!(Batch::empty().can_join(&batch) && batch.can_join(&Batch::empty()));
            }
        }
    }

    #[test]
    fn keyless_records_have_no_key() {
        let mut batch = Batch::empty();
        batch.push(RecordRef { key: None, value: b"line", timestamp: None });
        assert_eq!(batch.records().next().and_then(|record| record.key), None);
        assert_eq!(batch.record_count(), 1);
    }
}
