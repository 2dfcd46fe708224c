//! Barriers: when a chain takes its snapshots, and what of the records in flight goes into them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_core::{
    align::{AlignStep, Barriers},
    checkpoint::{AbortReason, Purpose},
    ids::{ChannelId, CheckpointId, micros},
    job::Event,
};
use cofferdam_store::{
    in_flight::{ChannelState, InFlight},
    snapshot::TaskSnapshot,
};

use super::{
    Result,
    node::SnapshotOutcome,
    worker::{Held, Origin, Worker},
};
use crate::{
    exchange::{Element, Gate},
    failure::TaskFailure,
};

/// What a worker knows of the barriers that have arrived.
pub(super) struct Alignment {
    pub(super) barriers: Barriers,
    /// The checkpoint that was announced last, and when its barrier overtakes.
    pub(super) announced: Option<CheckpointId>,
    pub(super) overtakes_at: Option<Instant>,
    /// When the first barrier of the checkpoint that is being aligned was taken.
    pub(super) began: Option<(CheckpointId, Instant)>,
}

impl Alignment {
    /// A barrier of a checkpoint has arrived now; gives when its first one had.
    fn took(&mut self, checkpoint: CheckpointId) -> Instant {
        match self.began {
            Some((current, began)) if current == checkpoint => began,
            _ => {
                let now = Instant::now();
                self.began = Some((checkpoint, now));
                now
            }
        }
    }
}

impl Worker {
    /// A barrier has arrived in a channel, and may overtake.
    pub(super) async fn on_announced(
        &mut self,
        announced: Option<CheckpointId>,
        gate: &Gate,
        alignment: &mut Alignment,
    ) -> Result<()> {
        let (Some(after), Some(checkpoint)) = (self.unaligned_after, announced) else {
            return Ok(());
        };
        if alignment.announced < announced {
            alignment.announced = announced;
            // Nobody knows the trigger of one that was given up.
            alignment.overtakes_at =
                self.monitor.triggered_at(checkpoint).map(|triggered| triggered + after);
        }
        if alignment.overtakes_at.is_none_or(|at| Instant::now() < at) {
            return Ok(());
        }
        alignment.overtakes_at = None;
        let Some(arrived) = alignment.barriers.overtake(checkpoint) else { return Ok(()) };
        let began = alignment.took(checkpoint);
        let purpose = Purpose::Periodic;
        let mut taken = self.take_snapshots(checkpoint, purpose, began, Duration::ZERO).await?;
        self.announce(|| Element::Barrier(checkpoint, Purpose::Periodic));
        match taken.remove(0) {
            SnapshotOutcome::Taken(snapshot) => {
                gate.begin_capture(checkpoint, &arrived);
                self.held = Some(Held { checkpoint, snapshot, began });
            }
            declined => self.hand_over(0, checkpoint, declined),
        }
        gate.unblock_all();
        for (node, outcome) in (1..).zip(taken) {
            self.hand_over(node, checkpoint, outcome);
        }
        Ok(())
    }

    /// Hands over a snapshot that waits for what is in flight, once all of it has come.
    pub(super) fn complete_held(&mut self, gate: &Gate, channels: &[Origin]) {
        let Some(held) = &self.held else { return };
        let Some((checkpoint, elements)) = gate.take_capture() else { return };
        if checkpoint != held.checkpoint {
            return;
        }
        let Some(Held { mut snapshot, began, .. }) = self.held.take() else { return };
        let of_channel = |(origin, elements): (&Origin, Vec<InFlight>)| ChannelState {
            place: origin.place,
            input: origin.input,
            from: origin.from.to_string(),
            producer: origin.producer,
            elements,
        };
        let in_flight: Vec<ChannelState> = channels
            .iter()
            .zip(elements)
            .filter(|(_, elements)| !elements.is_empty())
            .map(of_channel)
            .collect();
        snapshot.stats.in_flight_bytes = in_flight.iter().map(ChannelState::byte_count).sum();
        snapshot.stats.alignment_us = micros(began.elapsed());
        snapshot.stats.is_unaligned = true;
        snapshot.in_flight = Arc::new(in_flight);
        self.hand_over(0, checkpoint, SnapshotOutcome::Taken(snapshot));
    }

    pub(super) async fn on_barrier(
        &mut self,
        gate: &Gate,
        alignment: &mut Alignment,
        channel: ChannelId,
        checkpoint: CheckpointId,
        purpose: Purpose,
    ) -> Result<()> {
        let step = alignment.barriers.on_barrier(channel, checkpoint);
        let began = alignment.took(checkpoint);
        match step {
            AlignStep::Block => gate.block(channel),
            AlignStep::Ignore => {}
            AlignStep::Restart { .. } => {
                gate.unblock_all();
                gate.block(channel);
            }
            AlignStep::SnapshotNow => {
                self.snapshot(checkpoint, purpose, began).await?;
                gate.unblock_all();
            }
        }
        Ok(())
    }

    /// Snapshots every node, forwards the barrier, and hands the snapshots to the storage. `began`
    /// is when the first barrier was taken.
    pub(super) async fn snapshot(
        &mut self,
        checkpoint: CheckpointId,
        purpose: Purpose,
        began: Instant,
    ) -> Result<()> {
        let taken = self.take_snapshots(checkpoint, purpose, began, began.elapsed()).await?;
        self.announce(|| Element::Barrier(checkpoint, purpose));
        for (node, outcome) in taken.into_iter().enumerate() {
            self.hand_over(node, checkpoint, outcome);
        }
        Ok(())
    }

    /// Snapshots every node, in their order. All of them wait until the last is done.
    async fn take_snapshots(
        &mut self,
        checkpoint: CheckpointId,
        purpose: Purpose,
        began: Instant,
        alignment: Duration,
    ) -> Result<Vec<SnapshotOutcome>> {
        let triggered = self.monitor.triggered_at(checkpoint);
        let start_delay =
            triggered.map_or(Duration::ZERO, |at| began.saturating_duration_since(at));
        let paused = Instant::now();
        let mut taken = Vec::with_capacity(self.nodes.len());
        for node in &mut self.nodes {
            let task = node.task;
            let outcome = node.snapshot(checkpoint, purpose).await;
            let mut outcome = outcome.map_err(|cause| TaskFailure { task, cause })?;
            if let SnapshotOutcome::Taken(snapshot) = &mut outcome {
                snapshot.stats.start_delay_us = micros(start_delay);
                snapshot.stats.alignment_us = micros(alignment);
            }
            taken.push(outcome);
        }
        self.monitor.note_pause(checkpoint, paused.elapsed());
        Ok(taken)
    }

    pub(super) fn hand_over(
        &self,
        node: usize,
        checkpoint: CheckpointId,
        outcome: SnapshotOutcome,
    ) {
        let (node, attempt) = (&self.nodes[node], self.attempt);
        let task = node.task;
        match outcome {
            SnapshotOutcome::Taken(snapshot) => {
                let snapshot: Arc<TaskSnapshot> = Arc::from(snapshot);
                node.keep(checkpoint, snapshot.clone());
                self.monitor.note_snapshot(checkpoint, &snapshot);
                self.monitor.storage.write(node.slot, task, attempt, checkpoint, snapshot);
            }
            SnapshotOutcome::Declined(message) => {
                let reason = AbortReason::Declined { task: Some(task), message };
                let event = Event::SnapshotDeclined { task, attempt, checkpoint, reason };
                self.monitor.report(event);
            }
        }
    }
}
