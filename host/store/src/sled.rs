//! Generations in sled, the default. Only this file and `table.rs` name it.
//!
//! sled rewrites the neighbours of what is inserted, which costs three times the bytes of a large
//! value. So values of [`PACKED_BYTES_MIN`] and more are appended to a file beside the database,
//! written once and never moved, and sled keeps their place: the separation of keys from values
//! of WiscKey (Lu et al., FAST 2016).
//!
//! sled 0.34 never calls fsync, drops the end of its log at the first damaged byte without a word, and
//! refuses everything after its first I/O error. So what is in it also goes into a [log]
//! of our own, and that counts: where sled says something else it is made anew from the log, and where
//! the log is damaged sled has what it said.
//!
//! **Invariant:** pack, sync, log, sync. After an error nothing that was put since the last flush is
//! there: the files are opened again, as of that flush.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, FileExt},
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    time::Duration,
};

use cofferdam_files::{FOR_OWNER, create_file, make_dir, sync_dir};
use rustix::fs::FallocateFlags;

use crate::{
    Generation, Result, Storage, StorageError,
    log::{self, Entries, Log},
};

/// Checkpoints are written once and read at a restore; a cache would only hold what nobody reads.
const CACHE_BYTES: u64 = 16 << 20;

/// Values from here on go into the pack file; below, a place would save little.
const PACKED_BYTES_MIN: usize = 2 << 10;

/// The unit in which file systems give space back.
const BLOCK_BYTES: u64 = 4096;

/// So many blocks may wait for other values, or as many as have one.
const FREE_BLOCKS_MIN: u64 = 1024;

/// What the directories of generations begin with, and those of generations on their way out.
const GENERATION: &str = "gen-";
const REMOVED: &str = "removed-";
/// And those that were damaged.
const DAMAGED: &str = "damaged-";

/// In a generation: the database, the file of large values, and the log of both.
const INDEX: &str = "index";
const PACK: &str = "pack";
const LOG: &str = "log";

/// Beside the generations: two copies of the head.
const HEADS: [&str; 2] = ["HEAD-0", "HEAD-1"];

/// The first byte of what sled keeps for a key: the value itself follows, or its place.
const INLINE: u8 = 0;
const PLACE: u8 = 1;

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

fn open_index(path: &Path) -> Result<Quiet<sled::Db>> {
    let config = sled::Config::new()
        .path(path)
        .cache_capacity(CACHE_BYTES)
        .mode(sled::Mode::HighThroughput)
        // Durability is the log's.
        .flush_every_ms(None);
    guarded("open a generation", || open_unlocked(&config).map(Quiet::new))
}

fn entries_of(index: &sled::Db) -> Result<Entries> {
    guarded("read the index", || {
        index.iter().map(|kept| kept.map(|(key, kept)| (key.to_vec(), kept.to_vec()))).collect()
    })
}

/// A part of sled that is dropped without a panic: it syncs its file then, and unwraps the result.
pub(super) struct Quiet<T>(Option<T>);

impl<T> Quiet<T> {
    pub(super) fn new(part: T) -> Self {
        Self(Some(part))
    }
}

impl<T> std::ops::Deref for Quiet<T> {
    type Target = T;

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
pub(super) fn guarded<T>(doing: &'static str, call: impl FnOnce() -> sled::Result<T>) -> Result<T> {
    match std::panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| StorageError::store(doing, error)),
        Err(_) => Err(StorageError::damaged("the index", format!("sled gave up: {doing}"))),
    }
}

/// Large values, each in blocks of its own. What a crash left behind the last flush is never pointed at.
///
/// Where a value was that does not count any more another one is written, if there is room: blocks that
/// the file has cost a third of what new ones do. What is too much of that goes back to the file system,
/// and only the place is remembered.
#[derive(Debug)]
struct Pack {
    file: File,
    len: u64,
    is_dirty: bool,
    /// Places with blocks.
    free: Extents,
    /// Places without.
    holes: Extents,
    used_blocks: u64,
    /// Blocks that several values touch: earlier formats did not give each its own.
    shared: BTreeSet<u64>,
}

/// Blocks that no value has: how many there are, by the first of them. No two touch each other.
#[derive(Debug, Default)]
struct Extents {
    by_first: BTreeMap<u64, u64>,
    blocks: u64,
}

