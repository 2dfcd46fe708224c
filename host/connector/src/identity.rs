//! Who a job is, over all of its runs: what it writes elsewhere carries this, so that nobody takes
//! the output of one for that of another.
//!
//! A **job** is made once, with its state directory, and keeps its id in every checkpoint. A
//! **timeline** is one course of its events: whatever resumes from an older point than the newest begins
//! a new one, and knows where it has left its parent.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How many ancestors of a timeline are remembered.
const ANCESTORS_MAX: usize = 256;

/// An id that was made up at random, once.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(uuid::Uuid);

impl Id {
    /// A new one.
    #[must_use]
    pub fn new() -> Self {
        Self(uuid::Uuid::new_v4())
    }

    /// As many bits as a name of a file needs.
    #[must_use]
    pub fn short(self) -> String {
        self.0.simple().to_string()[..12].to_owned()
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.simple().fmt(f)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Id {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        uuid::Uuid::parse_str(text).map(Self)
    }
}

impl Serialize for Id {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.collect_str(self),
            false => self.bytes().serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.is_human_readable() {
            true => String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom),
            false => <[u8; 16]>::deserialize(deserializer)
                .map(|bytes| Self(uuid::Uuid::from_bytes(bytes))),
        }
    }
}

/// A job, its timeline, and where that comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// The job.
    pub job: Id,
    /// This course of its events.
    pub timeline: Id,
    /// Those that it comes from, the nearest first, each with the checkpoint at which it has left it.
    pub ancestors: Vec<(Id, u64)>,
}

impl Lineage {
    /// A job that begins.
    #[must_use]
    pub fn new() -> Self {
        Self { job: Id::new(), timeline: Id::new(), ancestors: Vec::new() }
    }

    /// A new timeline that leaves this one at a checkpoint.
    #[must_use]
    pub fn fork(&self, checkpoint: u64) -> Self {
        let here = [(self.timeline, checkpoint)];
        let ancestors = here.into_iter().chain(self.ancestors.iter().copied());
        Self {
            job: self.job,
            timeline: Id::new(),
            ancestors: ancestors.take(ANCESTORS_MAX).collect(),
        }
    }

    /// Up to which checkpoint what a timeline has done is part of this one's past; `None`: nothing of
    /// it. `own` is the checkpoint at which this one stands.
    #[must_use]
    pub fn shares(&self, timeline: Id, own: u64) -> Option<u64> {
        if timeline == self.timeline {
            return Some(own);
        }
        let ancestor = self.ancestors.iter().find(|(ancestor, _)| *ancestor == timeline);
        ancestor.map(|(_, checkpoint)| *checkpoint)
    }

    /// Whether this one has left `other` at a checkpoint, directly or by way of others.
    #[must_use]
    pub fn comes_from(&self, other: Id, checkpoint: u64) -> bool {
        self.ancestors.contains(&(other, checkpoint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_shares_the_past_up_to_where_it_left() {
        let first = Lineage::new();
        let second = first.fork(7);
        let third = second.fork(9);
        assert_eq!(third.job, first.job);
        assert_eq!(third.shares(first.timeline, 20), Some(7));
        assert_eq!(third.shares(second.timeline, 20), Some(9));
        assert_eq!(third.shares(third.timeline, 20), Some(20));
        assert_eq!(first.shares(second.timeline, 20), None);
        assert!(third.comes_from(first.timeline, 7) && !third.comes_from(first.timeline, 8));
    }

    #[test]
    fn ids_are_text_for_people_and_bytes_for_machines() {
        let lineage = Lineage::new().fork(3);
        let text = serde_json::to_string(&lineage).expect("encodes");
        assert!(text.contains(&lineage.job.to_string()));
        assert_eq!(serde_json::from_str::<Lineage>(&text).expect("decodes"), lineage);
        let bytes = postcard::to_stdvec(&lineage).expect("encodes");
        assert!(bytes.len() < 60);
        assert_eq!(postcard::from_bytes::<Lineage>(&bytes).expect("decodes"), lineage);
    }
}
