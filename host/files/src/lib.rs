//! Files and directories that survive a power loss and other processes: what is made is synced with its name, what
//! is replaced is whole, and what one process uses is locked.

use std::{
    fs::{DirBuilder, File, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// How the name of a file begins that was not renamed yet.
pub const UNFINISHED: &str = ".unfinished-";

/// Makes the names in a directory durable, as syncing a file does its content.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes a directory and those above it where they are not there, and makes their names durable. With
/// `mode` as it is left by the umask; those of a state are its owner's alone.
pub fn make_dir(dir: &Path, mode: u32) -> io::Result<()> {
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
pub const FOR_ALL: u32 = 0o777;

/// The mode of directories that are their owner's alone.
pub const FOR_OWNER: u32 = 0o700;

/// Opens a file for reading and writing, for its owner alone; makes it where it is not there.
pub fn create_file(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)
}

/// Replaces a file: anyone who looks finds the old content or the new, also after a crash.
pub fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or_else(|| Path::new("."));
    let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(dir)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_dir(dir)
}

/// How often, and after which pause, a lock is tried again: a tenth of a second in all.
const LOCK_RETRIES: u32 = 10;

const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Locks a file, which is made if it is not there; `None`: somebody else has it.
pub fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = create_file(path)?;
    // A run that has just ended, or a child that it has forked off, may hold it for a moment.
    for retry in 0..=LOCK_RETRIES {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if retry < LOCK_RETRIES => {
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(TryLockError::WouldBlock) => {}
        }
    }
    Ok(None)
}

/// Whether somebody has a lock. Changes nothing.
pub fn is_locked(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// A path without links and dots, as far as it is there.
pub fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut missing = Vec::new();
    let mut known = path.as_path();
    loop {
        if let Ok(real) = known.canonicalize() {
            return missing.iter().rev().fold(real, |path, name| match name {
                std::path::Component::ParentDir => {
                    path.parent().map(Path::to_owned).unwrap_or(path)
                }
                name => path.join(name),
            });
        }
        let Some(name) = known.components().next_back() else { return path.clone() };
        missing.push(name);
        let Some(parent) = known.parent() else { return path.clone() };
        known = parent;
    }
}
