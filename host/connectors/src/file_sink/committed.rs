//! The log of what was committed to a directory: it is written before a part becomes visible.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use cofferdam_connector::identity::Id;
use cofferdam_files::{FOR_ALL, make_dir, read_regular, sync_dir, write_whole};
use serde::{Deserialize, Serialize};

use super::names::file_of;

/// A log larger than this forgets its oldest parts, but not up to where they went.
pub(super) const LOG_BYTES_MAX: u64 = 1 << 20;

/// And keeps so many.
pub(super) const LISTED_MAX: usize = 1_000;

/// And so many writers from before these.
pub(super) const WRITERS_MAX: usize = 100;

/// Writers that are noted at once.
pub(super) const SPARE_WRITERS: usize = 4;

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "what")]
pub(super) enum Line {
    /// A task begins to write: its parts that are not committed are this timeline's.
    Writer { writer: Id, timeline: Id },
    /// A part becomes visible, in this directory.
    Part {
        name: String,
        #[serde(flatten)]
        part: Listed,
    },
    /// Parts that were forgotten reached up to here.
    Through { timeline: Id, checkpoint: u64 },
    /// A part was removed because its timeline was left.
    Discarded { name: String },
}

/// A part that was committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed {
    pub(super) timeline: Id,
    pub(super) checkpoint: u64,
    pub(super) bytes: u64,
    pub(super) dir: PathBuf,
    /// It is the beginning of a file that was still written to.
    pub(super) is_cut: bool,
}

/// What a log says.
#[derive(Debug, Default)]
pub(super) struct Committed {
    pub(super) writers: BTreeMap<Id, Id>,
    pub(super) parts: BTreeMap<String, Listed>,
    pub(super) through: BTreeMap<Id, u64>,
}

impl Committed {
    pub(super) fn read(dir: &Path) -> io::Result<Self> {
        let mut committed = Self::default();
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(committed),
            entries => entries?,
        };
        // The logs are of several tasks: what one has discarded may stand in another.
        let mut discarded = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                committed.add(lines_of(&path)?, &mut discarded);
            }
        }
        for name in discarded {
            committed.parts.remove(&name);
        }
        Ok(committed)
    }

    fn add(&mut self, lines: Vec<Line>, discarded: &mut Vec<String>) {
        for line in lines {
            match line {
                Line::Writer { writer, timeline } => {
                    self.writers.insert(writer, timeline);
                }
                Line::Part { name, part } => {
                    self.parts.insert(name, part);
                }
                Line::Through { timeline, checkpoint } => {
                    reach(&mut self.through, timeline, checkpoint);
                }
                Line::Discarded { name } => discarded.push(name),
            }
        }
    }
}

/// A log is shortened at a megabyte: what has more than this is none.
const READ_BYTES_MAX: u64 = 256 << 20;

/// The lines of a log. One that was cut short by a crash says nothing that was promised.
pub(super) fn lines_of(path: &Path) -> io::Result<Vec<Line>> {
    let bytes = read_regular(path, READ_BYTES_MAX)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

pub(super) fn reach(through: &mut BTreeMap<Id, u64>, timeline: Id, checkpoint: u64) {
    let known = through.entry(timeline).or_default();
    *known = checkpoint.max(*known);
}

/// A log that this task appends to.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// After an error nobody knows which file that is: it is opened again before the next line.
    is_broken: bool,
}

impl Log {
    pub(super) fn open(dir: &Path, name: &str) -> io::Result<Self> {
        make_dir(dir, FOR_ALL)?;
        let path = dir.join(name).with_extension("log");
        let file = File::options().create(true).append(true).open(&path)?;
        let bytes = file.metadata()?.len();
        sync_dir(dir)?;
        Ok(Self { path, file, bytes, is_broken: false })
    }

    pub(super) fn append(&mut self, lines: &[Line]) -> io::Result<()> {
        if self.is_broken {
            self.file = File::options().create(true).append(true).open(&self.path)?;
            self.bytes = self.file.metadata()?.len();
        }
        self.is_broken = true;
        self.append_lines(lines)?;
        self.is_broken = false;
        Ok(())
    }

    fn append_lines(&mut self, lines: &[Line]) -> io::Result<()> {
        let mut text = String::new();
        // A line of a write that failed half-way must not run into the next one.
        text.push('\n');
        for line in lines {
            text.push_str(&serde_json::to_string(line)?);
            text.push('\n');
        }
        self.file.write_all(text.as_bytes())?;
        self.file.sync_data()?;
        self.bytes += text.len() as u64;
        if LOG_BYTES_MAX < self.bytes { self.shorten() } else { Ok(()) }
    }

