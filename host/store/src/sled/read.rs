//! A generation that is only looked into: nothing of it is written, and what is damaged is known.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use super::{
    INDEX, LOG, PACK,
    database::{entries_of, open_index},
    pack_file::{INLINE, value_of},
};
use crate::{
    Generation, Result, StorageError,
    log::{self, Entries},
};

/// What counts where a log is damaged: its index, which is whole unless both are. What is in neither is
/// found to be missing by its reader.
pub(crate) fn instead_of(log: Entries, index: Entries) -> Entries {
    if index.is_empty() { log } else { index }
}

/// What an index says, which stays as it is: sled writes even where it is only asked.
pub(crate) fn entries_of_copy(path: &Path) -> Result<Entries> {
    let failed = |error: io::Error| StorageError::store("copy the index", error);
    let copy = tempfile::tempdir().map_err(failed)?;
    copy_dir(path, &copy.path().join(INDEX)).map_err(failed)?;
    let index = open_index(&copy.path().join(INDEX))?;
    entries_of(&index)
}

pub(crate) fn copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_dir(&entry.path(), &to)?,
            false => fs::copy(entry.path(), to).map(|_| ())?,
        }
    }
    Ok(())
}

/// A generation that is only looked at: nothing in its directory changes.
pub(crate) struct ReadGeneration {
    entries: Entries,
    flaws: Vec<String>,
    pack: Option<File>,
    pack_bytes: u64,
    end: u64,
}

impl ReadGeneration {
    pub(crate) fn open(path: &Path, end: u64) -> Result<Self> {
        let failed = |error: io::Error| StorageError::store("read a generation", error);
        if !path.is_dir() {
            return Err(StorageError::damaged("the generation", "it is not there"));
        }
        let mut replay = log::replay(&path.join(LOG)).map_err(failed)?;
        let mut flaws = Vec::new();
        if replay.is_short_of(end)
            && let Ok(entries) = entries_of_copy(&path.join(INDEX))
        {
            let log = path.join(LOG);
            flaws.push(format!(
                "{}: it ends early; the index beside it has the rest, and the next run makes it anew",
                log.display()
            ));
            replay.entries = instead_of(std::mem::take(&mut replay.entries), entries);
        }
        let pack = match File::open(path.join(PACK)) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let pack_bytes = pack.as_ref().map_or(Ok(0), |file| file.metadata().map(|it| it.len()));
        let pack_bytes = pack_bytes.map_err(failed)?;
        let end = replay.end();
        Ok(Self { entries: replay.entries, flaws, pack, pack_bytes, end })
    }
}

impl Generation for ReadGeneration {
    fn flaws(&self) -> Vec<String> {
        self.flaws.clone()
    }

    fn put(&mut self, _: &[u8], _: &[u8]) -> Result<()> {
        Err(StorageError::store("write", "the generation was opened for reading"))
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let Some(kept) = self.entries.get(key) else { return Ok(None) };
        match &self.pack {
            Some(file) => value_of(kept, file, self.pack_bytes),
            None => Ok(kept.strip_prefix(&[INLINE]).map(<[u8]>::to_vec)),
        }
    }

    fn delete(&mut self, _: &[u8]) -> Result<()> {
        Err(StorageError::store("delete", "the generation was opened for reading"))
    }

    fn keys(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>> {
        let from = self.entries.range(prefix.to_vec()..);
        Ok(from.map(|(key, _)| key.clone()).take_while(|key| key.starts_with(prefix)).collect())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn end(&self) -> u64 {
        self.end
    }
}
