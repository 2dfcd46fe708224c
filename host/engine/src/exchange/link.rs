//! Channels whose receiver may restart alone: the sender continues, and what was on its way is lost.
//!
//! A link outlives the attempts on both sides. While its receiver is away the sender has no credit,
//! so what it has still to send waits; lost is what the receiver had taken, or would have, since the
//! checkpoint that it begins from. The link counts that.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cofferdam_core::ids::{CheckpointId, TaskId};
use tokio::sync::Notify;

use super::{Element, Sender};

/// One channel of an edge, whatever the attempts of its ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId {
    /// The edge, by its place in the graph.
    pub(crate) edge: usize,
    pub(crate) producer: TaskId,
    pub(crate) consumer: TaskId,
}

/// The links of a job.
#[derive(Debug, Default)]
pub(crate) struct Links {
    known: Mutex<BTreeMap<LinkId, Arc<Link>>>,
    /// By edge, since somebody has asked.
    news: Mutex<BTreeMap<usize, Losses>>,
}

/// What restarts have done to the records of an edge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Losses {
    /// Lost to readers that have restarted alone.
    pub(crate) lost: u64,
    /// Were lost, and their producer has gone back behind them.
    pub(crate) regained: u64,
}

/// One of them.
#[derive(Debug, Default)]
pub(crate) struct Link {
    state: Mutex<State>,
    /// A receiver has come or gone.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// `None`: the receiver is away.
    receiver: Option<Sender>,
    /// Records that were sent, by the producer's state: a restart takes back what it will send again.
    sent: u64,
    /// How many there were at the barriers of checkpoints that may still be gone back to.
    at_barriers: VecDeque<(CheckpointId, u64)>,
    /// What the receiver will never see of that: where each gap begins, and how many records it has.
    /// Ascending; what lies before every barrier is forgotten.
    gaps: Vec<(u64, u64)>,
    /// What a new receiver has to know.
    watermark: Option<i64>,
    has_ended: bool,
}

impl Links {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<LinkId, Arc<Link>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn news(&self) -> MutexGuard<'_, BTreeMap<usize, Losses>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been lost and regained by edge since the last call.
    pub(crate) fn take_news(&self) -> BTreeMap<usize, Losses> {
        std::mem::take(&mut *self.news())
    }

    /// An attempt of the producer begins at a checkpoint.
    pub(crate) fn begin(&self, id: LinkId, restore_from: Option<CheckpointId>) -> Arc<Link> {
        let link = self.lock().entry(id).or_default().clone();
        let mut state = link.lock();
        (state.sent, state.watermark, state.has_ended) = (state.sent_at(restore_from), None, false);
        state.at_barriers.retain(|(checkpoint, _)| Some(*checkpoint) <= restore_from);
        self.news().entry(id.edge).or_default().regained += state.close_gaps();
        drop(state);
        link
    }

    /// An attempt of the consumer begins at a checkpoint, and receives here.
    pub(crate) fn connect(&self, id: LinkId, receiver: Sender, restore_from: Option<CheckpointId>) {
        let link = self.lock().entry(id).or_default().clone();
        let mut state = link.lock();
        self.news().entry(id.edge).or_default().lost += state.open_gap(restore_from);
        if let Some(watermark) = state.watermark {
            receiver.send(Element::Watermark(watermark));
        }
        if state.has_ended {
            receiver.send(Element::EndOfInput);
        }
        state.receiver = Some(receiver);
        drop(state);
        link.changed.notify_waiters();
    }

    /// These tasks receive nothing any more.
    pub(crate) fn disconnect(&self, consumers: impl Fn(TaskId) -> bool) {
        for link in self.lock().iter().filter(|(id, _)| consumers(id.consumer)).map(|(_, it)| it) {
            link.lock().receiver = None;
            link.changed.notify_waiters();
        }
    }

