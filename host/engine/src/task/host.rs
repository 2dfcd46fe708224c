//! The host as one task's guest sees it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use cofferdam_contract::StateChanges;
use cofferdam_core::{
    ids::{Attempt, TaskId},
    random::mix,
};
use cofferdam_sandbox::{Host, Level, StateError};

use crate::{
    clock::now_ms,
    state::keyed::KeyedState,
    watch::{log::Logs, metrics::Metrics, monitor::Monitor},
};

/// The host as one task's guest sees it.
pub(super) struct TaskHost {
    name: String,
    operator: usize,
    attempt: Attempt,
    metrics: Arc<Metrics>,
    logs: Arc<Logs>,
    random: AtomicU64,
    keyed: Option<Arc<KeyedState>>,
    /// Whether `open` has ended, and state may be written.
    pub(super) is_open: AtomicBool,
}

impl TaskHost {
    pub(super) fn new(
        monitor: &Monitor,
        task: TaskId,
        operator: &str,
        attempt: Attempt,
        keyed: Option<Arc<KeyedState>>,
        random_seed: u64,
    ) -> Self {
        Self {
            name: format!("{operator}/{}", task.index),
            operator: task.node.0 as usize,
            attempt,
            metrics: monitor.metrics.clone(),
            logs: monitor.logs.clone(),
            random: AtomicU64::new(random_seed),
            keyed,
            is_open: AtomicBool::new(false),
        }
    }

    fn keyed(&self) -> Result<&KeyedState, StateError> {
        self.keyed.as_deref().ok_or(StateError::NotKept)
    }
}

impl Host for TaskHost {
    fn log(&self, level: Level, message: &str) {
        let task = self.name.as_str();
        self.logs.add(task, level, message);
        match level {
            Level::Trace => tracing::trace!(target: "guest", task, "{message}"),
            Level::Debug => tracing::debug!(target: "guest", task, "{message}"),
            Level::Info => tracing::info!(target: "guest", task, "{message}"),
            Level::Warn => tracing::warn!(target: "guest", task, "{message}"),
            Level::Error => tracing::error!(target: "guest", task, "{message}"),
        }
    }

    fn add_to_counter(&self, name: &str, delta: u64) {
        self.metrics.operators[self.operator].change_custom(name, |value| *value += delta as f64);
    }

    fn set_gauge(&self, name: &str, value: f64) {
        self.metrics.operators[self.operator].change_custom(name, |known| *known = value);
    }

    fn now_ms(&self) -> u64 {
        now_ms()
    }

    fn random(&self) -> u64 {
        mix(self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed))
    }

    fn attempt(&self) -> u32 {
        self.attempt.0
    }

    fn state(&self, state: u32, key: &[u8], namespace: u32) -> Result<Option<Vec<u8>>, StateError> {
        self.keyed()?.get(state, key, namespace)
    }

    fn put_state(&self, changes: &StateChanges) -> Result<(), StateError> {
        let keyed = self.keyed()?;
        if !self.is_open.load(Ordering::Relaxed) {
            return Err(StateError::NotOpen);
        }
        keyed.put(changes)
    }

    fn scan_state(
        &self,
        state: u32,
        after: Option<(&[u8], u32)>,
    ) -> Result<StateChanges, StateError> {
        self.keyed()?.scan(state, after)
    }
}
