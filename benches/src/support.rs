//! Medians, instances, and the processor time of this process.

use std::{
    future::Future,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use cofferdam_contract::{Batch, OpenContext};
use cofferdam_engine::job::Job;
use cofferdam_sandbox::{Component, Instance, InstanceSetup, Limits, Sandbox, SandboxOptions};
use cofferdam_tests::host::RecordingHost;

/// The middle value.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value below which 99 of 100 lie.
pub(crate) fn percentile_99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() * 99 / 100).copied().unwrap_or(f64::NAN)
}

/// Calls `then` once a job was restarted so often, and has had time to recover.
pub(crate) fn after_restarts(job: &Job, restarts: u64, then: impl FnOnce() + Send + 'static) {
    let metrics = job.metrics();
    std::thread::spawn(move || {
        while metrics.restarts.load(Ordering::Relaxed) < restarts {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(300));
        then();
    });
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> Result<T> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("a runtime")?;
    Ok(runtime.block_on(future))
}

pub(crate) fn sandbox() -> Result<Sandbox> {
    let options = SandboxOptions::default();
    Ok(Sandbox::new(options)?)
}

pub(crate) fn load(sandbox: &Sandbox, path: &Path) -> Result<Component> {
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok(sandbox.load(&bytes)?)
}

pub(crate) fn limits() -> Limits {
    Limits { memory_bytes_max: 3 << 30, call_max: Duration::from_secs(60), ..Limits::default() }
}

pub(crate) async fn open(component: &Component, config: &[(&str, &str)]) -> Result<Instance> {
    let setup = InstanceSetup {
        host: Arc::new(RecordingHost::default()),
        limits: limits(),
        capabilities: Default::default(),
        seed: 1,
    };
    let mut instance = component.instantiate(setup).await?;
    let context = OpenContext {
        operator: "bench",
        task_index: 0,
        parallelism: 1,
        max_parallelism: 128,
        state_cache: None,
        tracks_changes: true,
        config,
    };
    instance.open(context).await?;
    Ok(instance)
}

/// The same records as columns of the SDK's type.
pub(crate) fn native_batch(
    batch: &Batch,
) -> cofferdam_sdk::bindings::cofferdam::operator::types::Batch {
    cofferdam_sdk::bindings::cofferdam::operator::types::Batch {
        keys: batch.keys.clone(),
        key_ends: batch.key_ends.clone(),
        values: batch.values.clone(),
        value_ends: batch.value_ends.clone(),
        timestamps: batch.timestamps.clone(),
    }
}

/// Processor time that this process has used, all threads together.
pub(crate) fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Bytes that this process has caused to be written to disks.
pub(crate) fn disk_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}
