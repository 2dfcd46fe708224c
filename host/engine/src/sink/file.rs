//! Writes part files, each visible once the checkpoint that holds it is complete.
//!
//! A task writes into a hidden file, `.part-TASK-NUMBER.pending`. At a barrier the file is synced
//! and closed, its number goes into the snapshot, and the next one is begun. When the checkpoint
//! completes, the file is renamed to `part-TASK-NUMBER`. Numbers ascend and are part of the
//! snapshot, so a rename that is done again does the same. Readers never see a pending part as long
//! as they read `part-*`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use cofferdam_core::{failure::FailureCause, ids::CheckpointId};
use cofferdam_sandbox::Batch;
use serde::{Deserialize, Serialize};

use super::{Sink, push_lines};
use crate::{
    problem::{Code, Problem},
    restore::{decode_states, encode_states},
    spec::{IfExists, LineContent},
    storage::sync_dir,
};

const BUFFER_BYTES: usize = 256 << 10;

/// What a checkpoint remembers of a task. After a rescale it may look after the parts of tasks that
/// are no more.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct State {
    /// The number of the next part of each task.
    next: BTreeMap<u32, u64>,
    /// Parts that are durable and not yet committed.
    pending: Vec<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Part {
    task: u32,
    number: u64,
    /// The checkpoint that holds it.
    checkpoint: u64,
}

/// Shares the state of all tasks out among another number of tasks: what a task that is no more has
/// left is looked after by another, and should the task come back, it goes on with its numbers.
pub(super) fn share(old: &[&[u8]], parallelism: usize) -> Result<Vec<Vec<u8>>, String> {
    let mut shares = vec![State::default(); parallelism];
    for state in decode_states::<State>(old)? {
        for (task, next) in state.next {
            shares[task as usize % parallelism].next.insert(task, next);
        }
        for part in state.pending {
            shares[part.task as usize % parallelism].pending.push(part);
        }
    }
    encode_states(&shares)
}

pub(crate) struct FileSink {
    dir: PathBuf,
    line: LineContent,
    index: u32,
    state: State,
    open: Option<BufWriter<File>>,
    buffer: Vec<u8>,
}

