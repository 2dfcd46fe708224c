//! Takes records out of a job: a sink writes into a transaction that is held from barrier to commit.

mod file;

use std::{io::Write, sync::Arc};

use cofferdam_core::{checkpoint::Purpose, failure::FailureCause, ids::CheckpointId};
use cofferdam_sandbox::Batch;

pub use self::file::Conflicts;
pub(crate) use self::file::{Claim, Output, OutputContext, check_states, names_of, uncommitted};
use crate::{
    batch::BatchExt,
    spec::{LineContent, SinkSpec},
};

/// One task of a sink.
pub(crate) trait Sink: Send {
    /// Takes records into the open transaction.
    fn write(&mut self, batch: &Batch) -> Result<(), FailureCause>;

    /// Makes durable what the open transaction has, not yet visible. What it gives goes into the
    /// snapshot, and is enough to commit after a restore.
    fn pre_commit(
        &mut self,
        checkpoint: CheckpointId,
        purpose: Purpose,
    ) -> Result<Vec<u8>, FailureCause>;

    /// Makes everything visible that was pre-committed up to this checkpoint.
    fn commit(&mut self, checkpoint: CheckpointId) -> Result<(), FailureCause>;
}

/// Shares the state of all tasks of a file sink out among another number of tasks.
pub(crate) fn share(old: &[&[u8]], parallelism: usize) -> Result<Vec<Vec<u8>>, String> {
    file::share(old, parallelism)
}

/// The sink of one task. With a state it commits what that state has pre-committed. A file sink has an
/// output, which the run has claimed.
pub(crate) fn open(
    spec: &SinkSpec,
    output: Option<&Arc<Output>>,
    index: u32,
    state: Option<&[u8]>,
) -> Result<Box<dyn Sink>, FailureCause> {
    Ok(match (spec, output) {
        (SinkSpec::File(spec), Some(output)) => {
            Box::new(file::FileSink::open(output.clone(), spec, index, state)?)
        }
        (SinkSpec::File(_), None) => {
            let message = "a file sink without a directory".to_owned();
            return Err(FailureCause::HostBug { message });
        }
        (SinkSpec::Stdout { line }, _) => Box::new(StdoutSink { line: *line, buffer: Vec::new() }),
        (SinkSpec::Discard, _) => Box::new(DiscardSink),
    })
}

/// Appends a batch as lines.
fn push_lines(batch: &Batch, line: LineContent, buffer: &mut Vec<u8>) {
    for record in batch.records() {
        if let (LineContent::KeyValue, Some(key)) = (line, record.key) {
            buffer.extend_from_slice(key);
            buffer.push(b'\t');
        }
        buffer.extend_from_slice(record.value);
        buffer.push(b'\n');
    }
}

/// Prints at once: what is printed cannot be taken back, so records may come twice after a restart.
struct StdoutSink {
    line: LineContent,
    buffer: Vec<u8>,
}

impl Sink for StdoutSink {
    fn write(&mut self, batch: &Batch) -> Result<(), FailureCause> {
        self.buffer.clear();
        push_lines(batch, self.line, &mut self.buffer);
        std::io::stdout().lock().write_all(&self.buffer).map_err(|error| {
            FailureCause::Environment { message: format!("write to standard output: {error}") }
        })
    }

    fn pre_commit(&mut self, _: CheckpointId, _: Purpose) -> Result<Vec<u8>, FailureCause> {
        std::io::stdout().lock().flush().map_err(|error| FailureCause::Environment {
            message: format!("flush standard output: {error}"),
        })?;
        Ok(Vec::new())
    }

    fn commit(&mut self, _: CheckpointId) -> Result<(), FailureCause> {
        Ok(())
    }
}

struct DiscardSink;

impl Sink for DiscardSink {
    fn write(&mut self, _: &Batch) -> Result<(), FailureCause> {
        Ok(())
    }

    fn pre_commit(&mut self, _: CheckpointId, _: Purpose) -> Result<Vec<u8>, FailureCause> {
        Ok(Vec::new())
    }

    fn commit(&mut self, _: CheckpointId) -> Result<(), FailureCause> {
        Ok(())
    }
}
