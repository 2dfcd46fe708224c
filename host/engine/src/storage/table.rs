//! Tables on disk with sorted keys: what does not fit into memory while a job runs.
//!
//! They are no checkpoint: nothing here is flushed, and whatever an earlier run has left is removed.
//! The memory they take is bounded by the cache of the one database that holds them all.

use std::{
    fs, io,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{Result, StorageError, sled::guarded};

/// sled counts what a page takes in its log. In memory, small entries take so many times as much:
/// measured with keys of 16 bytes and values of 1, at 3 million of them and two sizes of the cache.
const CACHE_OVERHEAD: u64 = 8;

/// Below this sled refuses to open.
const CACHE_BYTES_MIN: u64 = 256;

/// The tables of one run.
#[derive(Clone)]
pub(crate) struct Tables {
    inner: Arc<Inner>,
}

struct Inner {
    database: ::sled::Db,
    made: AtomicU64,
    dir: PathBuf,
}

impl Tables {
    /// Makes an empty database in `dir` that takes about so many bytes of memory, and some 20 a key.
    pub(crate) fn new(dir: &Path, cache_bytes: u64) -> Result<Self> {
        let failed = |error: io::Error| {
            StorageError::store("make room for state", format!("{}: {error}", dir.display()))
        };
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        fs::create_dir_all(dir).map_err(failed)?;
        let config = ::sled::Config::new()
            .path(dir)
            .cache_capacity((cache_bytes / CACHE_OVERHEAD).max(CACHE_BYTES_MIN))
            .mode(::sled::Mode::HighThroughput)
            // Nobody reads it after a crash.
            .flush_every_ms(None);
        let database = guarded("make room for state", || config.open())?;
        let (made, dir) = (AtomicU64::new(0), dir.to_owned());
        Ok(Self { inner: Arc::new(Inner { database, made, dir }) })
    }

    /// Makes an empty table.
    pub(crate) fn table(&self) -> Result<Table> {
        let number = self.inner.made.fetch_add(1, Ordering::Relaxed);
        let name = number.to_be_bytes();
        let tree = guarded("make a table", || self.inner.database.open_tree(name))?;
        Ok(Table { tree, name, tables: self.clone() })
    }
}

impl Drop for Inner {
    /// What is left if this fails is removed by the next run.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// One table.
pub(crate) struct Table {
    tree: ::sled::Tree,
    name: [u8; 8],
    tables: Tables,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Table").field(&u64::from_be_bytes(self.name)).finish()
    }
}

impl Table {
    /// The value of a key.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let value = guarded("read state", || self.tree.get(key))?;
        Ok(value.map(|value| value.to_vec()))
    }

    /// Sets the value of a key. Gives the length of the value before.
    pub(crate) fn insert(&self, key: &[u8], value: &[u8]) -> Result<Option<usize>> {
        let before = guarded("write state", || self.tree.insert(key, value))?;
        Ok(before.map(|value| value.len()))
    }

    /// Removes a key. Gives the length of its value.
    pub(crate) fn remove(&self, key: &[u8]) -> Result<Option<usize>> {
        let before = guarded("remove state", || self.tree.remove(key))?;
        Ok(before.map(|value| value.len()))
    }

    /// Every key from a bound on, ascending, with its value.
    pub(crate) fn range(
        &self,
        from: Bound<Vec<u8>>,
    ) -> impl Iterator<Item = Result<(Vec<u8>, Vec<u8>)>> {
        let mut range = self.tree.range::<Vec<u8>, _>((from, Bound::Unbounded));
        std::iter::from_fn(move || match guarded("read state", || range.next().transpose()) {
            Ok(entry) => entry.map(|(key, value)| Ok((key.to_vec(), value.to_vec()))),
            Err(error) => Some(Err(error)),
        })
    }

    /// Gives its space back.
    pub(crate) fn drop_table(&self) {
        let database = &self.tables.inner.database;
        if let Err(error) = guarded("remove a table", || database.drop_tree(self.name)) {
            tracing::debug!(%error, "its space comes back with the end of the run");
        }
    }
}
