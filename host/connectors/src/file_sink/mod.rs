//! Writes part files, each visible once a checkpoint that holds it is complete.
//!
//! A task writes into a hidden file, `.part-TASK-NUMBER-WRITER.pending`. When it is long or old enough,
//! and at least at each savepoint, the next barrier seals it: it is synced, and its name, length and
//! checksum go into the snapshot. When that checkpoint completes the part is noted in the log of its
//! directory, and renamed to `part-TASK-CHECKPOINT-NUMBER-WRITER`. Each task that is opened is a writer of
//! its own, so no name is ever used twice, whatever the history of the job. `docs/file-sink.md` draws the
//! life of a part.
//!
//! **Invariant:** a part belongs to one job, sink, task and timeline. What was committed is the reader's,
//! and may be gone at any time.

mod committed;
mod names;
mod output;
mod spec;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_connector::{
    blocking::BlockingSink,
    identity::Id,
    state::{decode_all, encode_all, unreadable},
};
use cofferdam_contract::Batch;
use cofferdam_core::{
    checkpoint::Purpose,
    failure::{EnvironmentError, FailureCause, Obstacle},
    ids::CheckpointId,
};
use cofferdam_files::sync_dir;
use cofferdam_settings::{Code, Problem};
use rustix::fs::{CWD, RenameFlags};
use serde::{Deserialize, Serialize};

pub(crate) use self::spec::FileSinkConnector;
pub use self::spec::{FileSinkSpec, IfExists, Rolling};
use self::{
    committed::{CommittedNames, Logs},
    names::writer_of_pending,
    output::{Claim, Claimant, Output},
};
use crate::{
    changed::Changed,
    file_source::checksum,
    line::{LineContent, push_lines},
};

const BUFFER_BYTES: usize = 256 << 10;

/// What a checkpoint remembers of a task: the parts that are not known to be committed. After a rescale
/// they may be of tasks that are no more.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct State {
    parts: Vec<Part>,
    /// So that it is never empty: an empty state is that of a node that the checkpoint does not know.
    version: u8,
}

/// A part that is durable and not yet committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    /// The directory that it lies in.
    dir: PathBuf,
    task: u32,
    number: u64,
    writer: Id,
    /// The course of events that has written it.
    timeline: Id,
    /// The checkpoint that has sealed it.
    checkpoint: u64,
    /// How much of the file belongs to it.
    bytes: u64,
    checksum: u32,
    /// It is still written to: what lies behind `bytes` came after the checkpoint.
    is_open: bool,
}

impl Part {
    /// Its name once it is visible.
    fn name(&self) -> String {
        let Self { task, checkpoint, number, writer, .. } = self;
        format!("part-{task}-{checkpoint:08}-{number:06}-{writer}")
    }

    fn pending(&self) -> String {
        format!(".part-{}.pending", self.file())
    }

    /// Its name while a savepoint needs it, which nothing but a restore of it removes.
    fn held(&self) -> String {
        format!(".part-{}.savepoint", self.file())
    }

    /// What tells its file from all others.
    fn file(&self) -> String {
        let Self { task, number, writer, .. } = self;
        format!("{task}-{number:06}-{writer}")
    }

    /// Where it is, if it is not committed, in the directory that it was written to or in the one that
    /// the sink has now. What a savepoint holds of a part that was cut is no sign that the cut one was
    /// not seen: that is what `committed` and the copy say.
    fn find(&self, now: &Path, committed: &CommittedNames) -> PartState {
        let is_listed = committed.names.contains(&self.name());
        // The directory may have been moved, or copied: what lies here is this run's.
        for dir in [now, self.dir.as_path()] {
            if dir.join(self.name()).exists() {
                return PartState::Visible;
            }
            let copy = copy_of(dir, &self.name());
            if is_listed && copy.is_file() {
                return PartState::Pending(dir.to_owned(), copy);
            }
            for name in [self.pending(), self.held()] {
                let is_of_savepoint = self.is_open && name == self.held();
                let path = dir.join(name);
                if path.is_file() && !(is_of_savepoint && is_listed) {
                    return PartState::Pending(dir.to_owned(), path);
                }
            }
        }
        PartState::Nowhere
    }

