//! A savepoint: a checkpoint in a place of its own, whole and relocatable.
//!
//! It is a store like any other with one generation. In a directory it is written beside its final name
//! and renamed when everything is durable: a directory of that name is a whole savepoint. Objects
//! cannot be renamed; there its metadata is written last, and without it there is no savepoint.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use cofferdam_files::{FOR_ALL, make_dir, sync_dir};

use crate::{Result, SnapshotStore, Storage, StorageError, is_url, objects_at, sled::SledStorage};

/// Writes the state as of a checkpoint that all tasks have acked.
pub fn write(store: &SnapshotStore, checkpoint: u64, written_at_ms: u64, dir: &Path) -> Result<()> {
    if is_url(dir) {
        let target = objects_at(&dir.to_string_lossy())?;
        return write_objects(store, checkpoint, written_at_ms, target);
    }
    let failed = |error: io::Error| StorageError::at("write a savepoint", dir.display(), error);
    check_place(dir).map_err(|reason| StorageError::store("write a savepoint", reason))?;
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or_else(|| Path::new("."));
    make_dir(parent, FOR_ALL).map_err(failed)?;
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
        .and_then(|_| fs::rename(&unfinished, dir).map_err(failed));
    if written.is_err() {
        // The reason for the failure says more than that of a failed removal would.
        let _ = fs::remove_dir_all(&unfinished);
    }
    written.and_then(|()| {
        sync_dir(parent).map_err(|error| {
            // It is this savepoint that is removed: nothing but a rename of ours has made it.
            let _ = fs::remove_dir_all(dir);
            failed(error)
        })
    })
}

/// Refuses a place where a savepoint cannot be: one that is taken, or one inside of a store, whose
/// generations are removed with all that is in them.
pub fn check_place(dir: &Path) -> std::result::Result<(), String> {
    let is_generation = |part: std::path::Component<'_>| {
        let name = part.as_os_str().to_str().and_then(|name| name.strip_prefix("gen-"));
        name.is_some_and(|number| number.len() == 8 && number.bytes().all(|it| it.is_ascii_digit()))
    };
    if is_url(dir) {
        return match dir.components().any(is_generation) {
            true => Err(format!("{}: it lies inside of a store of checkpoints", dir.display())),
            false => Ok(()),
        };
    }
    let full = std::path::absolute(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    if full.symlink_metadata().is_ok() {
        return Err(format!("{}: something is there already", dir.display()));
    }
    // What is not there yet has no links to follow.
    let there = full.ancestors().find_map(|it| it.canonicalize().ok()).unwrap_or_default();
    let is_store = |it: &&Path| {
        let has = |name: &str| it.join(name).is_file();
        has("HEAD-0") || has("HEAD-1") || (has("JOB") && has("LOCK"))
    };
    let is_output = |it: &&Path| it.join(".cofferdam/owner.json").is_file();
    let inside = |other: &Path, what: &str| {
        Err(format!("{}: it lies inside of {}, {what}", dir.display(), other.display()))
    };
    match (there.ancestors().find(is_store), there.ancestors().find(is_output)) {
        (Some(store), _) => inside(store, "which holds checkpoints"),
        (_, Some(output)) => inside(output, "which a sink writes to"),
        _ => Ok(()),
    }
}

fn write_objects(
    store: &SnapshotStore,
    checkpoint: u64,
    written_at_ms: u64,
    mut target: Box<dyn Storage>,
) -> Result<()> {
    let there = target.generations()?;
    if !there.is_empty() {
        let reason = format!("{}: something is there already", target.location());
        return Err(StorageError::store("write a savepoint", reason));
    }
    let written = store.export(checkpoint, written_at_ms, &mut *target);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_savepoint_lies_in_no_store_and_over_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = dir.path().join("counts.cofferdam");
        fs::create_dir_all(state.join("gen-00000001")).expect("a generation");
        fs::write(state.join("HEAD-0"), b"").expect("a head");
        let says = |path: PathBuf| check_place(&path).err().unwrap_or_default();
        assert!(says(state.join("gen-00000001/sp")).contains("lies inside of"));
        assert!(says(state.join("new/sp")).contains("lies inside of"));
        std::os::unix::fs::symlink(&state, dir.path().join("link")).expect("a link");
        assert!(says(dir.path().join("link/sp")).contains("lies inside of"));
        assert!(says(state.clone()).contains("there already"));
        assert_eq!(says(dir.path().join("a/b/sp")), "");
        assert!(says("s3://bucket/counts/gen-00000007/sp".into()).contains("lies inside of"));
        assert_eq!(says("s3://bucket/counts/sp".into()), "");
    }
}
