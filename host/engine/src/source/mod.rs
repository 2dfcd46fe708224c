//! Brings records into a job, from a position that can be restored.

mod file;
mod generator;

use std::{path::Path, time::Duration};

use cofferdam_core::failure::FailureCause;
use cofferdam_sandbox::Batch;

use crate::{problem::Problem, spec::SourceSpec};

/// What a source has for the next turn.
pub(crate) enum Step {
    /// Records, and the watermark behind them if it has moved.
    Records { batch: Batch, watermark: Option<i64> },
    /// Nothing before this has passed.
    Wait(Duration),
    /// Nothing any more.
    End,
}

/// One task of a source.
pub(crate) trait Source: Send {
    /// The next records, at most about one batch. Never waits for long.
    fn next(&mut self) -> Result<Step, FailureCause>;

    /// Where it stands: everything given out by `next` so far lies before.
    fn position(&self) -> Vec<u8>;
}

/// What all tasks of a source agree on, found out once before the job starts.
#[derive(Debug, Clone)]
pub(crate) enum Prepared {
    File(file::FilePlan),
    Generator(generator::GeneratorPlan),
}

impl Prepared {
    /// Looks at what there is to read.
    pub(crate) fn new(name: &str, spec: &SourceSpec, base_dir: &Path) -> Result<Self, Problem> {
        Ok(match spec {
            SourceSpec::File(spec) => Self::File(file::FilePlan::new(name, spec, base_dir)?),
            SourceSpec::Generator(spec) => Self::Generator(generator::GeneratorPlan::new(spec)),
        })
    }

    /// The source of one task, at a position or at its beginning.
    pub(crate) fn open(
        &self,
        index: u32,
        parallelism: u32,
        position: Option<&[u8]>,
    ) -> Result<Box<dyn Source>, FailureCause> {
        Ok(match self {
            Self::File(plan) => Box::new(file::FileSource::open(plan, index, parallelism, position)?),
            Self::Generator(plan) => {
                Box::new(generator::GeneratorSource::open(plan, index, parallelism, position)?)
            }
        })
    }
}

fn unreadable_position(error: impl std::fmt::Display) -> FailureCause {
    let message = format!("the source's position in the checkpoint cannot be read: {error}");
    FailureCause::Permanent { message }
}
