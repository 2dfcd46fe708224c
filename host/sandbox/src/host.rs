//! What a guest can ask of the program that embeds the sandbox.

use cofferdam_contract::StateChanges;

use crate::{Level, Limit};

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

    /// The value of a key of declared state, of which so many bytes at the end are its namespace.
    ///
    /// # Errors
    /// [`StateError::NotKept`] unless the host keeps it.
    fn state(
        &self,
        _state: u32,
        _key: &[u8],
        _namespace: u32,
    ) -> Result<Option<Vec<u8>>, StateError> {
        Err(StateError::NotKept)
    }

    /// Sets and removes entries of declared state.
    ///
    /// # Errors
    /// [`StateError::NotKept`] unless the host keeps it.
    fn put_state(&self, _changes: &StateChanges) -> Result<(), StateError> {
        Err(StateError::NotKept)
    }

    /// Some entries of a declared state after a key; none: there are no more.
    ///
    /// # Errors
    /// [`StateError::NotKept`] unless the host keeps it.
    fn scan_state(
        &self,
        _state: u32,
        _after: Option<(&[u8], u32)>,
    ) -> Result<StateChanges, StateError> {
        Err(StateError::NotKept)
    }
}

/// Why a host cannot do what a guest asks of its declared state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The guest was not told that the host keeps its state.
    #[error("it asks the host for declared state, and keeps that itself")]
    NotKept,
    /// The guest writes it before it is restored.
    #[error("it writes declared state in `open`, and only after that is its state restored")]
    NotOpen,
    /// The guest has more of it than it may.
    #[error("{0}")]
    Limit(Limit),
    /// The guest writes under a key that no record of its task has.
    #[error("{0}")]
    ForeignKey(String),
    /// The host cannot read or write it.
    #[error("{message}")]
    Unavailable {
        /// What it could not do, and why.
        message: String,
        /// The number of the operating system's error, where the failure is its.
        os_error: Option<i32>,
    },
}

/// For asking a component what it is: whatever it says meanwhile is of no interest.
#[derive(Debug, Clone, Copy)]
pub struct QuietHost;

impl Host for QuietHost {
    fn log(&self, _: Level, _: &str) {}
    fn add_to_counter(&self, _: &str, _: u64) {}
    fn set_gauge(&self, _: &str, _: f64) {}
    fn now_ms(&self) -> u64 {
        0
    }
    fn random(&self) -> u64 {
        0
    }
    fn attempt(&self) -> u32 {
        0
    }
}
