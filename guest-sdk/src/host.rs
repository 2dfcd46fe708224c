//! What an operator can ask of its host: the log, metrics, the clock, randomness.
//!
//! Natively, in unit tests, the log goes to standard error, metrics go nowhere, the clock is the
//! machine's and the randomness a fixed sequence.

#[cfg(target_arch = "wasm32")]
use crate::bindings::cofferdam::operator as wit;
#[cfg(target_arch = "wasm32")]
pub use wit::logging::Level;

/// How much a message matters.
#[cfg(not(target_arch = "wasm32"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Everything that happens.
    Trace,
    /// What helps to find a mistake.
    Debug,
    /// What an operator of the job wants to know.
    Info,
    /// What looks wrong.
    Warn,
    /// What is wrong.
    Error,
}

/// Writes one message to the host's log.
pub fn log(level: Level, message: &str) {
    #[cfg(target_arch = "wasm32")]
    wit::logging::log(level, message);
    #[cfg(not(target_arch = "wasm32"))]
    eprintln!("{level:?}: {message}");
}

/// Adds to a counter of the task.
pub fn add_to_counter(name: &str, delta: u64) {
    #[cfg(target_arch = "wasm32")]
    wit::metrics::add(name, delta);
    #[cfg(not(target_arch = "wasm32"))]
    let _ = (name, delta);
}

/// Sets a gauge of the task.
pub fn set_gauge(name: &str, value: f64) {
    #[cfg(target_arch = "wasm32")]
    wit::metrics::set(name, value);
    #[cfg(not(target_arch = "wasm32"))]
    let _ = (name, value);
}

/// Milliseconds since 1970-01-01 UTC.
#[must_use]
pub fn now_ms() -> u64 {
    #[cfg(target_arch = "wasm32")]
    return wit::clock::now();
    #[cfg(not(target_arch = "wasm32"))]
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// How often the task was restarted before; 0 in unit tests. For diagnostics: what an operator emits
/// must not depend on it.
#[must_use]
pub fn attempt() -> u32 {
    #[cfg(target_arch = "wasm32")]
    return wit::task::attempt();
    #[cfg(not(target_arch = "wasm32"))]
    0
}

/// 64 random bits.
#[must_use]
pub fn random() -> u64 {
    #[cfg(target_arch = "wasm32")]
    return wit::random::next();
    #[cfg(not(target_arch = "wasm32"))]
    {
        use std::sync::atomic::{AtomicU64, Ordering};
        static STATE: AtomicU64 = AtomicU64::new(1);
        let state = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        (state ^ (state >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb)
    }
}
