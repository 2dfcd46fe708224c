//! Runs the tasks of one chain: what arrives, process, align, snapshot.
//!
//! Operators joined by forward edges run in one worker, one call after the other, with no channel
//! between them. A worker is one future. It ends by a failure, by the last checkpoint, or by being
//! dropped at one of its awaits; in each case its instances are gone and the next attempt begins
//! with fresh ones.

pub(crate) mod node;
pub(crate) mod poison;

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use cofferdam_connector::{Step, blocking::Blocking, source::DEAD_LETTER_OUTPUT};
use cofferdam_contract::{Batch, Emission};
use cofferdam_core::{
    align::{AlignStep, Barriers},
    checkpoint::{AbortReason, Purpose},
    failure::FailureCause,
    ids::{Attempt, ChannelId, CheckpointId, TaskId, micros},
    job::{Event, TaskAttempt},
    watermark::{Clock, MAX_WATERMARK, Watermarks},
};
use cofferdam_store::{
    in_flight::{ChannelState, InFlight},
    snapshot::TaskSnapshot,
};
use futures::future::try_join_all;
use tokio::sync::mpsc;

use self::node::{Node, SnapshotOutcome, Target};
use crate::{
    clock::now_ms,
    driver::Shared,
    exchange::{Element, Gate, writer::Writer},
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
    /// Other chains send them.
    Gate { gate: Arc<Gate>, channels: Arc<[Origin]>, barriers: Barriers },
}

/// Where the records of a channel come from.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    /// The place of its edge among the node's inputs in the manifest.
    pub(crate) place: u32,
    /// The input of the operator that takes them.
    pub(crate) input: u32,
    /// The name of the operator that sends them.
    pub(crate) from: Arc<str>,
    /// Which of its tasks.
    pub(crate) producer: u32,
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
    /// From the trigger on until a barrier overtakes what it waits for; `None`: it never does.
    pub(crate) unaligned_after: Option<Duration>,
    /// How far event time may lag behind the clock before a source works off a backlog.
    pub(crate) backlog_lag_ms: Option<u64>,
    /// Whether it does, as far as was told.
    pub(crate) is_backlog: bool,
    /// Regions of the job run one after the other, and what has ended makes room.
    pub(crate) is_batch: bool,
    /// An unaligned snapshot that still waits for what is in flight.
    pub(crate) held: Option<Held>,
    /// Event time at the head of the chain, and so at every node of it.
    pub(crate) clock: Clock,
    /// Without records for so long a source holds event time back no longer.
    pub(crate) idle_after: Option<Duration>,
    /// Runs the calls of connectors that block.
    pub(crate) blocking: Blocking,
}

/// A step that is under way for this long holds nothing back any more: what was collected goes out.
const FLUSH_AFTER: Duration = Duration::from_millis(2);

/// How long a source has given nothing, and what came of it.
struct Quiet {
    since: Instant,
    /// What was collected has gone out.
    is_flushed: bool,
    /// It does not hold event time back.
    is_idle: bool,
}

impl Quiet {
    fn new() -> Self {
        Self { since: Instant::now(), is_flushed: false, is_idle: false }
    }

    /// When the next thing comes of it, if it stays quiet until then.
    fn ends_at(&self, idle_after: Option<Duration>) -> Option<Instant> {
        match (self.is_flushed, self.is_idle) {
            (false, _) => Some(self.since + FLUSH_AFTER),
            (true, false) => idle_after.map(|after| self.since + after),
            (true, true) => None,
        }
    }
}

/// Why the task of a source has stopped waiting.
enum Woken {
    Step(Step),
    /// `None`: the driver is gone.
    Control(Option<Control>),
    Quiet,
}

/// The snapshot of a chain's first node, to which the records that its barrier has overtaken are
/// still to be added.
pub(crate) struct Held {
    checkpoint: CheckpointId,
    snapshot: Box<TaskSnapshot>,
    began: Instant,
}

