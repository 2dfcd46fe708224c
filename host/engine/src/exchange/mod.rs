//! Moves batches between tasks: channels with credit by bytes, and the writers that pick them.
//!
//! A receiver has one [`Gate`] with a queue for each of its channels. A channel holds at most
//! `CHANNEL_BYTES_MAX` bytes that were not taken yet (and one batch more), then its sender waits:
//! that is the credit. A barrier that blocks a channel thereby also stops its sender.

pub(crate) mod writer;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use cofferdam_core::{
    checkpoint::Purpose,
    ids::{ChannelId, CheckpointId},
};
use cofferdam_sandbox::Batch;
use tokio::sync::Notify;

use crate::batch::BatchExt;

/// Bytes a channel holds before its sender waits: some tens of batches, so that neither side waits
/// for the other in a steady stream, and few enough for a barrier to pass in milliseconds.
const CHANNEL_BYTES_MAX: usize = 512 << 10;

/// What travels through a channel.
#[derive(Debug)]
pub(crate) enum Element {
    /// Records.
    Records(Batch),
    /// Event time of this channel.
    Watermark(i64),
    /// The border between what belongs to a checkpoint and what does not.
    Barrier(CheckpointId, Purpose),
    /// No records will follow. Barriers may.
    EndOfInput,
}

/// The receiving side of all channels of one task.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    readable: Notify,
    /// One for each channel: its sender may go on.
    writable: Vec<Notify>,
}

#[derive(Debug)]
struct GateState {
    channels: Vec<Channel>,
    /// The channel to look at first, so that none starves.
    next: usize,
}

#[derive(Debug, Default)]
struct Channel {
    queue: VecDeque<Element>,
    bytes: usize,
    is_blocked: bool,
}

impl Gate {
    pub(crate) fn new(channel_count: usize) -> Arc<Self> {
        let channels = (0..channel_count).map(|_| Channel::default()).collect();
        Arc::new(Self {
            state: Mutex::new(GateState { channels, next: 0 }),
            readable: Notify::new(),
            writable: (0..channel_count).map(|_| Notify::new()).collect(),
        })
    }

    /// Takes the next element of a channel that is not blocked; `None` where there is none now.
    pub(crate) fn try_next(&self) -> Option<(ChannelId, Element)> {
        let mut state = self.lock();
        let count = state.channels.len();
        for step in 0..count {
            let index = (state.next + step) % count;
            let channel = &mut state.channels[index];
            if channel.is_blocked {
                continue;
            }
            let Some(element) = channel.queue.pop_front() else { continue };
            let was_full = CHANNEL_BYTES_MAX <= channel.bytes;
            channel.bytes -= element_bytes(&element);
            let is_free = channel.bytes < CHANNEL_BYTES_MAX;
            state.next = index + 1;
            drop(state);
            if was_full && is_free {
                self.writable[index].notify_one();
            }
            return Some((ChannelId(u32::try_from(index).unwrap_or(u32::MAX)), element));
        }
        None
    }

    /// Waits for the next element of a channel that is not blocked.
    pub(crate) async fn next(&self) -> (ChannelId, Element) {
        loop {
            if let Some(next) = self.try_next() {
                return next;
            }
            // One task waits here, and a notification before the wait is kept for it.
            self.readable.notified().await;
        }
    }

    /// Takes nothing more from a channel.
    pub(crate) fn block(&self, channel: ChannelId) {
        self.lock().channels[channel.0 as usize].is_blocked = true;
    }

    /// Takes from every channel again.
    pub(crate) fn unblock_all(&self) {
        self.lock().channels.iter_mut().for_each(|channel| channel.is_blocked = false);
        self.readable.notify_one();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending side of one channel.
#[derive(Debug, Clone)]
pub(crate) struct Sender {
    gate: Arc<Gate>,
    channel: usize,
}

impl Sender {
    pub(crate) fn new(gate: &Arc<Gate>, channel: usize) -> Self {
        Self { gate: gate.clone(), channel }
    }

    /// Sends records as soon as there is credit; everything else at once, in its place.
    pub(crate) async fn send(&self, element: Element) {
        let bytes = element_bytes(&element);
        let mut element = Some(element);
        loop {
            {
                let mut state = self.gate.lock();
                let channel = &mut state.channels[self.channel];
                if (bytes == 0 || channel.bytes < CHANNEL_BYTES_MAX)
                    && let Some(element) = element.take()
                {
                    channel.bytes += bytes;
                    channel.queue.push_back(element);
                }
            }
            if element.is_none() {
                self.gate.readable.notify_one();
                return;
            }
            self.gate.writable[self.channel].notified().await;
        }
    }
}

fn element_bytes(element: &Element) -> usize {
    match element {
        Element::Records(batch) => batch.byte_count(),
        Element::Watermark(_) | Element::Barrier(..) | Element::EndOfInput => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::batch::RecordRef;

    fn records(bytes: usize) -> Element {
        let mut batch = Batch::empty();
        batch.push(RecordRef { key: None, value: &vec![0; bytes], timestamp: None });
        Element::Records(batch)
    }

    #[tokio::test]
    async fn sender_waits_for_credit_and_goes_on_when_it_comes() {
        let gate = Gate::new(1);
        let sender = Sender::new(&gate, 0);
        sender.send(records(CHANNEL_BYTES_MAX)).await;
        let waiting = tokio::spawn({
            let sender = sender.clone();
            async move { sender.send(records(10)).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "no credit");
        sender.send(Element::Watermark(1)).await;
        assert!(matches!(gate.next().await, (ChannelId(0), Element::Records(_))));
        tokio::time::timeout(Duration::from_secs(5), waiting).await.expect("credit").expect("sent");
    }

    #[tokio::test]
    async fn blocked_channel_keeps_its_elements_in_order() {
        let gate = Gate::new(2);
        let (left, right) = (Sender::new(&gate, 0), Sender::new(&gate, 1));
        gate.block(ChannelId(0));
        left.send(Element::Watermark(1)).await;
        left.send(Element::Watermark(2)).await;
        right.send(Element::Watermark(3)).await;
        assert!(matches!(gate.next().await, (ChannelId(1), Element::Watermark(3))));
        assert!(gate.try_next().is_none());
        gate.unblock_all();
        assert!(matches!(gate.next().await, (ChannelId(0), Element::Watermark(1))));
        assert!(matches!(gate.next().await, (ChannelId(0), Element::Watermark(2))));
    }

    #[tokio::test]
    async fn no_channel_starves() {
        let gate = Gate::new(2);
        let (left, right) = (Sender::new(&gate, 0), Sender::new(&gate, 1));
        for n in 0..10 {
            left.send(Element::Watermark(n)).await;
            right.send(Element::Watermark(n)).await;
        }
        for turn in 0..20 {
            assert_eq!(gate.next().await.0, ChannelId(turn % 2), "turn {turn}");
        }
    }
}