/// Makes the directory and proves that it can be written to.
pub(super) fn prepare(
    name: &str,
    dir: &Path,
    if_exists: IfExists,
    is_fresh: bool,
) -> Result<(), Problem> {
    let unusable = |error: io::Error| {
        Problem::new(
            Code::OutputUnwritable,
            format!("sink \"{name}\" cannot write to {}", dir.display()),
        )
        .detail(error)
        .hint("choose another path, or make the directory writable")
    };
    fs::create_dir_all(dir).map_err(unusable)?;
    tempfile::tempfile_in(dir).map_err(unusable)?;
    if !is_fresh {
        return Ok(());
    }
    let entries = fs::read_dir(dir).map_err(unusable)?.flatten();
    let parts: Vec<PathBuf> =
        entries.map(|entry| entry.path()).filter(|path| is_part(path)).collect();
    if let (Some(first), IfExists::Fail) = (parts.iter().find(|path| !is_pending(path)), if_exists)
    {
        return Err(Problem::new(
            Code::OutputUnwritable,
            format!("sink \"{name}\": {} holds the output of an earlier run", dir.display()),
        )
        .detail(format!("for example {}", first.display()))
        .hint("move it away, choose another path, or set if-exists = \"replace\""));
    }
    parts.iter().try_for_each(fs::remove_file).map_err(unusable)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn is_pending(path: &Path) -> bool {
    file_name(path).starts_with(".part-") && file_name(path).ends_with(".pending")
}

fn is_part(path: &Path) -> bool {
    is_pending(path) || file_name(path).starts_with("part-")
}

impl FileSink {
    pub(super) fn open(
        dir: &Path,
        line: LineContent,
        index: u32,
        state: Option<&[u8]>,
    ) -> Result<Self, FailureCause> {
        let state: State = match state {
            Some(bytes) => {
                postcard::from_bytes(bytes).map_err(|error| FailureCause::Permanent {
                    message: format!("the sink's state in the checkpoint cannot be read: {error}"),
                })?
            }
            None => State::default(),
        };
        let mut sink = Self {
            dir: dir.to_owned(),
            line,
            index,
            state,
            open: None,
            buffer: Vec::with_capacity(BUFFER_BYTES),
        };
        // The checkpoint is complete, so everything it holds is to be seen; everything else that
        // is pending was written after it and will be written again.
        sink.commit(CheckpointId(u64::MAX))?;
        sink.remove_leftovers()
            .map_err(|error| sink.failed("remove what was not committed", &error))?;
        Ok(sink)
    }

    fn pending_path(&self, task: u32, number: u64) -> PathBuf {
        self.dir.join(format!(".part-{task}-{number:08}.pending"))
    }

    fn final_path(&self, task: u32, number: u64) -> PathBuf {
        self.dir.join(format!("part-{task}-{number:08}"))
    }

    fn next(&self) -> u64 {
        self.state.next.get(&self.index).copied().unwrap_or(0)
    }

    fn remove_leftovers(&self) -> io::Result<()> {
        let own = self.state.next.keys().copied().chain([self.index]);
        let prefixes: Vec<String> = own.map(|task| format!(".part-{task}-")).collect();
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let path = entry.path();
            let is_own = prefixes.iter().any(|prefix| file_name(&path).starts_with(prefix));
            if is_pending(&path) && is_own {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn failed(&self, doing: &str, error: &io::Error) -> FailureCause {
        FailureCause::Environment { message: format!("{doing} in {}: {error}", self.dir.display()) }
    }

    fn end_part(&mut self) -> io::Result<bool> {
        let Some(writer) = self.open.take() else { return Ok(false) };
        let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        // The name of the file must be as durable as its content.
        sync_dir(&self.dir)?;
        Ok(true)
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        if self.open.is_none() {
            let file = File::create(self.pending_path(self.index, self.next()))?;
            self.open = Some(BufWriter::with_capacity(BUFFER_BYTES, file));
        }
        match &mut self.open {
            Some(writer) => writer.write_all(&self.buffer),
            None => Ok(()),
        }
    }

    /// Renames a part; one that was renamed before is fine.
    fn publish(&self, part: Part) -> io::Result<()> {
        let from = self.pending_path(part.task, part.number);
        let to = self.final_path(part.task, part.number);
        match fs::rename(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && to.exists() => Ok(()),
            other => other,
        }
    }
}

impl Sink for FileSink {
    fn write(&mut self, batch: &Batch) -> Result<(), FailureCause> {
        self.buffer.clear();
        push_lines(batch, self.line, &mut self.buffer);
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.write_buffer().map_err(|error| self.failed("write a part", &error))
    }

    fn pre_commit(&mut self, checkpoint: CheckpointId) -> Result<Vec<u8>, FailureCause> {
        if self.end_part().map_err(|error| self.failed("end a part", &error))? {
            let (task, number, checkpoint) = (self.index, self.next(), checkpoint.0);
            self.state.pending.push(Part { task, number, checkpoint });
            self.state.next.insert(task, number + 1);
        }
        postcard::to_stdvec(&self.state).map_err(|error| FailureCause::HostBug {
            message: format!("encode a sink's state: {error}"),
        })
    }

    fn commit(&mut self, checkpoint: CheckpointId) -> Result<(), FailureCause> {
        let is_due = |part: &Part| part.checkpoint <= checkpoint.0;
        let due: Vec<Part> =
            self.state.pending.iter().filter(|part| is_due(part)).copied().collect();
        if due.is_empty() {
            return Ok(());
        }
        let published =
            due.iter().try_for_each(|part| self.publish(*part)).and_then(|()| sync_dir(&self.dir));
        published.map_err(|error| self.failed("commit a part", &error))?;
        self.state.pending.retain(|part| !is_due(part));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{BatchExt, RecordRef};

    fn batch(value: &str) -> Batch {
        let mut batch = Batch::empty();
        batch.push(RecordRef { key: Some(b"k"), value: value.as_bytes(), timestamp: None });
        batch
    }

    fn visible(dir: &Path) -> Vec<String> {
        let mut parts: Vec<PathBuf> = fs::read_dir(dir)
            .expect("listed")
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| !is_pending(path))
            .collect();
        parts.sort();
        parts.iter().map(|path| fs::read_to_string(path).expect("readable")).collect()
    }

    #[test]
    fn nothing_is_visible_before_its_checkpoint_completes() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut sink = FileSink::open(dir.path(), LineContent::KeyValue, 0, None).expect("opens");
        sink.write(&batch("one")).expect("written");
        assert!(visible(dir.path()).is_empty());
        sink.pre_commit(CheckpointId(1)).expect("durable");
        sink.write(&batch("two")).expect("written");
        assert!(visible(dir.path()).is_empty());
        sink.commit(CheckpointId(1)).expect("committed");
        assert_eq!(visible(dir.path()), ["k\tone\n"]);
    }

    #[test]
    fn restore_commits_what_the_checkpoint_holds_and_removes_the_rest() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut sink = FileSink::open(dir.path(), LineContent::Value, 3, None).expect("opens");
        sink.write(&batch("one")).expect("written");
        let state = sink.pre_commit(CheckpointId(1)).expect("durable");
        sink.write(&batch("two")).expect("written");
        sink.pre_commit(CheckpointId(2)).expect("durable");
        drop(sink);
        for _ in 0..2 {
            let mut sink =
                FileSink::open(dir.path(), LineContent::Value, 3, Some(&state)).expect("opens");
            assert_eq!(visible(dir.path()), ["one\n"]);
            sink.write(&batch("two again")).expect("written");
        }
    }

    #[test]
    fn parts_of_tasks_that_are_no_more_are_committed_and_their_numbers_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut states: Vec<Vec<u8>> = Vec::new();
        for index in 0..3 {
            let mut sink =
                FileSink::open(dir.path(), LineContent::Value, index, None).expect("opens");
            sink.write(&batch(&format!("of {index}"))).expect("written");
            states.push(sink.pre_commit(CheckpointId(1)).expect("durable"));
        }
        let share = |states: &[Vec<u8>], parallelism| {
            let old: Vec<&[u8]> = states.iter().map(Vec::as_slice).collect();
            share(&old, parallelism).expect("shared")
        };
        let one = share(&states, 1);
        let mut sink =
            FileSink::open(dir.path(), LineContent::Value, 0, Some(&one[0])).expect("opens");
        assert_eq!(visible(dir.path()), ["of 0\n", "of 1\n", "of 2\n"]);
        let state = sink.pre_commit(CheckpointId(2)).expect("durable");
        let three = share(&[state], 3);
        let mut sink =
            FileSink::open(dir.path(), LineContent::Value, 2, Some(&three[2])).expect("opens");
        sink.write(&batch("again")).expect("written");
        sink.pre_commit(CheckpointId(3)).expect("durable");
        sink.commit(CheckpointId(3)).expect("committed");
        assert_eq!(visible(dir.path()).len(), 4, "nothing was written over");
    }

    #[test]
    fn lost_part_is_an_error_and_not_silence() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut sink = FileSink::open(dir.path(), LineContent::Value, 0, None).expect("opens");
        sink.write(&batch("one")).expect("written");
        let state = sink.pre_commit(CheckpointId(1)).expect("durable");
        fs::remove_file(sink.pending_path(0, 0)).expect("removed");
        let error =
            FileSink::open(dir.path(), LineContent::Value, 0, Some(&state)).err().expect("lost");
        assert!(error.to_string().contains("commit a part"), "{error}");
    }

    #[test]
    fn earlier_output_is_kept_unless_it_may_be_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("part-0-00000000"), "old").expect("written");
        let error = prepare("out", dir.path(), IfExists::Fail, true).expect_err("it is not empty");
        assert_eq!(error.code, Code::OutputUnwritable);
        prepare("out", dir.path(), IfExists::Fail, false).expect("a resumed job goes on");
        assert_eq!(visible(dir.path()), ["old"]);
        prepare("out", dir.path(), IfExists::Replace, true).expect("replaced");
        assert!(visible(dir.path()).is_empty());
    }
}
