//! The exchange's gate on threads of which loom knows every interleaving.
//!
//! The gate is the engine's own file; only what it shares between threads is another module of the same names.
//! Each function here is one scenario; loom finds a lock-up, a lost wake-up, or an order that breaks an assertion.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a scenario fails by a panic"
)]

#[path = "../../../host/engine/src/exchange/gate.rs"]
#[allow(dead_code, reason = "the scenarios need a part of it")]
mod gate;
mod sync;

use std::collections::BTreeSet;

use cofferdam_contract::{Batch, RecordRef};
use cofferdam_core::{
    checkpoint::Purpose,
    ids::{ChannelId, CheckpointId},
};
use cofferdam_store::in_flight::InFlight;
use loom::{future::block_on, thread};

use self::gate::{Element, Gate, Sender};

const CHECKPOINT: CheckpointId = CheckpointId(1);

/// As much as a channel holds, and a record that says which it is.
fn large(number: u8) -> Element {
    let mut batch = Batch::empty();
    let value = vec![number; 512 << 10];
    batch.push(RecordRef { key: None, value: &value, timestamp: None });
    Element::Records(batch)
}

fn small(number: u8) -> Element {
    let mut batch = Batch::empty();
    batch.push(RecordRef { key: None, value: &[number], timestamp: None });
    Element::Records(batch)
}

fn number_of(batch: &Batch) -> u8 {
    batch.values[0]
}

/// Takes the next element, or waits for it as a worker does.
fn take(gate: &Gate) -> (ChannelId, Element) {
    loop {
        if let Some(taken) = gate.try_next() {
            return taken;
        }
        block_on(gate.readable());
    }
}

/// A sender that asks for credit before each element gets it again whenever the receiver has taken enough, and
/// the channel never holds more than one element beyond its bound.
pub fn credit_comes_back() {
    let gate = Gate::new(1);
    let sender = Sender::new(&gate, 0);
    let sending = thread::spawn(move || {
        for number in 0..3 {
            block_on(sender.wait_for_credit());
            sender.send(large(number));
        }
        sender.send(Element::EndOfInput);
    });
    let mut numbers = Vec::new();
    while let (_, Element::Records(batch)) = take(&gate) {
        numbers.push(number_of(&batch));
    }
    assert_eq!(numbers, [0, 1, 2]);
    sending.join().expect("no panic");
}

/// Two senders fill one gate: everything is taken, in the order of each channel.
pub fn two_channels_are_emptied() {
    let gate = Gate::new(2);
    let senders: Vec<_> = (0..2)
        .map(|channel| {
            let sender = Sender::new(&gate, channel);
            thread::spawn(move || {
                sender.send(small(1));
                sender.send(Element::EndOfInput);
            })
        })
        .collect();
    let (mut records, mut ends) = ([0, 0], 0);
    while ends < 2 {
        match take(&gate) {
            (channel, Element::Records(_)) => records[channel.0 as usize] += 1,
            _ => ends += 1,
        }
    }
    assert_eq!(records, [1, 1]);
    senders.into_iter().for_each(|sender| sender.join().expect("no panic"));
}

/// A barrier overtakes: what was taken before the capture and what the capture holds are the records before the
/// barrier, each once.
pub fn a_capture_holds_what_the_barrier_overtook() {
    let gate = Gate::new(1);
    let sender = Sender::new(&gate, 0);
    let sending = thread::spawn(move || {
        sender.send(small(0));
        sender.send(small(1));
        sender.send(Element::Barrier(CHECKPOINT, Purpose::Periodic));
        sender.send(small(2));
    });
    let mut before = Vec::new();
    let mut has_barrier = false;
    // The task looks for news between two elements.
    while gate.announced().is_none() && !has_barrier {
        match gate.try_next() {
            Some((_, Element::Records(batch))) => before.push(number_of(&batch)),
            Some(_) => has_barrier = true,
            None => block_on(gate.news()),
        }
    }
    if !has_barrier {
        gate.begin_capture(CHECKPOINT, &BTreeSet::new());
        let (_, captured) = loop {
            match gate.take_capture() {
                Some(whole) => break whole,
                None => block_on(gate.news()),
            }
        };
        for element in &captured[0] {
            let InFlight::Records(batch) = element else { panic!("{element:?}") };
            before.push(number_of(batch));
        }
    }
    assert_eq!(before, [0, 1], "the records before the barrier, each once");
    sending.join().expect("no panic");
}

/// A capture that began before the barrier came is whole when it comes, and says so.
pub fn a_capture_ends_when_the_barrier_of_each_channel_has_come() {
    let gate = Gate::new(2);
    let late = Sender::new(&gate, 1);
    let sending = thread::spawn(move || {
        late.send(small(1));
        late.send(Element::Barrier(CHECKPOINT, Purpose::Periodic));
        late.send(small(2));
    });
    let early = Sender::new(&gate, 0);
    early.send(Element::Barrier(CHECKPOINT, Purpose::Periodic));
    gate.begin_capture(CHECKPOINT, &BTreeSet::new());
    let (_, captured) = loop {
        match gate.take_capture() {
            Some(whole) => break whole,
            None => block_on(gate.news()),
        }
    };
    assert!(captured[0].is_empty());
    assert_eq!(captured[1].len(), 1, "what came behind the barrier is not in it");
    sending.join().expect("no panic");
}
