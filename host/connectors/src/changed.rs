//! Why a file cannot be used as a checkpoint says: it has changed, or it cannot be read now.

use std::{fmt, io, path::Path};

use cofferdam_core::failure::{EnvironmentError, FailureCause, Obstacle};

/// Why a file cannot be used as a checkpoint says.
#[derive(Debug, Clone)]
pub(crate) enum Changed {
    /// It is not the file that the checkpoint speaks of.
    Content(String),
    /// Nobody knows: it cannot be read now.
    Unreadable(EnvironmentError),
}

impl Changed {
    /// What is wrong with a file.
    pub(crate) fn content(path: &Path, what: impl fmt::Display) -> Self {
        Self::Content(format!("{}: {what}", path.display()))
    }

    /// A file that could not be read. One that does not exist has changed.
    pub(crate) fn unread(path: &Path, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::content(path, "it no longer exists"),
            _ => Self::Unreadable(unreadable(path, error)),
        }
    }

    /// The failure of a task: a changed file is this obstacle, one that cannot be read may be readable soon.
    pub(crate) fn into_cause(self, obstacle: Obstacle) -> FailureCause {
        match self {
            Self::Content(message) => FailureCause::Permanent { obstacle, message },
            Self::Unreadable(error) => FailureCause::Environment(error),
        }
    }
}

/// A file that cannot be read now.
pub(crate) fn unreadable(path: &Path, error: io::Error) -> EnvironmentError {
    EnvironmentError::of(format_args!("read {}", path.display()), error)
}
