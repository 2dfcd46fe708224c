//! One chain of one attempt: its nodes, its way to the driver, and how it opens and ends.
//!
//! A worker is one future. It ends by a failure, by the last checkpoint, or by being dropped at one of its awaits;
//! in each case its instances are gone and the next attempt begins with fresh ones.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_connector::blocking::Blocking;
use cofferdam_core::{
    align::Barriers,
    checkpoint::Purpose,
    ids::{Attempt, CheckpointId},
    job::Event,
    watermark::Clock,
};
use cofferdam_store::snapshot::TaskSnapshot;
use futures::future::try_join_all;
use tokio::sync::mpsc;

use super::{Control, Opening, Result, node::Node};
use crate::{
    exchange::{Gate, writer::Writer},
    failure::TaskFailure,
    watch::monitor::Monitor,
};

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
    pub(crate) monitor: Arc<Monitor>,
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

/// The snapshot of a chain's first node, to which the records that its barrier has overtaken are
/// still to be added.
pub(crate) struct Held {
    pub(super) checkpoint: CheckpointId,
    pub(super) snapshot: Box<TaskSnapshot>,
    pub(super) began: Instant,
}

/// What a turn of the loop leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Continue,
    /// The last checkpoint is committed: the worker is done.
    Done,
}

/// How far a chain is with its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intake {
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
        self.opening.done(&self.monitor);
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
            self.monitor.report(Event::TaskFinished { task, attempt: self.attempt });
        }
        Ok(())
    }

    /// Opens every node, from its state where there is one. True if all of them had processed the
    /// end of their inputs by then.
    async fn open(&mut self) -> Result<bool> {
        let (monitor, restore_from, blocking) = (&self.monitor, self.restore_from, &self.blocking);
        // The last one first: a connector opens on another thread while an operator opens on this one.
        let opened = self.nodes.iter_mut().rev().map(|node| async move {
            let task = node.task;
            let opened = node.open(monitor, restore_from, blocking).await;
            opened.map_err(|cause| TaskFailure { task, cause })
        });
        try_join_all(opened).await?;
        Ok(self.nodes.iter().all(|node| node.is_drained))
    }

    pub(super) async fn on_control(
        &mut self,
        control: Control,
        intake: &mut Intake,
    ) -> Result<Flow> {
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
                    return Ok(Flow::Done);
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
        Ok(Flow::Continue)
    }
}

pub(super) fn has_credit(writers: &[Writer]) -> bool {
    writers.iter().all(Writer::has_credit)
}

pub(super) async fn wait_for_credit(writers: &[Writer]) {
    for writer in writers {
        writer.wait_for_credit().await;
    }
}

/// Waits for a moment; `None` never comes.
pub(super) async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
