//! Moves batches between the tasks of one process: channels with credit by bytes.
//!
//! Each receiving task has one gate, and in it a queue a channel. A sender asks for credit before
//! it processes a batch, and then sends what comes of it without waiting: a channel holds at most
//! [`CHANNEL_BYTES_MAX`] bytes and what one batch leads to. So a task that has no credit stands
//! between two batches, where it can take a snapshot. A barrier that blocks a channel thereby also
//! stops its sender.
//!
//! A barrier always lies in its channel where it was sent. For an unaligned checkpoint only the
//! news of it overtakes what lies before: the gate announces it, and [`Gate::begin_capture`] copies
//! what is still before it in each channel.

pub(crate) mod link;
pub(crate) mod partition;
pub(crate) mod writer;

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use cofferdam_contract::Batch;
use cofferdam_core::{
    checkpoint::Purpose,
    failure::FailureCause,
    ids::{ChannelId, CheckpointId},
};
use cofferdam_store::in_flight::InFlight;
use tokio::sync::Notify;

use self::{link::Link, partition::PartitionWriter};

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

    /// Copies what lies before the barrier of a checkpoint in every channel, and goes on with what
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

    fn lock(&self) -> std::sync::MutexGuard<'_, GateState> {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cofferdam_contract::RecordRef;

    use super::*;

    fn records(bytes: usize) -> Element {
        let mut batch = Batch::empty();
        batch.push(RecordRef { key: None, value: &vec![0; bytes], timestamp: None });
        Element::Records(batch)
    }

    #[tokio::test]
    async fn sender_waits_for_credit_and_goes_on_when_it_comes() {
        let gate = Gate::new(1);
        let sender = Sender::new(&gate, 0);
        sender.send(records(CHANNEL_BYTES_MAX));
        assert!(!sender.has_credit());
        let waiting = tokio::spawn({
            let sender = sender.clone();
            async move { sender.wait_for_credit().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "no credit");
        sender.send(Element::Watermark(1));
        assert!(matches!(gate.try_next(), Some((ChannelId(0), Element::Records(_)))));
        tokio::time::timeout(Duration::from_secs(5), waiting).await.expect("credit").expect("sent");
    }

    #[tokio::test]
    async fn capture_holds_what_lies_before_the_barrier_of_each_channel() {
        let gate = Gate::new(3);
        let senders: Vec<Sender> = (0..3).map(|channel| Sender::new(&gate, channel)).collect();
        let barrier = || Element::Barrier(CheckpointId(7), Purpose::Periodic);
        assert_eq!(gate.announced(), None);
        senders[0].send(records(1));
        senders[0].send(barrier());
        senders[0].send(records(2));
        senders[1].send(records(3));
        // The barrier of the third channel was taken, and what follows it waits.
        gate.block(ChannelId(2));
        let arrived = BTreeSet::from([ChannelId(2)]);
        senders[2].send(records(9));
        assert_eq!(gate.announced(), Some(CheckpointId(7)));
        gate.begin_capture(CheckpointId(7), &arrived);
        assert_eq!(gate.take_capture(), None, "the barrier of the second channel is not there");
        gate.unblock_all();
        senders[1].send(Element::Watermark(4));
        senders[1].send(Element::EndOfInput);
        senders[1].send(barrier());
        senders[1].send(Element::Watermark(5));
        let sizes = |elements: &Vec<InFlight>| -> Vec<i64> {
            let size = |element: &InFlight| match element {
                InFlight::Records(batch) => batch.values.len() as i64,
                InFlight::Watermark(watermark) => -watermark,
            };
            elements.iter().map(size).collect()
        };
        let (checkpoint, captured) = gate.take_capture().expect("every barrier is there");
        assert_eq!(checkpoint, CheckpointId(7));
        let captured: Vec<Vec<i64>> = captured.iter().map(sizes).collect();
        assert_eq!(captured, [vec![1], vec![3, -4], vec![]]);
        let mut taken = 0;
        while gate.try_next().is_some() {
            taken += 1;
        }
        assert_eq!(taken, 9, "what was captured is still to be processed");
    }

    #[tokio::test]
    async fn blocked_channel_keeps_its_elements_in_order() {
        let gate = Gate::new(2);
        let (left, right) = (Sender::new(&gate, 0), Sender::new(&gate, 1));
        gate.block(ChannelId(0));
        left.send(Element::Watermark(1));
        left.send(Element::Watermark(2));
        right.send(Element::Watermark(3));
        assert!(matches!(gate.try_next(), Some((ChannelId(1), Element::Watermark(3)))));
        assert!(gate.try_next().is_none());
        gate.unblock_all();
        assert!(matches!(gate.try_next(), Some((ChannelId(0), Element::Watermark(1)))));
        assert!(matches!(gate.try_next(), Some((ChannelId(0), Element::Watermark(2)))));
    }

    #[tokio::test]
    async fn no_channel_starves() {
        let gate = Gate::new(2);
        let (left, right) = (Sender::new(&gate, 0), Sender::new(&gate, 1));
        for n in 0..10 {
            left.send(Element::Watermark(n));
            right.send(Element::Watermark(n));
        }
        for turn in 0..20 {
            assert_eq!(gate.try_next().expect("an element").0, ChannelId(turn % 2), "turn {turn}");
        }
    }
}
