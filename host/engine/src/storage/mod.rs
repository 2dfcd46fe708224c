//! Keeps checkpoints: a row of generations, each a key-value store in a directory of its own.
//!
//! Whoever wants another store implements [`Storage`] and [`Generation`]; everything above them
//! (packs, chains, manifests, their order of commit) is in [`snapshot`], and does not know which
//! store it writes to. A generation holds a full image of every task and the increments since; it
//! is never repaired: it is replaced by a new one and removed as a directory.

mod chain;
pub mod declared;
pub mod faulty;
pub mod head;
pub mod in_flight;
pub mod keyed;
mod log;
pub mod manifest;
pub mod memory;
#[cfg(feature = "objects")]
pub mod objects;
pub mod run;
pub(crate) mod savepoint;
pub mod sled;
pub mod snapshot;
pub(crate) mod table;
pub(crate) mod writer;

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

/// Why a store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The store's own reason.
    #[error("{doing}: {reason}")]
    Store {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// It cannot be reached; what is in it may be whole.
    #[error("{doing}: {reason}")]
    Unreachable {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// Nobody knows whether a manifest is there.
    #[error("it is not known whether checkpoint {checkpoint} is complete: {reason}")]
    InDoubt {
        /// The checkpoint.
        checkpoint: u64,
        /// Why not.
        reason: String,
    },
    /// Something that was written is not there, or is not what was written.
    #[error("{what} is damaged: {why}")]
    Damaged {
        /// Which manifest or snapshot.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// Written by a version of this program that writes differently.
    #[error("{what} has format {found}, this program reads format {known}")]
    Format {
        /// Which manifest.
        what: String,
        /// Its version.
        found: u16,
        /// The version this program reads.
        known: u16,
    },
}

impl StorageError {
    pub(crate) fn store(doing: &'static str, reason: impl ToString) -> Self {
        Self::Store { doing, reason: reason.to_string() }
    }

    pub(crate) fn damaged(what: impl ToString, why: impl ToString) -> Self {
        Self::Damaged { what: what.to_string(), why: why.to_string() }
    }
}

/// A result of the storage.
pub type Result<T> = std::result::Result<T, StorageError>;

/// Makes the names in a directory durable, as syncing a file does its content.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes a directory and those above it where they are not there, and makes their names durable. With
/// `mode` as it is left by the umask; those of a state are its owner's alone.
pub(crate) fn make_dir(dir: &Path, mode: u32) -> io::Result<()> {
    let parent = match dir.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Ok(()),
    };
    let made = match DirBuilder::new().mode(mode).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_dir(parent, mode)?;
            DirBuilder::new().mode(mode).create(dir)
        }
        made => made,
    };
    match made {
        Ok(()) => sync_dir(parent),
        // Another run may have made it a moment before it was killed.
        Err(_) if dir.is_dir() => match sync_dir(parent) {
            // It was made by others then.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            synced => synced,
        },
        Err(error) => Err(error),
    }
}

/// The mode of directories that are for others, too, as far as the umask allows.
pub(crate) const FOR_ALL: u32 = 0o777;
/// The mode of directories that are their owner's alone.
pub(crate) const FOR_OWNER: u32 = 0o700;

/// Opens a file for reading and writing, for its owner alone; makes it where it is not there.
pub(crate) fn create_file(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)
}

/// Whether it is a URL and no path of this machine.
#[must_use]
pub fn is_url(location: &Path) -> bool {
    location.to_string_lossy().contains("://")
}

/// The names of what [`objects_at`] opens.
const GENERATION: &str = "gen-";
const SEGMENT: &str = "segment-";

/// Opens a place with objects: a URL, or a directory that many hosts may share.
///
/// # Errors
/// Where it cannot be opened, and in builds without object stores.
#[cfg(feature = "objects")]
pub fn objects_at(location: &str) -> Result<Box<dyn Storage>> {
    Ok(Box::new(objects::ObjectStorage::new(location)?))
}

/// Refuses a place with objects: this build has no object stores.
///
/// # Errors
/// Always.
#[cfg(not(feature = "objects"))]
pub fn objects_at(location: &str) -> Result<Box<dyn Storage>> {
    let reason = format!(
        "{location}: this build of cofferdam has no object stores (it lacks the Cargo feature `objects`)"
    );
    Err(StorageError::store("open the checkpoints", reason))
}

/// Whether a directory holds generations that are made of objects.
fn are_objects_in(dir: &Path) -> bool {
    let names_of = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    let begins =
        |entry: &fs::DirEntry, with: &str| entry.file_name().to_string_lossy().starts_with(with);
    names_of(dir)
        .filter(|entry| begins(entry, GENERATION))
        .any(|entry| names_of(&entry.path()).any(|entry| begins(&entry, SEGMENT)))
}

/// Opens the storage of a state directory or savepoint, or of a place with objects.
///
/// # Errors
/// Where there is none.
pub fn open_at(location: &Path) -> Result<Box<dyn Storage>> {
    if is_url(location) || are_objects_in(location) {
        return objects_at(&location.to_string_lossy());
    }
    if !location.is_dir() {
        return Err(StorageError::store("open a store", "there is no such directory"));
    }
    Ok(Box::new(sled::SledStorage::new(location.to_owned())))
}

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

    /// The copies of the head that there are; see [`head`].
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
