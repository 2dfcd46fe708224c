//! Tells a guest's trap, a limit, a rejected record and a host bug apart.

use wasmtime::{Error, Trap, WasmBacktrace, component::ResourceTableError};

use cofferdam_contract::{ErrorClass, OperatorError, text};

use crate::{Limits, StateError, limits::Limit, memory::NOT_RESERVED};

/// Why a call into a guest gave no result. After each but `Rejected` and `Failed` the instance is
/// gone: its memory is not state any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The guest trapped.
    #[error("{message}")]
    Trap {
        /// The kind of trap, and the guest's last words if it panicked.
        message: String,
        /// The guest's frames by name, innermost first.
        backtrace: Vec<String>,
    },
    /// The guest used more than it may.
    #[error("{0}")]
    Limit(Limit),
    /// The guest refuses a record.
    #[error("{message}")]
    Rejected {
        /// Its words.
        message: String,
        /// The place of the record in the batch, if it named one.
        record: Option<u32>,
    },
    /// The guest says that it cannot continue.
    #[error("{message}")]
    Failed {
        /// Its words.
        message: String,
        /// The place of the record in the batch, if it named one.
        record: Option<u32>,
    },
    /// The guest keeps state under a key that no record of its task has.
    #[error("{0}")]
    ForeignKey(String),
    /// The host could not do what the guest asked of it.
    #[error("{message}")]
    Unavailable {
        /// What it could not do, and why.
        message: String,
        /// The number of the operating system's error, where the failure is its.
        os_error: Option<i32>,
    },
    /// Something that the host should have prevented.
    #[error("{0}")]
    Host(String),
}

impl GuestError {
    /// The number of the operating system's error, where the failure is its.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Unavailable { os_error, .. } => *os_error,
            _ => None,
        }
    }
}

impl From<OperatorError> for GuestError {
    fn from(error: OperatorError) -> Self {
        let OperatorError { class, message, record } = error;
        let message = text::message(&message).into_owned();
        match class {
            ErrorClass::Rejected => Self::Rejected { message, record },
            ErrorClass::Failed => Self::Failed { message, record },
        }
    }
}

impl From<StateError> for GuestError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Limit(limit) => Self::Limit(limit),
            StateError::ForeignKey(message) => Self::ForeignKey(message),
            StateError::Unavailable { message, os_error } => {
                Self::Unavailable { message, os_error }
            }
            StateError::NotKept | StateError::NotOpen => Self::Host(error.to_string()),
        }
    }
}

/// The number of the operating system's error that a memory was not reserved for: wasmtime keeps only the text
/// of it.
fn os_error_in(text: &str) -> Option<i32> {
    let (number, _) = text.rsplit_once("(os error ")?.1.split_once(')')?;
    number.parse().ok()
}

/// What wasmtime says when a call gives back more than its fuel for host memory allows. It has no
/// type of its own.
const OUTPUT_EXHAUSTED: &str = "fuel allocated for hostcalls has been exhausted";

impl GuestError {
    /// Classifies what wasmtime returned. `refused` is a limit that was reached during the call,
    /// `last_words` the message of a panic.
    pub(crate) fn classify(
        error: &Error,
        refused: Option<Limit>,
        last_words: Option<String>,
        limits: &Limits,
    ) -> Self {
        if let Some(limit) = error.downcast_ref::<Limit>() {
            return Self::Limit(*limit);
        }
        if let Some(error) = error.downcast_ref::<StateError>()
            && !matches!(error, StateError::NotKept | StateError::NotOpen)
        {
            return error.clone().into();
        }
        if let Some(exit) = error.downcast_ref::<wasmtime_wasi::I32Exit>() {
            let message = format!("the guest called exit({})", exit.0);
            return Self::Trap { message, backtrace: backtrace(error) };
        }
        if let Some(ResourceTableError::Full) = error.downcast_ref() {
            return Self::Limit(Limit::Handles { max: limits.handles_max });
        }
        // Not all of its words: its backtrace names functions as the guest has called them.
        let words = error.root_cause().to_string();
        let is_trap = error.downcast_ref::<Trap>().is_some();
        if words.contains(NOT_RESERVED) && !is_trap {
            return Self::Unavailable { os_error: os_error_in(&words), message: words };
        }
        if words.contains(OUTPUT_EXHAUSTED) && !is_trap {
            return Self::Limit(Limit::Output { bytes_max: limits.output_bytes_max });
        }
        let message = match (error.downcast_ref::<Trap>(), refused) {
            (Some(Trap::StackOverflow), _) => return Self::Limit(Limit::Stack),
            (Some(Trap::CannotEnterComponent), _) => {
                return Self::Host("an instance was called after its trap".to_owned());
            }
            // Without a trap: a memory or a table is too large from its beginning.
            (_, Some(limit)) => return Self::Limit(limit),
            (Some(trap), None) => match last_words {
                Some(words) => format!("{trap}: {words}"),
                None => trap.to_string(),
            },
            // Bad pointers, invalid UTF-8, a host function that gave an error: the guest broke the canonical ABI or
            // misused a resource.
            (None, None) => text::message(&error.root_cause().to_string()).into_owned(),
        };
        Self::Trap { message, backtrace: backtrace(error) }
    }
}

/// The guest's frames by name, from the one that panicked: what the panic itself calls is noise.
fn backtrace(error: &Error) -> Vec<String> {
    let Some(backtrace) = error.downcast_ref::<WasmBacktrace>() else { return Vec::new() };
    let mut frames: Vec<String> = backtrace
        .frames()
        .iter()
        .map(|frame| match frame.func_name() {
            // Rust's mangled names as they stand in the source.
            Some(name) => text::name(&format!("{:#}", rustc_demangle::demangle(name))).into_owned(),
            None => format!("function {}", frame.func_index()),
        })
        .collect();
    let is_panic = |frame: &String| frame.starts_with("core::panicking::");
    let panic_frames = frames.iter().rposition(is_panic).map_or(0, |last| last + 1);
    frames.drain(..panic_frames);
    frames
}
