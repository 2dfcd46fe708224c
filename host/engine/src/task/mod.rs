//! Runs the tasks of one chain: what arrives, process, align, snapshot.
//!
//! Operators joined by forward edges run in one worker, one call after the other, with no channel
//! between them. A worker is one future. It ends by a failure, by the last checkpoint, or by being
//! dropped at one of its awaits; in each case its instances are gone and the next attempt begins
//! with fresh ones.

pub(crate) mod local;
pub(crate) mod node;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use cofferdam_core::{
    align::{AlignStep, Barriers},
    checkpoint::{AbortReason, Purpose},
    failure::FailureCause,
    ids::{Attempt, ChannelId, CheckpointId, TaskId},
    job::{Event, TaskAttempt},
    watermark::{MAX_WATERMARK, Watermarks},
};
use cofferdam_sandbox::{Batch, Emission};
use tokio::sync::mpsc;

use self::node::{Node, SnapshotOutcome, Target};
use crate::{
    driver::Shared,
    exchange::{Element, Gate, writer::Writer},
    source::{Source, Step},
};

/// What the driver tells a worker.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Control {
    /// To the workers of sources: a checkpoint begins.
    Barrier(CheckpointId, Purpose),
    /// A checkpoint is complete.
    Complete(CheckpointId, Purpose),
    /// A checkpoint was given up.
    Abort(CheckpointId),
    /// To the workers of sources: the input ends here.
    EndInput,
}

/// Tasks that are being started together; the last one to open reports the start of all.
#[derive(Debug)]
pub(crate) struct Opening {
    workers: AtomicUsize,
    tasks: Vec<TaskAttempt>,
}

impl Opening {
    pub(crate) fn new(workers: usize, tasks: Vec<TaskAttempt>) -> Self {
        Self { workers: AtomicUsize::new(workers), tasks }
    }

    fn done(&self, shared: &Shared) {
        if self.workers.fetch_sub(1, Ordering::AcqRel) == 1 {
            shared.report(Event::TasksStarted { tasks: self.tasks.clone() });
        }
    }
}

/// The failure of one task.
#[derive(Debug)]
pub(crate) struct TaskFailure {
    pub(crate) task: TaskId,
    pub(crate) cause: FailureCause,
}

type Result<T> = std::result::Result<T, TaskFailure>;

/// Where a chain's records come from.
pub(crate) enum Head {
    /// The chain's first node reads them.
    Source,
    /// Other chains send them; for each channel, the input of the first node it belongs to.
    Gate { gate: Arc<Gate>, inputs: Vec<u32>, barriers: Barriers },
}

/// One chain of one attempt.
pub(crate) struct Worker {
    pub(crate) attempt: Attempt,
    pub(crate) shared: Arc<Shared>,
    pub(crate) head: Head,
    /// In topological order: a node's targets come after it.
    pub(crate) nodes: Vec<Node>,
    pub(crate) writers: Vec<Writer>,
    pub(crate) control: mpsc::UnboundedReceiver<Control>,
    pub(crate) opening: Arc<Opening>,
    pub(crate) restore_from: Option<CheckpointId>,
}

/// What a turn of the loop leads to.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Continue,
    /// The last checkpoint is committed: the worker is done.
    Done,
}

/// How far a chain is with its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intake {
    /// Records may come.
    Open,
    /// The barrier of a last checkpoint has gone out: nothing may follow it.
    Held,
    /// Every input has ended and `finish` was called.
    Drained,
}

impl Worker {
    pub(crate) async fn run(mut self) -> Result<()> {
        let was_drained = self.open().await?;
        self.opening.done(&self.shared);
        match &self.head {
            Head::Source => self.run_source(was_drained).await?,
            Head::Gate { gate, inputs, barriers } => {
                let (gate, inputs, barriers) = (gate.clone(), inputs.clone(), barriers.clone());
                self.run_gate(&gate, &inputs, barriers, was_drained).await?;
            }
        }
        for mut node in self.nodes.drain(..) {
            let task = node.task;
            node.close().await.map_err(|cause| TaskFailure { task, cause })?;
            self.shared.report(Event::TaskFinished { task, attempt: self.attempt });
        }
        Ok(())
    }

    /// Opens every node, from its state where there is one. True if the chain had processed the
    /// end of its inputs by then.
    async fn open(&mut self) -> Result<bool> {
        let mut was_drained = false;
        for node in &mut self.nodes {
            let opened = node.open(&self.shared, self.attempt, self.restore_from).await;
            was_drained |= opened.map_err(|cause| TaskFailure { task: node.task, cause })?;
        }
        Ok(was_drained)
    }

