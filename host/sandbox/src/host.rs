//! What a guest can ask of the program that embeds the sandbox, and what it is granted.

use std::{fmt, fs::File};

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

    /// Does what waits for a disk, within a call of the guest.
    fn wait_for_disk(&self, work: &mut dyn FnMut()) {
        work();
    }

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

/// What a guest may reach outside of its sandbox. The default: nothing.
#[derive(Default)]
pub struct Capabilities {
    /// Directories that it may read, with all that is in them, by the names that it knows them by. Links that lead out
    /// of them are not followed.
    pub read: Vec<(String, File)>,
    /// A directory of its own, which it finds at `/scratch`, and how many bytes may be in it. It is empty and on no other
    /// instance's way. A snapshot does not contain it.
    pub scratch: Option<(File, u64)>,
    /// Environment variables.
    pub env: Vec<(String, String)>,
    /// Secrets by name. What a guest has asked for is in its memory, and with that in snapshots.
    pub secrets: Vec<(String, Vec<u8>)>,
}

impl fmt::Debug for Capabilities {
    /// Without the secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secrets: Vec<&String> = self.secrets.iter().map(|(name, _)| name).collect();
        f.debug_struct("Capabilities")
            .field("read", &self.read)
            .field("scratch", &self.scratch)
            .field("env", &self.env)
            .field("secrets", &secrets)
            .finish()
    }
}

/// What a component imports and a guest has to be granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// Files: `wasi:filesystem`.
    Files,
    /// Secrets: `cofferdam:operator/secrets`.
    Secrets,
}

impl Need {
    /// What an import needs, if it needs to be granted at all.
    pub(crate) fn of_import(name: &str) -> Option<Self> {
        [(Self::Files, "wasi:filesystem/"), (Self::Secrets, "cofferdam:operator/secrets@")]
            .into_iter()
            .find_map(|(need, prefix)| name.starts_with(prefix).then_some(need))
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
