//! What the workers of a job share with its driver: the way to it, the storage, and what is counted and reported.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cofferdam_core::{
    ids::{CheckpointId, NodeId, TaskId},
    job::Event,
};
use cofferdam_store::{metadata::SnapshotStats, snapshot::TaskSnapshot};
use tokio::sync::mpsc::UnboundedSender;

use super::log::Logs;
use crate::{
    storage::{Report, StorageHandle},
    watch::{
        metrics::Metrics,
        progress::{Observer, Progress},
    },
};

/// What the workers of a job share with its driver.
pub(crate) struct Monitor {
    events: UnboundedSender<Event>,
    pub(crate) storage: StorageHandle,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) logs: Arc<Logs>,
    observer: Arc<dyn Observer>,
    stats: Arc<Stats>,
    recovery: Mutex<Option<Recovery>>,
    /// Whether `recovery` is worth a look: asked once a batch.
    is_recovering: AtomicBool,
}

/// A restart under way.
struct Recovery {
    operator: Option<NodeId>,
    failed_at: Instant,
    delay: Duration,
}

/// Figures of the checkpoints that are under way.
#[derive(Debug, Default)]
pub(crate) struct Stats(Mutex<BTreeMap<u64, CheckpointStats>>);

#[derive(Debug, Clone, Copy, Default)]
struct CheckpointStats {
    triggered_at: Option<Instant>,
    pause: Duration,
    bytes: u64,
    state_bytes: u64,
    alignment_us: u64,
    in_flight_bytes: u64,
}

impl Stats {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, CheckpointStats>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the figures of a checkpoint; one that was given up has none.
    fn change(&self, checkpoint: CheckpointId, change: impl FnOnce(&mut CheckpointStats)) {
        if let Some(stats) = self.lock().get_mut(&checkpoint.0) {
            change(stats);
        }
    }
}

impl Monitor {
    pub(crate) fn new(
        report: &WriterReport,
        storage: StorageHandle,
        metrics: Arc<Metrics>,
        logs: Arc<Logs>,
    ) -> Self {
        Self {
            events: report.events.clone(),
            storage,
            metrics,
            logs,
            observer: report.observer.clone(),
            stats: report.stats.clone(),
            recovery: Mutex::new(None),
            is_recovering: AtomicBool::new(false),
        }
    }

    /// A checkpoint was triggered.
    pub(crate) fn note_triggered(&self, checkpoint: CheckpointId) {
        let triggered_at = Some(Instant::now());
        let stats = CheckpointStats { triggered_at, ..CheckpointStats::default() };
        self.stats.lock().insert(checkpoint.0, stats);
    }

    /// A checkpoint was given up.
    pub(crate) fn note_given_up(&self, checkpoint: CheckpointId) {
        self.stats.lock().remove(&checkpoint.0);
    }

    /// A checkpoint is complete.
    pub(crate) fn note_complete(&self, checkpoint: CheckpointId) {
        self.metrics.checkpoints.fetch_add(1, Ordering::Relaxed);
        let stats = self.stats.lock().remove(&checkpoint.0).unwrap_or_default();
        let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
        self.observe(Progress::CheckpointCompleted {
            checkpoint: checkpoint.0,
            duration_ms: stats.triggered_at.map_or(0.0, |at| millis(at.elapsed())),
            pause_ms: millis(stats.pause),
            bytes: stats.bytes,
            state_bytes: stats.state_bytes,
            alignment_ms: stats.alignment_us as f64 / 1e3,
            in_flight_bytes: stats.in_flight_bytes,
        });
    }

    /// A failure leads to a restart after `delay`; `operator` has failed, if it was one.
    pub(crate) fn note_restart(
        &self,
        operator: Option<NodeId>,
        failed_at: Instant,
        delay: Duration,
    ) {
        let recovery = Recovery { operator, failed_at, delay };
        *self.recovery.lock().unwrap_or_else(PoisonError::into_inner) = Some(recovery);
        self.is_recovering.store(true, Ordering::Relaxed);
        self.metrics.restarts.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn report(&self, event: Event) {
        // The driver is the last to go; after it nobody needs to know.
        let _ = self.events.send(event);
    }

    pub(crate) fn observe(&self, progress: Progress) {
        self.observer.observe(progress);
    }

    /// When a checkpoint that is under way was triggered.
    pub(crate) fn triggered_at(&self, checkpoint: CheckpointId) -> Option<Instant> {
        self.stats.lock().get(&checkpoint.0).and_then(|stats| stats.triggered_at)
    }

    /// The tasks of a chain stood still for so long.
    pub(crate) fn note_pause(&self, checkpoint: CheckpointId, pause: Duration) {
        self.stats.change(checkpoint, |stats| stats.pause = stats.pause.max(pause));
    }

    /// A task has taken its snapshot.
    pub(crate) fn note_snapshot(&self, checkpoint: CheckpointId, snapshot: &TaskSnapshot) {
        let state_bytes = snapshot.memory.as_ref().map_or(0, |memory| memory.size_bytes());
        let SnapshotStats { alignment_us, in_flight_bytes, .. } = snapshot.stats;
        self.stats.change(checkpoint, |stats| {
            stats.state_bytes += state_bytes + in_flight_bytes;
            stats.alignment_us = stats.alignment_us.max(alignment_us);
            stats.in_flight_bytes += in_flight_bytes;
        });
    }

    /// An operator has processed something: if it is the one that had failed, the job has recovered.
    pub(crate) fn note_processed(&self, task: TaskId) {
        if !self.is_recovering.load(Ordering::Relaxed) {
            return;
        }
        let mut recovery = self.recovery.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(done) =
            recovery.take_if(|recovery| recovery.operator.is_none_or(|id| id == task.node))
        {
            self.is_recovering.store(false, Ordering::Relaxed);
            let took = done.failed_at.elapsed().saturating_sub(done.delay);
            let recovery_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            self.observe(Progress::Recovered { recovery_us });
        }
    }
}

/// The writer's way to the driver.
pub(crate) struct WriterReport {
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) stats: Arc<Stats>,
}

impl Report for WriterReport {
    fn event(&self, event: Event) {
        let _ = self.events.send(event);
    }

    fn written(&self, checkpoint: CheckpointId, bytes: u64) {
        self.stats.change(checkpoint, |stats| stats.bytes += bytes);
    }

    fn warning(&self, message: String) {
        self.observer.observe(Progress::Warning { message });
    }
}