    async fn run_source(&mut self, was_drained: bool) -> Result<()> {
        let mut intake = Intake::Open;
        if was_drained {
            self.announce_end().await;
            intake = Intake::Drained;
        }
        loop {
            while let Ok(control) = self.control.try_recv() {
                if self.on_control(control, &mut intake).await? == Turn::Done {
                    return Ok(());
                }
            }
            if intake != Intake::Open {
                let Some(control) = self.control.recv().await else { return Ok(()) };
                if self.on_control(control, &mut intake).await? == Turn::Done {
                    return Ok(());
                }
                continue;
            }
            match self.next_step()? {
                Step::Records { batch, watermark } => {
                    self.route(0, vec![Emission { output: 0, records: batch }]).await?;
                    if let Some(watermark) = watermark {
                        self.advance(0, watermark).await?;
                    }
                    // A chain without channels never waits by itself.
                    tokio::task::consume_budget().await;
                }
                Step::Wait(duration) => {
                    self.flush().await;
                    tokio::select! {
                        biased;
                        control = self.control.recv() => {
                            let Some(control) = control else { return Ok(()) };
                            if self.on_control(control, &mut intake).await? == Turn::Done {
                                return Ok(());
                            }
                        }
                        () = tokio::time::sleep(duration) => {}
                    }
                }
                Step::End => {
                    self.drain().await?;
                    intake = Intake::Drained;
                }
            }
        }
    }

    fn next_step(&mut self) -> Result<Step> {
        let node = &mut self.nodes[0];
        let task = node.task;
        let step = node.source().and_then(|source: &mut Box<dyn Source>| source.next());
        step.map_err(|cause| TaskFailure { task, cause })
    }

    async fn run_gate(
        &mut self,
        gate: &Gate,
        inputs: &[u32],
        mut barriers: Barriers,
        was_drained: bool,
    ) -> Result<()> {
        let mut watermarks = Watermarks::new(inputs.len());
        let mut ended = 0;
        let mut intake = Intake::Open;
        loop {
            // Between two batches, so that a busy stream does not keep sinks from committing.
            while let Ok(control) = self.control.try_recv() {
                if self.on_gate_control(control, gate, &mut barriers, &mut intake).await?
                    == Turn::Done
                {
                    return Ok(());
                }
            }
            let next = match gate.try_next() {
                Some(next) => Some(next),
                None => {
                    // Nothing is held back while there is nothing to do.
                    self.flush().await;
                    tokio::select! {
                        biased;
                        control = self.control.recv() => {
                            let Some(control) = control else { return Ok(()) };
                            if self.on_gate_control(control, gate, &mut barriers, &mut intake).await?
                                == Turn::Done
                            {
                                return Ok(());
                            }
                            None
                        }
                        next = gate.next() => Some(next),
                    }
                }
            };
            let Some((channel, element)) = next else { continue };
            match element {
                Element::Records(batch) => {
                    self.deliver(0, inputs[channel.0 as usize], batch).await?;
                    tokio::task::consume_budget().await;
                }
                Element::Watermark(watermark) => {
                    if let Some(watermark) = watermarks.advance(channel, watermark)
                        && !was_drained
                    {
                        self.advance_all(watermark).await?;
                    }
                }
                Element::Barrier(checkpoint, purpose) => {
                    self.on_barrier(gate, &mut barriers, channel, checkpoint, purpose).await?;
                }
                Element::EndOfInput => {
                    ended += 1;
                    if ended == inputs.len() {
                        match was_drained {
                            true => self.announce_end().await,
                            false => self.drain().await?,
                        }
                        intake = Intake::Drained;
                    }
                }
            }
        }
    }

    async fn on_barrier(
        &mut self,
        gate: &Gate,
        barriers: &mut Barriers,
        channel: ChannelId,
        checkpoint: CheckpointId,
        purpose: Purpose,
    ) -> Result<()> {
        match barriers.on_barrier(channel, checkpoint) {
            AlignStep::Block => gate.block(channel),
            AlignStep::Ignore => {}
            AlignStep::Restart { .. } => {
                gate.unblock_all();
                gate.block(channel);
            }
            AlignStep::SnapshotNow => {
                self.snapshot(checkpoint, purpose).await?;
                gate.unblock_all();
            }
        }
        Ok(())
    }

    async fn on_gate_control(
        &mut self,
        control: Control,
        gate: &Gate,
        barriers: &mut Barriers,
        intake: &mut Intake,
    ) -> Result<Turn> {
        if let Control::Abort(checkpoint) = control
            && barriers.on_abort(checkpoint)
        {
            gate.unblock_all();
        }
        self.on_control(control, intake).await
    }

    async fn on_control(&mut self, control: Control, intake: &mut Intake) -> Result<Turn> {
        match control {
            Control::Barrier(checkpoint, purpose) => {
                self.snapshot(checkpoint, purpose).await?;
                if purpose == Purpose::Last && *intake == Intake::Open {
                    *intake = Intake::Held;
                }
            }
            Control::Complete(checkpoint, purpose) => {
                for node in &mut self.nodes {
                    let task = node.task;
                    node.commit(checkpoint).map_err(|cause| TaskFailure { task, cause })?;
                }
                if purpose == Purpose::Last {
                    return Ok(Turn::Done);
                }
            }
            Control::Abort(_) => {
                if *intake == Intake::Held {
                    *intake = Intake::Open;
                }
            }
            Control::EndInput => {
                if *intake == Intake::Open {
                    self.drain().await?;
                    *intake = Intake::Drained;
                }
            }
        }
        Ok(Turn::Continue)
    }

