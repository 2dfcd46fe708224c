//! Remembers what failed and what was done about it, in a file beside the checkpoints, for whoever
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
    /// What belongs to the history of a job; `None`: this does not.
    pub(super) fn of(progress: &Progress) -> Option<Self> {
        let is_history = matches!(
            progress,
            Progress::Restarting { .. }
                | Progress::Failed { .. }
                | Progress::DeadLetter { .. }
                | Progress::RecordsLost { .. }
                | Progress::CheckpointFailed { .. }
        );
        let event = is_history.then(|| serde_json::to_value(progress).ok()).flatten()?;
        Some(Self { at_ms: now_ms(), event })
    }
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
    lines: mpsc::Sender<String>,
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
        let (lines, receiver) = mpsc::channel::<String>();
        let thread = std::thread::Builder::new().name("cofferdam-history".to_owned());
        let thread = thread.spawn(move || {
            for line in receiver {
                let file = File::options().create(true).append(true).open(&path);
                if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
                    tracing::warn!(%error, "write the history of failures");
                }
            }
        })?;
        Ok((Self { observer, lines }, Writer(thread)))
    }
}

impl Observer for Recorder {
    fn observe(&self, progress: Progress) {
        if let Some(entry) = Entry::of(&progress)
            && let Ok(line) = serde_json::to_string(&entry)
        {
            // The writer ends only after this sender.
            let _ = self.lines.send(line + "\n");
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
