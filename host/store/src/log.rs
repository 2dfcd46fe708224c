//! The log of a generation: everything that was put into its index, in order, each entry with a
//! checksum. It is written and synced by this program alone, so what an index of a library has lost
//! is still here, and where it ends is known.
//!
//! An entry is `length u32, checksum u64, payload`; the checksum covers the place of the entry, too.
//! An unfinished entry at the end is what a crash has left of a flush that was never acknowledged.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use cofferdam_files::{create_file, sync_dir};
use twox_hash::XxHash3_64;

/// What a key stands for: the bytes that the index has for it.
pub(super) type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

const HEADER_BYTES: usize = 12;
const PUT: u8 = 0;
const DELETE: u8 = 1;
/// The first entry of a log that was rewritten: how often that was, and up to where.
const REWRITTEN: u8 = 2;
/// The bits of an end that say where it is; those above say in which rewriting.
const END_BITS: u32 = 40;
/// A log is rewritten when it is larger than this, and than four times what counts in it.
const REWRITE_BYTES_MIN: u64 = 1 << 20;

/// The log of one generation, open for writing.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: File,
    /// How often it was rewritten.
    epoch: u64,
    /// What is synced.
    durable: u64,
    /// What was appended since.
    tail: Vec<u8>,
    /// The size of all entries that still count.
    live: u64,
}

/// What a log was found to say.
#[derive(Debug, Default)]
pub(super) struct Replay {
    pub(super) entries: Entries,
    epoch: u64,
    /// Where the rewriting ended that it began with.
    rewritten: u64,
    /// How far it is whole.
    bytes: u64,
}

impl Replay {
    /// How far it reaches, comparable over rewritings.
    pub(super) fn end(&self) -> u64 {
        end_of(self.epoch, self.bytes)
    }

    /// Whether something is missing of what it had when it reached that far.
    pub(super) fn is_short_of(&self, end: u64) -> bool {
        let (epoch, bytes) = (end >> END_BITS, end & ((1 << END_BITS) - 1));
        match self.epoch.cmp(&epoch) {
            Ordering::Less => true,
            Ordering::Equal => self.bytes < bytes,
            Ordering::Greater => self.bytes < self.rewritten,
        }
    }
}

fn end_of(epoch: u64, bytes: u64) -> u64 {
    (epoch << END_BITS) + bytes
}

/// Reads a log up to the first entry that is not whole.
pub(super) fn replay(path: &Path) -> io::Result<Replay> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Replay::default()),
        Err(error) => return Err(error),
    };
    let mut replay = Replay::default();
    let mut at = 0;
    while let Some((payload, next)) = entry_at(&bytes, at) {
        match split(payload) {
            Some((PUT, key, value)) => {
                replay.entries.insert(key.to_vec(), value.to_vec());
            }
            Some((DELETE, key, _)) => {
                replay.entries.remove(key);
            }
            Some((REWRITTEN, key, value)) => {
                let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
                (replay.epoch, replay.rewritten) = (number(key), number(value));
            }
            _ => break,
        }
        at = next;
    }
    replay.bytes = at as u64;
    Ok(replay)
}

fn entry_at(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let (length, rest) = bytes.get(at..)?.split_first_chunk::<4>()?;
    let (stored, rest) = rest.split_first_chunk::<8>()?;
    let length = u32::from_le_bytes(*length) as usize;
    let payload = rest.get(..length)?;
    let is_whole = u64::from_le_bytes(*stored) == checksum(at as u64, payload);
    is_whole.then_some((payload, at + HEADER_BYTES + length))
}

fn split(payload: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (kind, rest) = payload.split_first()?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let (key, value) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
    Some((*kind, key, value))
}

fn checksum(at: u64, payload: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(at, payload)
}

fn append(out: &mut Vec<u8>, start: u64, kind: u8, key: &[u8], value: &[u8]) -> io::Result<u64> {
    let key_bytes = u16::try_from(key.len()).map_err(|_| io::Error::other("a key of 64 KiB"))?;
    let mut payload = Vec::with_capacity(3 + key.len() + value.len());
    payload.push(kind);
    payload.extend_from_slice(&key_bytes.to_le_bytes());
    payload.extend_from_slice(key);
    payload.extend_from_slice(value);
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let at = start + out.len() as u64;
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&checksum(at, &payload).to_le_bytes());
    out.extend_from_slice(&payload);
    Ok((HEADER_BYTES + payload.len()) as u64)
}

fn entry_bytes(key: &[u8], value: &[u8]) -> u64 {
    (HEADER_BYTES + 3 + key.len() + value.len()) as u64
}

impl Log {
    /// Opens a log for writing behind what is whole of it.
    pub(super) fn open(path: &Path) -> io::Result<(Self, Replay)> {
        let replay = replay(path)?;
        let file = create_file(path)?;
        let live = replay.entries.iter().map(|(key, value)| entry_bytes(key, value)).sum();
        let (epoch, durable, tail) = (replay.epoch, replay.bytes, Vec::new());
        Ok((Self { path: path.to_owned(), file, epoch, durable, tail, live }, replay))
    }

