//! Where a store lies: a directory, or a place with objects.

use std::{fs, path::Path};

use crate::{
    Result, Storage, StorageError,
    key::{GENERATION, SEGMENT},
    sled,
};

/// Whether it is a URL and no path of this machine.
#[must_use]
pub fn is_url(location: &Path) -> bool {
    location.to_string_lossy().contains("://")
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

/// Opens a place with objects: a URL, or a directory that many hosts may share.
///
/// # Errors
/// Where it cannot be opened, and in builds without object stores.
#[cfg(feature = "objects")]
pub fn objects_at(location: &str) -> Result<Box<dyn Storage>> {
    Ok(Box::new(crate::objects::ObjectStorage::new(location)?))
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
