//! The sending side of an edge: picks the channel of each record and cuts batches.

use cofferdam_contract::Batch;
use cofferdam_core::{
    failure::FailureCause,
    graph::Partitioner,
    key_group::{key_group, task_index},
};

use super::{Element, Outlet};

/// A batch is sent when it has this many records: enough for the cost of a guest's call to vanish,
/// few enough to stay in the processor's cache.
pub(crate) const BATCH_RECORDS_MAX: usize = 1024;
/// Or this many bytes.
pub(crate) const BATCH_BYTES_MAX: usize = 64 << 10;

/// One edge, seen from one of its producing tasks.
#[derive(Debug)]
pub(crate) struct Writer {
    partitioner: Partitioner,
    /// Hash: the channel of each key group.
    owners: Vec<u32>,
    channels: Vec<Outgoing>,
    /// Rebalance: the channel of the next batch.
    next: usize,
}

#[derive(Debug)]
struct Outgoing {
    outlet: Outlet,
    batch: Batch,
}

impl Writer {
    /// `outlets` in the order of the receiving tasks; for a forward edge, just the one.
    pub(crate) fn new(
        partitioner: Partitioner,
        max_parallelism: u32,
        outlets: Vec<Outlet>,
        start: usize,
    ) -> Self {
        let outgoing = |outlet| Outgoing { outlet, batch: Batch::empty() };
        let channels: Vec<Outgoing> = outlets.into_iter().map(outgoing).collect();
        let next = start % channels.len().max(1);
        let parallelism = u32::try_from(channels.len()).unwrap_or(u32::MAX);
        let owner = |group| task_index(group, parallelism, max_parallelism);
        let owners = match partitioner {
            Partitioner::Hash if 1 < parallelism => (0..max_parallelism).map(owner).collect(),
            _ => Vec::new(),
        };
        Self { partitioner, owners, channels, next }
    }

    /// Whether more may be written to every channel.
    pub(crate) fn has_credit(&self) -> bool {
        self.channels.iter().all(|channel| channel.outlet.has_credit())
    }

    /// Waits until it may.
    pub(crate) async fn wait_for_credit(&self) {
        for channel in &self.channels {
            channel.outlet.wait_for_credit().await;
        }
    }

    /// Takes records in; sends what has become a full batch.
    ///
    /// # Errors
    /// Where a partition could not be written.
    pub(crate) fn write(&mut self, batch: Batch) -> Result<(), FailureCause> {
        match self.partitioner {
            Partitioner::Hash if 1 < self.channels.len() => self.write_by_key(&batch),
            Partitioner::Broadcast => {
                for channel in &mut self.channels {
                    channel.append(batch.clone());
                }
            }
            Partitioner::Global => self.channels[0].append(batch),
            Partitioner::Hash
            | Partitioner::Forward
            | Partitioner::Rebalance
            | Partitioner::Rescale => {
                // Whole batches take turns: what is equal in the long run needs no splitting.
                let channel = &mut self.channels[self.next];
                channel.append(batch);
                if channel.batch.value_ends.is_empty() {
                    self.next = (self.next + 1) % self.channels.len();
                }
            }
        }
        // All parts of a partition are in one file.
        self.channels.first().map_or(Ok(()), |channel| channel.outlet.check())
    }

    fn write_by_key(&mut self, batch: &Batch) {
        let max_parallelism = u32::try_from(self.owners.len()).unwrap_or(u32::MAX);
        for channel in &mut self.channels {
            channel.make_fit(batch);
        }
        let (mut key_start, mut value_start) = (0, 0);
        for (place, &value_end) in batch.value_ends.iter().enumerate() {
            // A hash edge without keys is refused before a job starts; an operator that leaves
            // some keys out sends those records to the task of the empty key.
            let key_end = batch.key_ends.get(place).copied().unwrap_or(0);
            let key = &batch.keys[key_start as usize..key_end as usize];
            let owner = self.owners[key_group(key, max_parallelism) as usize];
            let channel = &mut self.channels[owner as usize];
            channel.reserve();
            channel.batch.push_from(batch, place, key_start..key_end, value_start..value_end);
            if channel.is_full() {
                channel.flush();
            }
            (key_start, value_start) = (key_end, value_end);
        }
    }

    /// Sends everything that is held back.
    pub(crate) fn flush(&mut self) {
        // Whatever is sent, the next one is another's turn: or one task had all of a slow stream.
        let is_held =
            self.channels.get(self.next).is_some_and(|it| !it.batch.value_ends.is_empty());
        if is_held {
            self.next = (self.next + 1) % self.channels.len();
        }
        for channel in &mut self.channels {
            channel.flush();
        }
    }

    /// Ends what does not end by itself.
    ///
    /// # Errors
    /// Where a partition could not be written.
    pub(crate) fn finish(&mut self) -> Result<(), FailureCause> {
        self.flush();
        self.channels.iter().try_for_each(|channel| channel.outlet.finish())
    }

    /// Sends something that concerns every channel, behind everything written before.
    pub(crate) fn announce(&mut self, element: impl Fn() -> Element) {
        for channel in &mut self.channels {
            channel.flush();
            channel.outlet.send(element());
        }
    }
}

