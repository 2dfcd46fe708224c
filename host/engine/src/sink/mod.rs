//! The sinks that are built in.

mod file;
mod stdout;

use std::sync::Arc;

use cofferdam_connector::{
    Answer, Sink, TaskContext,
    blocking::OffThread,
    ready,
    sink::{Guarantee, StateWriter},
};
use cofferdam_contract::Batch;
use cofferdam_core::{checkpoint::Purpose, failure::FailureCause, ids::CheckpointId};

pub use self::file::Conflicts;
pub(crate) use self::file::{Claim, Output, OutputContext, check_states, names_of, uncommitted};
use crate::spec::{LineContent, SinkSpec};

/// Shares the state of all tasks of a file sink out among another number of tasks.
pub(crate) fn share(old: &[&[u8]], parallelism: usize) -> Result<Vec<Vec<u8>>, String> {
    file::share(old, parallelism)
}

/// The sink of one task. With a state it commits what that state has pre-committed. A file sink has an
/// output, which the run has claimed.
pub(crate) fn open(
    spec: &SinkSpec,
    output: Option<&Arc<Output>>,
    task: &TaskContext,
    state: Option<Vec<u8>>,
) -> Answer<'static, Box<dyn Sink>> {
    let bug = |message: String| FailureCause::HostBug { message };
    match (spec, output) {
        (SinkSpec::File(spec), Some(output)) => {
            let (spec, output, index) = (spec.clone(), output.clone(), task.index);
            let blocking = task.blocking.clone();
            let open = move || file::FileSink::open(output, &spec, index, state.as_deref());
            let opening = blocking.run(open);
            Box::pin(async move {
                let sink = opening.await;
                let sink =
                    sink.map_err(|error| bug(format!("a file sink panicked: {error}")))??;
                Ok(Box::new(OffThread::new(sink, blocking)) as Box<dyn Sink>)
            })
        }
        (SinkSpec::File(_), None) => ready(Err(bug("a file sink without a directory".to_owned()))),
        (SinkSpec::Stdout { line }, _) => {
            ready(Ok(Box::new(stdout::StdoutSink::new(*line, task.blocking.clone()))))
        }
        (SinkSpec::Discard, _) => ready(Ok(Box::new(DiscardSink))),
    }
}

impl SinkSpec {
    /// What a reader of the output can rely on after a failure.
    #[must_use]
    pub fn guarantee(&self) -> Guarantee {
        match self {
            Self::File(_) | Self::Discard => Guarantee::ExactlyOnce,
            Self::Stdout { .. } => Guarantee::AtLeastOnce,
        }
    }
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

struct DiscardSink;

impl Sink for DiscardSink {
    fn write(&mut self, _: Batch) -> Answer<'_, ()> {
        ready(Ok(()))
    }

    fn pre_commit<'a>(
        &'a mut self,
        _: CheckpointId,
        _: Purpose,
        _: &'a mut StateWriter,
    ) -> Answer<'a, ()> {
        ready(Ok(()))
    }

    fn commit(&mut self, _: CheckpointId) -> Answer<'_, ()> {
        ready(Ok(()))
    }
}