    /// Compares a pending file with what the checkpoint says.
    fn verify(&self, path: &Path) -> Result<(), Changed> {
        let unread = |error: io::Error| Changed::unread(path, error);
        let file = File::open(path).map_err(unread)?;
        let len = file.metadata().map_err(unread)?.len();
        if len < self.bytes || (!self.is_open && self.bytes < len) {
            let what = format!("it has {len} bytes, and the checkpoint says {}", self.bytes);
            return Err(Changed::content(path, what));
        }
        match checksum(&file, 0, self.bytes).map_err(unread)? {
            Some(checksum) if checksum == self.checksum => Ok(()),
            _ => Err(Changed::content(path, "its content has changed")),
        }
    }
}

/// Where a part is.
enum PartState {
    /// Not committed: its directory and its file.
    Pending(PathBuf, PathBuf),
    /// Committed.
    Visible,
    /// Committed and taken by a reader, or lost.
    Nowhere,
}

/// Shares the parts of all tasks out among another number of tasks, which commit them.
pub(super) fn share(old: &[&[u8]], parallelism: usize) -> Result<Vec<Vec<u8>>, String> {
    let mut shares = vec![State { version: 1, ..State::default() }; parallelism];
    for state in decode_all::<State>(old)? {
        for part in state.parts {
            shares[part.task as usize % parallelism].parts.push(part);
        }
    }
    encode_all(&shares)
}

/// The visible names of the parts of restored states, by their files.
pub(crate) fn names_of(states: &[&[u8]]) -> BTreeMap<String, String> {
    let states = decode_all::<State>(states).unwrap_or_default();
    let parts = states.into_iter().flat_map(|state| state.parts);
    parts.map(|part| (part.file(), part.name())).collect()
}

/// The directories that the parts of these states lie in.
pub(crate) fn dirs_of(states: &[&[u8]]) -> BTreeSet<PathBuf> {
    let states = decode_all::<State>(states).unwrap_or_default();
    states.into_iter().flat_map(|state| state.parts).map(|part| part.dir).collect()
}

/// A part of these states that is not committed yet, if there is one.
pub(crate) fn uncommitted(states: &[&[u8]]) -> Option<PathBuf> {
    let states = decode_all::<State>(states).unwrap_or_default();
    let nothing = CommittedNames::default();
    let parts = states.iter().flat_map(|state| &state.parts);
    parts.into_iter().find_map(|part| match part.find(&part.dir, &nothing) {
        PartState::Pending(_, path) => Some(path),
        PartState::Visible | PartState::Nowhere => None,
    })
}

/// Pending files that restored states look after.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Their names.
    pub(crate) names: BTreeSet<String>,
    /// The directories they lie in, where these are not the sink's own.
    pub(crate) elsewhere: BTreeSet<PathBuf>,
}

/// Refuses states whose parts are not as they were left; gives the pending files that they look after.
/// Nothing is changed.
pub(crate) fn check_states(output: &Output, states: &[&[u8]]) -> Result<Kept, Problem> {
    let taken = |what: String| {
        let message = format!("sink \"{}\" cannot commit its pending output", output.sink);
        Problem::new(Code::OutputTaken, message).detail(what)
    };
    let states = decode_all::<State>(states).map_err(|error| {
        let message = format!("the state of sink \"{}\" cannot be read", output.sink);
        Problem::new(Code::StateMismatch, message).detail(error)
    })?;
    let parts = || states.iter().flat_map(|state| &state.parts);
    let dirs = parts().map(|part| part.dir.as_path()).collect();
    let unfit = |why: Changed, hint: &str| match why {
        Changed::Content(what) => taken(what).hint(hint),
        Changed::Unreadable(error) => {
            let message = format!("sink \"{}\" cannot read its pending output", output.sink);
            Problem::new(Code::OutputUnwritable, message).because(&error)
        }
    };
    let committed = output.committed(&dirs).map_err(|error| {
        let message = format!("sink \"{}\" cannot read what it has committed", output.sink);
        Problem::new(Code::OutputUnwritable, message).because(&error)
    })?;
    let mut kept = Kept::default();
    let mut lost = Vec::new();
    for part in parts() {
        match part.find(&output.dir, &committed) {
            PartState::Pending(dir, path) => {
                part.verify(&path).map_err(|why| {
                    unfit(why, "use another checkpoint or savepoint, or put the file back")
                })?;
                kept.names.insert(part.pending());
                if dir != output.dir {
                    kept.elsewhere.insert(dir);
                }
            }
            PartState::Visible => {}
            PartState::Nowhere if committed.names.contains(&part.name()) => {}
            // A later checkpoint has committed the whole of it: what is discarded becomes this again.
            PartState::Nowhere if committed.files.contains(&part.file()) => {
                if let Some(path) = names::visible_of(&output.dir, &part.file()) {
                    let verified = part.verify(&path);
                    verified.map_err(|why| unfit(why, "use another checkpoint"))?;
                    kept.names.insert(part.pending());
                }
            }
            PartState::Nowhere => lost.push(part),
        }
    }
    match lost.first() {
        Some(first) if !output.context.conflicts.assume_committed => Err(taken(format!(
            "{} parts are neither pending nor committed, for example {}",
            lost.len(),
            first.dir.join(first.pending()).display()
        ))
        .hint(
            "put them back; if the whole directory was moved, run the job once with the old path of the \
             sink; or, if a reader removed them after they were committed, use --assume-committed",
        )),
        _ => Ok(kept),
    }
}

