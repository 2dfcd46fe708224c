//! The state of a connector's task, and the states of all tasks, decoded and encoded together.

use bytes::Bytes;
use cofferdam_core::failure::{FailureCause, Obstacle};
use serde::{Serialize, de::DeserializeOwned};

/// The state of one task of a connector, in chunks that its copies share.
#[derive(Debug, Clone, Default)]
pub struct ConnectorState(Vec<Bytes>);

impl ConnectorState {
    /// Adds a chunk behind those that are there.
    pub fn push(&mut self, chunk: impl Into<Bytes>) {
        let chunk = chunk.into();
        if !chunk.is_empty() {
            self.0.push(chunk);
        }
    }

    /// Its chunks; none of them is empty.
    pub fn chunks(&self) -> impl Iterator<Item = &Bytes> {
        self.0.iter()
    }

    /// How many bytes it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of it, as one.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.0.concat()
    }
}

impl From<Vec<u8>> for ConnectorState {
    fn from(bytes: Vec<u8>) -> Self {
        let mut state = Self::default();
        state.push(bytes);
        state
    }
}

/// Decodes the states of all tasks.
///
/// # Errors
/// Where one is not of this type.
pub fn decode_all<T: DeserializeOwned>(states: &[&[u8]]) -> Result<Vec<T>, String> {
    let decode = |state: &&[u8]| postcard::from_bytes(state).map_err(|error| error.to_string());
    states.iter().map(decode).collect()
}

/// Encodes the states of all tasks.
///
/// # Errors
/// Where one cannot be encoded.
pub fn encode_all<T: Serialize>(states: &[T]) -> Result<Vec<Vec<u8>>, String> {
    let encode = |state: &T| postcard::to_stdvec(state).map_err(|error| error.to_string());
    states.iter().map(encode).collect()
}

/// The failure of a task whose state in the checkpoint does not fit it.
#[must_use]
pub fn mismatch(message: String) -> FailureCause {
    FailureCause::Permanent { obstacle: Obstacle::StateMismatch, message }
}

/// The failure of a task whose state in the checkpoint is not what it has written.
pub fn unreadable(of: &str, error: impl std::fmt::Display) -> FailureCause {
    mismatch(format!("the {of} in the checkpoint cannot be read: {error}"))
}