    /// Snapshots every node, forwards the barrier, and hands the snapshots to the storage.
    async fn snapshot(&mut self, checkpoint: CheckpointId, purpose: Purpose) -> Result<()> {
        let began = Instant::now();
        let mut taken = Vec::with_capacity(self.nodes.len());
        for node in &mut self.nodes {
            let task = node.task;
            let outcome = node.snapshot(checkpoint).await;
            taken.push((task, node.slot, outcome.map_err(|cause| TaskFailure { task, cause })?));
        }
        let pause = began.elapsed();
        for writer in &mut self.writers {
            writer.announce(|| Element::Barrier(checkpoint, purpose)).await;
        }
        let attempt = self.attempt;
        for (task, slot, outcome) in taken {
            match outcome {
                SnapshotOutcome::Taken(snapshot) => {
                    self.shared.note_pause(checkpoint, pause, &snapshot);
                    self.shared.storage.write(slot, task, attempt, checkpoint, snapshot);
                }
                SnapshotOutcome::Declined(message) => {
                    let reason = AbortReason::Declined { task: Some(task), message };
                    let event = Event::SnapshotDeclined { task, attempt, checkpoint, reason };
                    self.shared.report(event);
                }
            }
        }
        Ok(())
    }

    /// Every input has ended: event time is over, every operator finishes, and so on downstream.
    async fn drain(&mut self) -> Result<()> {
        self.advance_all(MAX_WATERMARK).await?;
        for node in 0..self.nodes.len() {
            let finished = self.nodes[node].finish(&self.shared).await;
            let task = self.nodes[node].task;
            let emissions = finished.map_err(|cause| TaskFailure { task, cause })?;
            self.route(node, emissions).await?;
        }
        self.announce_end().await;
        Ok(())
    }

    async fn announce_end(&mut self) {
        for writer in &mut self.writers {
            writer.announce(|| Element::EndOfInput).await;
        }
        for node in &mut self.nodes {
            node.is_drained = true;
            self.shared.report(Event::TaskDrained { task: node.task, attempt: self.attempt });
        }
    }

    /// Event time has moved on at the head of the chain.
    async fn advance_all(&mut self, watermark: i64) -> Result<()> {
        self.advance_nodes(0, watermark).await
    }

    /// Event time has moved on behind a source.
    async fn advance(&mut self, source: usize, watermark: i64) -> Result<()> {
        self.shared.metrics.operators[self.nodes[source].task.operator.0 as usize]
            .set_watermark(watermark);
        self.advance_nodes(source + 1, watermark).await
    }

    async fn advance_nodes(&mut self, from: usize, watermark: i64) -> Result<()> {
        for node in from..self.nodes.len() {
            let advanced = self.nodes[node].advance(&self.shared, watermark).await;
            let task = self.nodes[node].task;
            let emissions = advanced.map_err(|cause| TaskFailure { task, cause })?;
            self.route(node, emissions).await?;
        }
        for writer in &mut self.writers {
            writer.announce(|| Element::Watermark(watermark)).await;
        }
        Ok(())
    }

    /// Processes a batch at a node, and what comes of it at the nodes behind.
    async fn deliver(&mut self, node: usize, input: u32, batch: Batch) -> Result<()> {
        let mut waiting = vec![(node, input, batch)];
        while let Some((node, input, batch)) = waiting.pop() {
            let processed = self.nodes[node].process(&self.shared, input, batch).await;
            let task = self.nodes[node].task;
            let emissions = processed.map_err(|cause| TaskFailure { task, cause })?;
            self.send(node, emissions, &mut waiting).await?;
        }
        Ok(())
    }

    /// Sends what a node has emitted to where it goes.
    async fn route(&mut self, node: usize, emissions: Vec<Emission>) -> Result<()> {
        let mut waiting = Vec::new();
        self.send(node, emissions, &mut waiting).await?;
        while let Some((node, input, batch)) = waiting.pop() {
            self.deliver(node, input, batch).await?;
        }
        Ok(())
    }

    /// Writes to exchanges at once, in order; what goes to chained nodes is put on the stack, the
    /// first on top.
    async fn send(
        &mut self,
        node: usize,
        emissions: Vec<Emission>,
        waiting: &mut Vec<(usize, u32, Batch)>,
    ) -> Result<()> {
        let first = waiting.len();
        for Emission { output, records } in emissions {
            self.nodes[node].count_out(&self.shared, &records);
            let Some((last, others)) = self.nodes[node].targets(output)?.split_last() else {
                continue;
            };
            let (last, others) = (*last, others.to_vec());
            for target in others {
                self.send_to(target, records.clone(), waiting).await;
            }
            self.send_to(last, records, waiting).await;
        }
        waiting[first..].reverse();
        Ok(())
    }

    async fn send_to(
        &mut self,
        target: Target,
        records: Batch,
        waiting: &mut Vec<(usize, u32, Batch)>,
    ) {
        match target {
            Target::Node { node, input } => waiting.push((node, input, records)),
            Target::Writer(writer) => self.writers[writer].write(records).await,
        }
    }

    async fn flush(&mut self) {
        for writer in &mut self.writers {
            writer.flush().await;
        }
    }
}