impl Outgoing {
    #[inline]
    fn reserve(&mut self) {
        if self.batch.value_ends.capacity() == 0 {
            self.batch.value_ends.reserve(BATCH_RECORDS_MAX);
            self.batch.key_ends.reserve(BATCH_RECORDS_MAX);
            self.batch.keys.reserve(BATCH_RECORDS_MAX * 8);
        }
    }

    /// Sends what is held back if records of this batch cannot join it.
    fn make_fit(&mut self, batch: &Batch) {
        if !self.batch.can_join(batch) {
            self.flush();
        }
    }

    fn append(&mut self, batch: Batch) {
        self.make_fit(&batch);
        if let Err(batch) = self.batch.append(batch) {
            self.batch = batch;
        }
        if self.is_full() {
            self.flush();
        }
    }

    #[inline]
    fn is_full(&self) -> bool {
        BATCH_RECORDS_MAX <= self.batch.record_count() || BATCH_BYTES_MAX <= self.batch.byte_count()
    }

    fn flush(&mut self) {
        if !self.batch.value_ends.is_empty() {
            let batch = std::mem::replace(&mut self.batch, Batch::empty());
            self.outlet.send(Element::Records(batch));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cofferdam_contract::RecordRef;

    use super::*;
    use crate::exchange::{Gate, Sender};

    /// Writes 3,000 records through a partitioner to 3 tasks; gives the keys that each received.
    fn received(partitioner: Partitioner) -> Vec<Vec<String>> {
        let gates: Vec<_> = (0..3).map(|_| Gate::new(1)).collect();
        let senders = gates.iter().map(|gate| Outlet::Channel(Sender::new(gate, 0))).collect();
        let mut writer = Writer::new(partitioner, 128, senders, 0);
        for chunk in 0..30 {
            let mut batch = Batch::empty();
            for n in 0..100 {
                let key = format!("key-{}", (chunk * 100 + n) % 700);
                batch.push(RecordRef { key: Some(key.as_bytes()), value: b"", timestamp: None });
            }
            writer.write(batch).expect("channels take everything");
        }
        writer.announce(|| Element::EndOfInput);
        gates
            .iter()
            .map(|gate| {
                let mut keys = Vec::new();
                while let Some((_, element)) = gate.try_next() {
                    if let Element::Records(batch) = element {
                        assert!(batch.record_count() <= BATCH_RECORDS_MAX + 100);
                        let text = |key: &[u8]| String::from_utf8_lossy(key).into_owned();
                        keys.extend(batch.records().filter_map(|record| record.key.map(text)));
                    }
                }
                keys
            })
            .collect()
    }

    /// Records with and without keys or times used to be joined in one batch, whose columns then shifted.
    #[test]
    fn a_record_keeps_its_key_and_time_whatever_it_is_batched_with() {
        let partitioners = [
            Partitioner::Hash,
            Partitioner::Broadcast,
            Partitioner::Global,
            Partitioner::Rebalance,
            Partitioner::Rescale,
            Partitioner::Forward,
        ];
        for partitioner in partitioners {
            let gates: Vec<_> = (0..3).map(|_| Gate::new(1)).collect();
            let senders = gates.iter().map(|gate| Outlet::Channel(Sender::new(gate, 0))).collect();
            let mut writer = Writer::new(partitioner, 128, senders, 0);
            let key = |n: usize| (!n.is_multiple_of(3)).then(|| format!("key-{n}"));
            let time = |n: usize| (n % 5 < 2).then_some(n as i64);
            for n in 0..500 {
                let mut batch = Batch::empty();
                let (key, value) = (key(n), n.to_string());
                let key = key.as_ref().map(String::as_bytes);
                batch.push(RecordRef { key, value: value.as_bytes(), timestamp: time(n) });
                writer.write(batch).expect("channels take everything");
            }
            writer.flush();
            let mut count = 0;
            for gate in &gates {
                while let Some((_, Element::Records(batch))) = gate.try_next() {
                    assert_eq!(batch.check(), Ok(()));
                    for record in batch.records() {
                        let n: usize =
                            String::from_utf8_lossy(record.value).parse().expect("a number");
                        assert_eq!(record.key, key(n).as_ref().map(String::as_bytes));
                        assert_eq!(record.timestamp, time(n));
                        count += 1;
                    }
                }
            }
            let copies = if partitioner == Partitioner::Broadcast { 3 } else { 1 };
            assert_eq!(count, 500 * copies, "{partitioner:?}");
        }
    }

    #[test]
    fn hash_sends_a_key_to_one_task_only() {
        let mut owner = BTreeMap::new();
        let received = received(Partitioner::Hash);
        assert_eq!(received.iter().map(Vec::len).sum::<usize>(), 3_000);
        for (task, keys) in received.iter().enumerate() {
            assert!(500 < keys.len(), "task {task} got {}", keys.len());
            for key in keys {
                assert_eq!(*owner.entry(key.clone()).or_insert(task), task, "{key}");
            }
        }
    }

    #[test]
    fn broadcast_sends_everything_to_everyone_and_rebalance_shares() {
        assert!(received(Partitioner::Broadcast).iter().all(|keys| keys.len() == 3_000));
        let shares = received(Partitioner::Rebalance);
        assert_eq!(shares.iter().map(Vec::len).sum::<usize>(), 3_000);
        assert!(
            shares.iter().all(|keys| 500 < keys.len()),
            "{:?}",
            shares.iter().map(Vec::len).collect::<Vec<_>>()
        );
    }
}
