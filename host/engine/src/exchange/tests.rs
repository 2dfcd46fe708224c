//! The gate and its credit, step by step. `tests/loom` tries them on threads.

use std::{collections::BTreeSet, time::Duration};

use cofferdam_contract::{Batch, RecordRef};
use cofferdam_core::{
    checkpoint::Purpose,
    ids::{ChannelId, CheckpointId},
};
use cofferdam_store::in_flight::InFlight;

use super::gate::{CHANNEL_BYTES_MAX, Element, Gate, Sender};

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
