//! The sinks that are built in.

mod file;
mod stdout;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_connector::{
    Answer, Sink, TaskContext,
    blocking::OffThread,
    catalog::{OutputContext, SinkPlan, SinkSpec},
    ready,
    sink::{Guarantee, StateWriter},
    state::mismatch,
};
use cofferdam_contract::{Batch, Format};
use cofferdam_core::{checkpoint::Purpose, ids::CheckpointId};
use cofferdam_settings::{Code, Problem};

pub(crate) use self::file::uncommitted;
use self::file::{Claim, Kept, Output};
use crate::spec::{FileSinkSpec, LineContent};

impl SinkSpec for FileSinkSpec {
    fn guarantee(&self) -> Guarantee {
        Guarantee::ExactlyOnce
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn claim(&self, output: OutputContext<'_>) -> Result<Box<dyn SinkPlan>, Problem> {
        let claim = if output.is_asking { Claim::Ask } else { Claim::Take };
        let (sink, states) = (output.sink.to_owned(), output.states.clone());
        let context = file::OutputContext {
            job: output.job.to_owned(),
            lineage: output.lineage.clone(),
            restored: output.restored,
            record_dir: output.record_dir,
            conflicts: output.conflicts,
            own_parts: file::names_of(&states),
        };
        let output = Output::claim(&sink, &self.path, self.if_exists, context, claim)?;
        let kept = file::check_states(&output, &states)?;
        Ok(Box::new(FileSinkPlan { spec: self.clone(), output: Arc::new(output), kept, claim }))
    }

    fn redistribute<'a>(
        &'a self,
        states: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        ready(file::share(states, parallelism).map_err(mismatch))
    }
}

/// A directory that this run has claimed.
struct FileSinkPlan {
    spec: FileSinkSpec,
    output: Arc<Output>,
    /// The pending parts in it that the restored state looks after.
    kept: Kept,
    claim: Claim,
}

impl SinkPlan for FileSinkPlan {
    fn claim_elsewhere(&mut self, own: &BTreeSet<PathBuf>) -> Result<(), Problem> {
        let Some(output) = Arc::get_mut(&mut self.output) else {
            return Err(Problem::new(Code::HostBug, "an output that was begun is claimed again"));
        };
        let elsewhere = self.kept.elsewhere.iter();
        elsewhere.into_iter().try_for_each(|dir| output.claim_before(dir, own, self.claim))
    }

    fn begin(&self) -> Result<(), Problem> {
        self.output.begin(self.spec.if_exists, &self.kept.names).map_err(|error| {
            let (sink, path) = (self.output.sink(), self.spec.path.display());
            let message = format!("sink \"{sink}\" cannot write to {path}");
            Problem::new(Code::OutputUnwritable, message).detail(error)
        })
    }

    fn open(&self, task: &TaskContext, state: Option<Vec<u8>>) -> Answer<'static, Box<dyn Sink>> {
        let (spec, output, index) = (self.spec.clone(), self.output.clone(), task.index);
        let blocking = task.blocking.clone();
        let open = move || file::FileSink::open(output, &spec, index, state.as_deref());
        let opening = OffThread::open(blocking, open);
        Box::pin(async move { Ok(Box::new(opening.await?) as Box<dyn Sink>) })
    }
}

/// Standard output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StdoutSpec {
    pub(crate) line: LineContent,
}

impl SinkSpec for StdoutSpec {
    fn guarantee(&self) -> Guarantee {
        Guarantee::AtLeastOnce
    }

    fn claim(&self, _: OutputContext<'_>) -> Result<Box<dyn SinkPlan>, Problem> {
        Ok(Box::new(*self))
    }
}

impl SinkPlan for StdoutSpec {
    fn open(&self, task: &TaskContext, _: Option<Vec<u8>>) -> Answer<'static, Box<dyn Sink>> {
        ready(Ok(Box::new(stdout::StdoutSink::new(self.line, task.blocking.clone()))))
    }
}

/// Nowhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DiscardSpec;

impl SinkSpec for DiscardSpec {
    fn guarantee(&self) -> Guarantee {
        Guarantee::ExactlyOnce
    }

    fn takes(&self, _: Format) -> bool {
        true
    }

    fn claim(&self, _: OutputContext<'_>) -> Result<Box<dyn SinkPlan>, Problem> {
        Ok(Box::new(*self))
    }
}

impl SinkPlan for DiscardSpec {
    fn open(&self, _: &TaskContext, _: Option<Vec<u8>>) -> Answer<'static, Box<dyn Sink>> {
        ready(Ok(Box::new(DiscardSink)))
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
