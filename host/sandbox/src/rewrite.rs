//! What is compiled in place of a component, or why nothing is: checks it, and gives access to its state.

use std::io;

use crate::{
    instrument,
    limits::CompileLimit,
    validate::{self, Unsound, ValidateError},
};

/// Why bytes cannot be run as an operator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ComponentError {
    /// Not WebAssembly.
    #[error("it is not a WebAssembly file (it begins with {begins_with:?})")]
    NotWasm {
        /// The first bytes.
        begins_with: String,
    },
    /// A core module, not a component.
    #[error("it is a core WebAssembly module, not a component")]
    CoreModule,
    /// WebAssembly that breaks off or makes no sense.
    #[error("it is malformed: {message}")]
    Malformed {
        /// What, and at which byte.
        message: String,
    },
    /// A component whose state a snapshot of its memory would miss.
    #[error("it cannot be checkpointed: {0}")]
    Unsound(Unsound),
    /// A component that imports what operators do not get.
    #[error("it imports what an operator does not get: {message}")]
    Import {
        /// Which import.
        message: String,
    },
    /// A component that is not an operator.
    #[error("it does not export `cofferdam:operator/guest@0.2.0`: {message}")]
    OtherWorld {
        /// What is missing.
        message: String,
    },
    /// The compiler refused what the checks had accepted.
    #[error("compile it")]
    Compile(
        /// The compiler's words, or what the system did not give it.
        #[source]
        Box<dyn std::error::Error + Send + Sync>,
    ),
    /// Compiling it takes more than it may.
    #[error("{0}")]
    Limit(CompileLimit),
    /// The compiler has died of it.
    #[error("the compiler crashed on it ({how})")]
    Crashed {
        /// How, and its last words.
        how: String,
    },
    /// There is no compiler.
    #[error("start the compiler")]
    NoCompiler(#[source] io::Error),
}

/// The component that is compiled in place of this one: the same, with accesses to the state that no export
/// gives.
///
/// # Errors
/// Where the bytes are no component, or one that cannot be checkpointed.
pub fn rewrite(bytes: &[u8]) -> Result<Vec<u8>, ComponentError> {
    check_kind(bytes)?;
    validate::check(bytes)?;
    // The rewriting relies on what validation guarantees, so validate what was given first.
    wasmparser::Validator::new_with_features(validate::features())
        .validate_all(bytes)
        .map_err(ValidateError::from)?;
    Ok(instrument::instrument(bytes)?)
}

impl From<ValidateError> for ComponentError {
    fn from(error: ValidateError) -> Self {
        match error {
            ValidateError::Malformed(message) => Self::Malformed { message },
            ValidateError::Unsound(unsound) => Self::Unsound(unsound),
        }
    }
}

fn check_kind(bytes: &[u8]) -> Result<(), ComponentError> {
    if !bytes.starts_with(b"\0asm") {
        let begins_with = String::from_utf8_lossy(&bytes[..bytes.len().min(8)]).into_owned();
        return Err(ComponentError::NotWasm { begins_with });
    }
    if wasmparser::Parser::is_core_wasm(bytes) {
        return Err(ComponentError::CoreModule);
    }
    Ok(())
}