impl Extents {
    fn insert(&mut self, mut first: u64, mut count: u64) {
        if count == 0 {
            return;
        }
        self.blocks += count;
        if let Some((&before, &blocks)) = self.by_first.range(..first).next_back()
            && before + blocks == first
        {
            self.by_first.remove(&before);
            (first, count) = (before, blocks + count);
        }
        if let Some(blocks) = self.by_first.remove(&(first + count)) {
            count += blocks;
        }
        self.by_first.insert(first, count);
    }

    /// The first place with so many blocks.
    fn take(&mut self, count: u64) -> Option<u64> {
        let (&first, &blocks) = self.by_first.iter().find(|(_, blocks)| count <= **blocks)?;
        self.by_first.remove(&first);
        if count < blocks {
            self.by_first.insert(first + count, blocks - count);
        }
        self.blocks -= count;
        Some(first)
    }

    fn take_last(&mut self) -> Option<(u64, u64)> {
        let (first, blocks) = self.by_first.pop_last()?;
        self.blocks -= blocks;
        Some((first, blocks))
    }
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

    /// The place in what is kept for a key, if it has one.
    fn of(kept: &[u8]) -> Option<Self> {
        match kept.split_first() {
            Some((&PLACE, place)) => Self::decode(place),
            _ => None,
        }
    }

    fn end(self) -> u64 {
        self.offset.saturating_add(u64::from(self.len))
    }

    /// The first block that it touches, and how many. Of an earlier format it may share the outer ones
    /// with its neighbours.
    fn blocks(self) -> (u64, u64) {
        let first = self.offset / BLOCK_BYTES;
        (first, self.end().div_ceil(BLOCK_BYTES) - first)
    }
}

