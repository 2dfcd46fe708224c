//! What a manifest says about a sink of files, and the output that a run has claimed.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cofferdam_connector::{
    Answer, Sink, TaskContext,
    blocking::OffThread,
    catalog::{OutputContext, SinkConnector, SinkPlan, SinkSpec},
    ready,
    sink::Guarantee,
    state::mismatch,
};
use cofferdam_files::link_below;
use cofferdam_settings::{
    AnySetting, Code, Optional, Problem, Required, Section, Setting, table::Key,
};

use super::{
    Claim, Claimant, FileSink, Kept, Output, check_states, dirs_of, names_of, share, uncommitted,
};
use crate::{
    line::{LINE, LineContent},
    settings::Result,
};

/// Part files in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSinkSpec {
    /// The directory.
    pub path: PathBuf,
    /// What is written of a record.
    pub line: LineContent,
    /// What to do about the parts of an earlier run.
    pub if_exists: IfExists,
    /// When a part ends.
    pub rolling: Rolling,
}

/// When a part ends: with the first checkpoint after one of these is reached; without any, with each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rolling {
    /// So many bytes.
    pub size: Option<u64>,
    /// So much time since it began.
    pub interval: Option<Duration>,
}

/// What to do about the parts of an earlier run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfExists {
    /// Refuse to start.
    Fail,
    /// Remove them.
    Replace,
}

static SINK_PATH: Required<String> = Key::text("path", "the directory of the parts")
    .of_job()
    .required("the directory for the parts");

static IF_EXISTS: Setting<IfExists> = Key::choice(
    "if-exists",
    &[("fail", IfExists::Fail), ("replace", IfExists::Replace)],
    "`replace` removes the parts of an earlier job, and no other file",
)
.of_job()
.or(IfExists::Fail);

static ROLL_SIZE: Optional<u64> = Key::bytes(
    "roll-size",
    "a part continues over checkpoints until it has this many bytes, and is visible after that",
)
.of_job()
.unless(|bytes| (*bytes == 0).then_some("it must be above 0"))
.or_none("none: each checkpoint ends a part");

static ROLL_INTERVAL: Optional<u64> = Key::duration(
    "roll-interval",
    "a part continues over checkpoints until this much time has passed, and is visible after that",
)
.of_job()
.or_none("none: each checkpoint ends a part");

static FILE_SINK_ROWS: &[&dyn AnySetting] =
    &[&LINE, &SINK_PATH, &IF_EXISTS, &ROLL_SIZE, &ROLL_INTERVAL];

/// Part files.
pub(crate) struct FileSinkConnector;

impl SinkConnector for FileSinkConnector {
    fn name(&self) -> &'static str {
        "file"
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        FILE_SINK_ROWS
    }

    fn read(&self, section: &Section<'_>, base_dir: &Path) -> Result<Arc<dyn SinkSpec>> {
        Ok(Arc::new(read_file_sink(section, base_dir)?))
    }

    fn uncommitted(&self, state: &[u8]) -> Option<String> {
        uncommitted(&[state]).map(|path| path.display().to_string())
    }
}

fn read_file_sink(section: &Section<'_>, base_dir: &Path) -> Result<FileSinkSpec> {
    let path = base_dir.join(section.require(&SINK_PATH)?.value);
    let shown = section.shown_key(SINK_PATH.row().key);
    section.document().amend(&shown, path.display().to_string());
    let size = section.find(&ROLL_SIZE);
    let interval = section.find(&ROLL_INTERVAL);
    Ok(FileSinkSpec {
        path,
        line: section.get(&LINE),
        if_exists: section.get(&IF_EXISTS),
        rolling: Rolling {
            size: size.map(|size| size.value),
            interval: interval.map(|interval| Duration::from_millis(interval.value)),
        },
    })
}

impl SinkSpec for FileSinkSpec {
    fn guarantee(&self) -> Guarantee {
        Guarantee::ExactlyOnce
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn claim(&self, output: OutputContext<'_>) -> Result<Box<dyn SinkPlan>> {
        let claim = if output.is_asking { Claim::Ask } else { Claim::Take };
        let (sink, states) = (output.sink.to_owned(), output.states.clone());
        // Nothing is looked at that is not granted, whatever a state names.
        if let Some(dir) = dirs_of(&states).iter().find(|dir| !output.grants.may_write(dir)) {
            let message =
                format!("sink \"{sink}\" has written to a place that the host does not grant");
            return Err(Problem::new(Code::NotGranted, message)
                .detail(format!("the checkpoint names parts in {}", dir.display()))
                .hint(
                    "the operator of the host can add it to `grants.default.write` in its file",
                ));
        }
        if !output.grants.is_all()
            && let Some(link) = link_below(&self.path)
        {
            let message = format!(
                "sink \"{sink}\" has a link in its directory, where the host grants no others"
            );
            return Err(Problem::new(Code::NotGranted, message).detail(link.display()));
        }
        let context = Claimant {
            job: output.job.to_owned(),
            lineage: output.lineage.clone(),
            restored: output.restored,
            record_dir: output.record_dir,
            conflicts: output.conflicts,
            own_parts: names_of(&states),
        };
        let output = Output::claim(&sink, &self.path, self.if_exists, context, claim)?;
        let kept = check_states(&output, &states)?;
        Ok(Box::new(FileSinkPlan { spec: self.clone(), output: Arc::new(output), kept, claim }))
    }

    fn redistribute<'a>(
        &'a self,
        states: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        ready(share(states, parallelism).map_err(mismatch))
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
    fn claim_elsewhere(&mut self, own: &BTreeSet<PathBuf>) -> Result<()> {
        let Some(output) = Arc::get_mut(&mut self.output) else {
            return Err(Problem::new(Code::HostBug, "an output that was begun is claimed again"));
        };
        let elsewhere = self.kept.elsewhere.iter();
        elsewhere.into_iter().try_for_each(|dir| output.claim_before(dir, own, self.claim))
    }

    fn begin(&self) -> Result<()> {
        self.output.begin(self.spec.if_exists, &self.kept.names).map_err(|error| {
            let (sink, path) = (self.output.sink(), self.spec.path.display());
            let message = format!("sink \"{sink}\" cannot write to {path}");
            Problem::new(Code::OutputUnwritable, message).because(&error)
        })
    }

    fn open(&self, task: &TaskContext, state: Option<Vec<u8>>) -> Answer<'static, Box<dyn Sink>> {
        let (spec, output, index) = (self.spec.clone(), self.output.clone(), task.index);
        let blocking = task.blocking.clone();
        let open = move || FileSink::open(output, &spec, index, state.as_deref());
        // A restart need not wait for what is removed from the directory.
        let sink: Box<dyn Sink> = Box::new(OffThread::opening(blocking, open));
        ready(Ok(sink))
    }
}