pub(crate) struct FileSink {
    output: Arc<Output>,
    line: LineContent,
    rolling: Rolling,
    index: u32,
    writer: Id,
    logs: Arc<Logs>,
    number: u64,
    /// What is durable and not committed, the open part not among it.
    parts: Vec<Part>,
    open: Option<OpenPart>,
    buffer: Vec<u8>,
}

struct OpenPart {
    file: BufWriter<File>,
    checksum: crc32fast::Hasher,
    bytes: u64,
    since: Instant,
    /// Whether its name is durable.
    is_named: bool,
}

impl FileSink {
    pub(super) fn open(
        output: Arc<Output>,
        spec: &FileSinkSpec,
        index: u32,
        state: Option<&[u8]>,
    ) -> Result<Self, FailureCause> {
        let state: State = match state {
            Some(bytes) => {
                postcard::from_bytes(bytes).map_err(|error| unreadable("sink's state", error))?
            }
            None => State::default(),
        };
        let logs = output.logs(index);
        let (logs, writer) =
            logs.map_err(|error| failed(&output, "open the log of parts", error))?;
        let mut sink = Self {
            output,
            line: spec.line,
            rolling: spec.rolling.clone(),
            index,
            writer,
            logs,
            number: 0,
            parts: state.parts,
            open: None,
            buffer: Vec::with_capacity(BUFFER_BYTES),
        };
        // The checkpoint is complete, so everything it holds is to be seen; everything else that is
        // pending was written after it and will be written again.
        sink.restore_parts()?;
        sink.remove_leftovers()
            .map_err(|error| sink.failed("remove what was not committed", error))?;
        Ok(sink)
    }

    fn failed(&self, doing: &str, error: io::Error) -> FailureCause {
        failed(&self.output, doing, error)
    }

    /// Commits what a restored checkpoint holds.
    fn restore_parts(&mut self) -> Result<(), FailureCause> {
        // Most often they are there to be seen, and no log needs to be read.
        let parts = std::mem::take(&mut self.parts);
        let unseen: Vec<&Part> =
            parts.iter().filter(|part| !self.output.dir.join(part.name()).exists()).collect();
        if unseen.is_empty() {
            return Ok(());
        }
        let committed = self.committed(unseen.iter().copied())?;
        for part in &unseen {
            if let PartState::Pending(_, path) = part.find(&self.output.dir, &committed) {
                part.verify(&path).map_err(|why| why.into_cause(Obstacle::OutputTaken))?;
            }
        }
        self.publish(&unseen, &committed)
    }

