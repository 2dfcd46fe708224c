//! Remembers what failed and what was done about it, in a file beside the checkpoints, for anyone who
//! asks after the fact.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use cofferdam_files::read_regular;
use serde::{Deserialize, Serialize};

use crate::{
    clock::now_ms,
    watch::progress::{Observer, Progress},
};

const FILE: &str = "history.jsonl";
/// Four times what as many entries can have.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// So many of the newest entries are kept; the file has at most twice as many.
pub(super) const ENTRIES_MAX: usize = 1_000;

/// Something that happened, with its time.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// In milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// What happened, as in `run --json`.
    #[serde(flatten)]
    pub event: serde_json::Value,
}

impl Entry {
    /// An entry of the history; `None`: it cannot be written as JSON.
    pub(super) fn of(at_ms: u64, progress: &Progress) -> Option<Self> {
        Some(Self { at_ms, event: serde_json::to_value(progress).ok()? })
    }
}

/// Whether something belongs to the history of a job.
pub(super) fn is_kept(progress: &Progress) -> bool {
    matches!(
        progress,
        Progress::Restarting(_)
            | Progress::Failed { .. }
            | Progress::DeadLetter { .. }
            | Progress::RecordsLost { .. }
            | Progress::CheckpointFailed { .. }
    )
}

/// The entries of a state directory, oldest first; none where nothing has failed. Lines that were
/// cut short by a crash are left out.
///
/// # Errors
/// Where the file is there and cannot be read.
pub fn read(state_dir: &Path) -> io::Result<Vec<Entry>> {
    match read_regular(&state_dir.join(FILE), FILE_BYTES_MAX) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Passes everything on, and writes down what belongs to the history.
pub(crate) struct Recorder {
    observer: Arc<dyn Observer>,
    /// When something has happened, and what.
    entries: mpsc::SyncSender<(u64, Progress)>,
    /// Entries that found too many others waiting for the disk.
    missed: Arc<AtomicU64>,
}

/// The thread that writes; ends when the recorder is gone.
pub(crate) struct Writer(JoinHandle<()>);

impl Writer {
    /// Waits until everything is written.
    pub(crate) fn join(self) {
        // A history that cannot be written was told in the log.
        let _ = self.0.join();
    }
}

impl Recorder {
    /// Goes on with the history of a state directory.
    pub(crate) fn start(
        state_dir: &Path,
        observer: Arc<dyn Observer>,
    ) -> io::Result<(Self, Writer)> {
        let mut count = forget_old(state_dir)?;
        let state_dir = state_dir.to_owned();
        let (entries, receiver) = mpsc::sync_channel::<(u64, Progress)>(ENTRIES_MAX);
        let missed = Arc::<AtomicU64>::default();
        let own = missed.clone();
        let thread = std::thread::Builder::new().name("cofferdam-history".to_owned());
        let thread = thread.spawn(move || {
            let report_missed = || {
                let missed = own.swap(0, Ordering::Relaxed);
                if 0 < missed {
                    tracing::warn!(
                        missed,
                        "the history of failures is written too slowly for all of them"
                    );
                }
            };
            for (at_ms, progress) in receiver {
                report_missed();
                let Some(entry) = Entry::of(at_ms, &progress) else { continue };
                match append(&state_dir, &entry, count) {
                    Ok(now) => count = now,
                    Err(error) => tracing::warn!(%error, "write the history of failures"),
                }
            }
            report_missed();
        })?;
        Ok((Self { observer, entries, missed }, Writer(thread)))
    }
}

/// Adds an entry to those that are there; gives how many there are then.
fn append(state_dir: &Path, entry: &Entry, count: usize) -> io::Result<usize> {
    let line = serde_json::to_string(entry)? + "\n";
    let mut file = File::options().create(true).append(true).open(state_dir.join(FILE))?;
    file.write_all(line.as_bytes())?;
    if count + 1 < 2 * ENTRIES_MAX { Ok(count + 1) } else { forget_old(state_dir) }
}

impl Observer for Recorder {
    fn observe(&self, progress: Progress) {
        // Put into words by the thread that writes: a restart does not wait for that.
        if is_kept(&progress) {
            // The writer ends only after this sender, so there is too little room. The job does not wait for a disk.
            if self.entries.try_send((now_ms(), progress.clone())).is_err() {
                self.missed.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.observer.observe(progress);
    }
}

/// Removes all but the newest entries; gives how many are left.
fn forget_old(state_dir: &Path) -> io::Result<usize> {
    let entries = read(state_dir)?;
    let Some(excess) = entries.len().checked_sub(ENTRIES_MAX).filter(|excess| 0 < *excess) else {
        return Ok(entries.len());
    };
    let mut file = tempfile::NamedTempFile::new_in(state_dir)?;
    for entry in &entries[excess..] {
        writeln!(file, "{}", serde_json::to_string(entry)?)?;
    }
    fs::rename(file.into_temp_path().keep()?, state_dir.join(FILE))?;
    Ok(ENTRIES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_outlive_the_run_and_old_ones_are_forgotten() {
        let dir = tempfile::tempdir().expect("a directory");
        let record = |count: u64| {
            let (recorder, writer) = Recorder::start(dir.path(), Arc::new(())).expect("starts");
            for checkpoint in 0..count {
                let (code, reason) = ("CHECKPOINT_EXPIRED", String::new());
                recorder.observe(Progress::CheckpointFailed { checkpoint, code, reason });
                recorder.observe(Progress::Warning { message: "of no interest".to_owned() });
            }
            drop(recorder);
            writer.join();
        };
        assert!(read(dir.path()).expect("none").is_empty());
        record(3);
        record(ENTRIES_MAX as u64);
        assert_eq!(read(dir.path()).expect("read").len(), ENTRIES_MAX + 3);
        record(1);
        let entries = read(dir.path()).expect("read");
        assert_eq!(entries.len(), ENTRIES_MAX + 1);
        assert_eq!(entries[0].event["checkpoint"], 0, "the second run's first");
        assert_eq!(entries[0].event["event"], "checkpoint-failed");
    }

    #[test]
    fn a_run_with_many_failures_has_a_short_history_of_the_newest() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut count, total) = (0, 5 * ENTRIES_MAX as u64);
        for checkpoint in 0..total {
            let (code, reason) = ("CHECKPOINT_EXPIRED", String::new());
            let progress = Progress::CheckpointFailed { checkpoint, code, reason };
            let entry = Entry::of(checkpoint, &progress).expect("JSON");
            count = append(dir.path(), &entry, count).expect("written");
            assert!(count < 2 * ENTRIES_MAX);
        }
        let entries = read(dir.path()).expect("read");
        assert_eq!(entries.len(), count);
        assert!(ENTRIES_MAX <= count, "{count}");
        let all: Vec<u64> = entries.iter().map(|entry| entry.at_ms).collect();
        assert!(all.iter().copied().eq(total - count as u64..total), "the newest, without a gap");
    }
}
