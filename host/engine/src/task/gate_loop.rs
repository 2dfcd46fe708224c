//! The loop of a chain that reads from channels.

use cofferdam_core::{
    align::Barriers,
    ids::ChannelId,
    watermark::{MAX_WATERMARK, Watermarks},
};
use cofferdam_store::in_flight::InFlight;

use super::{
    Control, Result,
    align::Alignment,
    node::SnapshotOutcome,
    worker::{Flow, Intake, Origin, Worker, has_credit, until, wait_for_credit},
};
use crate::exchange::{Element, Gate};

/// How far a chain is with its channels.
struct Inputs {
    alignment: Alignment,
    watermarks: Watermarks,
    /// How many channels have not ended.
    open: usize,
    intake: Intake,
    /// The checkpoint that was restored was taken after the end of all channels.
    was_drained: bool,
}

impl Worker {
    pub(super) async fn run_gate(
        &mut self,
        gate: &Gate,
        channels: &[Origin],
        barriers: Barriers,
        was_drained: bool,
    ) -> Result<()> {
        let mut inputs = Inputs {
            alignment: Alignment { barriers, announced: None, overtakes_at: None, began: None },
            watermarks: Watermarks::new(channels.len()),
            open: channels.len(),
            intake: Intake::Open,
            was_drained,
        };
        self.replay_in_flight(channels, &mut inputs.watermarks).await?;
        loop {
            // Before the controls: by the time a barrier is there, so is what was told before it.
            let announced = gate.announced();
            // Between two batches, so that a busy stream does not keep sinks from committing.
            while let Ok(control) = self.control.try_recv() {
                if self.on_gate_control(control, gate, &mut inputs).await? == Flow::Done {
                    return Ok(());
                }
            }
            self.on_announced(announced, gate, &mut inputs.alignment).await?;
            self.complete_held(gate, channels);
            let has_credit = has_credit(&self.writers);
            if let Some((channel, element)) = has_credit.then(|| gate.try_next()).flatten() {
                self.take_element(gate, channels, &mut inputs, channel, element).await?;
                continue;
            }
            // Nothing is held back while there is nothing to do.
            self.flush();
            let control = tokio::select! {
                biased;
                control = self.control.recv() => control,
                () = gate.news() => continue,
                () = until(inputs.alignment.overtakes_at) => continue,
                () = wait_for_credit(&self.writers), if !has_credit => continue,
                () = gate.readable(), if has_credit => continue,
            };
            let Some(control) = control else { return Ok(()) };
            if self.on_gate_control(control, gate, &mut inputs).await? == Flow::Done {
                return Ok(());
            }
        }
    }

    /// Processes the next element of a channel.
    async fn take_element(
        &mut self,
        gate: &Gate,
        channels: &[Origin],
        inputs: &mut Inputs,
        channel: ChannelId,
        element: Element,
    ) -> Result<()> {
        match element {
            Element::Records(batch) => {
                self.deliver(0, channels[channel.0 as usize].input, batch).await?;
                tokio::task::consume_budget().await;
            }
            Element::Watermark(watermark) => {
                if let Some(watermark) = inputs.watermarks.advance(channel, watermark) {
                    self.advance_all(watermark).await?;
                }
            }
            Element::Idle => {
                if let Some(watermark) = inputs.watermarks.idle(channel) {
                    self.advance_all(watermark).await?;
                }
                if inputs.watermarks.is_idle() {
                    self.announce(|| Element::Idle);
                }
            }
            Element::Barrier(checkpoint, purpose) => {
                let alignment = &mut inputs.alignment;
                self.on_barrier(gate, alignment, channel, checkpoint, purpose).await?;
            }
            Element::EndOfInput => {
                // What has ended holds nothing back.
                if let Some(watermark) = inputs.watermarks.advance(channel, MAX_WATERMARK) {
                    self.advance_all(watermark).await?;
                }
                inputs.open -= 1;
                if inputs.open == 0 {
                    match inputs.was_drained {
                        true => self.announce_end().await?,
                        false => self.drain().await?,
                    }
                    inputs.intake = Intake::Drained;
                }
            }
        }
        Ok(())
    }

    /// Processes what the restored checkpoint's barrier had overtaken, before anything newer: so
    /// records keep their order, wherever they come from now.
    pub(super) async fn replay_in_flight(
        &mut self,
        channels: &[Origin],
        watermarks: &mut Watermarks,
    ) -> Result<()> {
        if self.restore_from.is_none() {
            return Ok(());
        }
        // Nodes behind the first were heads of chains of their own if they have any; the last one
        // first, because what the others give out comes after it.
        for node in (0..self.nodes.len()).rev() {
            let in_flight = self.nodes[node].local.lock().in_flight.clone();
            for state in in_flight.iter() {
                let is_its_own = |origin: &Origin| {
                    node == 0 && (origin.place, origin.producer) == (state.place, state.producer)
                };
                let channel = channels.iter().position(is_its_own);
                for element in &state.elements {
                    wait_for_credit(&self.writers).await;
                    match element {
                        InFlight::Records(batch) => {
                            self.deliver(node, state.input, batch.clone()).await?;
                        }
                        InFlight::Watermark(watermark) => {
                            let Some(channel) = channel else { continue };
                            let channel = ChannelId(u32::try_from(channel).unwrap_or(u32::MAX));
                            if let Some(watermark) = watermarks.advance(channel, *watermark) {
                                self.advance_all(watermark).await?;
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    async fn on_gate_control(
        &mut self,
        control: Control,
        gate: &Gate,
        inputs: &mut Inputs,
    ) -> Result<Flow> {
        if let Control::Abort(checkpoint) = control {
            if inputs.alignment.barriers.on_abort(checkpoint) {
                gate.unblock_all();
            }
            gate.drop_capture(checkpoint);
            // The next increment stands on it, whatever became of its checkpoint.
            if let Some(held) = self.held.take_if(|held| held.checkpoint == checkpoint) {
                self.hand_over(0, held.checkpoint, SnapshotOutcome::Taken(held.snapshot));
            }
        }
        self.on_control(control, &mut inputs.intake).await
    }
}