    /// Removes what earlier attempts of this task have left that nobody needs. What a savepoint holds
    /// has another name.
    fn remove_leftovers(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.output.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some((task, writer)) = name.to_str().and_then(writer_of_pending) else { continue };
            let is_own = self.output.is_own_writer(writer) && writer != self.writer;
            if task == self.index && is_own {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn path(&self, number: u64) -> PathBuf {
        self.output.dir.join(format!(".part-{}-{number:06}-{}.pending", self.index, self.writer))
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        let open = match &mut self.open {
            Some(open) => open,
            None => {
                let file = create_file_for_readers(&self.path(self.number))?;
                self.open.insert(OpenPart {
                    file: BufWriter::with_capacity(BUFFER_BYTES, file),
                    checksum: crc32fast::Hasher::new(),
                    bytes: 0,
                    since: Instant::now(),
                    is_named: false,
                })
            }
        };
        open.file.write_all(&self.buffer)?;
        open.checksum.update(&self.buffer);
        open.bytes += self.buffer.len() as u64;
        Ok(())
    }

    /// Makes what was written durable, as a part that is sealed or still open.
    fn end_open_part(&mut self, checkpoint: u64, is_savepoint: bool) -> io::Result<Option<Part>> {
        let Some(open) = &mut self.open else { return Ok(None) };
        open.file.flush()?;
        open.file.get_ref().sync_all()?;
        if !open.is_named {
            // The name of the file must be as durable as its content.
            sync_dir(&self.output.dir)?;
            open.is_named = true;
        }
        let is_sealed = is_savepoint || self.rolling.is_due(open.bytes, open.since.elapsed());
        let part = Part {
            dir: self.output.dir.clone(),
            task: self.index,
            number: self.number,
            writer: self.writer,
            timeline: self.output.context.lineage.timeline,
            checkpoint,
            bytes: open.bytes,
            checksum: open.checksum.clone().finalize(),
            is_open: !is_sealed,
        };
        if is_sealed {
            self.open = None;
            self.number += 1;
        }
        Ok(Some(part))
    }

    /// A savepoint may be restored at any time, whatever becomes of the job: what it holds gets a name
    /// that no restart removes.
    fn hold_for_savepoint(&self) -> io::Result<()> {
        for part in self.parts.iter().filter(|part| part.writer == self.writer) {
            let from = part.dir.join(part.pending());
            if from.exists() {
                fs::rename(from, part.dir.join(part.held()))?;
            }
        }
        sync_dir(&self.output.dir)
    }

    fn committed<'p>(
        &self,
        parts: impl Iterator<Item = &'p Part>,
    ) -> Result<CommittedNames, FailureCause> {
        let dirs = parts.map(|part| part.dir.as_path()).collect();
        let committed = self.output.committed(&dirs);
        committed.map_err(|error| self.failed("read the log of parts", error))
    }

    /// Makes parts visible. What was made visible before is as it should be, wherever it is now.
    fn publish(&self, parts: &[&Part], committed: &CommittedNames) -> Result<(), FailureCause> {
        let mut pending = Vec::new();
        let mut missing = Vec::new();
        for part in parts {
            match part.find(&self.output.dir, committed) {
                PartState::Pending(dir, path) => pending.push((*part, dir, path)),
                PartState::Visible => {}
                PartState::Nowhere => missing.push(*part),
            }
        }
        if !missing.is_empty() && !self.output.context.conflicts.assume_committed {
            let known = self.committed(missing.iter().copied())?;
            let is_known = |part: &&&Part| {
                known.names.contains(&part.name()) || known.files.contains(&part.file())
            };
            if let Some(lost) = missing.iter().find(|part| !is_known(part)) {
                let path = lost.dir.join(lost.pending());
                return Err(taken(format!(
                    "{} is neither pending nor committed: it is lost",
                    path.display()
                )));
            }
        }
        if pending.is_empty() {
            return Ok(());
        }
        for (part, dir, path) in &mut pending {
            if part.is_open && *path == dir.join(part.held()) {
                // A savepoint needs the rest of it as well. Before the log: where the copy is, it was not
                // renamed.
                let copy = copy_of(dir, &part.name());
                copy_beginning(path, &copy, part.bytes)
                    .and_then(|()| sync_dir(dir))
                    .map_err(|error| self.failed("copy a part", error))?;
                *path = copy;
            }
        }
        if let Some(checkpoint) = pending.iter().map(|(part, ..)| part.checkpoint).max() {
            self.output
                .leave_before(checkpoint)
                .map_err(|error| self.failed("note in a directory that it was left", error))?;
        }
        let log = self.logs.commit(pending.iter().map(|(part, ..)| *part)).and_then(|()| {
            let elsewhere = pending.iter().filter(|(_, dir, _)| *dir != self.output.dir);
            elsewhere
                .into_iter()
                .try_for_each(|(part, dir, _)| output::note_elsewhere(dir, [*part].into_iter()))
        });
        log.map_err(|error| self.failed("note a part in the log", error))?;
        let mut dirs = BTreeSet::new();
        for (part, dir, path) in pending {
            let publish = || -> io::Result<()> {
                let name = dir.join(part.name());
                if part.is_open {
                    // What came after the checkpoint comes again.
                    let file = File::options().write(true).open(&path)?;
                    file.set_len(part.bytes)?;
                    file.sync_all()?;
                }
                publish_as(&path, &name)
            };
            publish().map_err(|error| self.failed("commit a part", error))?;
            dirs.insert(dir);
        }
        let synced = dirs.iter().try_for_each(|dir| sync_dir(dir));
        synced.map_err(|error| self.failed("commit parts", error))
    }
}

/// Renames without replacing, also where the file system cannot do that in one step.
fn publish_as(path: &Path, name: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, path, CWD, name, RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP) => {
            fs::hard_link(path, name)?;
            fs::remove_file(path)
        }
        renamed => Ok(renamed?),
    }
}