    /// Nobody goes back behind this checkpoint any more.
    pub(crate) fn complete(&self, checkpoint: CheckpointId) {
        for link in self.lock().values() {
            let mut state = link.lock();
            state.at_barriers.retain(|(known, _)| checkpoint <= *known);
            let first = state.at_barriers.front().map_or(state.sent, |(_, sent)| *sent);
            state.gaps.retain(|(start, _)| first <= *start);
        }
    }
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends at once, whether or not there is credit, or somebody who receives.
    pub(super) fn send(&self, element: Element) {
        let mut state = self.lock();
        match &element {
            Element::Records(batch) => state.sent += batch.record_count() as u64,
            Element::Watermark(watermark) => state.watermark = Some(*watermark),
            Element::Barrier(checkpoint, _) => {
                let sent = state.sent;
                state.at_barriers.push_back((*checkpoint, sent));
            }
            Element::EndOfInput => state.has_ended = true,
            Element::Idle => {}
        }
        if let Some(receiver) = &state.receiver {
            receiver.send(element);
        }
    }

    pub(super) fn has_credit(&self) -> bool {
        self.lock().receiver.as_ref().is_some_and(Sender::has_credit)
    }

    pub(super) async fn wait_for_credit(&self) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no news is missed.
            changed.as_mut().enable();
            let receiver = self.lock().receiver.clone();
            match receiver {
                Some(receiver) => tokio::select! {
                    () = receiver.wait_for_credit() => return,
                    () = changed => {}
                },
                None => changed.await,
            }
        }
    }
}

impl State {
    /// Records sent before the barrier of a checkpoint.
    fn sent_at(&self, checkpoint: Option<CheckpointId>) -> u64 {
        let known = self.at_barriers.iter().find(|(known, _)| Some(*known) == checkpoint);
        known.map_or(0, |(_, sent)| *sent)
    }

    /// A receiver resumes from a checkpoint: what was sent since is lost to it. Gives what had not been
    /// lost before.
    fn open_gap(&mut self, restore_from: Option<CheckpointId>) -> u64 {
        let start = self.sent_at(restore_from);
        let records = self.sent.saturating_sub(start);
        let inside = self.gaps.partition_point(|(gap, _)| *gap < start);
        let known: u64 = self.gaps.drain(inside..).map(|(_, records)| records).sum();
        if 0 < records {
            self.gaps.push((start, records));
        }
        records.saturating_sub(known)
    }

