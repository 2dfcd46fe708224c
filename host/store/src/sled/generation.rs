//! A generation that is written to.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use cofferdam_files::sync_dir;

use super::{
    INDEX, LOG, PACK,
    database::{Quiet, entries_of, guarded, open_index},
    pack_file::{INLINE, Pack, PackExtent, value_of},
    read::instead_of,
};
use crate::{
    Generation, Result, StorageError,
    log::{self, Entries, Log},
};

/// Values from here on go into the pack file; below, an extent would save little.
pub(crate) const PACKED_BYTES_MIN: usize = 2 << 10;

pub(crate) struct SledGeneration {
    path: PathBuf,
    /// `None` after an error: everything is opened again before anything else.
    files: Option<Files>,
}

pub(super) struct Files {
    index: Quiet<sled::Db>,
    pack: Pack,
    log: Log,
    /// What was deleted or replaced since the last flush.
    freed: Vec<PackExtent>,
}

impl Files {
    fn open(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| StorageError::store("open a generation", error);
        let (log, replay) = Log::open(&path.join(LOG)).map_err(failed)?;
        let index_path = path.join(INDEX);
        let found = open_index(&index_path).and_then(|index| Ok((entries_of(&index)?, index)));
        let index = match found {
            Ok((entries, index)) if entries == replay.entries => index,
            found => {
                drop(found);
                made_anew(&index_path, &replay.entries)?
            }
        };
        let pack = Pack::open(&path.join(PACK), &replay.entries).map_err(failed)?;
        sync_dir(path).map_err(failed)?;
        Ok(Self { index, pack, log, freed: Vec::new() })
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let write = |error: io::Error| StorageError::store("write", error);
        let kept = if value.len() < PACKED_BYTES_MIN {
            [&[INLINE], value].concat()
        } else {
            self.pack.append(value).map_err(write)?.encode().to_vec()
        };
        self.log.put(key, &kept).map_err(write)?;
        let replaced = guarded("write", || self.index.insert(key, kept))?;
        self.free(key, replaced);
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<()> {
        let removed = guarded("delete", || self.index.remove(key))?;
        if removed.is_some() {
            self.log.delete(key).map_err(|error| StorageError::store("delete", error))?;
        }
        self.free(key, removed);
        Ok(())
    }

    /// Remembers a value that is not pointed at any more.
    fn free(&mut self, key: &[u8], replaced: Option<sled::IVec>) {
        if let Some(kept) = replaced {
            self.log.replaced(key, &kept);
            self.freed.extend(PackExtent::of(&kept));
        }
    }

    fn flush(&mut self) -> Result<()> {
        self.pack.sync().map_err(|error| StorageError::store("flush the pack file", error))?;
        self.log.flush().map_err(|error| StorageError::store("flush the log", error))?;
        // Only now is it certain that nobody will ask for them, not even after a crash.
        for extent in self.freed.drain(..) {
            self.pack.give_back(extent);
        }
        if self.log.is_outgrown() {
            let entries = entries_of(&self.index)?;
            let rewritten = self.log.rewrite(&entries);
            rewritten.map_err(|error| StorageError::store("write the log anew", error))?;
        }
        Ok(())
    }
}

/// An index with these entries, and no other.
pub(crate) fn made_anew(path: &Path, entries: &Entries) -> Result<Quiet<sled::Db>> {
    let failed = |error: io::Error| StorageError::store("make an index", error);
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(path).map_err(failed)?;
    let index = open_index(path)?;
    for (key, kept) in entries {
        guarded("make an index", || index.insert(key.as_slice(), kept.as_slice()))?;
    }
    Ok(index)
}

impl SledGeneration {
    /// Opens a generation, or makes it. What its log has lost, its index may have.
    pub(crate) fn open(path: PathBuf, end: u64) -> Result<Self> {
        let failed = |error: io::Error| StorageError::store("open a generation", error);
        let replay = log::replay(&path.join(LOG)).map_err(failed)?;
        if replay.is_short_of(end)
            && let Ok(entries) = open_index(&path.join(INDEX)).and_then(|index| entries_of(&index))
        {
            let path = path.join(LOG);
            tracing::warn!(path = %path.display(), "the log is damaged: the index has what it said");
            let (mut log, _) = Log::open(&path).map_err(failed)?;
            log.rewrite(&instead_of(replay.entries, entries)).map_err(failed)?;
        }
        let files = Some(Files::open(&path)?);
        Ok(Self { path, files })
    }

    fn files(&mut self) -> Result<&mut Files> {
        let files = match self.files.take() {
            Some(files) => files,
            None => Files::open(&self.path)?,
        };
        Ok(self.files.insert(files))
    }

    /// After an error nothing can be said of what was done since the last flush: it is undone.
    pub(super) fn with<T>(&mut self, work: impl FnOnce(&mut Files) -> Result<T>) -> Result<T> {
        let result = work(self.files()?);
        if result.is_err() {
            self.files = None;
        }
        result
    }

    fn opened(&self) -> Result<&Files> {
        let why = "it has failed before and is opened again with the next write";
        self.files.as_ref().ok_or_else(|| StorageError::store("read", why))
    }
}

impl Generation for SledGeneration {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.with(|files| files.put(key, value))
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let files = self.opened()?;
        let Some(kept) = guarded("read", || files.index.get(key))? else { return Ok(None) };
        value_of(&kept, &files.pack.file, files.pack.len)
    }

    fn delete(&mut self, key: &[u8]) -> Result<()> {
        self.with(|files| files.delete(key))
    }

    fn keys(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>> {
        let files = self.opened()?;
        guarded("list the keys", || {
            let keys = files.index.scan_prefix(prefix).keys();
            keys.map(|key| key.map(|key| key.to_vec())).collect()
        })
    }

    fn flush(&mut self) -> Result<()> {
        self.with(Files::flush)
    }

    fn reopen(&mut self) -> Result<()> {
        self.files().map(|_| ())
    }

    fn end(&self) -> u64 {
        self.files.as_ref().map_or(0, |files| files.log.end())
    }
}
