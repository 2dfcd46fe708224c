//! Generations in sled, the default. Only this folder and `table.rs` name it.
//!
//! sled rewrites the neighbours of what is inserted, which costs three times the bytes of a large
//! value. So values of [2 KiB](generation::PACKED_BYTES_MIN) and more are appended to a file beside the database,
//! written once and never moved, and sled keeps their place: the separation of keys from values
//! of WiscKey (Lu et al., FAST 2016).
//!
//! sled 0.34 never calls fsync, drops the end of its log at the first damaged byte without a word, and
//! refuses everything after its first I/O error. So what is in it also goes into a [log](crate::log)
//! of our own, and that counts: where sled says something else it is rebuilt from the log, and where
//! the log is damaged sled has what it said.
//!
//! **Invariant:** pack, sync, log, sync. After an error nothing that was put since the last flush is
//! there: the files are opened again, as of that flush.

mod database;
mod generation;
mod pack_file;
mod read;
#[cfg(test)]
mod tests;

use std::{fs, io, os::unix::fs::FileExt, path::PathBuf};

use cofferdam_files::{FOR_OWNER, create_file, make_dir, sync_dir};

pub(crate) use self::database::{Quiet, guarded};
use self::{generation::SledGeneration, read::ReadGeneration};
use crate::{Generation, Result, Storage, StorageError, key::GENERATION};

/// Checkpoints are written once and read at a restore; a cache would only hold what nobody reads.
const CACHE_BYTES: u64 = 16 << 20;

/// What the directories of generations begin with that are on their way out.
const REMOVED: &str = "removed-";
/// And those that were damaged.
const DAMAGED: &str = "damaged-";

/// In a generation: the database, the file of large values, and the log of both.
const INDEX: &str = "index";
const PACK: &str = "pack";
const LOG: &str = "log";

/// Beside the generations: two copies of the head.
const HEADS: [&str; 2] = ["HEAD-0", "HEAD-1"];

/// A directory with one sled database, one pack file and one log for each generation.
#[derive(Debug)]
pub struct SledStorage {
    dir: PathBuf,
}

impl SledStorage {
    /// Generations in `dir`, which must be there.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Removes what a removal that was cut short has left. The directory must be locked.
    ///
    /// # Errors
    /// Where something is still there.
    pub fn finish_removals(&self) -> Result<()> {
        let failed = |error: io::Error| StorageError::store("remove a generation", error);
        for entry in fs::read_dir(&self.dir).map_err(failed)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(REMOVED) {
                fs::remove_dir_all(entry.path()).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{GENERATION}{number:08}"))
    }
}

impl Storage for SledStorage {
    fn generations(&self) -> Result<Vec<u64>> {
        let failed = |error: io::Error| StorageError::store("list the generations", error);
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Some(number) = name.strip_prefix(GENERATION) {
                numbers.extend(number.parse::<u64>().ok());
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn open(&mut self, number: u64, end: u64) -> Result<Box<dyn Generation>> {
        let path = self.path(number);
        let failed = |error: io::Error| StorageError::store("make a generation", error);
        make_dir(&path, FOR_OWNER).map_err(failed)?;
        Ok(Box::new(SledGeneration::open(path, end)?))
    }

    fn read(&self, number: u64, end: u64) -> Result<Box<dyn Generation>> {
        Ok(Box::new(ReadGeneration::open(&self.path(number), end)?))
    }

    fn set_aside(&mut self, number: u64) -> Result<()> {
        let aside = self.dir.join(format!("{DAMAGED}{number:08}"));
        fs::rename(self.path(number), aside)
            .and_then(|()| sync_dir(&self.dir))
            .map_err(|error| StorageError::store("set a generation aside", error))
    }

    /// Renames first: a directory that is half removed must not be taken for a generation.
    fn remove(&mut self, number: u64) -> Result<()> {
        let doomed = self.dir.join(format!("{REMOVED}{number:08}"));
        fs::rename(self.path(number), &doomed)
            .and_then(|()| sync_dir(&self.dir))
            .and_then(|()| fs::remove_dir_all(doomed))
            .map_err(|error| StorageError::store("remove a generation", error))
    }

    fn heads(&self) -> Result<Vec<Vec<u8>>> {
        let mut heads = Vec::new();
        for name in HEADS {
            match fs::read(self.dir.join(name)) {
                Ok(bytes) => heads.push(bytes),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StorageError::store("read the head", error)),
            }
        }
        Ok(heads)
    }

    fn write_head(&mut self, copy: usize, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(HEADS[copy % HEADS.len()]);
        let is_new = !path.exists();
        let write = || -> io::Result<()> {
            let file = create_file(&path)?;
            file.write_all_at(bytes, 0)?;
            file.set_len(bytes.len() as u64)?;
            file.sync_all()?;
            if is_new { sync_dir(&self.dir) } else { Ok(()) }
        };
        write().map_err(|error| StorageError::store("write the head", error))
    }

    fn remove_heads(&mut self) -> Result<()> {
        for name in HEADS {
            match fs::remove_file(self.dir.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StorageError::store("remove the head", error));
                }
                _ => {}
            }
        }
        sync_dir(&self.dir).map_err(|error| StorageError::store("remove the head", error))
    }

    fn location(&self) -> String {
        self.dir.display().to_string()
    }
}
