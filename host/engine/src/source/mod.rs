//! The sources that are built in.

mod file;
mod generator;

use std::{path::Path, sync::Arc, time::Duration};

use cofferdam_connector::{Answer, Source, TaskContext, blocking::OffThread, ready};
use cofferdam_contract::Batch;
use cofferdam_core::failure::FailureCause;

pub(crate) use self::file::checksum;
use crate::spec::{GeneratorSpec, SourceSpec};
use cofferdam_settings::Problem;

/// The output of records that a source could make no sense of.
pub(crate) const DEAD_LETTERS: u32 = 1;

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
        task: &TaskContext,
        position: Option<Vec<u8>>,
    ) -> Answer<'static, Box<dyn Source>> {
        let (index, parallelism) = (task.index, task.parallelism);
        match self {
            Self::File(plan) => {
                let (plan, blocking) = (plan.clone(), task.blocking.clone());
                let open =
                    move || file::FileSource::open(&plan, index, parallelism, position.as_deref());
                let opening = blocking.run(open);
                Box::pin(async move {
                    let source = opening.await.map_err(|error| FailureCause::HostBug {
                        message: format!("a file source panicked: {error}"),
                    })??;
                    Ok(Box::new(OffThread::new(source, blocking)) as Box<dyn Source>)
                })
            }
            Self::Generator(plan) => {
                let opened =
                    generator::GeneratorSource::open(plan, index, parallelism, position.as_deref());
                ready(opened.map(|source| Box::new(source) as Box<dyn Source>))
            }
        }
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
    std::iter::from_fn(move || source.as_mut()?.batch(u64::MAX))
}
