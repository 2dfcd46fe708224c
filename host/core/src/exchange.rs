//! The types of an exchange: what of a producer's output can be read when, and read again.
//!
//! The table is Flink's `ResultPartitionType` (2.0); a result partition is what one task produces
//! for one edge.

/// How the records of an edge get from its producers to its consumers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExchangeType {
    /// Through channels while the producer runs, with any number of batches in between.
    Pipelined,
    /// Through channels of bounded size: the usual one of a stream.
    PipelinedBounded,
    /// Bounded, and a consumer may be started again alone, at the price of records lost.
    PipelinedApproximate,
    /// Through a result partition that is read after its producer has finished.
    Blocking,
    /// Blocking, and kept until somebody removes it.
    BlockingPersistent,
    /// Through channels where the consumer is there in time, and kept whole to be read again.
    HybridFull,
    /// As above, but only what the consumer did not take in time is kept.
    HybridSelective,
}

impl ExchangeType {
    /// Every type, in the order in which they are listed to people.
    pub const ALL: [Self; 7] = [
        Self::Pipelined,
        Self::PipelinedBounded,
        Self::PipelinedApproximate,
        Self::Blocking,
        Self::BlockingPersistent,
        Self::HybridFull,
        Self::HybridSelective,
    ];

    /// Its name in a manifest.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pipelined => "pipelined",
            Self::PipelinedBounded => "pipelined-bounded",
            Self::PipelinedApproximate => "pipelined-approximate",
            Self::Blocking => "blocking",
            Self::BlockingPersistent => "blocking-persistent",
            Self::HybridFull => "hybrid-full",
            Self::HybridSelective => "hybrid-selective",
        }
    }

    /// The type of this name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|exchange| exchange.name() == name)
    }

    /// Its consumers must run while its producers do: both are in one region.
    #[must_use]
    pub fn must_be_pipelined(self) -> bool {
        matches!(self, Self::Pipelined | Self::PipelinedBounded)
    }

    /// Its records go through result partitions on disk; those of the others through channels.
    #[must_use]
    pub fn has_partition(self) -> bool {
        !matches!(self, Self::Pipelined | Self::PipelinedBounded | Self::PipelinedApproximate)
    }

    /// Its consumers run while its producers do, and may be started again alone.
    #[must_use]
    pub fn is_approximate(self) -> bool {
        self == Self::PipelinedApproximate
    }

    /// Its consumers cannot begin before its producers have finished.
    #[must_use]
    pub fn is_blocking(self) -> bool {
        matches!(self, Self::Blocking | Self::BlockingPersistent)
    }

    /// A consumer that is started again can read it again from the beginning.
    #[must_use]
    pub fn is_reconsumable(self) -> bool {
        matches!(self, Self::Blocking | Self::BlockingPersistent | Self::HybridFull)
    }

    /// It outlives the job.
    #[must_use]
    pub fn is_persistent(self) -> bool {
        self == Self::BlockingPersistent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Table 4.2 of the reference: type, reconsumable, persistent, must be pipelined, blocking.
    #[test]
    fn each_type_can_be_read_when_and_as_often_as_the_reference_says() {
        let rows = [
            ("blocking", true, false, false, true),
            ("blocking-persistent", true, true, false, true),
            ("pipelined", false, false, true, false),
            ("pipelined-bounded", false, false, true, false),
            ("pipelined-approximate", false, false, false, false),
            ("hybrid-full", true, false, false, false),
            ("hybrid-selective", false, false, false, false),
        ];
        assert_eq!(rows.len(), ExchangeType::ALL.len());
        for (name, reconsumable, persistent, pipelined, blocking) in rows {
            let exchange = ExchangeType::of(name).expect("known");
            assert_eq!(exchange.name(), name);
            assert_eq!(exchange.is_reconsumable(), reconsumable, "{name}");
            assert_eq!(exchange.is_persistent(), persistent, "{name}");
            assert_eq!(exchange.must_be_pipelined(), pipelined, "{name}");
            assert_eq!(exchange.is_blocking(), blocking, "{name}");
        }
        assert_eq!(ExchangeType::of("pipelined-forced"), None);
    }
}
