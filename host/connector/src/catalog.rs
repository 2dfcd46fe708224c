//! What connectors there are: a value that the program hands to the engine.
//!
//! A connector goes through four hands. Its [`SourceConnector`] reads a node's settings into a [`SourceSpec`],
//! which says what can be known without looking outside. [`prepare`](SourceSpec::prepare) looks at what is there
//! and gives a [`SourcePlan`], once a run. And that opens a [`Source`] for each task of each attempt. A sink goes the
//! same way, but its plan also [claims](SinkSpec::claim) its output: what belongs to another job is refused before
//! anything in it has changed.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cofferdam_contract::Format;
use cofferdam_core::failure::{FailureCause, Obstacle};
use cofferdam_files::Grants;
use cofferdam_settings::{AnySetting, Problem, Section};

use crate::{Answer, Sink, Source, TaskContext, identity::Lineage, sink::Guarantee};

/// How the keys and values of records are encoded; no key format: they have no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Formats {
    /// Of keys.
    pub key: Option<Format>,
    /// Of values.
    pub value: Format,
}

/// Where a node stands, for its connector.
#[derive(Debug, Clone, Copy)]
pub struct NodeContext<'a> {
    /// The node's name.
    pub name: &'a str,
    /// Where relative paths begin: the manifest's directory.
    pub base_dir: &'a Path,
    /// Which files the host lets it open: open them by [`Grants::open`].
    pub grants: &'a Grants,
}

/// One kind of source.
pub trait SourceConnector: Send + Sync {
    /// Its name in a manifest: `connector = "NAME"`.
    fn name(&self) -> &'static str;

    /// The settings that it reads, beside those of every source.
    fn settings(&self) -> &'static [&'static dyn AnySetting];

    /// Reads the settings of a node. Looks at nothing outside of the manifest.
    ///
    /// # Errors
    /// What is wrong with them.
    fn read(&self, section: &Section<'_>, base_dir: &Path) -> Result<Arc<dyn SourceSpec>, Problem>;
}

/// A source as the manifest has it.
pub trait SourceSpec: fmt::Debug + Send + Sync {
    /// How its records are encoded.
    fn formats(&self) -> Formats;

    /// Whether its records come to an end.
    fn is_bounded(&self) -> bool;

    /// Whether it has an output for bad records.
    fn has_dead_letters(&self) -> bool {
        false
    }

    /// The files and directories that it reads, as far as the manifest says: the host has to grant them.
    fn reads(&self, base_dir: &Path) -> Vec<PathBuf> {
        let _ = base_dir;
        Vec::new()
    }

    /// Looks at what there is to read. Called once a run, before anything is written.
    ///
    /// # Errors
    /// Where it cannot be looked at.
    fn prepare(&self, node: NodeContext<'_>) -> Result<Arc<dyn SourcePlan>, Problem>;
}

/// A source that has looked at what there is to read.
pub trait SourcePlan: fmt::Debug + Send + Sync {
    /// Opens the source of one task, at a position or at its beginning.
    fn open(
        &self,
        task: &TaskContext,
        position: Option<Vec<u8>>,
    ) -> Answer<'static, Box<dyn Source>>;

    /// Refuses to begin where there is nothing to read.
    ///
    /// # Errors
    /// Where there is not.
    fn check_fresh(&self) -> Result<(), Problem> {
        Ok(())
    }

    /// Refuses positions from which it cannot continue; gives what people should know.
    ///
    /// # Errors
    /// Where it cannot.
    fn check_positions(&self, positions: &[&[u8]]) -> Result<Vec<String>, Problem> {
        let _ = positions;
        Ok(Vec::new())
    }

    /// After this long without a record a task does not hold event time back any more.
    fn idle_after(&self) -> Option<Duration> {
        None
    }

    /// Distributes the positions of all tasks over another number of tasks. Together the new ones cover exactly
    /// what the old ones had still to read. May look outside, and wait.
    fn redistribute<'a>(
        &'a self,
        positions: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>>;
}

/// One kind of sink.
pub trait SinkConnector: Send + Sync {
    /// Its name in a manifest: `connector = "NAME"`.
    fn name(&self) -> &'static str;

    /// The settings that it reads, beside those of every sink.
    fn settings(&self) -> &'static [&'static dyn AnySetting];

    /// Reads the settings of a node. Looks at nothing outside of the manifest.
    ///
    /// # Errors
    /// What is wrong with them.
    fn read(&self, section: &Section<'_>, base_dir: &Path) -> Result<Arc<dyn SinkSpec>, Problem>;

    /// What the state of one of its tasks has still to commit, for example the name of a file; `None`: nothing. Asked
    /// before a job continues without the sink, or with one of another kind under its uid: that is refused where
    /// something is left. As long as a connector does not say otherwise, every state counts as output.
    fn uncommitted(&self, state: &[u8]) -> Option<String> {
        (!state.is_empty()).then(|| format!("{} bytes of state", state.len()))
    }
}

/// A sink as the manifest has it.
pub trait SinkSpec: fmt::Debug + Send + Sync {
    /// What a reader of the output can rely on after a failure.
    fn guarantee(&self) -> Guarantee;

    /// Whether it takes values of a format.
    fn takes(&self, value: Format) -> bool {
        value != Format::Postcard
    }

    /// The directory that it writes to, if it writes to one: the host has to grant it, no other sink may have it, nor
    /// may it lie within the job's state.
    fn directory(&self) -> Option<&Path> {
        None
    }