    fn shorten(&mut self) -> io::Result<()> {
        let lines = lines_of(&self.path)?;
        let old = lines.len().saturating_sub(LISTED_MAX);
        // The newest of them writes just now, perhaps since long.
        let is_writer = |line: &&Line| matches!(line, Line::Writer { .. });
        let writers = lines[..old].iter().filter(is_writer);
        let dropped = writers.clone().count().saturating_sub(WRITERS_MAX);
        let writers = writers.skip(dropped).cloned();
        let mut through: BTreeMap<Id, u64> = BTreeMap::new();
        for line in &lines[..old] {
            match line {
                Line::Part { part, .. } => reach(&mut through, part.timeline, part.checkpoint),
                Line::Through { timeline, checkpoint } => {
                    reach(&mut through, *timeline, *checkpoint);
                }
                Line::Writer { .. } | Line::Discarded { .. } => {}
            }
        }
        let through = through
            .into_iter()
            .map(|(timeline, checkpoint)| Line::Through { timeline, checkpoint });
        let mut short = String::new();
        for line in through.chain(writers).chain(lines[old..].iter().cloned()) {
            short.push_str(&serde_json::to_string(&line)?);
            short.push('\n');
        }
        write_whole(&self.path, short.as_bytes())?;
        self.file = File::options().append(true).open(&self.path)?;
        self.bytes = short.len() as u64;
        Ok(())
    }
}

pub(super) fn line_of(part: &super::Part) -> Line {
    let listed = Listed {
        timeline: part.timeline,
        checkpoint: part.checkpoint,
        bytes: part.bytes,
        dir: part.dir.clone(),
        is_cut: part.is_open,
    };
    Line::Part { name: part.name(), part: listed }
}

pub(super) fn remove_logs(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// What is known to have been committed.
#[derive(Debug, Default)]
pub(crate) struct CommittedNames {
    pub(crate) names: BTreeSet<String>,
    /// What tells their files from all others; see [`file_of`].
    pub(super) files: BTreeSet<String>,
}

/// The hidden file of a part that was not renamed yet, by its visible name.
pub(super) fn unseen_in(dir: &Path, name: &str, is_cut: bool) -> Option<PathBuf> {
    let file = file_of(name)?;
    let hidden = |end: &str| dir.join(format!(".part-{file}.{end}"));
    // What a savepoint holds of a part that was cut is the whole file, and says nothing of this.
    let other = if is_cut { super::copy_of(dir, name) } else { hidden("savepoint") };
    let found = [hidden("pending"), other].into_iter().find(|path| path.is_file());
    found.filter(|_| !dir.join(name).exists())
}

/// The logs of one task, in all of its attempts.
#[derive(Debug)]
pub(crate) struct Logs {
    pub(crate) timeline: Id,
    pub(crate) noted: Mutex<Noted>,
}

#[derive(Debug)]
pub(super) struct Noted {
    pub(super) logs: Vec<Log>,
    /// Writers that are in the logs, for attempts that are yet to begin: none of those waits for a disk.
    pub(super) spares: Vec<Id>,
}

impl Logs {
    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A writer that nobody has been. It is in the logs: what it leaves behind is known as the job's own.
    pub(super) fn writer(&self) -> io::Result<Id> {
        let mut noted = self.lock();
        if let Some(writer) = noted.spares.pop() {
            return Ok(writer);
        }
        noted.refill(self.timeline)?;
        Ok(noted.spares.pop().unwrap_or_default())
    }

    /// Sees to it that the next attempt need not wait.
    pub(super) fn prepare(&self) -> io::Result<()> {
        let mut noted = self.lock();
        if noted.spares.is_empty() { noted.refill(self.timeline) } else { Ok(()) }
    }

    /// These parts become visible now. Durable before any of them is.
    pub(super) fn commit<'p>(
        &self,
        parts: impl Iterator<Item = &'p super::Part>,
    ) -> io::Result<()> {
        let lines: Vec<Line> = parts.map(line_of).collect();
        self.lock().append(&lines)
    }
}

impl Noted {
    fn append(&mut self, lines: &[Line]) -> io::Result<()> {
        self.logs.iter_mut().try_for_each(|log| log.append(lines))
    }

    fn refill(&mut self, timeline: Id) -> io::Result<()> {
        let spares: Vec<Id> = (0..SPARE_WRITERS).map(|_| Id::new()).collect();
        let line = |writer: &Id| Line::Writer { writer: *writer, timeline };
        self.append(&spares.iter().map(line).collect::<Vec<_>>())?;
        self.spares.extend(spares);
        Ok(())
    }
}

#[cfg(test)]
impl Logs {
    /// As after an error.
    pub(super) fn fail(&self) {
        self.lock().logs.iter_mut().for_each(|log| log.is_broken = true);
    }
}