/// What a worker knows of the barriers that have arrived.
struct Alignment {
    barriers: Barriers,
    /// The checkpoint that was announced last, and when its barrier overtakes.
    announced: Option<CheckpointId>,
    overtakes_at: Option<Instant>,
    /// When the first barrier of the checkpoint that is being aligned was taken.
    began: Option<(CheckpointId, Instant)>,
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
    /// None will, and what `finish` gives goes out as soon as there is credit for it.
    Ending,
    /// The barrier of a last checkpoint has gone out: nothing may follow it.
    Held(CheckpointId),
    /// Every input has ended and `finish` was called.
    Drained,
}

impl Worker {
    pub(crate) async fn run(mut self) -> Result<()> {
        let was_drained = self.open().await?;
        self.opening.done(&self.shared);
        match &self.head {
            Head::Source => self.run_source(was_drained).await?,
            Head::Gate { gate, channels, barriers } => {
                let (gate, channels, barriers) = (gate.clone(), channels.clone(), barriers.clone());
                self.run_gate(&gate, &channels, barriers, was_drained).await?;
            }
        }
        for mut node in self.nodes.drain(..) {
            let task = node.task;
            node.close().await.map_err(|cause| TaskFailure { task, cause })?;
            self.shared.report(Event::TaskFinished { task, attempt: self.attempt });
        }
        Ok(())
    }

    /// Opens every node, from its state where there is one. True if all of them had processed the
    /// end of their inputs by then.
    async fn open(&mut self) -> Result<bool> {
        let (shared, restore_from, blocking) = (&self.shared, self.restore_from, &self.blocking);
        // The last one first: a connector opens on another thread while an operator opens on this one.
        let opened = self.nodes.iter_mut().rev().map(|node| async move {
            let task = node.task;
            let opened = node.open(shared, restore_from, blocking).await;
            opened.map_err(|cause| TaskFailure { task, cause })
        });
        try_join_all(opened).await?;
        Ok(self.nodes.iter().all(|node| node.is_drained))
    }

    async fn run_source(&mut self, was_drained: bool) -> Result<()> {
        let mut intake = Intake::Open;
        let mut quiet = Quiet::new();
        self.replay_in_flight(&[], &mut Watermarks::new(0)).await?;
        if was_drained {
            self.announce_end().await?;
            intake = Intake::Drained;
        } else if self.nodes[0].is_drained {
            self.drain().await?;
            intake = Intake::Drained;
        }
        loop {
            while let Ok(control) = self.control.try_recv() {
                if self.on_source_control(control, &mut intake, &mut quiet).await? == Turn::Done {
                    return Ok(());
                }
            }
            let is_sending = matches!(intake, Intake::Open | Intake::Ending);
            if !is_sending || !has_credit(&self.writers) {
                let control = tokio::select! {
                    biased;
                    control = self.control.recv() => Some(control),
                    () = wait_for_credit(&self.writers), if is_sending => None,
                };
                // Without credit nothing was asked for, so nothing says that the source is quiet.
                quiet.since = Instant::now();
                if let Some(control) = control {
                    let Some(control) = control else { return Ok(()) };
                    if self.on_source_control(control, &mut intake, &mut quiet).await? == Turn::Done
                    {
                        return Ok(());
                    }
                }
                continue;
            }
            if intake == Intake::Ending {
                self.drain().await?;
                intake = Intake::Drained;
                continue;
            }
            match self.next_step(&mut quiet).await? {
                Woken::Step(step) => {
                    self.take_step(step, &mut intake, &mut quiet).await?;
                    // A chain without channels never waits by itself.
                    tokio::task::consume_budget().await;
                }
                Woken::Control(None) => return Ok(()),
                Woken::Control(Some(control)) => {
                    if self.on_source_control(control, &mut intake, &mut quiet).await? == Turn::Done
                    {
                        return Ok(());
                    }
                }
                Woken::Quiet if quiet.is_flushed => {
                    quiet.is_idle = true;
                    self.announce(|| Element::Idle);
                }
                Woken::Quiet => {
                    quiet.is_flushed = true;
                    self.flush();
                }
            }
        }
    }

