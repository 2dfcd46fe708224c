//! What an unaligned checkpoint holds of a task's channels: records that its barrier has overtaken.

use cofferdam_contract::Batch;
use cofferdam_core::{
    graph::Partitioner,
    key_group::{key_group, task_index},
    redistribute::{Receiver, receiver_in_flight},
};
use serde::{Deserialize, Serialize};

/// An element that was on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum InFlight {
    /// Records.
    Records(Batch),
    /// Event time of the channel.
    Watermark(i64),
}

impl InFlight {
    /// As [`ChannelState::check`].
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self) -> Result<(), &'static str> {
        match self {
            Self::Records(batch) => batch.check(),
            Self::Watermark(_) => Ok(()),
        }
    }
}

/// What was on its way in one channel, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// The place of its edge among the inputs of the receiving node in the metadata.
    pub place: u32,
    /// The input of the operator that takes it.
    pub input: u32,
    /// The name of the operator that has sent it.
    pub from: String,
    /// Which of its tasks.
    pub producer: u32,
    /// What was sent.
    pub elements: Vec<InFlight>,
}

impl ChannelState {
    /// Whether the columns of its records fit together: a reader goes by their ends.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self) -> Result<(), &'static str> {
        self.elements.iter().try_for_each(InFlight::check)
    }

    /// The size of its records.
    #[must_use]
    pub fn byte_count(&self) -> u64 {
        let size = |element: &InFlight| match element {
            InFlight::Records(batch) => batch.byte_count() as u64,
            InFlight::Watermark(_) => 0,
        };
        self.elements.iter().map(size).sum()
    }

    /// Shares its records out among the tasks that there are now, as their edge would. Watermarks
    /// stay behind: the sources tell event time again. `None` where every task would need them, and
    /// some have processed them already.
    #[must_use]
    pub fn share(
        self,
        receiver: u32,
        partitioner: Partitioner,
        parallelism: u32,
        max_parallelism: u32,
    ) -> Option<Vec<(u32, Self)>> {
        let Self { place, input, from, producer, elements } = self;
        let mut shares: Vec<Vec<InFlight>> = vec![Vec::new(); parallelism as usize];
        for element in elements {
            let InFlight::Records(batch) = element else { continue };
            let have_keys = !batch.key_ends.is_empty();
            match receiver_in_flight(partitioner, have_keys, receiver, parallelism) {
                Receiver::Every => return None,
                Receiver::OwnerOfKey => {
                    let mut parts = vec![Batch::empty(); parallelism as usize];
                    for record in batch.records() {
                        let group = key_group(record.key.unwrap_or_default(), max_parallelism);
                        let owner = task_index(group, parallelism, max_parallelism);
                        parts[owner as usize].push(record);
                    }
                    for (share, part) in shares.iter_mut().zip(parts) {
                        if 0 < part.record_count() {
                            share.push(InFlight::Records(part));
                        }
                    }
                }
                Receiver::Task(task) => shares[task as usize].push(InFlight::Records(batch)),
            }
        }
        let filled = (0..).zip(shares).filter(|(_, elements)| !elements.is_empty());
        Some(
            filled
                .map(|(task, elements)| {
                    (task, Self { place, input, from: from.clone(), producer, elements })
                })
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_contract::RecordRef;

    use super::*;

    fn channel() -> ChannelState {
        let mut batch = Batch::empty();
        for n in 0..100 {
            let key = format!("key-{n}");
            batch.push(RecordRef { key: Some(key.as_bytes()), value: b"v", timestamp: None });
        }
        let elements = vec![InFlight::Records(batch), InFlight::Watermark(3)];
        ChannelState { place: 0, input: 0, from: "words".to_owned(), producer: 1, elements }
    }

    #[test]
    fn records_by_key_go_to_the_task_that_owns_the_key_now() {
        let shares = channel().share(1, Partitioner::Hash, 5, 128).expect("can be shared");
        let mut count = 0;
        for (task, share) in &shares {
            for element in &share.elements {
                let InFlight::Records(batch) = element else { panic!("{element:?}") };
                for record in batch.records() {
                    let group = key_group(record.key.expect("a key"), 128);
                    assert_eq!(task_index(group, 5, 128), *task);
                    count += 1;
                }
            }
        }
        assert_eq!((count, shares.len()), (100, 5));
    }

    #[test]
    fn records_without_an_owner_stay_together_and_broadcast_ones_cannot_be_shared() {
        let shares = channel().share(4, Partitioner::Rebalance, 3, 128).expect("can be shared");
        assert_eq!(shares.iter().map(|(task, _)| *task).collect::<Vec<_>>(), [1]);
        assert_eq!(shares[0].1.byte_count(), channel().byte_count());
        let by_key = channel().share(1, Partitioner::Forward, 5, 128).expect("can be shared");
        assert_eq!(Some(by_key), channel().share(1, Partitioner::Hash, 5, 128));
        assert_eq!(channel().share(4, Partitioner::Global, 3, 128).expect("shared")[0].0, 0);
        assert_eq!(channel().share(0, Partitioner::Broadcast, 3, 128), None);
    }
}
