//! The directory that belongs to one job: its lock, and the record that makes it the job's.

use std::{
    error::Error,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use cofferdam_connector::identity::Id;
use cofferdam_files::{
    FOR_OWNER, UNFINISHED, is_locked, make_dir, read_regular, try_lock, write_whole,
};
use cofferdam_settings::{Code, Problem};
use serde::{Deserialize, Serialize};

const LOCK: &str = "LOCK";
const RECORD: &str = "JOB";
const RECORD_BYTES_MAX: u64 = 64 << 10;
const FORMAT: u32 = 1;

/// What a state directory says of its job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    format: u32,
    /// The job.
    pub job: Id,
    /// Its name.
    pub name: String,
    /// What it was begun from, if it was not from its beginning.
    #[serde(default)]
    pub begun_from: Option<PathBuf>,
    /// How it has ended, if it has.
    #[serde(default)]
    pub ended: Option<Ended>,
}

/// How a job has ended for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "how")]
pub enum Ended {
    /// Every input was processed, and every sink has committed.
    Finished {
        /// When, in milliseconds since 1970-01-01 UTC.
        at_ms: u64,
        /// What it was: a digest of its manifest and components.
        digest: String,
    },
    /// It was stopped with a savepoint, and resumes from that.
    Stopped {
        /// When, in milliseconds since 1970-01-01 UTC.
        at_ms: u64,
        /// Where the savepoint was written.
        savepoint: Option<PathBuf>,
    },
}

impl JobRecord {
    /// A job that begins here.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let (job, name) = (Id::new(), name.to_owned());
        Self { format: FORMAT, job, name, begun_from: None, ended: None }
    }

    /// The record of a state directory, if it has one.
    ///
    /// # Errors
    /// Where it is there and cannot be read.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        match read_regular(&dir.join(RECORD), RECORD_BYTES_MAX) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The job begins: it is this one, begun from there if it was. Writes that down, durably.
    ///
    /// # Errors
    /// Where that is not certain.
    pub(crate) fn begin(&mut self, dir: &Path, job: Id, from: Option<PathBuf>) -> io::Result<()> {
        self.job = job;
        if from.is_some() {
            self.begun_from = from;
        }
        self.write(dir)
    }

    /// Writes it down, durably.
    ///
    /// # Errors
    /// Where that is not certain.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        write_whole(&dir.join(RECORD), &serde_json::to_vec_pretty(self)?)
    }
}

pub(crate) fn unusable_state(location: Option<&Path>, error: &(dyn Error + 'static)) -> Problem {
    let place = location.map_or_else(|| "memory".to_owned(), |path| path.display().to_string());
    Problem::new(Code::StateUnusable, format!("the state directory {place} cannot be used"))
        .because(error)
        .hint(
            "set --state-dir, or execution.checkpointing.dir, to a directory that you can write to",
        )
}

/// Makes a state directory and locks it for one run. A directory with anything else in it is nobody's
/// state: what a job would remove there is not its own.
pub(crate) fn lock(dir: &Path) -> Result<File, Problem> {
    let unusable = |error: io::Error| unusable_state(Some(dir), &error);
    make_dir(dir, FOR_OWNER).map_err(unusable)?;
    check_ours(dir)?;
    let lock = try_lock(&dir.join(LOCK)).map_err(unusable)?;
    lock.ok_or_else(|| {
        let message = format!("another run is using the state directory {}", dir.display());
        Problem::new(Code::StateInUse, message)
            .hint("wait for it to end, or give this run another one: --state-dir DIR")
    })
}

/// Locks what a state directory or a savepoint holds, to look into it, as long as the file is kept. `None`: it has
/// no lock, so no run can use it, as is the case with a savepoint.
///
/// # Errors
/// `C0019` where a run uses it, `C0018` where the lock cannot be opened.
pub fn lock_existing(dir: &Path) -> Result<Option<File>, Problem> {
    let path = dir.join(LOCK);
    let unusable = |error: io::Error| {
        let message = format!("{} cannot be locked", dir.display());
        Problem::new(Code::StateUnusable, message).because(&error)
    };
    // Nothing is written to it: it may be another user's, or on a file system that is read only.
    let file = match File::open(&path) {
        // Nor is a URL a directory of this machine.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(unusable)?,
    };
    cofferdam_files::lock(file).map_err(unusable)?.map(Some).ok_or_else(|| {
        let message = format!("a run is using the state directory {}", dir.display());
        Problem::new(Code::StateInUse, message)
            .hint("wait for it to end, or take a savepoint and inspect that")
    })
}

/// Whether a run uses a directory, which need not be there. Changes nothing.
pub(crate) fn is_in_use(dir: &Path) -> Result<bool, Problem> {
    if !dir.exists() {
        return Ok(false);
    }
    check_ours(dir)?;
    is_locked(&dir.join(LOCK)).map_err(|error| unusable_state(Some(dir), &error))
}

fn check_ours(dir: &Path) -> Result<(), Problem> {
    let unusable = |error: io::Error| unusable_state(Some(dir), &error);
    if !dir.join(RECORD).exists() {
        for entry in fs::read_dir(dir).map_err(unusable)? {
            let entry = entry.map_err(unusable)?;
            // A crash may have left a record that was never finished.
            let is_unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED);
            if entry.file_name() != LOCK && !is_unfinished {
                let message = format!("{} is not a state directory", dir.display());
                return Err(Problem::new(Code::NotOurs, message)
                    .detail(format!(
                        "it has no `{RECORD}`, but contains {}",
                        entry.path().display()
                    ))
                    .hint("name a directory that is empty or does not exist: --state-dir DIR"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_with_other_things_in_it_is_no_state_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        lock(dir.path()).expect("an empty one will do");
        drop(lock(dir.path()).expect("and so does one that was locked before"));
        fs::write(dir.path().join(".unfinished-x"), "").expect("made");
        drop(lock(dir.path()).expect("and what a crash has left"));
        fs::create_dir(dir.path().join("removed-photos")).expect("made");
        let problem = lock(dir.path()).expect_err("somebody's photos");
        assert_eq!(problem.code, Code::NotOurs);
        JobRecord::new("j").write(dir.path()).expect("written");
        lock(dir.path()).expect("now it is a job's");
    }

    #[test]
    fn what_a_run_uses_is_not_looked_into() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(lock_existing(dir.path()).expect("a savepoint has none").is_none());
        assert!(!dir.path().join(LOCK).exists(), "and gets none");
        let run = lock(dir.path()).expect("a run begins");
        let problem = lock_existing(dir.path()).expect_err("it is used");
        assert_eq!(problem.code, Code::StateInUse);
        drop(run);
        let looking = lock_existing(dir.path()).expect("it has ended").expect("locked");
        assert!(lock(dir.path()).is_err(), "no run begins meanwhile");
        drop(looking);
        // What cannot be opened may be in use.
        fs::remove_file(dir.path().join(LOCK)).expect("removed");
        std::os::unix::fs::symlink(LOCK, dir.path().join(LOCK)).expect("made");
        let problem = lock_existing(dir.path()).expect_err("it leads to itself");
        assert_eq!(problem.code, Code::StateUnusable);
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(JobRecord::read(dir.path()).expect("readable"), None);
        let mut record = JobRecord::new("words");
        record.ended = Some(Ended::Finished { at_ms: 7, digest: "abc".to_owned() });
        record.write(dir.path()).expect("written");
        assert_eq!(JobRecord::read(dir.path()).expect("readable"), Some(record));
    }
}
