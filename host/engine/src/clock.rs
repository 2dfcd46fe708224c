//! The wall clock, for what people and guests are told. Nothing is decided by it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Since 1970-01-01 UTC; zero on a machine whose clock stands before that.
pub(crate) fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Milliseconds since 1970-01-01 UTC.
pub(crate) fn now_ms() -> u64 {
    since_epoch().as_millis() as u64
}