    /// Waits for the source's next step, for news from the driver, or until the source counts as quiet.
    async fn next_step(&mut self, quiet: &mut Quiet) -> Result<Woken> {
        let task = self.nodes[0].task;
        let failure = |cause| TaskFailure { task, cause };
        let source = self.nodes[0].source().map_err(failure)?;
        if let Poll::Ready(step) = poll_fn(|context| Poll::Ready(source.poll_next(context))).await {
            return step.map(Woken::Step).map_err(failure);
        }
        // A step that is under way may well be there before what was collected is worth sending.
        if !quiet.is_flushed && source.is_settled() {
            quiet.is_flushed = true;
            self.flush();
        }
        let quiet_at = quiet.ends_at(self.idle_after);
        let (node, control) = (&mut self.nodes[0], &mut self.control);
        let step = poll_fn(|context| match node.source() {
            Ok(source) => source.poll_next(context),
            Err(cause) => Poll::Ready(Err(cause)),
        });
        tokio::select! {
            biased;
            control = control.recv() => Ok(Woken::Control(control)),
            step = step => {
                step.map(Woken::Step).map_err(|cause| TaskFailure { task, cause })
            }
            () = until(quiet_at) => Ok(Woken::Quiet),
        }
    }

    /// Processes what the source has given.
    async fn take_step(
        &mut self,
        step: Step,
        intake: &mut Intake,
        quiet: &mut Quiet,
    ) -> Result<()> {
        quiet.since = Instant::now();
        quiet.is_flushed = false;
        match step {
            Step::Records { batch, letters, bad, watermark } => {
                self.end_idleness(quiet);
                self.nodes[0].count_bad(&self.shared, bad);
                let letters = letters.map(|letters| (DEAD_LETTER_OUTPUT, *letters));
                let emissions = [(0, batch)].into_iter().chain(letters);
                let emissions = emissions.map(|(output, records)| Emission { output, records });
                self.route(0, emissions.collect()).await?;
                self.note_lag(watermark)?;
                if let Some(watermark) = watermark {
                    self.advance_all(watermark).await?;
                }
            }
            Step::Watermark(watermark) => {
                self.end_idleness(quiet);
                self.note_lag(Some(watermark))?;
                self.advance_all(watermark).await?;
            }
            Step::Idle if quiet.is_idle => {}
            Step::Idle => {
                quiet.is_idle = true;
                self.flush();
                self.announce(|| Element::Idle);
            }
            Step::End => *intake = Intake::Ending,
        }
        Ok(())
    }

    /// A source that was idle counts again, from where it was.
    fn end_idleness(&mut self, quiet: &mut Quiet) {
        if std::mem::take(&mut quiet.is_idle) {
            let now = self.clock.now();
            self.announce(|| Element::Watermark(now));
        }
    }

    /// Processes what the source has begun and not given yet: it lies before the position that is asked for
    /// next.
    async fn settle(&mut self, intake: &mut Intake, quiet: &mut Quiet) -> Result<()> {
        while *intake == Intake::Open {
            let node = &mut self.nodes[0];
            let task = node.task;
            let failure = |cause| TaskFailure { task, cause };
            let settled = node.source().map_err(failure)?.settle().await;
            match settled.map_err(failure)? {
                Some(step) => self.take_step(step, intake, quiet).await?,
                None => break,
            }
        }
        Ok(())
    }

    async fn on_source_control(
        &mut self,
        control: Control,
        intake: &mut Intake,
        quiet: &mut Quiet,
    ) -> Result<Turn> {
        if matches!(control, Control::Barrier(..) | Control::EndInput) {
            self.settle(intake, quiet).await?;
        }
        self.on_control(control, intake).await
    }

