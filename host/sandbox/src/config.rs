//! The one configuration of wasmtime: code that a child has compiled runs in this process.

use std::sync::Arc;

use wasmtime::Config;

use crate::memory::{Creator, track::Tracking};

/// The one configuration for running, testing and compiling.
pub(crate) fn engine_config(without_signals: bool, tracking: Arc<Tracking>) -> Config {
    let mut config = Config::new();
    config
        // Memories are our own, and every one starts as zeroes: a copy-on-write image of the data
        // segments would belong to wasmtime.
        .with_host_memory(Arc::new(Creator { tracking }))
        .memory_init_cow(false)
        .wasm_component_model(true)
        // Component-model async is not offered; its bookkeeping would cost each call 250 ns.
        .concurrency_support(false)
        .epoch_interruption(true)
        // The same input must give the same memory, on every machine and in every replay.
        .cranelift_nan_canonicalization(true)
        .relaxed_simd_deterministic(true)
        .wasm_backtrace_max_frames(std::num::NonZeroUsize::new(32))
        .signals_based_traps(!without_signals);
    config
}

/// For code that runs in engines of the same choice, compiled where no guest runs.
pub(crate) fn compiling_config(without_signals: bool) -> Config {
    engine_config(without_signals, Arc::new(Tracking::compare()))
}
