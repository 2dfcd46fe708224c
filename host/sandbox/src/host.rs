//! What a guest can ask of whoever embeds the sandbox.

use crate::Level;

/// The answers to a guest's imports. Everything nondeterministic that a guest sees comes through
/// here, so that it can be recorded.
pub trait Host: Send + Sync + 'static {
    /// A message for the log; a panic's last words come as [`Level::Error`].
    fn log(&self, level: Level, message: &str);

    /// Adds to a counter.
    fn add_to_counter(&self, name: &str, delta: u64);

    /// Sets a gauge.
    fn set_gauge(&self, name: &str, value: f64);

    /// Milliseconds since 1970-01-01 UTC.
    fn now_ms(&self) -> u64;

    /// 64 random bits.
    fn random(&self) -> u64;

    /// How often the task was restarted before.
    fn attempt(&self) -> u32;
}
