//! The gate of a task: its channels, and the credit of their senders.
//!
//! A sender asks for credit before it processes a batch, and then sends what comes of it without waiting: a
//! channel holds at most [`CHANNEL_BYTES_MAX`] bytes and what one batch leads to.
//!
//! `tests/loom` compiles this file, too, and tries every interleaving of both sides: what it shares between
//! threads comes from `super::sync`.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::PoisonError,
};

use cofferdam_contract::Batch;
use cofferdam_core::{
    checkpoint::Purpose,
    ids::{ChannelId, CheckpointId},
};
use cofferdam_store::in_flight::InFlight;

use super::sync::{Arc, AtomicBool, AtomicU64, Mutex, MutexGuard, Notify, Ordering};

/// Bytes a channel holds before its sender waits: some tens of batches, so that neither side waits
/// for the other in a steady stream, and few enough for a barrier to pass in milliseconds.
pub(super) const CHANNEL_BYTES_MAX: usize = 512 << 10;

/// What travels through a channel.
#[derive(Debug)]
pub(crate) enum Element {
    /// Records.
    Records(Batch),
    /// Event time of this channel.
    Watermark(i64),
    /// This channel holds event time back no longer, until a watermark comes.
    Idle,
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
    /// By channel.
    credits: Vec<Credit>,
    /// The newest checkpoint whose barrier may overtake and lies in a channel; 0: none yet.
    announced: AtomicU64,
    /// A checkpoint is announced, or a capture whole.
    news: Notify,
}

/// What the sender of one channel waits for.
#[derive(Debug, Default)]
struct Credit {
    is_used_up: AtomicBool,
    came_back: Notify,
}

#[derive(Debug)]
struct GateState {
    channels: Vec<Channel>,
    /// The channel to look at first, so that none starves.
    next: usize,
    capture: Option<Capture>,
}

/// What an unaligned checkpoint holds of the channels.
#[derive(Debug)]
struct Capture {
    checkpoint: CheckpointId,
    /// By channel.
    elements: Vec<Vec<InFlight>>,
    /// Channels whose barrier has still to come.
    open: Vec<bool>,
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
            state: Mutex::new(GateState { channels, next: 0, capture: None }),
            readable: Notify::new(),
            credits: (0..channel_count).map(|_| Credit::default()).collect(),
            announced: AtomicU64::new(0),
            news: Notify::new(),
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
            if was_full && channel.bytes < CHANNEL_BYTES_MAX {
                let credit = &self.credits[index];
                credit.is_used_up.store(false, Ordering::Release);
                credit.came_back.notify_one();
            }
            state.next = index + 1;
            return Some((ChannelId(u32::try_from(index).unwrap_or(u32::MAX)), element));
        }
        None
    }

    /// Waits until an element has come since the last wait. One task waits here, and a
    /// notification before the wait is kept for it.
    pub(crate) async fn readable(&self) {
        self.readable.notified().await;
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

    /// The newest checkpoint whose barrier may overtake and has arrived in a channel.
    pub(crate) fn announced(&self) -> Option<CheckpointId> {
        match self.announced.load(Ordering::Acquire) {
            0 => None,
            id => Some(CheckpointId(id)),
        }
    }

    /// Waits until a checkpoint is announced or a capture whole.
    pub(crate) async fn news(&self) {
        self.news.notified().await;
    }

    /// Copies what lies before the barrier of a checkpoint in every channel, and continues with what
    /// comes there until the barrier does. From channels of `arrived` the barrier was taken
    /// already. The task must have taken its snapshot, and nothing from a channel since.
    pub(crate) fn begin_capture(&self, checkpoint: CheckpointId, arrived: &BTreeSet<ChannelId>) {
        let mut state = self.lock();
        let count = state.channels.len();
        let mut capture =
            Capture { checkpoint, elements: vec![Vec::new(); count], open: vec![true; count] };
        for channel in arrived {
            capture.open[channel.0 as usize] = false;
        }
        for (index, channel) in state.channels.iter().enumerate() {
            channel.queue.iter().for_each(|element| capture.add(index, element));
        }
        state.capture = Some(capture);
    }

    /// What was captured, by channel, once every channel's barrier has come.
    pub(crate) fn take_capture(&self) -> Option<(CheckpointId, Vec<Vec<InFlight>>)> {
        let mut state = self.lock();
        let capture = state.capture.take_if(|capture| capture.is_whole())?;
        Some((capture.checkpoint, capture.elements))
    }

    /// The checkpoint was given up.
    pub(crate) fn drop_capture(&self, checkpoint: CheckpointId) {
        self.lock().capture.take_if(|capture| capture.checkpoint == checkpoint);
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Capture {
    fn is_whole(&self) -> bool {
        !self.open.contains(&true)
    }

    fn add(&mut self, channel: usize, element: &Element) {
        if !self.open[channel] {
            return;
        }
        match element {
            Element::Records(batch) => {
                self.elements[channel].push(InFlight::Records(batch.clone()));
            }
            Element::Watermark(watermark) => {
                self.elements[channel].push(InFlight::Watermark(*watermark));
            }
            Element::Barrier(checkpoint, _) if *checkpoint == self.checkpoint => {
                self.open[channel] = false;
            }
            // A sender whose input has ended says so again when it is restored.
            Element::Barrier(..) | Element::EndOfInput | Element::Idle => {}
        }
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

    /// Sends at once, whether or not there is credit.
    pub(crate) fn send(&self, element: Element) {
        let bytes = element_bytes(&element);
        let announced = match &element {
            Element::Barrier(checkpoint, Purpose::Periodic) => Some(checkpoint.0),
            _ => None,
        };
        let mut state = self.gate.lock();
        let mut is_news = false;
        if let Some(capture) = &mut state.capture {
            capture.add(self.channel, &element);
            is_news = capture.is_whole();
        }
        let channel = &mut state.channels[self.channel];
        channel.bytes += bytes;
        channel.queue.push_back(element);
        if CHANNEL_BYTES_MAX <= channel.bytes {
            self.credit().is_used_up.store(true, Ordering::Release);
        }
        drop(state);
        self.gate.readable.notify_one();
        if let Some(checkpoint) = announced {
            is_news |= self.gate.announced.fetch_max(checkpoint, Ordering::AcqRel) < checkpoint;
        }
        if is_news {
            self.gate.news.notify_one();
        }
    }

    /// Whether the receiver has taken enough for more to be sent.
    pub(crate) fn has_credit(&self) -> bool {
        !self.credit().is_used_up.load(Ordering::Acquire)
    }

    /// Waits for credit.
    pub(crate) async fn wait_for_credit(&self) {
        while !self.has_credit() {
            self.credit().came_back.notified().await;
        }
    }

    fn credit(&self) -> &Credit {
        &self.gate.credits[self.channel]
    }
}

fn element_bytes(element: &Element) -> usize {
    match element {
        Element::Records(batch) => batch.byte_count(),
        Element::Watermark(_) | Element::Idle | Element::Barrier(..) | Element::EndOfInput => 0,
    }
}
