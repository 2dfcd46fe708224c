//! A host that records what guests say to it.

use std::sync::{
    Mutex,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use cofferdam_sandbox::{Host, Level};

/// Answers guests with fixed sequences and keeps their messages.
#[derive(Debug, Default)]
pub struct RecordingHost {
    messages: Mutex<Vec<String>>,
    random: AtomicU64,
    /// What guests are told about their attempt.
    pub attempt: AtomicU32,
}

impl RecordingHost {
    /// Every message so far.
    ///
    /// # Panics
    /// If a test has panicked while it logged.
    #[must_use]
    pub fn messages(&self) -> Vec<String> {
        self.messages.lock().expect("no panic while logging").clone()
    }
}

impl Host for RecordingHost {
    fn log(&self, _level: Level, message: &str) {
        self.messages.lock().expect("no panic while logging").push(message.to_owned());
    }

    fn add_to_counter(&self, _: &str, _: u64) {}

    fn set_gauge(&self, _: &str, _: f64) {}

    fn now_ms(&self) -> u64 {
        1_700_000_000_000
    }

    fn random(&self) -> u64 {
        self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed)
    }

    fn attempt(&self) -> u32 {
        self.attempt.load(Ordering::Relaxed)
    }
}