/// The bytes at a place; `None` where the file ends before them.
fn read_place(file: &File, len: u64, place: Place) -> io::Result<Option<Vec<u8>>> {
    // A place whose bits have rotted must not make us ask for more memory than there is file.
    if len < place.end() {
        return Ok(None);
    }
    let mut value = vec![0; place.len as usize];
    match file.read_exact_at(&mut value, place.offset) {
        Ok(()) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of what is kept for a key.
fn value_of(kept: &[u8], file: &File, len: u64) -> Result<Option<Vec<u8>>> {
    match kept.split_first() {
        Some((&INLINE, value)) => Ok(Some(value.to_vec())),
        Some((&PLACE, place)) => match Place::decode(place) {
            Some(place) => read_place(file, len, place)
                .map_err(|error| StorageError::store("read the pack file", error)),
            None => Ok(None),
        },
        _ => Ok(None),
    }
}

impl Pack {
    fn open(path: &Path, entries: &Entries) -> io::Result<Self> {
        let file = create_file(path)?;
        // Nothing may take the place of a value that counts, whatever the file has lost: giving it
        // back would take another's.
        let places = entries.values().filter_map(|kept| Place::of(kept));
        let mut used: Vec<(u64, u64)> = places.map(Place::blocks).collect();
        used.sort_unstable();
        let mut pack = Self {
            file,
            len: 0,
            is_dirty: false,
            free: Extents::default(),
            holes: Extents::default(),
            used_blocks: 0,
            shared: BTreeSet::new(),
        };
        // What lies between was given up, or written by a flush that has failed.
        let mut end = 0;
        for (first, blocks) in used {
            pack.make_hole(end, first.saturating_sub(end));
            pack.used_blocks += blocks;
            if first < end {
                pack.shared.insert(first);
            }
            end = end.max(first.saturating_add(blocks));
        }
        pack.len = end.saturating_mul(BLOCK_BYTES);
        if pack.len < pack.file.metadata()?.len() {
            pack.file.set_len(pack.len)?;
        }
        Ok(pack)
    }

    fn append(&mut self, value: &[u8]) -> io::Result<Place> {
        let len = u32::try_from(value.len())
            .map_err(|_| io::Error::other("a value of more than 4 GiB"))?;
        let blocks = u64::from(len).div_ceil(BLOCK_BYTES);
        let first = self.free.take(blocks).or_else(|| self.holes.take(blocks));
        let first = first.unwrap_or_else(|| {
            let first = self.len / BLOCK_BYTES;
            self.len += blocks * BLOCK_BYTES;
            first
        });
        self.used_blocks += blocks;
        self.is_dirty = true;
        let offset = first * BLOCK_BYTES;
        self.file.write_all_at(value, offset)?;
        Ok(Place { offset, len })
    }

    /// A value does not count any more, durably: another one may take its place.
    fn give_back(&mut self, place: Place) {
        let (mut first, mut blocks) = place.blocks();
        self.used_blocks = self.used_blocks.saturating_sub(blocks);
        if self.shared.contains(&first) {
            (first, blocks) = (first + 1, blocks - 1);
        }
        if 0 < blocks && self.shared.contains(&(first + blocks - 1)) {
            blocks -= 1;
        }
        self.free.insert(first, blocks);
        while self.used_blocks.max(FREE_BLOCKS_MIN) < self.free.blocks
            && let Some((first, blocks)) = self.free.take_last()
        {
            let too_many = self.free.blocks + blocks - self.used_blocks.max(FREE_BLOCKS_MIN);
            let kept = blocks.saturating_sub(too_many);
            self.free.insert(first, kept);
            self.make_hole(first + kept, blocks - kept);
        }
    }

    /// Gives blocks back to the file system. Where that cannot, their space comes back with the
    /// generation.
    fn make_hole(&mut self, first: u64, blocks: u64) {
        if blocks == 0 {
            return;
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (start, len) = (first * BLOCK_BYTES, blocks * BLOCK_BYTES);
        if let Err(error) = rustix::fs::fallocate(&self.file, flags, start, len) {
            tracing::debug!(%error, "give blocks of a pack file back");
        }
        self.holes.insert(first, blocks);
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.is_dirty {
            self.file.sync_data()?;
            self.is_dirty = false;
        }
        Ok(())
    }
}

struct SledGeneration {
    path: PathBuf,
    /// `None` after an error: everything is opened again before anything else.
    files: Option<Files>,
}

struct Files {
    index: Quiet<sled::Db>,
    pack: Pack,
    log: Log,
    /// What was deleted or replaced since the last flush.
    freed: Vec<Place>,
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
            self.freed.extend(Place::of(&kept));
        }
    }

    fn flush(&mut self) -> Result<()> {
        self.pack.sync().map_err(|error| StorageError::store("flush the pack file", error))?;
        self.log.flush().map_err(|error| StorageError::store("flush the log", error))?;
        // Only now is it certain that nobody will ask for them, not even after a crash.
        for place in self.freed.drain(..) {
            self.pack.give_back(place);
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
fn made_anew(path: &Path, entries: &Entries) -> Result<Quiet<sled::Db>> {
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
    fn open(path: PathBuf, end: u64) -> Result<Self> {
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
    fn with<T>(&mut self, work: impl FnOnce(&mut Files) -> Result<T>) -> Result<T> {
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

/// What counts where a log is damaged: its index, which is whole unless both are. What is in neither is
/// found to be missing by its reader.
fn instead_of(log: Entries, index: Entries) -> Entries {
    if index.is_empty() { log } else { index }
}

/// What an index says, which stays as it is: sled writes even where it is only asked.
fn entries_of_copy(path: &Path) -> Result<Entries> {
    let failed = |error: io::Error| StorageError::store("copy the index", error);
    let copy = tempfile::tempdir().map_err(failed)?;
    copy_dir(path, &copy.path().join(INDEX)).map_err(failed)?;
    let index = open_index(&copy.path().join(INDEX))?;
    entries_of(&index)
}

fn copy_dir(from: &Path, to: &Path) -> io::Result<()> {
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
struct ReadGeneration {
    entries: Entries,
    flaws: Vec<String>,
    pack: Option<File>,
    pack_bytes: u64,
    end: u64,
}

impl ReadGeneration {
    fn open(path: &Path, end: u64) -> Result<Self> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> Box<dyn Generation> {
        SledStorage::new(dir.to_owned()).open(1, 0).expect("opens")
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
        for n in 0..12u8 {
            generation.put(&[n], &[n; 1 << 20]).expect("put");
        }
        generation.flush().expect("flush");
        let full = blocks();
        (1..12u8).for_each(|n| generation.delete(&[n]).expect("delete"));
        assert_eq!(blocks(), full, "a crash may still ask for it");
        generation.flush().expect("flush");
        assert!(blocks() + (7 << 20) <= full, "{full} bytes before, {} after", blocks());
        assert_eq!(generation.get(&[0]).expect("readable"), Some(vec![0; 1 << 20]));
    }

    #[test]
    fn a_value_takes_the_place_of_one_that_is_gone_durably_and_of_no_other() {
        let dir = tempfile::tempdir().expect("dir");
        let mut generation = open(dir.path());
        let pack = dir.path().join("gen-00000001").join(PACK);
        let len = || fs::metadata(&pack).expect("there").len();
        let value = |n: u8, len: usize| vec![n; len - usize::from(n)];
        for n in 0..50u8 {
            generation.put(b"a", &value(n, 200_000)).expect("put");
            generation.put(&[n], &value(n, 3_000)).expect("put");
            generation.put(b"b", &value(n, 100_000)).expect("put");
            if n % 2 == 0 {
                // What is not flushed is there, and what it replaces is not given away.
                let durable = SledStorage::new(dir.path().to_owned()).read(1, 0).expect("reads");
                if let Some(a) = durable.get(b"a").expect("readable") {
                    assert_eq!(a, value(n - 1, 200_000));
                }
                generation.flush().expect("flush");
                generation.put(b"a", &value(n + 1, 200_000)).expect("put again");
            }
            generation.flush().expect("flush");
            let kept = if n % 2 == 0 { n + 1 } else { n };
            assert_eq!(generation.get(b"a").expect("readable"), Some(value(kept, 200_000)));
            assert_eq!(generation.get(b"b").expect("readable"), Some(value(n, 100_000)));
        }
        assert!(len() < 50 * 4_096 + 1_200_000, "{} bytes", len());
        drop(generation);
        let mut generation = open(dir.path());
        generation.put(b"c", &value(7, 200_000)).expect("put");
        for n in 0..50u8 {
            assert_eq!(generation.get(&[n]).expect("readable"), Some(value(n, 3_000)));
        }
        assert_eq!(generation.get(b"a").expect("readable"), Some(value(49, 200_000)));
    }

    #[test]
    fn blocks_are_given_away_once_and_come_together_again() {
        let mut random = cofferdam_core::random::Random::new(3);
        let mut extents = Extents::default();
        extents.insert(0, 1000);
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for _ in 0..5_000 {
            if random.one_in(2) {
                let count = random.between(1, 40);
                if let Some(first) = extents.take(count) {
                    assert!(first + count <= 1000);
                    assert!(taken.iter().all(|(at, n)| at + n <= first || first + count <= *at));
                    taken.push((first, count));
                }
            } else if !taken.is_empty() {
                let place = random.between(0, taken.len() as u64 - 1) as usize;
                let (first, count) = taken.swap_remove(place);
                extents.insert(first, count);
            }
            let used: u64 = taken.iter().map(|(_, count)| count).sum();
            assert_eq!(extents.blocks + used, 1000);
        }
        taken.into_iter().for_each(|(first, count)| extents.insert(first, count));
        assert_eq!(extents.by_first, BTreeMap::from([(0, 1000)]));
    }

    #[test]
    fn values_that_share_a_block_do_not_lose_it_with_one_of_them() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("pack");
        // As format 5 wrote them: the second begins in the last block of the first.
        let places = [
            Place { offset: 0, len: 10_000 },
            Place { offset: 10_000, len: 3_000 },
            Place { offset: 16_384, len: 8_192 },
        ];
        for gone in places {
            fs::write(&file, vec![7; 24_576]).expect("written");
            let entries = places.iter().enumerate();
            let entries =
                entries.map(|(n, place)| (vec![n as u8], place.encode().to_vec())).collect();
            let mut pack = Pack::open(&file, &entries).expect("opens");
            pack.give_back(gone);
            for len in [1_000, 5_000, 5_000, 10_000] {
                pack.append(&vec![1; len]).expect("written");
            }
            for place in places.iter().filter(|place| **place != gone) {
                let value = read_place(&pack.file, pack.len, *place).expect("read").expect("there");
                assert!(value.iter().all(|byte| *byte == 7), "{place:?} without {gone:?}");
            }
        }
    }

    #[test]
    fn a_file_that_is_opened_again_is_no_larger_than_what_is_in_it() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("dir");
        let pack = dir.path().join("gen-00000001").join(PACK);
        for n in 0..20u8 {
            let mut generation = open(dir.path());
            for part in 0..10u8 {
                generation.put(&[part], &vec![n; 300_000 - 3_000 * usize::from(n)]).expect("put");
            }
            generation.flush().expect("flush");
            // Never flushed, as after an error.
            generation.put(b"lost", &[1; 1 << 20]).expect("put");
        }
        let generation = open(dir.path());
        let metadata = fs::metadata(&pack).expect("there");
        assert!(metadata.blocks() * 512 < 4 << 20, "{} bytes", metadata.blocks() * 512);
        assert!(metadata.len() < 8 << 20, "{} bytes", metadata.len());
        assert_eq!(generation.get(&[3]).expect("readable").map(|it| it[0]), Some(19));
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

    /// Everything that is kept, by key.
    fn all(generation: &dyn Generation) -> Entries {
        let keys = generation.keys(b"").expect("listed");
        let get = |key: &Vec<u8>| generation.get(key).expect("readable").expect("there");
        keys.iter().map(|key| (key.clone(), get(key))).collect()
    }

    fn filled(dir: &Path) -> (Entries, u64) {
        let mut generation = open(dir);
        for n in 0..60u16 {
            let len = if n % 7 == 0 { 3_000 } else { usize::from(n) };
            generation.put(&n.to_be_bytes(), &vec![n as u8; len]).expect("put");
            if n % 5 == 4 {
                generation.delete(&(n - 3).to_be_bytes()).expect("deleted");
                generation.flush().expect("flush");
            }
        }
        (all(&*generation), generation.end())
    }

    /// One flipped bit in its file made sled forget everything behind it, without an error.
    #[test]
    fn whatever_happens_to_one_of_log_and_index_nothing_is_lost() {
        let kept = tempfile::tempdir().expect("dir");
        let (entries, end) = filled(kept.path());
        let generation = PathBuf::from("gen-00000001");
        for file in ["log", "index/db", "index/conf"] {
            let whole = fs::read(kept.path().join(&generation).join(file)).expect("there");
            let step = (whole.len() / 23).max(1);
            let spoilt = (0..whole.len()).step_by(step).map(|at| {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << (at % 8);
                bytes
            });
            let cut = (0..whole.len()).step_by(step * 3).map(|at| whole[..at].to_vec());
            for bytes in spoilt.chain(cut) {
                let dir = tempfile::tempdir().expect("dir");
                copy_dir(&kept.path().join(&generation), &dir.path().join(&generation))
                    .expect("copied");
                fs::write(dir.path().join(&generation).join(file), &bytes).expect("spoilt");
                let storage = SledStorage::new(dir.path().to_owned());
                let looked_at = storage.read(1, end).expect("read");
                assert!(all(&*looked_at) == entries, "{file}, looked at");
                assert_eq!(!looked_at.flaws().is_empty(), file == "log", "what counts is damaged");
                let is_as_before = fs::read(dir.path().join(&generation).join(file));
                assert!(is_as_before.expect("there") == bytes, "looking changes nothing");
                let mut storage = storage;
                let opened = storage.open(1, end).expect("opens");
                assert!(all(&*opened) == entries, "{file}");
            }
        }
    }

    #[test]
    fn what_was_not_flushed_before_an_error_is_undone() {
        let dir = tempfile::tempdir().expect("dir");
        let (entries, _) = filled(dir.path());
        let mut generation =
            SledGeneration::open(dir.path().join("gen-00000001"), 0).expect("opens");
        generation.put(b"later", &[1; 5_000]).expect("put");
        generation.delete(&9u16.to_be_bytes()).expect("deleted");
        let failed: Result<()> = generation.with(|_| Err(StorageError::store("write", "EIO")));
        assert!(failed.is_err());
        generation.reopen().expect("opened again");
        assert!(all(&generation) == entries);
        generation.put(b"again", &[2; 5_000]).expect("put");
        generation.flush().expect("flush");
        drop(generation);
        assert_eq!(open(dir.path()).get(b"again").expect("readable"), Some(vec![2; 5_000]));
    }
}