    /// What was sent is taken back to where it stands now; gives what is lost no more.
    fn close_gaps(&mut self) -> u64 {
        let inside = self.gaps.partition_point(|(gap, _)| *gap < self.sent);
        self.gaps.drain(inside..).map(|(_, records)| records).sum()
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_contract::{Batch, RecordRef};
    use cofferdam_core::{checkpoint::Purpose, ids::NodeId};

    use super::*;
    use crate::exchange::Gate;

    const ID: LinkId = LinkId {
        edge: 0,
        producer: TaskId { node: NodeId(0), index: 0 },
        consumer: TaskId { node: NodeId(1), index: 0 },
    };
    const FIRST: CheckpointId = CheckpointId(1);

    fn records(count: usize) -> Element {
        let mut batch = Batch::empty();
        for _ in 0..count {
            batch.push(RecordRef { key: None, value: &[7; 1_000], timestamp: None });
        }
        Element::Records(batch)
    }

    fn received(gate: &Gate) -> (usize, bool, Option<i64>) {
        let (mut count, mut has_ended, mut last) = (0, false, None);
        while let Some((_, element)) = gate.try_next() {
            match element {
                Element::Records(batch) => count += batch.record_count(),
                Element::Watermark(watermark) => last = Some(watermark),
                Element::EndOfInput => has_ended = true,
                Element::Barrier(..) | Element::Idle => {}
            }
        }
        (count, has_ended, last)
    }

    /// Lost and regained by what was done since the last call.
    fn news(links: &Links) -> (u64, u64) {
        let Losses { lost, regained } = links.take_news().remove(&0).unwrap_or_default();
        (lost, regained)
    }

    fn connect(links: &Links, restore_from: Option<CheckpointId>) -> Arc<Gate> {
        let gate = Gate::new(1);
        links.connect(ID, Sender::new(&gate, 0), restore_from);
        gate
    }

    #[test]
    fn what_a_new_receiver_misses_is_counted_once_and_from_its_checkpoint() {
        let links = Links::default();
        let link = links.begin(ID, None);
        let gate = connect(&links, None);
        link.send(records(10));
        link.send(Element::Barrier(FIRST, Purpose::Periodic));
        link.send(records(5));
        link.send(Element::Watermark(70));
        assert_eq!(received(&gate), (15, false, Some(70)));
        links.complete(FIRST);
        links.disconnect(|task| task == ID.consumer);
        link.send(records(2));
        assert_eq!(news(&links), (0, 0));
        let gate = connect(&links, Some(FIRST));
        assert_eq!(news(&links), (7, 0));
        link.send(records(1));
        link.send(Element::EndOfInput);
        assert_eq!(received(&gate), (1, true, Some(70)), "and it knows what time it is");
        let gate = connect(&links, Some(FIRST));
        assert_eq!(news(&links), (1, 0), "and 7 before");
        assert_eq!(received(&gate), (0, true, Some(70)), "nothing more will come");
    }

    #[test]
    fn what_its_producer_sends_again_is_not_lost() {
        let links = Links::default();
        let link = links.begin(ID, None);
        link.send(records(10));
        link.send(Element::Barrier(FIRST, Purpose::Periodic));
        link.send(records(5));
        connect(&links, Some(FIRST));
        link.send(Element::Barrier(CheckpointId(2), Purpose::Periodic));
        link.send(records(2));
        connect(&links, Some(CheckpointId(2)));
        assert_eq!(news(&links), (7, 0));
        let link = links.begin(ID, Some(CheckpointId(2)));
        assert_eq!(news(&links), (0, 2));
        connect(&links, Some(CheckpointId(2)));
        assert_eq!(news(&links), (0, 0));
        link.send(records(3));
        links.begin(ID, Some(FIRST));
        connect(&links, Some(FIRST));
        assert_eq!(news(&links), (0, 5));
        links.begin(ID, None);
        connect(&links, None);
        assert_eq!(news(&links), (0, 0));
    }

    #[test]
    fn gaps_and_barriers_are_forgotten_with_the_checkpoints_behind_them() {
        let links = Links::default();
        let link = links.begin(ID, None);
        for checkpoint in (1..100).map(CheckpointId) {
            link.send(records(3));
            link.send(Element::Barrier(checkpoint, Purpose::Periodic));
            link.send(records(1));
            connect(&links, Some(checkpoint));
            links.complete(checkpoint);
            let state = link.lock();
            assert!(state.gaps.len() <= 2 && state.at_barriers.len() <= 2, "{state:?}");
        }
        assert_eq!(news(&links), (99, 0));
    }

    #[tokio::test]
    async fn sender_waits_while_nobody_receives_and_goes_on_with_whoever_comes() {
        let links = Arc::new(Links::default());
        let link = links.begin(ID, None);
        assert!(!link.has_credit());
        let waiting = tokio::spawn({
            let link = link.clone();
            async move { link.wait_for_credit().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        let gate = Gate::new(1);
        links.connect(ID, Sender::new(&gate, 0), None);
        waiting.await.expect("no panic");
        // One that is full and goes away is not waited for.
        while link.has_credit() {
            link.send(records(100));
        }
        let waiting = tokio::spawn({
            let link = link.clone();
            async move { link.wait_for_credit().await }
        });
        tokio::task::yield_now().await;
        links.disconnect(|_| true);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        let gate = Gate::new(1);
        links.connect(ID, Sender::new(&gate, 0), None);
        waiting.await.expect("no panic");
    }
}
