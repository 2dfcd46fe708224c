//! The sources that are built in.

mod file;
mod generator;

use std::sync::Arc;

use cofferdam_connector::{
    Answer, Source, TaskContext,
    blocking::OffThread,
    catalog::{Formats, NodeContext, SourcePlan, SourceSpec},
    ready,
    state::mismatch,
};
use cofferdam_contract::{Batch, Format};
use cofferdam_settings::Problem;

pub(crate) use self::file::checksum;
use crate::spec::{FileSourceSpec, GeneratorContent, GeneratorSpec, LineFormat, OnBadRecord};

/// The output of records that a source could make no sense of.
pub(crate) const DEAD_LETTERS: u32 = 1;

impl SourceSpec for FileSourceSpec {
    fn formats(&self) -> Formats {
        let value = match self.format {
            LineFormat::Text | LineFormat::Csv => Format::Text,
            LineFormat::Json => Format::Json,
        };
        Formats { key: self.key.as_ref().map(|_| Format::Text), value }
    }

    fn is_bounded(&self) -> bool {
        true
    }

    fn has_dead_letters(&self) -> bool {
        self.on_bad_record == OnBadRecord::DeadLetter
    }

    fn prepare(&self, node: NodeContext<'_>) -> Result<Arc<dyn SourcePlan>, Problem> {
        Ok(Arc::new(Files(Arc::new(file::FilePlan::new(node.name, self, node.base_dir)?))))
    }
}

/// Files that were listed.
#[derive(Debug)]
struct Files(Arc<file::FilePlan>);

impl SourcePlan for Files {
    fn open(
        &self,
        task: &TaskContext,
        position: Option<Vec<u8>>,
    ) -> Answer<'static, Box<dyn Source>> {
        let (index, parallelism) = (task.index, task.parallelism);
        let (plan, blocking) = (self.0.clone(), task.blocking.clone());
        let open = move || file::FileSource::open(&plan, index, parallelism, position.as_deref());
        let opening = OffThread::open(blocking, open);
        Box::pin(async move { Ok(Box::new(opening.await?) as Box<dyn Source>) })
    }

    fn check_fresh(&self) -> Result<(), Problem> {
        self.0.check_fresh()
    }

    fn check_positions(&self, positions: &[&[u8]]) -> Result<Vec<String>, Problem> {
        self.0.check_positions(positions)
    }

    fn idle_after(&self) -> Option<std::time::Duration> {
        self.0.idle_after()
    }

    fn redistribute<'a>(
        &'a self,
        positions: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        ready(file::share(positions, parallelism).map_err(mismatch))
    }
}

impl SourceSpec for GeneratorSpec {
    fn formats(&self) -> Formats {
        match self.content {
            GeneratorContent::Words { .. } => {
                Formats { key: Some(Format::Text), value: Format::Bytes }
            }
            GeneratorContent::Sequence => Formats { key: None, value: Format::Text },
        }
    }

    fn is_bounded(&self) -> bool {
        self.count.is_some()
    }

    fn prepare(&self, _: NodeContext<'_>) -> Result<Arc<dyn SourcePlan>, Problem> {
        Ok(Arc::new(generator::GeneratorPlan::new(self)))
    }
}

impl SourcePlan for generator::GeneratorPlan {
    fn open(
        &self,
        task: &TaskContext,
        position: Option<Vec<u8>>,
    ) -> Answer<'static, Box<dyn Source>> {
        let (index, parallelism) = (task.index, task.parallelism);
        let opened =
            generator::GeneratorSource::open(self, index, parallelism, position.as_deref());
        ready(opened.map(|source| Box::new(source) as Box<dyn Source>))
    }

    fn redistribute<'a>(
        &'a self,
        positions: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        ready(generator::share(positions, parallelism).map_err(mismatch))
    }
}

/// The batches that one task of a generator gives out, to measure the same records without a job around them.
pub fn generate(spec: &GeneratorSpec, index: u32, parallelism: u32) -> impl Iterator<Item = Batch> {
    let plan = generator::GeneratorPlan::new(spec);
    let mut source = generator::GeneratorSource::open(&plan, index, parallelism, None).ok();
    std::iter::from_fn(move || source.as_mut()?.batch(u64::MAX))
}
