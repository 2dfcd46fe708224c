//! Moves batches between the tasks of one process: channels with credit by bytes.
//!
//! Each receiving task has one gate, and in it a queue a channel. A sender asks for credit before
//! it processes a batch, and then sends what comes of it without waiting: a channel holds at most
//! `CHANNEL_BYTES_MAX` bytes and what one batch leads to. So a task that has no credit stands
//! between two batches, where it can take a snapshot. A barrier that blocks a channel thereby also
//! stops its sender.
//!
//! A barrier always lies in its channel where it was sent. For an unaligned checkpoint only the
//! news of it overtakes what lies before: the gate announces it, and [`Gate::begin_capture`] copies
//! what is still before it in each channel.

mod gate;
pub(crate) mod link;
pub(crate) mod partition;
mod sync;
pub(crate) mod writer;

use std::sync::{Arc, Mutex, PoisonError};

use cofferdam_core::failure::FailureCause;

pub(crate) use self::gate::{Element, Gate, Sender};
use self::{link::Link, partition::PartitionWriter};

/// Where what a writer has for one receiver goes.
#[derive(Debug, Clone)]
pub(crate) enum Outlet {
    /// Into a channel, while the receiver runs.
    Channel(Sender),
    /// Into a channel whose receiver may be away.
    Link(Arc<Link>),
    /// Into a partition, for this one of its readers.
    Partition(Arc<Mutex<PartitionWriter>>, usize),
}

impl Outlet {
    fn send(&self, element: Element) {
        match self {
            Self::Channel(sender) => sender.send(element),
            Self::Link(link) => link.send(element),
            Self::Partition(partition, reader) => lock(partition).write(*reader, element),
        }
    }

    fn has_credit(&self) -> bool {
        match self {
            Self::Channel(sender) => sender.has_credit(),
            Self::Link(link) => link.has_credit(),
            // A partition takes whatever comes: it is on disk.
            Self::Partition(..) => true,
        }
    }

    async fn wait_for_credit(&self) {
        match self {
            Self::Channel(sender) => sender.wait_for_credit().await,
            Self::Link(link) => link.wait_for_credit().await,
            Self::Partition(..) => {}
        }
    }

    /// Whether what was written is there.
    fn check(&self) -> Result<(), FailureCause> {
        match self {
            Self::Channel(_) | Self::Link(_) => Ok(()),
            Self::Partition(partition, _) => lock(partition).check(),
        }
    }

    /// Nothing follows, in none of a partition's parts.
    fn finish(&self) -> Result<(), FailureCause> {
        match self {
            Self::Channel(_) | Self::Link(_) => Ok(()),
            Self::Partition(partition, _) => lock(partition).finish(),
        }
    }
}

fn lock(partition: &Mutex<PartitionWriter>) -> std::sync::MutexGuard<'_, PartitionWriter> {
    partition.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
