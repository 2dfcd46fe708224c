//! The states of all tasks of a connector, decoded and encoded together.

use cofferdam_core::failure::{FailureCause, Obstacle};
use serde::{Serialize, de::DeserializeOwned};

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