    /// Takes the output for this run, or asks whether it could. Nothing of it changes before
    /// [`begin`](SinkPlan::begin).
    ///
    /// # Errors
    /// Where it belongs to another job, or the state does not fit it.
    fn claim(&self, output: OutputContext<'_>) -> Result<Box<dyn SinkPlan>, Problem>;

    /// Distributes the states of all tasks over another number of tasks, which commit what they hold. May look
    /// outside, and wait. A sink that has states and does not say how is refused another parallelism: what it holds
    /// would be lost.
    fn redistribute<'a>(
        &'a self,
        states: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        if states.iter().all(|state| state.is_empty()) {
            return crate::ready(Ok(vec![Vec::new(); parallelism]));
        }
        let message = "its connector cannot distribute what the tasks have still to commit over another number of \
                       tasks; keep the parallelism"
            .to_owned();
        crate::ready(Err(FailureCause::Permanent { obstacle: Obstacle::StateMismatch, message }))
    }
}

/// A sink whose output this run has claimed.
pub trait SinkPlan: Send + Sync {
    /// Claims also where states of the checkpoint have written, if that is elsewhere. `own` are the directories
    /// of all sinks of the run.
    ///
    /// # Errors
    /// As [`claim`](SinkSpec::claim).
    fn claim_elsewhere(&mut self, own: &BTreeSet<PathBuf>) -> Result<(), Problem> {
        let _ = own;
        Ok(())
    }

    /// Begins the run: from now on the output may change.
    ///
    /// # Errors
    /// Where it cannot be written to.
    fn begin(&self) -> Result<(), Problem> {
        Ok(())
    }

    /// Opens the sink of one task. With a state it commits what that state has pre-committed, before its first barrier
    /// is answered at the latest: a sink may continue to open while its task processes the first records.
    fn open(&self, task: &TaskContext, state: Option<Vec<u8>>) -> Answer<'static, Box<dyn Sink>>;
}

/// What a sink has to know of its output: whose it is, and what the run begins from.
#[derive(Debug, Clone)]
pub struct OutputContext<'a> {
    /// The sink's name.
    pub sink: &'a str,
    /// The job's name.
    pub job: &'a str,
    /// The job and the course of its events.
    pub lineage: &'a Lineage,
    /// The checkpoint that the sink's states come from; `None`: it begins.
    pub restored: Option<u64>,
    /// The states of its tasks in that checkpoint.
    pub states: Vec<&'a [u8]>,
    /// Where the job records what it has committed, if it has a directory.
    pub record_dir: Option<PathBuf>,
    /// Which files the host lets it write: states may name other places than the manifest.
    pub grants: &'a Grants,
    /// Ways out of conflicts between the state and the output.
    pub conflicts: Conflicts,
    /// Whether the output is only asked for: nothing is locked then.
    pub is_asking: bool,
}

/// Ways out of conflicts between the state and the output, which only people can choose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Conflicts {
    /// Output that was committed after the state is discarded.
    pub discard_output: bool,
    /// Parts that are neither pending nor committed were committed, and a reader has taken them.
    pub assume_committed: bool,
}

/// What the state of a sink has still to commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uncommitted {
    /// Nothing.
    Nothing,
    /// Output that is lost where nobody commits it.
    Output {
        /// The connector that can commit it.
        connector: &'static str,
        /// Some of it, for people.
        example: String,
    },
    /// The program does not have its connector.
    Unknown {
        /// The name of the connector.
        connector: String,
    },
}

/// The connectors that a program has.
#[derive(Clone, Default)]
pub struct Catalog {
    sources: Vec<Arc<dyn SourceConnector>>,
    sinks: Vec<Arc<dyn SinkConnector>>,
}

impl fmt::Debug for Catalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sources: Vec<&str> = self.sources.iter().map(|it| it.name()).collect();
        let sinks: Vec<&str> = self.sinks.iter().map(|it| it.name()).collect();
        f.debug_struct("Catalog").field("sources", &sources).field("sinks", &sinks).finish()
    }
}

impl Catalog {
    /// Adds a kind of source. One of its name that is there already is replaced.
    #[must_use]
    pub fn source(mut self, connector: impl SourceConnector + 'static) -> Self {
        self.sources.retain(|known| known.name() != connector.name());
        self.sources.push(Arc::new(connector));
        self
    }

    /// Adds a kind of sink. One of its name that is there already is replaced.
    #[must_use]
    pub fn sink(mut self, connector: impl SinkConnector + 'static) -> Self {
        self.sinks.retain(|known| known.name() != connector.name());
        self.sinks.push(Arc::new(connector));
        self
    }

    /// Every kind of source.
    #[must_use]
    pub fn sources(&self) -> &[Arc<dyn SourceConnector>] {
        &self.sources
    }

    /// What the state of a sink has still to commit. Its connector is asked; where that is not known, because an
    /// older version has written the checkpoint, each one is.
    #[must_use]
    pub fn uncommitted(&self, of: Option<&str>, state: &[u8]) -> Uncommitted {
        if let Some(of) = of
            && self.sinks.iter().all(|connector| connector.name() != of)
        {
            return Uncommitted::Unknown { connector: of.to_owned() };
        }
        let mut asked = self.sinks.iter().filter(|it| of.is_none_or(|of| it.name() == of));
        let output = asked.find_map(|connector| {
            let example = connector.uncommitted(state)?;
            Some(Uncommitted::Output { connector: connector.name(), example })
        });
        output.unwrap_or(Uncommitted::Nothing)
    }

    /// Every kind of sink.
    #[must_use]
    pub fn sinks(&self) -> &[Arc<dyn SinkConnector>] {
        &self.sinks
    }
}
