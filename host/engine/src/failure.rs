//! Every error of a task has its class here, once: what a guest, a store or the environment says, as the cause of
//! a failure that the core decides about.

use std::io;

use cofferdam_contract::Batch;
use cofferdam_core::{
    failure::{EnvironmentError, FailureCause, LimitKind, Obstacle},
    ids::TaskId,
};
use cofferdam_sandbox::{GuestError, Limit, RestoreError, SnapshotError};
use cofferdam_settings::problem::{shown, with_sources};

use cofferdam_store::StorageError;

type Result<T> = std::result::Result<T, FailureCause>;

/// The failure of one task.
#[derive(Debug)]
pub(crate) struct TaskFailure {
    pub(crate) task: TaskId,
    pub(crate) cause: FailureCause,
}

/// Runs something that blocks where that harms nobody.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|error| Err(host_bug(&format!("a blocking call panicked: {error}"))))
}

pub(crate) fn host_bug(message: &str) -> FailureCause {
    FailureCause::HostBug { message: message.to_owned() }
}

/// The class of a guest's error in a batch, with the record that it is about.
pub(crate) fn cause_with_record(error: GuestError, batch: &Batch) -> FailureCause {
    match error {
        GuestError::Rejected { message, record: Some(place) } => {
            FailureCause::Rejected { message: about_record(&message, batch, place) }
        }
        GuestError::Failed { message, record: Some(place) } => FailureCause::Trap {
            message: about_record(&message, batch, place),
            backtrace: Vec::new(),
        },
        error => cause_of(error),
    }
}

/// A message with the record that it is about, shortened.
pub(crate) fn about_record(message: &str, batch: &Batch, place: u32) -> String {
    let Some(record) = batch.records().nth(place as usize) else { return message.to_owned() };
    let key = record.key.map_or(String::new(), |key| format!("key {}, ", shown(key)));
    let time = record.timestamp.map_or(String::new(), |time| format!(", time {time}"));
    format!("{message}: record with {key}value {}{time}", shown(record.value))
}

/// The class of a guest's error.
pub(crate) fn cause_of(error: GuestError) -> FailureCause {
    let at = |message: String, record: Option<u32>| match record {
        Some(record) => format!("{message} (record {record} of its batch)"),
        None => message,
    };
    match error {
        GuestError::Trap { message, backtrace } => FailureCause::Trap { message, backtrace },
        GuestError::Limit(limit) => {
            FailureCause::LimitExceeded { limit: kind_of(limit), message: limit.to_string() }
        }
        GuestError::Rejected { message, record } => {
            FailureCause::Rejected { message: at(message, record) }
        }
        GuestError::Failed { message, record } => {
            FailureCause::Trap { message: at(message, record), backtrace: Vec::new() }
        }
        GuestError::ForeignKey(message) => foreign_key(message),
        GuestError::Unavailable { message, os_error } => {
            FailureCause::Environment(with_number(message, os_error))
        }
        other => FailureCause::HostBug { message: other.to_string() },
    }
}

fn kind_of(limit: Limit) -> LimitKind {
    match limit {
        Limit::Memory { .. } => LimitKind::Memory,
        Limit::Call { .. } => LimitKind::Call,
        Limit::Wait { .. } => LimitKind::Wait,
        Limit::Output { .. } => LimitKind::Output,
        Limit::Handles { .. } => LimitKind::Handles,
        Limit::Table { .. } => LimitKind::Table,
        Limit::State { .. } => LimitKind::State,
        Limit::Stack => LimitKind::Stack,
    }
}

pub(crate) fn foreign_key(message: String) -> FailureCause {
    FailureCause::Permanent { obstacle: Obstacle::ForeignKey, message }
}

pub(crate) fn snapshot_cause(error: SnapshotError) -> FailureCause {
    match error {
        SnapshotError::Guest(error) => cause_of(error),
        error => {
            let message = format!("snapshot a guest's memory: {}", with_sources(&error));
            FailureCause::Environment(EnvironmentError::new(message).because(error))
        }
    }
}

pub(crate) fn restore_cause(error: RestoreError) -> FailureCause {
    match error {
        RestoreError::Guest(error) => cause_of(error),
        RestoreError::Map(_) => {
            let message = with_sources(&error);
            FailureCause::Environment(EnvironmentError::new(message).because(error))
        }
        RestoreError::Limit(limit) => FailureCause::Permanent {
            obstacle: Obstacle::Limit(kind_of(limit)),
            message: format!("restore a guest's memory: {limit}"),
        },
        other => FailureCause::Permanent {
            obstacle: Obstacle::StateMismatch,
            message: format!("restore a guest's memory: {other}"),
        },
    }
}

/// An error of the storage, as one of the environment.
pub(crate) fn storage_error(error: StorageError) -> EnvironmentError {
    EnvironmentError::new(error.to_string()).because(error)
}

/// An error of which only the text and the operating system's number are left.
fn with_number(message: String, os_error: Option<i32>) -> EnvironmentError {
    let error = EnvironmentError::new(message);
    match os_error {
        Some(number) => error.because(io::Error::from_raw_os_error(number)),
        None => error,
    }
}

/// What an error of the storage means for a task.
pub(crate) fn storage_cause(error: StorageError) -> FailureCause {
    let message = error.to_string();
    match error {
        StorageError::Store { .. } | StorageError::Unreachable { .. } => {
            FailureCause::Environment(storage_error(error))
        }
        StorageError::Damaged { .. } | StorageError::Format { .. } => {
            FailureCause::Permanent { obstacle: Obstacle::StoreDamaged, message }
        }
        StorageError::InDoubt { .. } => {
            let obstacle = Obstacle::StoreInDoubt { os_error: error.os_error() };
            FailureCause::Permanent { obstacle, message }
        }
    }
}
