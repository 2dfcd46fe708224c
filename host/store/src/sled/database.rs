//! The database of a generation: opened with patience, and quiet where the library would panic.

use std::{panic::AssertUnwindSafe, path::Path, time::Duration};

use super::CACHE_BYTES;
use crate::{Result, StorageError, log::Entries};

/// How often, and after which pause, a lock is tried again: a fifth of a second in all.
const LOCK_RETRIES: u32 = 20;

const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A database that was dropped just now may still be held by one of sled's own threads.
pub(crate) fn open_unlocked(config: &sled::Config) -> sled::Result<sled::Db> {
    let is_locked = |error: &sled::Error| error.to_string().contains("could not acquire lock");
    for _ in 0..LOCK_RETRIES {
        match config.open() {
            Err(error) if is_locked(&error) => std::thread::sleep(LOCK_PAUSE),
            opened => return opened,
        }
    }
    config.open()
}

pub(crate) fn open_index(path: &Path) -> Result<Quiet<sled::Db>> {
    let config = sled::Config::new()
        .path(path)
        .cache_capacity(CACHE_BYTES)
        .mode(sled::Mode::HighThroughput)
        // Durability is the log's.
        .flush_every_ms(None);
    guarded("open a generation", || open_unlocked(&config).map(Quiet::new))
}

pub(crate) fn entries_of(index: &sled::Db) -> Result<Entries> {
    guarded("read the index", || {
        index.iter().map(|kept| kept.map(|(key, kept)| (key.to_vec(), kept.to_vec()))).collect()
    })
}

/// A part of sled that is dropped without a panic: it syncs its file then, and unwraps the result.
pub(crate) struct Quiet<T>(Option<T>);

impl<T> Quiet<T> {
    pub(crate) fn new(part: T) -> Self {
        Self(Some(part))
    }
}

impl<T> std::ops::Deref for Quiet<T> {
    type Target = T;

    #[allow(clippy::expect_used, reason = "only `drop` takes it")]
    fn deref(&self) -> &T {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl<T> Drop for Quiet<T> {
    fn drop(&mut self) {
        let part = self.0.take();
        if std::panic::catch_unwind(AssertUnwindSafe(|| drop(part))).is_err() {
            tracing::debug!("sled could not sync a file that was closed");
        }
    }
}

/// Calls sled, which panics where it finds its own files damaged in some ways.
pub(crate) fn guarded<T>(doing: &'static str, call: impl FnOnce() -> sled::Result<T>) -> Result<T> {
    match std::panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| match error {
            // sled does not name it as its source.
            sled::Error::Io(error) => StorageError::store(doing, error),
            error => StorageError::store(doing, error),
        }),
        Err(_) => Err(StorageError::damaged("the index", format!("sled gave up: {doing}"))),
    }
}
