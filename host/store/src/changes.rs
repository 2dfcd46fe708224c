//! What has changed in the declared state of a task between two barriers.

use std::{fmt, sync::Arc};

use cofferdam_contract::StateChanges;

use crate::{
    declared::{Entries, Merge, sorted},
    run::Run,
};

/// Changes that the host has collected and keeps.
pub trait HostChanges: fmt::Debug + Send + Sync {
    /// Whether nothing has changed.
    fn is_empty(&self) -> bool;

    /// The changes, by ascending keys.
    fn entries(&self) -> Entries<'_>;
}

/// The entries that have changed between two barriers.
#[derive(Debug)]
pub enum Changes {
    /// Handed over, in pieces, by a guest that keeps its state itself.
    Guest(Vec<StateChanges>),
    /// Collected by the host, which keeps it.
    Host(Arc<dyn HostChanges>),
    /// Those of several barriers, as one.
    Merged(Run),
}

impl Changes {
    /// Whether nothing has changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Guest(pieces) => pieces.iter().all(|changes| changes.states.is_empty()),
            Self::Host(changes) => changes.is_empty(),
            Self::Merged(run) => run.is_empty(),
        }
    }

    /// How much memory they take up, beside what the host keeps anyway.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Guest(pieces) => pieces.iter().map(StateChanges::byte_count).sum(),
            Self::Host(_) => 0,
            Self::Merged(run) => run.bytes(),
        }
    }

    /// Those of barriers that follow each other, as one; `None` where the host keeps them, or they cannot be
    /// read.
    pub(crate) fn as_one(apart: &[&Self], max_parallelism: u32) -> Option<Self> {
        if apart.iter().any(|it| matches!(it, Self::Host(_))) {
            return None;
        }
        let runs = apart.iter().map(|changes| changes.run(max_parallelism)).collect();
        Run::of(Box::new(Merge::of(runs))).ok().map(Self::Merged)
    }

    /// The changes as a run. Of a key that was handed over twice the last counts.
    #[must_use]
    pub fn run(&self, max_parallelism: u32) -> Entries<'_> {
        match self {
            Self::Guest(pieces) => sorted(pieces, max_parallelism),
            Self::Host(changes) => changes.entries(),
            Self::Merged(run) => run.entries(None),
        }
    }
}
