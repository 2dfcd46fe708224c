//! Builds batches record by record and takes them apart again.

use cofferdam_sandbox::Batch;

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

/// What the engine does with batches.
pub trait BatchExt {
    /// A batch without records.
    fn empty() -> Self;
    /// How many records.
    fn record_count(&self) -> usize;
    /// How many bytes, ends and timestamps included.
    fn byte_count(&self) -> usize;
    /// Adds a record. All records of a batch have a key and a timestamp, or none has.
    fn push(&mut self, record: RecordRef<'_>);
    /// Every record, in order.
    fn records(&self) -> impl Iterator<Item = RecordRef<'_>>;
    /// Adds all records of another batch.
    fn append(&mut self, other: Self);
}

impl BatchExt for Batch {
    fn empty() -> Self {
        Self {
            keys: Vec::new(),
            key_ends: Vec::new(),
            values: Vec::new(),
            value_ends: Vec::new(),
            timestamps: Vec::new(),
        }
    }

    #[inline]
    fn record_count(&self) -> usize {
        self.value_ends.len()
    }

    #[inline]
    fn byte_count(&self) -> usize {
        self.keys.len()
            + self.values.len()
            + 4 * (self.key_ends.len() + self.value_ends.len())
            + 8 * self.timestamps.len()
    }

    #[inline(always)]
    fn push(&mut self, record: RecordRef<'_>) {
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

    #[inline]
    fn records(&self) -> impl Iterator<Item = RecordRef<'_>> {
        let (mut key_start, mut value_start) = (0, 0);
        self.value_ends.iter().enumerate().map(move |(place, &value_end)| {
            let key = self.key_ends.get(place).map(|&key_end| {
                let key = &self.keys[key_start as usize..key_end as usize];
                key_start = key_end;
                key
            });
            let value = &self.values[value_start as usize..value_end as usize];
            value_start = value_end;
            RecordRef { key, value, timestamp: self.timestamps.get(place).copied() }
        })
    }

    fn append(&mut self, other: Self) {
        if self.value_ends.is_empty() {
            *self = other;
            return;
        }
        let (keys, values) = (end_of(&self.keys), end_of(&self.values));
        self.keys.extend_from_slice(&other.keys);
        self.key_ends.extend(other.key_ends.iter().map(|end| end + keys));
        self.values.extend_from_slice(&other.values);
        self.value_ends.extend(other.value_ends.iter().map(|end| end + values));
        self.timestamps.extend_from_slice(&other.timestamps);
    }
}

/// Batches are cut long before 4 GiB; a single record larger than that cannot cross the boundary
/// of a 32-bit guest anyway and is refused where it enters.
#[inline]
fn end_of(column: &[u8]) -> u32 {
    column.len() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record<'a>(key: &'a str, value: &'a str) -> RecordRef<'a> {
        RecordRef { key: Some(key.as_bytes()), value: value.as_bytes(), timestamp: Some(7) }
    }

    #[test]
    fn records_come_out_as_they_went_in() {
        let mut left = Batch::empty();
        let mut right = Batch::empty();
        left.push(record("a", "1"));
        left.push(record("", "22"));
        right.push(record("ccc", ""));
        left.append(right);
        let records: Vec<_> = left.records().collect();
        assert_eq!(records, [record("a", "1"), record("", "22"), record("ccc", "")]);
        assert_eq!(left.check(), Ok(()));
    }

    #[test]
    fn keyless_records_have_no_key() {
        let mut batch = Batch::empty();
        batch.push(RecordRef { key: None, value: b"line", timestamp: None });
        assert_eq!(batch.records().next().and_then(|record| record.key), None);
        assert_eq!(batch.record_count(), 1);
    }
}
