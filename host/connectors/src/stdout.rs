//! Prints at once: what is printed cannot be taken back, so records may come twice after a restart.
//!
//! A reader may stop reading for as long as it likes, and holds up anyone who writes. So all tasks of the process
//! take turns, and the one whose turn it is writes on a thread that may block.

use std::{
    io::{self, Write},
    sync::{Arc, LazyLock},
};

use cofferdam_connector::{
    Answer, Sink, TaskContext,
    blocking::Blocking,
    catalog::{OutputContext, SinkPlan, SinkSpec},
    ready,
    sink::{Guarantee, StateWriter},
};
use cofferdam_contract::Batch;
use cofferdam_core::{
    checkpoint::Purpose,
    failure::{EnvironmentError, FailureCause},
    ids::CheckpointId,
};
use cofferdam_settings::{AnySetting, Problem};
use tokio::sync::Mutex;

use crate::{
    line::{LINE, LineContent, push_lines},
    settings::BuiltIn,
};

static STDOUT_ROWS: &[&dyn AnySetting] = &[&LINE];

/// Standard output.
pub(crate) const STDOUT: BuiltIn<dyn SinkSpec> = BuiltIn {
    name: "stdout",
    rows: STDOUT_ROWS,
    read: |section, _| Ok(Arc::new(StdoutSpec { line: section.get(&LINE) })),
};

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
        ready(Ok(Box::new(StdoutSink::new(self.line, task.blocking.clone()))))
    }
}

/// Whose turn it is: standard output is one for the whole process.
static TURN: LazyLock<Arc<Mutex<()>>> = LazyLock::new(Arc::default);

struct StdoutSink {
    line: LineContent,
    blocking: Blocking,
}

impl StdoutSink {
    fn new(line: LineContent, blocking: Blocking) -> Self {
        Self { line, blocking }
    }

    /// Does something with standard output, on a thread that may block.
    async fn print(
        &self,
        doing: &'static str,
        call: impl FnOnce(&mut io::StdoutLock<'_>) -> io::Result<()> + Send + 'static,
    ) -> Result<(), FailureCause> {
        let turn = TURN.clone().lock_owned().await;
        let print = move || {
            let printed = call(&mut io::stdout().lock());
            drop(turn);
            printed.map_err(|error| {
                FailureCause::Environment(match error.kind() {
                    // The number of a full pipe is that of a machine without threads to give.
                    io::ErrorKind::WouldBlock => EnvironmentError::new(format!("{doing}: {error}")),
                    _ => EnvironmentError::of(doing, error),
                })
            })
        };
        self.blocking.call(print).await
    }
}

impl Sink for StdoutSink {
    fn write(&mut self, batch: Batch) -> Answer<'_, ()> {
        Box::pin(async move {
            let mut buffer = Vec::with_capacity(batch.byte_count());
            push_lines(&batch, self.line, &mut buffer);
            self.print("write to standard output", move |out| out.write_all(&buffer)).await
        })
    }

    fn pre_commit<'a>(
        &'a mut self,
        _: CheckpointId,
        _: Purpose,
        _: &'a mut StateWriter,
    ) -> Answer<'a, ()> {
        Box::pin(self.print("flush standard output", |out| out.flush()))
    }

    fn commit(&mut self, _: CheckpointId) -> Answer<'_, ()> {
        ready(Ok(()))
    }
}