    /// Reports how far the source is behind, and where it begins or ceases to work off a backlog. Where it
    /// does not say, event time that lags behind the clock does.
    fn note_lag(&mut self, watermark: Option<i64>) -> Result<()> {
        let (task, attempt) = (self.nodes[0].task, self.attempt);
        let lag = self.nodes[0].source().map_err(|cause| TaskFailure { task, cause })?.lag();
        self.nodes[0].set_records_behind(&self.shared, lag.records);
        let lags = |(lag_ms, watermark): (u64, i64)| {
            let now = i64::try_from(now_ms()).unwrap_or(i64::MAX);
            i64::try_from(lag_ms).unwrap_or(i64::MAX) < now.saturating_sub(watermark)
        };
        let by_clock = || self.backlog_lag_ms.zip(watermark).map(lags);
        let Some(is_backlog) = lag.is_backlog.or_else(by_clock) else { return Ok(()) };
        if is_backlog != std::mem::replace(&mut self.is_backlog, is_backlog) {
            self.shared.report(Event::BacklogChanged { task, attempt, is_backlog });
        }
        Ok(())
    }

    async fn run_gate(
        &mut self,
        gate: &Gate,
        channels: &[Origin],
        barriers: Barriers,
        was_drained: bool,
    ) -> Result<()> {
        let mut alignment =
            Alignment { barriers, announced: None, overtakes_at: None, began: None };
        let mut watermarks = Watermarks::new(channels.len());
        let mut ended = 0;
        let mut intake = Intake::Open;
        self.replay_in_flight(channels, &mut watermarks).await?;
        loop {
            // Before the controls: by the time a barrier is there, so is what was told before it.
            let announced = gate.announced();
            // Between two batches, so that a busy stream does not keep sinks from committing.
            while let Ok(control) = self.control.try_recv() {
                if self.on_gate_control(control, gate, &mut alignment, &mut intake).await?
                    == Turn::Done
                {
                    return Ok(());
                }
            }
            self.on_announced(announced, gate, &mut alignment).await?;
            self.complete_held(gate, channels);
            let has_credit = has_credit(&self.writers);
            let next = match has_credit.then(|| gate.try_next()).flatten() {
                Some(next) => Some(next),
                None => {
                    // Nothing is held back while there is nothing to do.
                    self.flush();
                    let overtakes_at = alignment.overtakes_at;
                    let control = tokio::select! {
                        biased;
                        control = self.control.recv() => Some(control),
                        () = gate.news() => None,
                        () = until(overtakes_at) => None,
                        () = wait_for_credit(&self.writers), if !has_credit => None,
                        () = gate.readable(), if has_credit => None,
                    };
                    if let Some(control) = control {
                        let Some(control) = control else { return Ok(()) };
                        if self.on_gate_control(control, gate, &mut alignment, &mut intake).await?
                            == Turn::Done
                        {
                            return Ok(());
                        }
                    }
                    None
                }
            };
            let Some((channel, element)) = next else { continue };
            match element {
                Element::Records(batch) => {
                    self.deliver(0, channels[channel.0 as usize].input, batch).await?;
                    tokio::task::consume_budget().await;
                }
                Element::Watermark(watermark) => {
                    if let Some(watermark) = watermarks.advance(channel, watermark) {
                        self.advance_all(watermark).await?;
                    }
                }
                Element::Idle => {
                    if let Some(watermark) = watermarks.idle(channel) {
                        self.advance_all(watermark).await?;
                    }
                    if watermarks.is_idle() {
                        self.announce(|| Element::Idle);
                    }
                }
                Element::Barrier(checkpoint, purpose) => {
                    self.on_barrier(gate, &mut alignment, channel, checkpoint, purpose).await?;
                }
                Element::EndOfInput => {
                    ended += 1;
                    // What has ended holds nothing back.
                    if let Some(watermark) = watermarks.advance(channel, MAX_WATERMARK) {
                        self.advance_all(watermark).await?;
                    }
                    if ended == channels.len() {
                        match was_drained {
                            true => self.announce_end().await?,
                            false => self.drain().await?,
                        }
                        intake = Intake::Drained;
                    }
                }
            }
        }
    }

