//! Remembers what failed and what was done about it, in a file beside the checkpoints, for anyone who
//! asks after the fact.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    path::Path,
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use serde::{Deserialize, Serialize};

use crate::{
    clock::now_ms,
    watch::progress::{Observer, Progress},
};

const FILE: &str = "history.jsonl";
/// Older entries are forgotten when a run begins.
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
    match File::open(state_dir.join(FILE)) {
        Ok(file) => {
            let lines = BufReader::new(file).lines();
            Ok(lines.map_while(Result::ok).filter_map(|l| serde_json::from_str(&l).ok()).collect())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Passes everything on, and writes down what belongs to the history.
pub(crate) struct Recorder {
    observer: Arc<dyn Observer>,
    /// When something has happened, and what.
    entries: mpsc::Sender<(u64, Progress)>,
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
        forget_old(state_dir)?;
        let path = state_dir.join(FILE);
        let (entries, receiver) = mpsc::channel::<(u64, Progress)>();
        let thread = std::thread::Builder::new().name("cofferdam-history".to_owned());
        let thread = thread.spawn(move || {
            for (at_ms, progress) in receiver {
                let entry = Entry::of(at_ms, &progress);
                let Some(Ok(line)) = entry.map(|entry| serde_json::to_string(&entry)) else {
                    continue;
                };
                let file = File::options().create(true).append(true).open(&path);
                if let Err(error) = file.and_then(|mut it| it.write_all((line + "\n").as_bytes())) {
                    tracing::warn!(%error, "write the history of failures");
                }
            }
        })?;
        Ok((Self { observer, entries }, Writer(thread)))
    }
}

impl Observer for Recorder {
    fn observe(&self, progress: Progress) {
        // Put into words by the thread that writes: a restart does not wait for that.
        if is_kept(&progress) {
            // The writer ends only after this sender.
            let _ = self.entries.send((now_ms(), progress.clone()));
        }
        self.observer.observe(progress);
    }
}

fn forget_old(state_dir: &Path) -> io::Result<()> {
    let entries = read(state_dir)?;
    let Some(excess) = entries.len().checked_sub(ENTRIES_MAX).filter(|excess| 0 < *excess) else {
        return Ok(());
    };
    let mut file = tempfile::NamedTempFile::new_in(state_dir)?;
    for entry in &entries[excess..] {
        writeln!(file, "{}", serde_json::to_string(entry)?)?;
    }
    fs::rename(file.into_temp_path().keep()?, state_dir.join(FILE))
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
}
