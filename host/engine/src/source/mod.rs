//! Brings records into a job, from a position that can be restored.

mod file;
mod generator;

pub(crate) use self::file::checksum;
mod pace;

use std::{path::Path, sync::Arc, time::Duration};

use cofferdam_core::failure::{FailureCause, Obstacle};
use cofferdam_sandbox::Batch;

use crate::{
    problem::Problem,
    spec::{GeneratorSpec, SourceSpec},
};

/// The output of records that a source could make no sense of.
pub(crate) const DEAD_LETTERS: u32 = 1;

/// What a source has for the next turn.
pub(crate) enum Step {
    /// Records, what became of bad ones, and the event time behind all of them.
    Records {
        batch: Batch,
        /// For the output of dead letters.
        letters: Option<Box<Batch>>,
        /// How many records were bad, with a letter or without.
        bad: u64,
        watermark: Option<i64>,
    },
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
    ///
    /// # Errors
    /// Where what was read is not there any more, so that nobody could go on from it.
    fn position(&mut self) -> Result<Vec<u8>, FailureCause>;
}

/// What all tasks of a source agree on, found out once before the job starts.
#[derive(Debug, Clone)]
pub(crate) enum Prepared {
    File(Arc<file::FilePlan>),
    Generator(generator::GeneratorPlan),
}

impl Prepared {
    /// Looks at what there is to read.
    pub(crate) fn new(name: &str, spec: &SourceSpec, base_dir: &Path) -> Result<Self, Problem> {
        Ok(match spec {
            SourceSpec::File(spec) => {
                Self::File(Arc::new(file::FilePlan::new(name, spec, base_dir)?))
            }
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
            Self::File(plan) => {
                Box::new(file::FileSource::open(plan, index, parallelism, position)?)
            }
            Self::Generator(plan) => {
                Box::new(generator::GeneratorSource::open(plan, index, parallelism, position)?)
            }
        })
    }
}

impl Prepared {
    /// Refuses to begin where there is nothing to read.
    pub(crate) fn check_fresh(&self) -> Result<(), Problem> {
        match self {
            Self::File(plan) => plan.check_fresh(),
            Self::Generator(_) => Ok(()),
        }
    }

    /// Without records for so long a task holds event time back no longer.
    pub(crate) fn idle_after(&self) -> Option<Duration> {
        match self {
            Self::File(plan) => plan.idle_after(),
            Self::Generator(_) => None,
        }
    }

    /// Refuses positions from which it cannot go on; gives what people should know.
    pub(crate) fn check_positions(&self, positions: &[&[u8]]) -> Result<Vec<String>, Problem> {
        match self {
            Self::File(plan) => plan.check_positions(positions),
            Self::Generator(_) => Ok(Vec::new()),
        }
    }

    /// Shares the positions of all tasks out among another number of tasks.
    pub(crate) fn share(&self, old: &[&[u8]], parallelism: usize) -> Result<Vec<Vec<u8>>, String> {
        match self {
            Self::File(_) => file::share(old, parallelism),
            Self::Generator(_) => generator::share(old, parallelism),
        }
    }
}

/// The batches that one task of a generator gives out, for whoever wants to measure the same
/// records without a job around them.
pub fn generate(spec: &GeneratorSpec, index: u32, parallelism: u32) -> impl Iterator<Item = Batch> {
    let plan = generator::GeneratorPlan::new(spec);
    let mut source = generator::GeneratorSource::open(&plan, index, parallelism, None).ok();
    std::iter::from_fn(move || match source.as_mut()?.next() {
        Ok(Step::Records { batch, .. }) => Some(batch),
        Ok(Step::Wait(_) | Step::End) | Err(_) => None,
    })
}

fn unreadable_position(error: impl std::fmt::Display) -> FailureCause {
    let message = format!("the source's position in the checkpoint cannot be read: {error}");
    FailureCause::Permanent { obstacle: Obstacle::StateMismatch, message }
}
