//! Generations in sled, the default. Only this file and `table.rs` name it.
//!
//! sled rewrites the neighbours of what is inserted, which costs three times the bytes of a large
//! value. So values of [`PACKED_BYTES_MIN`] and more are appended to a file beside the database,
//! written once and never moved, and sled keeps their place: the separation of keys from values
//! of WiscKey (Lu et al., FAST 2016). Flush order is file, then database, so a place that is
//! durable points at bytes that are.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::FallocateFlags;

use super::{Generation, Result, Storage, StorageError, sync_dir};

/// Checkpoints are written once and read at a restore; a cache would only hold what nobody reads.
const CACHE_BYTES: u64 = 16 << 20;

/// Values from here on go into the pack file; below, a place would save little.
const PACKED_BYTES_MIN: usize = 2 << 10;

/// The unit in which file systems give space back.
const BLOCK_BYTES: u64 = 4096;

/// What the directories of generations begin with, and those of generations on their way out.
const GENERATION: &str = "gen-";
const REMOVED: &str = "removed-";

/// In a generation: the database, and the file of large values.
const INDEX: &str = "index";
const PACK: &str = "pack";

/// The first byte of what sled keeps for a key: the value itself follows, or its place.
const INLINE: u8 = 0;
const PLACE: u8 = 1;

/// A directory with one sled database and one pack file for each generation.
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

    /// Removes what a removal that was cut short has left. For whoever has locked the directory.
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
        let entries = fs::read_dir(&self.dir)
            .map_err(|error| StorageError::store("list the generations", error))?;
        let mut numbers = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Some(number) = name.strip_prefix(GENERATION) {
                numbers.extend(number.parse::<u64>().ok());
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn open(&mut self, number: u64) -> Result<Box<dyn Generation>> {
        let path = self.path(number);
        let opened = fs::create_dir_all(&path).and_then(|()| Pack::open(&path.join(PACK)));
        let mut pack = opened.map_err(|error| StorageError::store("open a pack file", error))?;
        let config = sled::Config::new()
            .path(path.join(INDEX))
            .cache_capacity(CACHE_BYTES)
            .mode(sled::Mode::HighThroughput)
            // Durability is asked for, never assumed: see `flush`.
            .flush_every_ms(None);
        let index = guarded("open a generation", || open_unlocked(&config))?;
        pack.len = pack.len.max(end_of_places(&index)?);
        sync_dir(&path)
            .and_then(|()| sync_dir(&self.dir))
            .map_err(|error| StorageError::store("make the generation durable", error))?;
        Ok(Box::new(SledGeneration { index, pack, freed: Vec::new() }))
    }

    /// Renames first: a directory that is half removed must not be taken for a generation.
    fn remove(&mut self, number: u64) -> Result<()> {
        let doomed = self.dir.join(format!("{REMOVED}{number:08}"));
        fs::rename(self.path(number), &doomed)
            .and_then(|()| sync_dir(&self.dir))
            .and_then(|()| fs::remove_dir_all(doomed))
            .map_err(|error| StorageError::store("remove a generation", error))
    }

    fn location(&self) -> String {
        self.dir.display().to_string()
    }
}

/// How often, and after which pause, a lock is tried again: a fifth of a second in all.
const LOCK_RETRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A database that was dropped just now may still be held by one of sled's own threads.
fn open_unlocked(config: &sled::Config) -> sled::Result<sled::Db> {
    let is_locked = |error: &sled::Error| error.to_string().contains("could not acquire lock");
    for _ in 0..LOCK_RETRIES {
        match config.open() {
            Err(error) if is_locked(&error) => std::thread::sleep(LOCK_PAUSE),
            opened => return opened,
        }
    }
    config.open()
}

/// Where the last value ends that the index knows of. After a power cut that may be behind the end
/// of the file, because sled writes ahead of its flush; nothing else may then take its place, or
/// giving it back would take another's.
fn end_of_places(index: &sled::Db) -> Result<u64> {
    guarded("open a generation", || {
        index.iter().values().try_fold(0, |end, kept| {
            let place = match kept?.split_first() {
                Some((&PLACE, place)) => Place::decode(place),
                _ => None,
            };
            let of = |place: Place| place.offset.saturating_add(u64::from(place.len));
            Ok(place.map_or(end, |place| end.max(of(place))))
        })
    })
}

