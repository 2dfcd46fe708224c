//! From a checked spec to a running job: opens the state directory, and hands everything to the driver.

pub(crate) mod check;
mod component;
pub(crate) mod driver;
mod edges;
mod ending;
pub(crate) mod files;
mod fit;
pub(crate) mod plan;
mod read_out;
mod redistribute;
pub(crate) mod rehearsal;
pub mod restore;
mod resume;
pub mod state_dir;
mod target;
mod wiring;

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cofferdam_core::{
    ids::{OperatorId, TaskId},
    job::{Event, Job as CoreJob, JobSettings, Outcome, Resume},
};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::JobSpec;
use cofferdam_store::{
    SnapshotStore, Storage, StorageError, manifest::TaskIdentity, memory::MemoryStorage,
};
use tokio::sync::mpsc;

use self::{
    ending::{Ending, failure, next_step},
    files::{is_nothing_there, locals, open_store, partitions, storage_at, unusable_state},
    plan::{
        NodePlan, Plan, components_of, digest_of, identity, keyed_outputs, own_components,
        prepare_nodes, sources_of, untried,
    },
    restore::Restorable,
    resume::{Before, Resumption, claim_outputs, look},
    target::Tasks,
};
use crate::{
    exchange::link::Links,
    job::driver::Driver,
    storage::StorageHandle,
    watch::{
        control::{Desk, JobControl, KeptCheckpoint},
        history::{self, Recorder},
        log::Logs,
        metrics::{Metrics, OperatorMetrics},
        monitor::{Monitor, Stats, WriterReport},
        progress::{Observer, Progress},
    },
};

pub use self::{
    check::CheckedJob,
    component::{describe, load_component, sandbox},
    read_out::each_declared,
    resume::JobOptions,
};

impl CheckedJob {
    /// Whether a run can begin from the savepoint or state directory that `options` name, and what it would
    /// take over; `None` where they name none. Changes nothing. While a run uses the state directory, that
    /// and the output are left out: both will be others when it has ended.
    ///
    /// # Errors
    /// What `cofferdam run --from` would be refused for.
    pub fn check_from(
        &self,
        options: &JobOptions,
        observer: &dyn Observer,
    ) -> Result<Option<Restorable>, Problem> {
        let Some(from) = &options.from else { return Ok(None) };
        let tasks = self.spec.graph.tasks();
        let identity = |task: &TaskId| identity(&self.spec, &self.operators, *task);
        let identities: Vec<TaskIdentity> = tasks.iter().map(identity).collect();
        let nodes = prepare_nodes(&self.spec, &self.operators)?;
        let tasks = Tasks {
            spec: &self.spec,
            identities: &identities,
            locals: &BTreeMap::new(),
            sources: &sources_of(&self.spec, &nodes),
            components: &components_of(&self.spec, &self.operators),
            observer,
        };
        let state_dir = options.state_dir.as_deref().or(self.spec.storage.state_dir());
        if state_dir.map_or(Ok(false), state_dir::is_in_use)? {
            let mut restorable = restore::check_from(&tasks, from)?;
            restorable.warnings.push(
                "a run uses the state directory: what is in it then, and what the output allows, is \
                 known when that has ended"
                    .to_owned(),
            );
            return Ok(Some(restorable));
        }
        let unusable = |error: &dyn std::fmt::Display| unusable_state(state_dir, error);
        let storage: Box<dyn Storage> = match state_dir {
            Some(dir) if is_nothing_there(&self.spec.storage, dir) => {
                Box::new(MemoryStorage::default())
            }
            _ => storage_at(&self.spec.storage, state_dir).map_err(|error| unusable(&error))?,
        };
        let digest = digest_of(&identities, &self.spec);
        let Resumption { chosen, .. } = look(&tasks, storage, state_dir, options, &digest)?;
        claim_outputs(&self.spec, &identities, &chosen, state_dir, options, true)?;
        let restorable = |manifest| restore::restorable(&tasks, manifest, chosen.warnings.clone());
        Ok(chosen.manifest.as_ref().map(restorable))
    }
}

/// A job that is ready to run: its state directory is locked, its store open.
pub struct Job {
    plan: Plan,
    spec: JobSpec,
    store: SnapshotStore,
    resume: Resume,
    _lock: Option<File>,
    /// What it began from and owns.
    claimed: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    seed: u64,
    observer: Arc<dyn Observer>,
    metrics: Arc<Metrics>,
    logs: Arc<Logs>,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
    desk: Arc<Desk>,
    /// See [`digest_of`].
    digest: String,
}

