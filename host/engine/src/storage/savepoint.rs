//! A savepoint: a checkpoint in a place of its own, whole and relocatable.
//!
//! It is a store like any other with one generation. In a directory it is written beside its final name
//! and renamed when everything is durable: a directory of that name is a whole savepoint. Objects
//! cannot be renamed; there its manifest is written last, and without it there is no savepoint.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    Result, Storage, StorageError, is_url, objects::ObjectStorage, sled::SledStorage,
    snapshot::SnapshotStore, sync_dir,
};

/// Writes the state as of a checkpoint that all tasks have acked.
pub(crate) fn write(
    store: &SnapshotStore,
    checkpoint: u64,
    written_at_ms: u64,
    dir: &Path,
) -> Result<()> {
    if is_url(dir) {
        let target = ObjectStorage::new(&dir.to_string_lossy())?;
        return write_objects(store, checkpoint, written_at_ms, target);
    }
    let failed = |error: io::Error| {
        StorageError::store("write a savepoint", format!("{}: {error}", dir.display()))
    };
    if dir.exists() {
        return Err(failed(io::Error::from(io::ErrorKind::AlreadyExists)));
    }
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(failed)?;
    let unfinished = unfinished_name(dir);
    // What an earlier try has left there is of no use to anybody.
    match fs::remove_dir_all(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    fs::create_dir(&unfinished).map_err(failed)?;
    let mut target = SledStorage::new(unfinished.clone());
    let written = store
        .export(checkpoint, written_at_ms, &mut target)
        .and_then(|_| fs::rename(&unfinished, dir).and_then(|()| sync_dir(parent)).map_err(failed));
    if written.is_err() {
        // The reason for the failure says more than that of a failed removal would.
        let _ = fs::remove_dir_all(&unfinished);
        let _ = fs::remove_dir_all(dir);
    }
    written
}

fn write_objects(
    store: &SnapshotStore,
    checkpoint: u64,
    written_at_ms: u64,
    mut target: ObjectStorage,
) -> Result<()> {
    let there = target.generations()?;
    if !there.is_empty() {
        let reason = format!("{}: something is there already", target.location());
        return Err(StorageError::store("write a savepoint", reason));
    }
    let written = store.export(checkpoint, written_at_ms, &mut target);
    if written.is_err() {
        // The reason for the failure says more than that of a failed removal would.
        let _ = target.remove(1);
    }
    written.map(|_| ())
}

fn unfinished_name(dir: &Path) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    dir.with_file_name(format!(".{name}.unfinished"))
}