/// Calls sled, which panics where it finds its own files damaged in some ways.
pub(super) fn guarded<T>(doing: &'static str, call: impl FnOnce() -> sled::Result<T>) -> Result<T> {
    match std::panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| StorageError::store(doing, error)),
        Err(_) => Err(StorageError::damaged("the index", format!("sled gave up: {doing}"))),
    }
}

/// Large values, one after the other. What a crash left behind the last flush is never pointed at.
#[derive(Debug)]
struct Pack {
    file: File,
    len: u64,
    is_dirty: bool,
}

/// Where a value lies in the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    offset: u64,
    len: u32,
}

impl Place {
    fn encode(self) -> [u8; 13] {
        let mut bytes = [PLACE; 13];
        bytes[1..9].copy_from_slice(&self.offset.to_le_bytes());
        bytes[9..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (offset, rest) = bytes.split_first_chunk::<8>()?;
        let len = rest.try_into().ok()?;
        Some(Self { offset: u64::from_le_bytes(*offset), len: u32::from_le_bytes(len) })
    }
}

impl Pack {
    fn open(path: &Path) -> io::Result<Self> {
        let file =
            File::options().create(true).truncate(false).read(true).write(true).open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { file, len, is_dirty: false })
    }

    fn append(&mut self, value: &[u8]) -> io::Result<Place> {
        let len = u32::try_from(value.len())
            .map_err(|_| io::Error::other("a value of more than 4 GiB"))?;
        if BLOCK_BYTES <= u64::from(len) {
            // So that its blocks are its own, and can be given back.
            self.len = self.len.next_multiple_of(BLOCK_BYTES);
        }
        let place = Place { offset: self.len, len };
        self.is_dirty = true;
        // Where this fails half-way, the next value is written over it.
        self.file.write_all_at(value, place.offset)?;
        self.len += u64::from(len);
        Ok(place)
    }