    /// How far it reaches, once it is flushed.
    pub(super) fn end(&self) -> u64 {
        end_of(self.epoch, self.durable)
    }

    pub(super) fn put(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.live += append(&mut self.tail, self.durable, PUT, key, value)?;
        Ok(())
    }

    /// An entry does not count any more; `bytes` is what the index had for it.
    pub(super) fn replaced(&mut self, key: &[u8], value: &[u8]) {
        self.live = self.live.saturating_sub(entry_bytes(key, value));
    }

    pub(super) fn delete(&mut self, key: &[u8]) -> io::Result<()> {
        append(&mut self.tail, self.durable, DELETE, key, &[]).map(|_| ())
    }

    /// Writes and syncs what was appended. After an error the log must be opened again.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.tail.is_empty() {
            return Ok(());
        }
        self.file.write_all_at(&self.tail, self.durable)?;
        let end = self.durable + self.tail.len() as u64;
        // What an unfinished flush has left behind must not be taken for a later one's.
        self.file.set_len(end)?;
        self.file.sync_data()?;
        self.durable = end;
        self.tail.clear();
        Ok(())
    }

    /// Whether most of it does not count any more.
    pub(super) fn is_outgrown(&self) -> bool {
        REWRITE_BYTES_MIN.max(4 * self.live) < self.durable
    }

    /// Rewrites the log with what counts.
    pub(super) fn rewrite(&mut self, entries: &Entries) -> io::Result<()> {
        let mut bytes = Vec::new();
        let epoch = self.epoch + 1;
        let header = (HEADER_BYTES + 3 + 8 + 8) as u64;
        let len = entries.iter().fold(header, |len, (key, value)| len + entry_bytes(key, value));
        append(&mut bytes, 0, REWRITTEN, &epoch.to_le_bytes(), &len.to_le_bytes())?;
        for (key, value) in entries {
            append(&mut bytes, 0, PUT, key, value)?;
        }
        let new = self.path.with_extension("new");
        let file = create_file(&new)?;
        file.set_len(0)?;
        file.write_all_at(&bytes, 0)?;
        file.sync_data()?;
        std::fs::rename(&new, &self.path)?;
        sync_dir(self.path.parent().unwrap_or_else(|| Path::new(".")))?;
        (self.file, self.epoch, self.durable, self.live) = (file, epoch, len, len);
        self.tail.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(dir: &Path) -> PathBuf {
        let path = dir.join("log");
        let (mut log, _) = Log::open(&path).expect("opens");
        for n in 0..20u8 {
            log.put(&[n], &vec![n; usize::from(n)]).expect("put");
            log.flush().expect("flush");
        }
        log.delete(&[3]).expect("delete");
        log.flush().expect("flush");
        path
    }

    #[test]
    fn what_was_flushed_is_there_and_what_was_not_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = filled(dir.path());
        let (mut log, before) = Log::open(&path).expect("opens");
        assert_eq!(before.entries.len(), 19);
        log.put(b"never", b"flushed").expect("put");
        drop(log);
        assert_eq!(replay(&path).expect("reads").entries, before.entries);
    }

    #[test]
    fn whatever_is_cut_off_or_flipped_ends_the_log_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = filled(dir.path());
        let whole = std::fs::read(&path).expect("there");
        let end = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("written");
            let found = replay(&path).expect("reads");
            assert!(found.is_short_of(whole.len() as u64), "it is told");
            found.bytes
        };
        for at in 0..whole.len() {
            assert!(end(&whole[..at]) <= at as u64);
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            assert!(end(&flipped) <= at as u64, "byte {at}");
        }
    }

    #[test]
    fn an_outgrown_log_is_written_anew() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let (mut log, _) = Log::open(&path).expect("opens");
        let mut entries = Entries::new();
        let mut rounds = 0;
        while !log.is_outgrown() {
            let value = vec![rounds as u8; 10_000];
            if let Some(before) = entries.insert(b"k".to_vec(), value.clone()) {
                log.replaced(b"k", &before);
            }
            log.put(b"k", &value).expect("put");
            log.flush().expect("flush");
            rounds += 1;
        }
        log.rewrite(&entries).expect("rewritten");
        assert!(log.durable < 11_000, "{}", log.durable);
        let rewritten = log.end();
        log.put(b"later", b"1").expect("put");
        log.flush().expect("flush");
        entries.insert(b"later".to_vec(), b"1".to_vec());
        let found = replay(&path).expect("reads");
        assert_eq!(found.entries, entries);
        assert!(rewritten < log.end() && !found.is_short_of(log.end()));
        assert!(!found.is_short_of(99), "what reached further before was rewritten");
        assert!(found.is_short_of(log.end() + 1));
        std::fs::write(&path, &std::fs::read(&path).expect("there")[..5_000]).expect("cut");
        assert!(replay(&path).expect("reads").is_short_of(99));
    }
}
