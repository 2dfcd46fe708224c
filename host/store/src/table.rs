//! Tables on disk with sorted keys: what does not fit into memory while a job runs.
//!
//! They are no checkpoint: nothing here is flushed, and whatever an earlier run has left is removed.
//! The memory they take is bounded by the cache of the one database that holds them all.

use std::{
    fs, io,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    Result, StorageError,
    sled::{Quiet, guarded},
};

/// sled counts what a page takes in its log. In memory, small entries take so many times as much:
/// measured with keys of 16 bytes and values of 1, at 3 million of them and two sizes of the cache.
const CACHE_OVERHEAD: u64 = 8;

/// Below this sled refuses to open.
const CACHE_BYTES_MIN: u64 = 256;

/// The tables of one run. They lie in one database, and in another one after that has failed: sled
/// refuses everything after its first error.
#[derive(Clone)]
pub struct Tables {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    cache_bytes: u64,
    database: Mutex<Arc<Database>>,
    /// Databases and tables that were made.
    made: AtomicU64,
}

struct Database {
    sled: Quiet<::sled::Db>,
    dir: PathBuf,
    is_broken: AtomicBool,
}

impl Tables {
    /// Makes an empty database below `dir` that takes about so many bytes of memory, and some 20 a key.
    pub fn new(dir: &Path, cache_bytes: u64) -> Result<Self> {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(no_room(dir, error));
            }
            _ => {}
        }
        let database = Mutex::new(Arc::new(Database::new(dir.join("0"), cache_bytes)?));
        let (dir, made) = (dir.to_owned(), AtomicU64::new(1));
        Ok(Self { inner: Arc::new(Inner { dir, cache_bytes, database, made }) })
    }

    /// Makes an empty table, if need be in a new database.
    pub fn table(&self) -> Result<Table> {
        let number = self.inner.made.fetch_add(1, Ordering::Relaxed);
        let database = {
            let mut newest = self.inner.database.lock().unwrap_or_else(PoisonError::into_inner);
            if newest.is_broken() {
                let dir = self.inner.dir.join(number.to_string());
                *newest = Arc::new(Database::new(dir, self.inner.cache_bytes)?);
            }
            newest.clone()
        };
        let name = number.to_be_bytes();
        let tree = database.guarded("make a table", |sled| sled.open_tree(name).map(Quiet::new))?;
        Ok(Table { tree, name, database })
    }

    /// Has the effect of an error of the disk, for tests of what follows from one.
    #[doc(hidden)]
    pub fn break_database(&self) {
        self.inner
            .database
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_broken
            .store(true, Ordering::Relaxed);
    }
}

impl Drop for Inner {
    /// What is left if this fails is removed by the next run.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Database {
    fn new(dir: PathBuf, cache_bytes: u64) -> Result<Self> {
        fs::create_dir_all(&dir).map_err(|error| no_room(&dir, error))?;
        let config = ::sled::Config::new()
            .path(&dir)
            .cache_capacity((cache_bytes / CACHE_OVERHEAD).max(CACHE_BYTES_MIN))
            .mode(::sled::Mode::HighThroughput)
            // Nobody reads it after a crash.
            .flush_every_ms(None);
        let sled = guarded("make room for state", || config.open().map(Quiet::new))?;
        Ok(Self { sled, dir, is_broken: AtomicBool::new(false) })
    }

    fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    fn guarded<T>(
        &self,
        doing: &'static str,
        call: impl FnOnce(&::sled::Db) -> ::sled::Result<T>,
    ) -> Result<T> {
        if self.is_broken() {
            let why = "the database has failed before; its state is read from the last checkpoint";
            return Err(StorageError::store(doing, why));
        }
        guarded(doing, || call(&self.sled))
            .inspect_err(|_| self.is_broken.store(true, Ordering::Relaxed))
    }
}

impl Drop for Database {
    /// One that has failed makes room for the next.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn no_room(dir: &Path, error: io::Error) -> StorageError {
    StorageError::at("make room for state", dir.display(), error)
}

/// One table.
pub struct Table {
    tree: Quiet<::sled::Tree>,
    name: [u8; 8],
    database: Arc<Database>,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Table").field(&u64::from_be_bytes(self.name)).finish()
    }
}

impl Table {
    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let value = self.database.guarded("read state", |_| self.tree.get(key))?;
        Ok(value.map(|value| value.to_vec()))
    }

    /// Sets the value of a key. Gives the length of the value before.
    pub fn insert(&self, key: &[u8], value: &[u8]) -> Result<Option<usize>> {
        let before = self.database.guarded("write state", |_| self.tree.insert(key, value))?;
        Ok(before.map(|value| value.len()))
    }

    /// Removes a key. Gives the length of its value.
    pub fn remove(&self, key: &[u8]) -> Result<Option<usize>> {
        let before = self.database.guarded("remove state", |_| self.tree.remove(key))?;
        Ok(before.map(|value| value.len()))
    }

    /// Every key from a bound on, ascending, with its value.
    pub fn range(&self, from: Bound<Vec<u8>>) -> impl Iterator<Item = Result<(Vec<u8>, Vec<u8>)>> {
        let mut range = self.tree.range::<Vec<u8>, _>((from, Bound::Unbounded));
        std::iter::from_fn(move || {
            match self.database.guarded("read state", |_| range.next().transpose()) {
                Ok(entry) => entry.map(|(key, value)| Ok((key.to_vec(), value.to_vec()))),
                Err(error) => Some(Err(error)),
            }
        })
    }

    /// Gives its space back.
    pub fn drop_table(&self) {
        if let Err(error) =
            self.database.guarded("remove a table", |sled| sled.drop_tree(self.name))
        {
            tracing::debug!(%error, "its space comes back with the end of the run");
        }
    }

    /// Whether its database has failed, so that nothing can be read any more.
    pub fn is_broken(&self) -> bool {
        self.database.is_broken()
    }
}