    /// The bytes at a place; `None` where the file ends before them.
    fn read(&self, place: Place) -> io::Result<Option<Vec<u8>>> {
        // A place whose bits have rotted must not make us ask for more memory than there is file.
        if place.offset.checked_add(u64::from(place.len)).is_none_or(|end| self.len < end) {
            return Ok(None);
        }
        let mut value = vec![0; place.len as usize];
        match self.file.read_exact_at(&mut value, place.offset) {
            Ok(()) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a hole where a value was. Where the file system cannot, its space comes back with the
    /// generation.
    fn give_back(&self, place: Place) {
        let start = place.offset.next_multiple_of(BLOCK_BYTES);
        let end = (place.offset + u64::from(place.len)) / BLOCK_BYTES * BLOCK_BYTES;
        if start < end {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if let Err(error) = rustix::fs::fallocate(&self.file, flags, start, end - start) {
                tracing::debug!(%error, "give blocks of a pack file back");
            }
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.is_dirty)
            && let Err(error) = self.file.sync_data()
        {
            // The kernel may have dropped what it could not write: never call it synced.
            self.is_dirty = true;
            return Err(error);
        }
        Ok(())
    }
}

struct SledGeneration {
    index: sled::Db,
    pack: Pack,
    /// What was deleted or replaced since the last flush.
    freed: Vec<Place>,
}

impl SledGeneration {
    /// Remembers a value that is not pointed at any more.
    fn free(&mut self, replaced: Option<sled::IVec>) {
        if let Some((&PLACE, place)) = replaced.as_deref().and_then(<[u8]>::split_first) {
            self.freed.extend(Place::decode(place));
        }
    }
}

impl Generation for SledGeneration {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let write = |error: &dyn std::fmt::Display| StorageError::store("write", error);
        let kept = if value.len() < PACKED_BYTES_MIN {
            [&[INLINE], value].concat()
        } else {
            self.pack.append(value).map_err(|error| write(&error))?.encode().to_vec()
        };
        let replaced = guarded("write", || self.index.insert(key, kept))?;
        self.free(replaced);
        Ok(())
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let read = |error: &dyn std::fmt::Display| StorageError::store("read", error);
        let Some(kept) = guarded("read", || self.index.get(key))? else { return Ok(None) };
        match kept.split_first() {
            Some((&INLINE, value)) => Ok(Some(value.to_vec())),
            Some((&PLACE, place)) => match Place::decode(place) {
                Some(place) => self.pack.read(place).map_err(|error| read(&error)),
                None => Ok(None),
            },
            _ => Ok(None),
        }
    }

    fn delete(&mut self, key: &[u8]) -> Result<()> {
        let removed = guarded("delete", || self.index.remove(key))?;
        self.free(removed);
        Ok(())
    }

    fn keys(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>> {
        guarded("list the keys", || {
            let keys = self.index.scan_prefix(prefix).keys();
            keys.map(|key| key.map(|key| key.to_vec())).collect()
        })
    }

    fn flush(&mut self) -> Result<()> {
        self.pack.sync().map_err(|error| StorageError::store("flush the pack file", error))?;
        guarded("flush", || self.index.flush())?;
        // Only now is it certain that nobody will ask for them, not even after a crash.
        for place in self.freed.drain(..) {
            self.pack.give_back(place);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> Box<dyn Generation> {
        SledStorage::new(dir.to_owned()).open(1).expect("opens")
    }

    #[test]
    fn small_and_large_values_survive_reopening() {
        let dir = tempfile::tempdir().expect("dir");
        let large = |byte: u8| vec![byte; PACKED_BYTES_MIN];
        let mut generation = open(dir.path());
        generation.put(b"small", b"1").expect("put");
        generation.put(b"a", &large(1)).expect("put");
        generation.put(b"b", &large(2)).expect("put");
        generation.put(b"a", &large(3)).expect("put again");
        generation.flush().expect("flush");
        drop(generation);
        let mut generation = open(dir.path());
        generation.put(b"c", &large(4)).expect("put");
        let get = |key: &[u8]| generation.get(key).expect("readable");
        assert_eq!(get(b"small"), Some(b"1".to_vec()));
        assert_eq!(get(b"a"), Some(large(3)));
        assert_eq!(get(b"b"), Some(large(2)));
        assert_eq!(get(b"c"), Some(large(4)));
        assert_eq!(get(b"d"), None);
        generation.delete(b"a").expect("delete");
        assert_eq!(generation.get(b"a").expect("readable"), None);
        assert_eq!(generation.keys(b"").expect("list"), [&b"b"[..], b"c", b"small"]);
    }

    #[test]
    fn space_of_deleted_values_is_given_back_after_the_flush() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("dir");
        let mut generation = open(dir.path());
        let pack = dir.path().join("gen-00000001").join(PACK);
        let blocks = || fs::metadata(&pack).expect("there").blocks() * 512;
        generation.put(b"a", &[1; 1 << 20]).expect("put");
        generation.put(b"b", &[2; 1 << 20]).expect("put");
        generation.flush().expect("flush");
        let full = blocks();
        generation.delete(b"a").expect("delete");
        generation.flush().expect("flush");
        assert!(blocks() + (1 << 20) <= full, "{full} bytes before, {} after", blocks());
        assert_eq!(generation.get(b"b").expect("readable"), Some(vec![2; 1 << 20]));
    }

    #[test]
    fn value_whose_bytes_are_gone_is_not_there() {
        let dir = tempfile::tempdir().expect("dir");
        let mut generation = open(dir.path());
        generation.put(b"a", &[7; 5000]).expect("put");
        generation.flush().expect("flush");
        drop(generation);
        let pack = dir.path().join("gen-00000001").join(PACK);
        File::options().write(true).open(pack).expect("there").set_len(4999).expect("shorter");
        assert_eq!(open(dir.path()).get(b"a").expect("readable"), None);
    }
}
