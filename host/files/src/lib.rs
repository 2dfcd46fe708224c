//! Files and directories that survive a power loss and other processes: what is made is synced with its name, what
//! is replaced is whole, and what one process uses is locked.

mod grants;

use std::{
    fs::{DirBuilder, File, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::OFlags;

pub use self::grants::{Grants, link_below};

/// How the name of a file begins that was not renamed yet.
pub const UNFINISHED: &str = ".unfinished-";

/// Makes the names in a directory durable, as syncing a file does its content.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The directory that a path lies in; of a bare name that is the working directory.
fn folder_of(path: &Path) -> Option<&Path> {
    path.parent().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
}

/// Makes a directory and those above it where they are not there, and makes their names durable. With
/// `mode` as it is left by the umask; those of a state are its owner's alone.
pub fn make_dir(dir: &Path, mode: u32) -> io::Result<()> {
    let Some(parent) = folder_of(dir) else { return Ok(()) };
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

/// The content of a regular file that has at most so many bytes. Waits for nothing: a pipe, a terminal or a device is
/// refused.
pub fn read_regular(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    // Opening a pipe would wait for somebody who writes to it.
    let flags = OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes_max < bytes.len() as u64 {
        return Err(io::Error::other(format!("it has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Replaces a file: anyone who looks finds the old content or the new, also after a crash.
pub fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = folder_of(path).unwrap_or_else(|| Path::new("."));
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
    lock(create_file(path)?)
}

/// Locks an open file; `None`: somebody else has the lock.
pub fn lock(file: File) -> io::Result<Option<File>> {
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_regular_files_of_at_most_so_many_bytes_are_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        fs::write(&path, b"1234").expect("written");
        assert_eq!(read_regular(&path, 4).expect("it fits"), b"1234");
        assert!(read_regular(&path, 3).expect_err("too many").to_string().contains("more than 3"));
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo");
        assert!(made.success());
        for endless in [&pipe, dir.path(), Path::new("/dev/zero")] {
            assert!(read_regular(endless, 4).is_err(), "{}", endless.display());
        }
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("JOB");
        for content in [&b"old"[..], b"new and longer", b""] {
            write_whole(&path, content).expect("written");
            assert_eq!(fs::read(&path).expect("readable"), content);
        }
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 1);
        assert!(write_whole(&dir.path().join("none/JOB"), b"").is_err(), "it makes no directory");
        assert_eq!(folder_of(Path::new("JOB")), Some(Path::new(".")), "of a bare name");
    }

    #[test]
    fn directories_are_made_with_those_above_them_for_their_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let deep = dir.path().join("a/b/c");
        for _ in 0..2 {
            make_dir(&deep, FOR_OWNER).expect("made, or there already");
        }
        let mode = fs::metadata(&deep).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, FOR_OWNER);
        fs::write(dir.path().join("file"), "").expect("written");
        assert!(make_dir(&dir.path().join("file/below"), FOR_ALL).is_err(), "a file is in the way");
    }

    #[test]
    fn a_lock_has_one_owner_and_asking_for_it_makes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("LOCK");
        assert!(!is_locked(&path).expect("it can be asked"));
        assert!(!path.exists(), "asking has made it");
        let owner = try_lock(&path).expect("it can be made").expect("it is free");
        assert!(is_locked(&path).expect("it can be asked"));
        assert!(try_lock(&path).expect("it can be opened").is_none());
        assert!(lock(File::open(&path).expect("there")).expect("it can be asked").is_none());
        drop(owner);
        assert!(lock(File::open(&path).expect("there")).expect("it can be asked").is_some());
    }

    #[test]
    fn a_path_is_resolved_as_far_as_it_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let real = dir.path().canonicalize().expect("there");
        fs::create_dir(real.join("a")).expect("made");
        std::os::unix::fs::symlink(real.join("a"), real.join("link")).expect("made");
        for (path, expected) in [
            ("link", "a"),
            ("link/none/deeper", "a/none/deeper"),
            ("a/./x", "a/x"),
            ("none/../a", "a"),
        ] {
            assert_eq!(resolved(&real.join(path)), real.join(expected), "{path}");
        }
    }
}