impl Job {
    /// Opens the state directory, finds what to resume, and prepares sources and sinks.
    ///
    /// # Errors
    /// The first problem. What was committed by sinks is as it was; damaged checkpoints may have
    /// been left behind, and the state may lie in a new generation.
    pub fn prepare(
        checked: CheckedJob,
        options: &JobOptions,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, Problem> {
        let CheckedJob { spec, operators } = checked;
        let tasks: Vec<TaskId> = spec.graph.tasks().into_iter().collect();
        let identities: Vec<TaskIdentity> =
            tasks.iter().map(|task| identity(&spec, &operators, *task)).collect();
        let mut nodes = prepare_nodes(&spec, &operators)?;
        let state_dir = options.state_dir.as_deref().or(spec.storage.state_dir());
        let unusable = |error: &dyn std::fmt::Display| unusable_state(state_dir, error);
        let lock = state_dir.map(state_dir::lock).transpose()?;
        let digest = digest_of(&identities, &spec);
        let mut targets = Tasks {
            spec: &spec,
            identities: &identities,
            locals: &BTreeMap::new(),
            sources: &sources_of(&spec, &nodes),
            components: &components_of(&spec, &operators),
            observer: &*observer,
        };
        // A refused run leaves everything as it was: what is there is looked at before it is opened.
        let storage = storage_at(&spec.storage, state_dir).map_err(|error| unusable(&error))?;
        let resumption = look(&targets, storage, state_dir, options, &digest)?;
        // Everything that may be refused is refused by now, or here.
        let mut outputs =
            claim_outputs(&spec, &identities, &resumption.chosen, state_dir, options, false)?;
        let Resumption { mut record, before, is_over, looked, chosen } = resumption;
        for message in &chosen.warnings {
            observer.observe(Progress::Warning { message: message.clone() });
        }
        drop(looked);
        // Before an output is said to be this job's.
        if let Some(dir) = state_dir
            && matches!(before, Before::Nothing)
        {
            record.write(dir).map_err(|error| unusable(&error))?;
        }
        let locals = locals(&tasks, &identities, &spec, state_dir);
        let locals = locals.map_err(|error| unusable(&error))?;
        let partitions = partitions(&spec, state_dir).map_err(|error| unusable(&error))?;
        targets.locals = &locals;
        let mut store = open_store(&spec, state_dir, &identities, is_over, options)
            .map_err(|error| unusable(&error))?;
        let own = own_components(&spec, &operators, &tasks, &identities);
        let untried = untried(&spec, &identities, &chosen, &locals, &own);
        let components = operators.values().map(|operator| operator.component.clone());
        store.set_components(components.collect(), Arc::new(own));
        let resume = restore::adopt(&targets, &mut store, &chosen)?;
        outputs.values().try_for_each(|output| output.begin())?;
        for (node, work) in spec.nodes.iter().zip(&mut nodes) {
            if let NodePlan::Sink { plan } = work {
                *plan = outputs.remove(&node.name).map(Arc::from);
            }
        }
        if let Some(dir) = state_dir {
            record.job = chosen.lineage.job;
            if let Some(from) = &options.from {
                record.begun_from = restore::absolute(&from.dir);
            }
            record.write(dir).map_err(|error| unusable(&error))?;
        }
        let desk = desk_of(&store, &resume).map_err(|error| unusable(&error))?;
        let ids = (0..).map(OperatorId).zip(&spec.nodes);
        let plan = Plan {
            job: spec.name.clone(),
            secret: *blake3::hash(chosen.lineage.job.bytes()).as_bytes(),
            graph: spec.graph.clone(),
            nodes,
            slots: tasks.iter().copied().zip(0..).collect(),
            outputs: ids.map(|(id, node)| keyed_outputs(node, operators.get(&id))).collect(),
            is_exactly_once: spec.is_exactly_once,
            unaligned_after: spec.checkpoint.unaligned_after_ms.map(Duration::from_millis),
            backlog_lag_ms: spec.backlog_lag_ms,
            links: Links::default(),
            partitions,
            locals,
            untried,
        };
        let operators = spec.nodes.iter().map(|node| OperatorMetrics::new(&node.name)).collect();
        let (events, inbox) = mpsc::unbounded_channel();
        Ok(Self {
            plan,
            store,
            resume,
            _lock: lock,
            claimed: options.from.as_ref().filter(|from| from.claim).map(|from| from.dir.clone()),
            state_dir: state_dir.map(Path::to_owned),
            seed: options.seed,
            observer,
            metrics: Arc::new(Metrics { operators, ..Metrics::default() }),
            logs: Arc::default(),
            events,
            inbox,
            desk,
            digest,
            spec,
        })
    }

    /// The job's counters.
    #[must_use]
    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// The job's spec.
    #[must_use]
    pub fn spec(&self) -> &JobSpec {
        &self.spec
    }

    /// The directory that it has locked; `None` where its state is in memory.
    #[must_use]
    pub fn state_dir(&self) -> Option<&Path> {
        self.state_dir.as_deref()
    }

    /// The checkpoint that it resumes from.
    #[must_use]
    pub fn resumes_from(&self) -> Option<u64> {
        self.resume.completed.last().map(|checkpoint| checkpoint.0)
    }

    /// The way to it while it runs.
    #[must_use]
    pub fn control(&self) -> JobControl {
        JobControl::new(self.events.clone(), self.desk.clone())
    }

    /// Keeps what its guests log there.
    pub(crate) fn log_to(&mut self, logs: Arc<Logs>) {
        self.logs = logs;
    }

    /// Runs the job to its end, on a tokio runtime with several threads.
    ///
    /// # Errors
    /// Where the job failed: the failure that the restart strategy did not allow to restart.
    pub async fn run(self) -> Result<Outcome, Problem> {
        let settings = JobSettings {
            graph: self.plan.graph.clone(),
            failover: self.spec.failover,
            checkpoint: self.spec.checkpoint.clone(),
            restart: self.spec.restart.strategy.clone(),
            is_merging_failures: self.spec.restart.is_merging_failures,
            escalates_after: self.spec.escalates_after,
            seed: self.seed,
        };
        let resumed_from = self.resume.completed.last().copied();
        let (core, first) = CoreJob::new(settings, self.resume);
        let (observer, history) = recorded(self.state_dir.as_deref(), &self.observer);
        let stats = Arc::new(Stats::default());
        let report = || WriterReport {
            events: self.events.clone(),
            observer: observer.clone(),
            stats: stats.clone(),
        };
        let (storage, thread) = StorageHandle::start(self.store, report()).map_err(|error| {
            Problem::new(Code::CannotStart, "start the storage thread").detail(error)
        })?;
        self.desk.look_with(storage.inspector());
        let graph = self.plan.graph.clone();
        let monitor = Monitor::new(&report(), storage, self.metrics, self.logs);
        let driver =
            Driver::new(self.plan, core, monitor, &report(), self.inbox, self.desk.clone());
        // On the runtime's own threads, next to the workers: a failure is answered without waking
        // another thread.
        let outcome = tokio::spawn(driver.run(first)).await;
        self.desk.close();
        let outcome = outcome.map_err(|panic| {
            let message = format!("the driver of the job panicked: {panic}");
            Problem::new(Code::HostBug, message)
        })?;
        // The driver's handle is gone, but blocking calls of tasks that have ended may still have
        // the store: joining waits for them.
        let store = tokio::task::spawn_blocking(move || thread.join()).await.ok().flatten();
        if let Outcome::Failed { task, cause, .. } = &outcome {
            observer.observe(Progress::failed(task.map(|task| graph.task_name(task)), cause));
        }
        drop(observer);
        if let Some(history) = history {
            history.join();
        }
        let ending = Ending {
            state_dir: self.state_dir.as_deref(),
            digest: &self.digest,
            claimed: self.claimed.as_deref(),
            retention: self.spec.retention,
            resumed_from,
            observer: &*self.observer,
        };
        let is_kept = ending.settle(&outcome, store, self.desk.last_saved());
        match outcome {
            Outcome::Failed { task, cause, checkpoint } => {
                let problem = failure(&graph, task, &cause);
                Err(problem.hint(next_step(&cause, checkpoint, is_kept, self.spec.retention)))
            }
            ended => Ok(ended),
        }
    }
}

/// Passes events on, and writes what belongs to the history into the state directory.
fn recorded(
    state_dir: Option<&Path>,
    observer: &Arc<dyn Observer>,
) -> (Arc<dyn Observer>, Option<history::Writer>) {
    match state_dir.map(|dir| Recorder::start(dir, observer.clone())) {
        Some(Ok((recorder, writer))) => (Arc::new(recorder), Some(writer)),
        Some(Err(error)) => {
            let message = format!("failures are not recorded: {error}");
            observer.observe(Progress::Warning { message });
            (observer.clone(), None)
        }
        None => (observer.clone(), None),
    }
}

/// What can be said of the job at once: the checkpoints that it keeps.
fn desk_of(store: &SnapshotStore, resume: &Resume) -> Result<Arc<Desk>, StorageError> {
    let desk = Arc::<Desk>::default();
    for checkpoint in &resume.completed {
        desk.keep(KeptCheckpoint::from(&store.manifest(checkpoint.0)?));
    }
    Ok(desk)
}
