//! Counters of a running job, written by its tasks once a batch and read by anyone who shows them.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

/// Counters and gauges that the guests of one operator may have.
const CUSTOM_MAX: usize = 1_000;

/// The counters of one operator, all its tasks together.
#[derive(Debug)]
pub struct OperatorMetrics {
    /// Its name in the manifest.
    pub name: String,
    /// Records taken from its inputs.
    pub records_in: AtomicU64,
    /// Records given to its outputs.
    pub records_out: AtomicU64,
    /// The newest watermark, in milliseconds; `i64::MIN` before the first.
    pub watermark: AtomicI64,
    /// Records that a source could not make sense of and left out, or gave to its dead letters.
    pub bad_records: AtomicU64,
    /// By task: how many records a source has still to read, where it knows.
    pub records_behind: Mutex<BTreeMap<u32, u64>>,
    /// What guests count and measure themselves.
    pub custom: Mutex<BTreeMap<String, f64>>,
}

impl OperatorMetrics {
    /// All zero.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            records_in: AtomicU64::new(0),
            records_out: AtomicU64::new(0),
            watermark: AtomicI64::new(i64::MIN),
            bad_records: AtomicU64::new(0),
            records_behind: Mutex::default(),
            custom: Mutex::default(),
        }
    }

    /// A task of a source has this many records still to read, if it knows.
    pub(crate) fn set_records_behind(&self, task: u32, records: Option<u64>) {
        let Some(records) = records else { return };
        let mut behind = self.records_behind.lock().unwrap_or_else(PoisonError::into_inner);
        behind.insert(task, records);
    }

    /// How many records all tasks of a source have still to read; `None` where they do not know.
    fn all_records_behind(&self) -> Option<u64> {
        let behind = self.records_behind.lock().unwrap_or_else(PoisonError::into_inner);
        (!behind.is_empty()).then(|| behind.values().sum())
    }

    pub(crate) fn add_in(&self, count: usize) {
        self.records_in.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn add_out(&self, count: usize) {
        self.records_out.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn set_watermark(&self, watermark: i64) {
        self.watermark.store(watermark, Ordering::Relaxed);
    }

    pub(crate) fn change_custom(&self, name: &str, change: impl FnOnce(&mut f64)) {
        let mut custom = self.custom.lock().unwrap_or_else(PoisonError::into_inner);
        // A guest cannot fill the host's memory with names.
        if !custom.contains_key(name) && custom.len() < CUSTOM_MAX {
            custom.insert(name.to_owned(), 0.0);
        }
        if let Some(value) = custom.get_mut(name) {
            change(value);
        }
    }
}

/// The counters of a job.
#[derive(Debug, Default)]
pub struct Metrics {
    /// One for each operator, in the order of the job graph.
    pub operators: Vec<OperatorMetrics>,
    /// Completed checkpoints.
    pub checkpoints: AtomicU64,
    /// Restarts.
    pub restarts: AtomicU64,
    /// Records lost by tasks that restarted without those that they read from.
    pub records_lost: AtomicU64,
}

/// A reading of the counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Reading {
    /// Records that the sources have read.
    pub records_read: u64,
    /// Records that the sinks have taken.
    pub records_written: u64,
    /// Completed checkpoints.
    pub checkpoints: u64,
    /// Restarts.
    pub restarts: u64,
    /// Records lost by tasks that restarted without those that they read from.
    pub records_lost: u64,
    /// Records that sources could not make sense of, of this run.
    pub bad_records: u64,
    /// The lowest watermark of the sinks, if every one has one.
    pub watermark: Option<i64>,
}

/// A reading of one operator's counters.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct OperatorReading {
    /// Its name in the manifest.
    pub name: String,
    /// Records taken from its inputs.
    pub records_in: u64,
    /// Records given to its outputs.
    pub records_out: u64,
    /// The newest watermark, in milliseconds, if there was one.
    pub watermark: Option<i64>,
    /// How many records a source has still to read, where it knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records_behind: Option<u64>,
    /// What its guests count and measure themselves, all tasks together.
    pub metrics: BTreeMap<String, f64>,
}

impl Metrics {
    /// All zero, for operators of these names.
    pub(crate) fn of<'n>(names: impl Iterator<Item = &'n str>) -> Self {
        Self { operators: names.map(OperatorMetrics::new).collect(), ..Self::default() }
    }

    /// Reads the counters of each operator, in the order of the job graph.
    #[must_use]
    pub fn read_operators(&self) -> Vec<OperatorReading> {
        let read = |operator: &OperatorMetrics| OperatorReading {
            name: operator.name.clone(),
            records_in: operator.records_in.load(Ordering::Relaxed),
            records_out: operator.records_out.load(Ordering::Relaxed),
            watermark: Some(operator.watermark.load(Ordering::Relaxed))
                .filter(|it| *it != i64::MIN),
            records_behind: operator.all_records_behind(),
            metrics: operator.custom.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        };
        self.operators.iter().map(read).collect()
    }

    /// Reads the counters. Sources are the operators that take nothing, sinks those that give
    /// nothing.
    #[must_use]
    pub fn read(
        &self,
        is_source: impl Fn(usize) -> bool,
        is_sink: impl Fn(usize) -> bool,
    ) -> Reading {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut reading = Reading {
            checkpoints: load(&self.checkpoints),
            restarts: load(&self.restarts),
            records_lost: load(&self.records_lost),
            ..Reading::default()
        };
        let mut lowest = i64::MAX;
        for (index, operator) in self.operators.iter().enumerate() {
            if is_source(index) {
                reading.records_read += load(&operator.records_out);
                reading.bad_records += load(&operator.bad_records);
            }
            if is_sink(index) {
                reading.records_written += load(&operator.records_in);
                lowest = lowest.min(operator.watermark.load(Ordering::Relaxed));
            }
        }
        reading.watermark = (lowest != i64::MIN).then_some(lowest);
        reading
    }
}