    /// Processes what the restored checkpoint's barrier had overtaken, before anything newer: so
    /// records keep their order, wherever they come from now.
    async fn replay_in_flight(
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

    /// A barrier has arrived in a channel, and may overtake.
    async fn on_announced(
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
                self.shared.triggered_at(checkpoint).map(|triggered| triggered + after);
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
    fn complete_held(&mut self, gate: &Gate, channels: &[Origin]) {
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

    async fn on_barrier(
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

    async fn on_gate_control(
        &mut self,
        control: Control,
        gate: &Gate,
        alignment: &mut Alignment,
        intake: &mut Intake,
    ) -> Result<Turn> {
        if let Control::Abort(checkpoint) = control {
            if alignment.barriers.on_abort(checkpoint) {
                gate.unblock_all();
            }
            gate.drop_capture(checkpoint);
            // The next increment stands on it, whatever became of its checkpoint.
            if let Some(held) = self.held.take_if(|held| held.checkpoint == checkpoint) {
                self.hand_over(0, held.checkpoint, SnapshotOutcome::Taken(held.snapshot));
            }
        }
        self.on_control(control, intake).await
    }

    async fn on_control(&mut self, control: Control, intake: &mut Intake) -> Result<Turn> {
        match control {
            Control::Barrier(checkpoint, purpose) => {
                self.snapshot(checkpoint, purpose, Instant::now()).await?;
                if purpose == Purpose::Last && *intake == Intake::Open {
                    *intake = Intake::Held(checkpoint);
                }
            }
            Control::Complete(checkpoint, purpose) => {
                for node in &mut self.nodes {
                    let task = node.task;
                    let committed = node.commit(checkpoint).await;
                    committed.map_err(|cause| TaskFailure { task, cause })?;
                }
                if purpose == Purpose::Last {
                    return Ok(Turn::Done);
                }
            }
            Control::Abort(checkpoint) => {
                for node in &mut self.nodes {
                    let task = node.task;
                    let aborted = node.abort(checkpoint).await;
                    aborted.map_err(|cause| TaskFailure { task, cause })?;
                }
                if *intake == Intake::Held(checkpoint) {
                    *intake = Intake::Open;
                }
            }
            Control::EndInput => {
                if *intake == Intake::Open {
                    *intake = Intake::Ending;
                }
            }
        }
        Ok(Turn::Continue)
    }

    /// Snapshots every node, forwards the barrier, and hands the snapshots to the storage. `began`
    /// is when the first barrier was taken.
    async fn snapshot(
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
        let triggered = self.shared.triggered_at(checkpoint);
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
        self.shared.note_pause(checkpoint, paused.elapsed());
        Ok(taken)
    }

    fn hand_over(&self, node: usize, checkpoint: CheckpointId, outcome: SnapshotOutcome) {
        let (node, attempt) = (&self.nodes[node], self.attempt);
        let task = node.task;
        match outcome {
            SnapshotOutcome::Taken(snapshot) => {
                let snapshot: Arc<TaskSnapshot> = Arc::from(snapshot);
                node.keep(checkpoint, snapshot.clone());
                self.shared.note_snapshot(checkpoint, &snapshot);
                self.shared.storage.write(node.slot, task, attempt, checkpoint, snapshot);
            }
            SnapshotOutcome::Declined(message) => {
                let reason = AbortReason::Declined { task: Some(task), message };
                let event = Event::SnapshotDeclined { task, attempt, checkpoint, reason };
                self.shared.report(event);
            }
        }
    }

    fn announce(&mut self, element: impl Fn() -> Element) {
        for writer in &mut self.writers {
            writer.announce(&element);
        }
    }

    /// Every input has ended: event time is over, every operator finishes, and so on downstream.
    async fn drain(&mut self) -> Result<()> {
        self.advance_all(MAX_WATERMARK).await?;
        for node in 0..self.nodes.len() {
            if self.nodes[node].is_drained {
                continue;
            }
            let finished = self.nodes[node].finish(&self.shared).await;
            let task = self.nodes[node].task;
            let emissions = finished.map_err(|cause| TaskFailure { task, cause })?;
            self.route(node, emissions).await?;
        }
        self.announce_end().await
    }

    /// Tells whoever comes behind, and the driver, that nothing more will.
    async fn announce_end(&mut self) -> Result<()> {
        // A task that is restored behind its end has never told how late it is.
        self.advance_all(MAX_WATERMARK).await?;
        self.announce(|| Element::EndOfInput);
        let last = self.nodes[self.nodes.len() - 1].task;
        for writer in &mut self.writers {
            writer.finish().map_err(|cause| TaskFailure { task: last, cause })?;
        }
        for node in &mut self.nodes {
            node.is_drained = true;
            if self.is_batch {
                // Its results are where others read them: nobody asks it for anything any more.
                let closed = node.close().await;
                closed.map_err(|cause| TaskFailure { task: node.task, cause })?;
            }
            self.shared.report(Event::TaskDrained { task: node.task, attempt: self.attempt });
        }
        Ok(())
    }

    /// Event time at the head of the chain is said to be this. What moves the clock reaches every
    /// node, and whoever comes behind.
    async fn advance_all(&mut self, watermark: i64) -> Result<()> {
        let Some(watermark) = self.clock.advance(watermark) else { return Ok(()) };
        for node in 0..self.nodes.len() {
            if self.nodes[node].is_drained {
                continue;
            }
            let advanced = self.nodes[node].advance(&self.shared, watermark).await;
            let task = self.nodes[node].task;
            let emissions = advanced.map_err(|cause| TaskFailure { task, cause })?;
            self.route(node, emissions).await?;
        }
        self.announce(|| Element::Watermark(watermark));
        Ok(())
    }

    /// Processes a batch at a node, and what comes of it at the nodes behind.
    async fn deliver(&mut self, node: usize, input: u32, batch: Batch) -> Result<()> {
        let mut waiting = vec![(node, input, batch)];
        while let Some((node, input, batch)) = waiting.pop() {
            let processed = self.nodes[node].process(&self.shared, input, batch).await;
            let task = self.nodes[node].task;
            let emissions = processed.map_err(|cause| TaskFailure { task, cause })?;
            self.send(node, emissions, &mut waiting)?;
        }
        Ok(())
    }

    /// Sends what a node has emitted to where it goes.
    async fn route(&mut self, node: usize, emissions: Vec<Emission>) -> Result<()> {
        let mut waiting = Vec::new();
        self.send(node, emissions, &mut waiting)?;
        while let Some((node, input, batch)) = waiting.pop() {
            self.deliver(node, input, batch).await?;
        }
        Ok(())
    }

    /// Writes to exchanges at once, in order; what goes to chained nodes is put on the stack, the
    /// first on top.
    fn send(
        &mut self,
        node: usize,
        emissions: Vec<Emission>,
        waiting: &mut Vec<(usize, u32, Batch)>,
    ) -> Result<()> {
        let first = waiting.len();
        for Emission { output, records } in emissions {
            self.nodes[node].count_out(&self.shared, &records);
            if records.value_ends.is_empty() {
                continue;
            }
            let targets = self.nodes[node].targets(output, &records)?;
            let Some((last, others)) = targets.split_last() else {
                continue;
            };
            let (last, others) = (*last, others.to_vec());
            let task = self.nodes[node].task;
            for target in others {
                self.send_to(task, target, records.clone(), waiting)?;
            }
            self.send_to(task, last, records, waiting)?;
        }
        waiting[first..].reverse();
        Ok(())
    }

    fn send_to(
        &mut self,
        task: TaskId,
        target: Target,
        records: Batch,
        waiting: &mut Vec<(usize, u32, Batch)>,
    ) -> Result<()> {
        match target {
            Target::Node { node, input } => {
                waiting.push((node, input, records));
                Ok(())
            }
            Target::Writer(writer) => {
                let written = self.writers[writer].write(records);
                written.map_err(|cause| TaskFailure { task, cause })
            }
        }
    }

    fn flush(&mut self) {
        self.writers.iter_mut().for_each(Writer::flush);
    }
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

fn has_credit(writers: &[Writer]) -> bool {
    writers.iter().all(Writer::has_credit)
}

async fn wait_for_credit(writers: &[Writer]) {
    for writer in writers {
        writer.wait_for_credit().await;
    }
}

/// Waits for a moment; `None` never comes.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
