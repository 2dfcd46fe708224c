//! What a store must be able to do, and how it fails.

use std::error::Error;

use cofferdam_core::failure::os_error;
use cofferdam_settings::problem::with_sources;

/// The operating system's number for a file that is not there.
const NOT_FOUND: i32 = 2;

/// What lies behind a failure of a store.
pub type Cause = Box<dyn Error + Send + Sync>;

/// Why a store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The store's own reason.
    #[error("{doing}: {}", with_sources(&**cause))]
    Store {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        cause: Cause,
    },
    /// It cannot be reached; what is in it may be whole.
    #[error("{doing}: {}", with_sources(&**cause))]
    Unreachable {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        cause: Cause,
    },
    /// Nobody knows whether the metadata is there.
    #[error(
        "it is not known whether checkpoint {checkpoint} is complete: {failed}; and it could not be withdrawn: {again}"
    )]
    InDoubt {
        /// The checkpoint.
        checkpoint: u64,
        /// Why it may not be complete.
        failed: Box<StorageError>,
        /// Why it could not be withdrawn.
        #[source]
        again: Box<StorageError>,
    },
    /// Something that was written is not there, or is not what was written.
    #[error("{what} is damaged: {why}")]
    Damaged {
        /// Which metadata or snapshot.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// Written by a version of this program that writes differently.
    #[error("{what} has format {found}, this program reads format {known}")]
    Format {
        /// Which metadata.
        what: String,
        /// Its version.
        found: u16,
        /// The version this program reads.
        known: u16,
    },
}

/// An error, and the file or directory that it is about.
#[derive(Debug, thiserror::Error)]
#[error("{place}")]
struct At {
    place: String,
    source: Cause,
}

impl StorageError {
    /// A failure of the store itself, at a file or directory.
    pub fn at(doing: &'static str, place: impl ToString, cause: impl Into<Cause>) -> Self {
        Self::store(doing, At { place: place.to_string(), source: cause.into() })
    }

    /// A failure of the store itself.
    pub fn store(doing: &'static str, cause: impl Into<Cause>) -> Self {
        Self::Store { doing, cause: cause.into() }
    }

    /// The number of the operating system's error, where the failure is its.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Store { cause, .. } | Self::Unreachable { cause, .. } => os_error(&**cause),
            Self::InDoubt { failed, again, .. } => again.os_error().or_else(|| failed.os_error()),
            Self::Damaged { .. } | Self::Format { .. } => None,
        }
    }

    /// True where the same call may succeed another time: the machine or the way to the store has failed, and not
    /// what is in it. A file that is not there is damage.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Store { .. } => self.os_error().is_some_and(|number| number != NOT_FOUND),
            Self::InDoubt { .. } | Self::Damaged { .. } | Self::Format { .. } => false,
        }
    }

    /// Something that is not what was written.
    pub fn damaged(what: impl ToString, why: impl ToString) -> Self {
        Self::Damaged { what: what.to_string(), why: why.to_string() }
    }
}

/// A result of the storage.
pub type Result<T> = std::result::Result<T, StorageError>;

/// A row of generations.
pub trait Storage: Send {
    /// The numbers of all generations, ascending.
    ///
    /// # Errors
    /// Where they cannot be listed.
    fn generations(&self) -> Result<Vec<u64>>;

    /// Opens a generation; makes an empty one where it is not there. It has once reached as far as
    /// `end`: where something is missing of that, it is looked for elsewhere.
    ///
    /// # Errors
    /// Where it cannot be read or made.
    fn open(&mut self, number: u64, end: u64) -> Result<Box<dyn Generation>>;

    /// Opens a generation that is there to look into it. Nothing is written, wherever it lies.
    ///
    /// # Errors
    /// Where it is not there, or cannot be read.
    fn read(&self, number: u64, end: u64) -> Result<Box<dyn Generation>>;

    /// The copies of the head that there are; see [`head`](crate::head).
    ///
    /// # Errors
    /// Where they cannot be read.
    fn heads(&self) -> Result<Vec<Vec<u8>>>;

    /// Writes one of two copies of the head, durably.
    ///
    /// # Errors
    /// Where nobody knows whether it is there.
    fn write_head(&mut self, copy: usize, bytes: &[u8]) -> Result<()>;

    /// Puts a damaged generation where it is in nobody's way, for people to look at.
    ///
    /// # Errors
    /// Where it is still there.
    fn set_aside(&mut self, _number: u64) -> Result<()> {
        Ok(())
    }

    /// Removes a generation that nobody has open.
    ///
    /// # Errors
    /// Where it is still there.
    fn remove(&mut self, number: u64) -> Result<()>;

    /// Removes both copies of the head: there is no store any more.
    ///
    /// # Errors
    /// Where one is still there.
    fn remove_heads(&mut self) -> Result<()>;

    /// Where it is, for messages.
    fn location(&self) -> String;
}

/// A key-value store. What was put is durable after the next `flush`, not before. After an error
/// everything since the last flush is undone, and the store is opened again by the next write.
pub trait Generation: Send {
    /// Writes a value.
    ///
    /// # Errors
    /// Where it was not taken.
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()>;

    /// Reads a value.
    ///
    /// # Errors
    /// Where it cannot be read; a key that is not there is `Ok(None)`.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;

    /// Removes a value.
    ///
    /// # Errors
    /// Where it was not removed.
    fn delete(&mut self, key: &[u8]) -> Result<()>;

    /// Every key that begins with `prefix`, ascending.
    ///
    /// # Errors
    /// Where they cannot be listed.
    fn keys(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Makes everything durable that was put.
    ///
    /// # Errors
    /// Where that is not certain.
    fn flush(&mut self) -> Result<()>;

    /// Opens the store again if an error has closed it.
    ///
    /// # Errors
    /// Where it still cannot be.
    fn reopen(&mut self) -> Result<()> {
        Ok(())
    }

    /// How far it reaches as of the last flush: ascends with each.
    fn end(&self) -> u64;

    /// What of it is damaged, though all of it can still be read.
    fn flaws(&self) -> Vec<String> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn what_the_operating_system_says_stays_a_fact() {
        let full = StorageError::at("write it", "/data", io::Error::from_raw_os_error(28));
        assert_eq!(full.os_error(), Some(28));
        assert_eq!(full.to_string(), "write it: /data: No space left on device (os error 28)");
        assert_eq!(StorageError::store("write it", "no luck (os error 28)").os_error(), None);
    }

    /// Too many open files were damage: the advice was to move the directory away, and an older checkpoint was taken.
    #[test]
    fn what_the_machine_refuses_for_now_is_not_damage_and_a_missing_file_is() {
        let of = |number| StorageError::store("read", io::Error::from_raw_os_error(number));
        assert!(of(24).may_pass() && of(5).may_pass() && of(12).may_pass());
        assert!(!of(2).may_pass());
        assert!(!StorageError::damaged("it", "its checksum is wrong").may_pass());
        assert!(!StorageError::store("read", "there is no checkpoint in it").may_pass());
    }
}
