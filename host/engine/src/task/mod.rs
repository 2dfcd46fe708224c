//! Runs the tasks of one chain: what arrives, process, align, snapshot.
//!
//! Operators joined by forward edges run in one worker, one call after the other, with no channel
//! between them.

mod align;
mod gate_loop;
mod guard;
mod host;
pub(crate) mod node;
pub(crate) mod operator;
mod poison;
pub(crate) mod reach;
mod route;
mod source_loop;
mod worker;

use std::sync::atomic::{AtomicUsize, Ordering};

use cofferdam_core::{
    checkpoint::Purpose,
    ids::CheckpointId,
    job::{Event, TaskAttempt},
};

use crate::{failure::TaskFailure, watch::monitor::Monitor};

pub(crate) use self::{
    guard::Processed,
    worker::{Head, Origin, Worker},
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

    fn done(&self, monitor: &Monitor) {
        if self.workers.fetch_sub(1, Ordering::AcqRel) == 1 {
            monitor.report(Event::TasksStarted { tasks: self.tasks.clone() });
        }
    }
}

type Result<T> = std::result::Result<T, TaskFailure>;