/// Where the copy of a part lies that a savepoint holds, by its visible name.
fn copy_of(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!(".{name}.copy"))
}

fn copy_beginning(path: &Path, copy: &Path, bytes: u64) -> io::Result<()> {
    let mut target = File::create(copy)?;
    io::copy(&mut io::Read::take(File::open(path)?, bytes), &mut target)?;
    target.sync_all()
}

/// Parts are for others to read, as the user's umask allows.
fn create_file_for_readers(path: &Path) -> io::Result<File> {
    File::options().create_new(true).write(true).open(path)
}

fn failed(output: &Output, doing: &str, error: io::Error) -> FailureCause {
    let doing = format_args!("{doing} in {}", output.dir.display());
    FailureCause::Environment(EnvironmentError::of(doing, error))
}

fn taken(message: String) -> FailureCause {
    FailureCause::Permanent { obstacle: Obstacle::OutputTaken, message }
}

impl Rolling {
    /// Whether a part is long or old enough. Without a bound each checkpoint ends one.
    fn is_due(&self, bytes: u64, age: Duration) -> bool {
        match (self.size, self.interval) {
            (None, None) => true,
            (size, interval) => {
                size.is_some_and(|size| size <= bytes)
                    || interval.is_some_and(|interval| interval <= age)
            }
        }
    }
}

impl BlockingSink for FileSink {
    fn write(&mut self, batch: &Batch) -> Result<(), FailureCause> {
        self.buffer.clear();
        push_lines(batch, self.line, &mut self.buffer);
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.write_buffer().map_err(|error| self.failed("write a part", error))
    }

    fn pre_commit(
        &mut self,
        checkpoint: CheckpointId,
        purpose: Purpose,
    ) -> Result<Vec<u8>, FailureCause> {
        // A savepoint holds nothing that is still written to, and the last checkpoint may be one.
        let is_end = purpose != Purpose::Periodic;
        let ended = self.end_open_part(checkpoint.0, is_end);
        let ended = ended.map_err(|error| self.failed("end a part", error))?;
        let open = match ended {
            Some(part) if part.is_open => Some(part),
            sealed => {
                self.parts.extend(sealed);
                None
            }
        };
        if is_end {
            self.hold_for_savepoint().map_err(|error| self.failed("keep a part", error))?;
        }
        let parts = self.parts.iter().cloned().chain(open).collect();
        postcard::to_stdvec(&State { parts, version: 1 }).map_err(|error| FailureCause::HostBug {
            message: format!("encode a sink's state: {error}"),
        })
    }

    fn commit(&mut self, checkpoint: CheckpointId) -> Result<(), FailureCause> {
        let is_due = |part: &&Part| part.checkpoint <= checkpoint.0;
        let due: Vec<&Part> = self.parts.iter().filter(is_due).collect();
        // They are this task's own, and nobody has committed them before.
        self.publish(&due, &CommittedNames::default())?;
        self.parts.retain(|part| checkpoint.0 < part.checkpoint);
        self.logs.prepare().map_err(|error| self.failed("note a writer in the log", error))
    }
}

#[cfg(test)]
mod tests;
