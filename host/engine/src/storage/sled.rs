//! Generations in sled, the default. The only file that names it.

use std::{fs, io, path::PathBuf};

use super::{Generation, Result, Storage, StorageError};

/// Checkpoints are written once and read at a restore; a cache would only hold what nobody reads.
const CACHE_BYTES: u64 = 64 << 20;

/// What the directories of generations begin with, and those of generations on their way out.
const GENERATION: &str = "gen-";
const REMOVED: &str = "removed-";

/// A directory with one sled database for each generation.
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

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{GENERATION}{number:08}"))
    }
}

impl Storage for SledStorage {
    fn generations(&self) -> Result<Vec<u64>> {
        let entries = fs::read_dir(&self.dir)
            .map_err(|error| StorageError::store("list the generations", error))?;
        let mut numbers = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Some(number) = name.strip_prefix(GENERATION) {
                numbers.extend(number.parse::<u64>().ok());
            } else if name.starts_with(REMOVED) {
                // Its removal was cut short.
                let removed = fs::remove_dir_all(entry.path());
                removed.map_err(|error| StorageError::store("remove a generation", error))?;
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn open(&mut self, number: u64) -> Result<Box<dyn Generation>> {
        let database = sled::Config::new()
            .path(self.path(number))
            .cache_capacity(CACHE_BYTES)
            .mode(sled::Mode::HighThroughput)
            // Durability is asked for, never assumed: see `flush`.
            .flush_every_ms(None)
            .open()
            .map_err(|error| StorageError::store("open a generation", error))?;
        sync_dir(&self.dir)
            .map_err(|error| StorageError::store("make the generation durable", error))?;
        Ok(Box::new(SledGeneration { database }))
    }

    /// Renames first: a directory that is half removed must not be taken for a generation.
    fn remove(&mut self, number: u64) -> Result<()> {
        let doomed = self.dir.join(format!("{REMOVED}{number:08}"));
        fs::rename(self.path(number), &doomed)
            .and_then(|()| sync_dir(&self.dir))
            .and_then(|()| fs::remove_dir_all(doomed))
            .map_err(|error| StorageError::store("remove a generation", error))
    }

    fn location(&self) -> Option<PathBuf> {
        Some(self.dir.clone())
    }
}

fn sync_dir(dir: &std::path::Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

struct SledGeneration {
    database: sled::Db,
}

impl Generation for SledGeneration {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.database.insert(key, value).map_err(|error| StorageError::store("write", error))?;
        Ok(())
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let value = self.database.get(key).map_err(|error| StorageError::store("read", error))?;
        Ok(value.map(|bytes| bytes.to_vec()))
    }

    fn delete(&mut self, key: &[u8]) -> Result<()> {
        self.database.remove(key).map_err(|error| StorageError::store("delete", error))?;
        Ok(())
    }

    fn keys(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>> {
        let keys = self.database.scan_prefix(prefix).keys();
        keys.map(|key| {
            key.map(|key| key.to_vec()).map_err(|error| StorageError::store("list the keys", error))
        })
        .collect()
    }

    fn flush(&mut self) -> Result<()> {
        self.database.flush().map_err(|error| StorageError::store("flush", error))?;
        Ok(())
    }
}
