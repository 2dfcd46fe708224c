//! The host as one task's guest sees it.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use cofferdam_contract::StateChanges;
use cofferdam_core::ids::{Attempt, CheckpointId, TaskId};
use cofferdam_sandbox::{Host, Level, StateError};
use tempfile::TempDir;

use crate::{
    clock::now_ms,
    state::keyed::KeyedState,
    threads::wait_for_disk,
    watch::{log::Logs, metrics::Metrics, monitor::Monitor},
};

/// Random numbers that only the job's secret can foretell: those of a task say nothing of its own next ones, nor of
/// another task's. After a restart from the same checkpoint they come again.
pub(super) struct Random(blake3::OutputReader);

impl Random {
    /// The numbers of a task from this checkpoint on.
    pub(super) fn new(key: &[u8; 32], restored_from: Option<CheckpointId>) -> Self {
        let from = restored_from.map_or(0, |id| id.0);
        Self(blake3::Hasher::new_keyed(key).update(&from.to_le_bytes()).finalize_xof())
    }

    fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}

/// The host as one task's guest sees it.
pub(super) struct TaskHost {
    name: String,
    operator: usize,
    attempt: Attempt,
    metrics: Arc<Metrics>,
    logs: Arc<Logs>,
    random: Mutex<Random>,
    keyed: Option<Arc<KeyedState>>,
    /// Whether `open` has ended, and state may be written.
    pub(super) is_open: AtomicBool,
    /// Removed with the instance.
    _scratch: Scratch,
}

/// A directory that goes with its task. That is work for a disk.
#[derive(Default)]
struct Scratch(Option<TempDir>);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(dir) = self.0.take() {
            wait_for_disk(|| drop(dir));
        }
    }
}

impl TaskHost {
    pub(super) fn new(
        monitor: &Monitor,
        task: TaskId,
        operator: &str,
        attempt: Attempt,
        keyed: Option<Arc<KeyedState>>,
        random: Random,
    ) -> Self {
        Self {
            name: format!("{operator}/{}", task.index),
            operator: task.node.0 as usize,
            attempt,
            metrics: monitor.metrics.clone(),
            logs: monitor.logs.clone(),
            random: Mutex::new(random),
            keyed,
            is_open: AtomicBool::new(false),
            _scratch: Scratch::default(),
        }
    }

    /// Keeps a directory as long as the instance.
    pub(super) fn with_scratch(self, scratch: Option<TempDir>) -> Self {
        Self { _scratch: Scratch(scratch), ..self }
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
        self.random.lock().unwrap_or_else(PoisonError::into_inner).next()
    }

    fn attempt(&self) -> u32 {
        self.attempt.0
    }

    fn wait_for_disk(&self, work: &mut dyn FnMut()) {
        wait_for_disk(work);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_come_again_after_a_restart_and_differ_between_tasks() {
        let numbers = |key: u8, from: u64| {
            let mut random = Random::new(&[key; 32], Some(CheckpointId(from)));
            [(); 9].map(|()| random.next())
        };
        let first = numbers(1, 5);
        assert_eq!(first, numbers(1, 5));
        for other in [numbers(2, 5), numbers(1, 6)] {
            assert!(other.iter().all(|number| !first.contains(number)));
        }
        let distinct: std::collections::BTreeSet<u64> = first.into_iter().collect();
        assert_eq!(distinct.len(), first.len());
    }
}
