//! From a checked spec to a running job: opens the state directory, and hands everything to the driver.

pub(crate) mod check;
mod component;
pub(crate) mod driver;
mod edges;
mod ending;
pub(crate) mod files;
mod fit;
mod granted;
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
    error::Error,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_connector::blocking::Blocking;
use cofferdam_core::{
    exchange::ExchangeType,
    ids::TaskId,
    job::{Event, Job as CoreJob, JobSettings, Outcome, Resume},
};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::JobSpec;
use cofferdam_store::{
    SnapshotStore, Storage, StorageError, memory::MemoryStorage, metadata::TaskIdentity,
};
use tokio::sync::mpsc;

pub use self::{
    check::CheckedJob,
    component::{describe, load_component, sandbox},
    granted::check_places,
    read_out::each_declared,
    resume::JobOptions,
};
use self::{
    driver::Driver,
    ending::{Ending, failure, next_step},
    files::{is_nothing_there, locals, open_store, partitions, storage_at},
    plan::{
        Plan, components_of, digest_of, identity, own_components, prepare_nodes, sources_of,
        untried,
    },
    restore::Restorable,
    resume::{Resumption, claim_outputs, look},
    state_dir::unusable_state,
    target::Tasks,
};
use crate::{
    storage::StorageHandle,
    task::reach::Reach,
    threads::Share,
    watch::{
        control::{JobControl, KeptCheckpoint, SavepointRequests},
        history::{self, Recorder},
        log::Logs,
        metrics::Metrics,
        monitor::{Monitor, Stats, WriterReport},
        progress::{Observer, Progress},
    },
};

impl CheckedJob {
    /// What the state of each of its tasks belongs to.
    fn identities(&self) -> Vec<TaskIdentity> {
        let tasks = self.spec.graph.tasks();
        tasks.iter().map(|task| identity(&self.spec, &self.operators, *task)).collect()
    }

    /// The same job with another parallelism, where its state can become that as far as is known before there is a
    /// checkpoint of its end. The components stay those that are loaded.
    pub(crate) fn rescaled(&self, parallelism: &BTreeMap<String, u32>) -> Result<Self, Problem> {
        let spec = self.spec.with_parallelism(parallelism)?;
        let other = Self::of(spec, self.operators.clone(), self.sandbox.clone())?;
        if [self, &other].iter().any(|it| it.spec.graph.has_exchange(ExchangeType::has_partition)) {
            return Err(Problem::new(Code::RequestRefused, "the job cannot be rescaled")
                .detail("its regions run one after the other, and have no state between them"));
        }
        let known = self.identities();
        for task in other.identities() {
            if let Some(known) = known.iter().find(|known| known.uid == task.uid) {
                cofferdam_core::fit::fit(&known.state(), &task.state(), false)
                    .map_err(|misfit| fit::problem_of(&misfit, known, &task))?;
            }
        }
        Ok(other)
    }

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
        let identities = self.identities();
        let nodes = prepare_nodes(&self.spec, &self.operators)?;
        let tasks = Tasks {
            spec: &self.spec,
            identities: &identities,
            locals: &BTreeMap::new(),
            sources: &sources_of(&self.spec, &nodes),
            components: &components_of(&self.spec, &self.operators),
            observer,
        };
        let state_dir = options.state_dir.as_deref().or_else(|| self.spec.storage.state_dir());
        if state_dir.map_or(Ok(false), state_dir::is_in_use)? {
            let mut restorable = restore::check_from(&tasks, from)?;
            restorable.warnings.push(
                "a run uses the state directory: its contents and the output can be checked only \
                 after that run has ended"
                    .to_owned(),
            );
            return Ok(Some(restorable));
        }
        let unusable = |error: &(dyn Error + 'static)| unusable_state(state_dir, error);
        let storage: Box<dyn Storage> = match state_dir {
            Some(dir) if is_nothing_there(&self.spec.storage, dir) => {
                Box::new(MemoryStorage::default())
            }
            _ => storage_at(&self.spec.storage, state_dir).map_err(|error| unusable(&error))?,
        };
        let digest = digest_of(&identities, &self.spec);
        let Resumption { chosen, .. } = look(&tasks, storage, state_dir, options, &digest)?;
        claim_outputs(&self.spec, &identities, &chosen, state_dir, options, true)?;
        let restorable = |metadata| restore::restorable(&tasks, metadata, chosen.warnings.clone());
        Ok(chosen.metadata.as_ref().map(restorable))
    }
}

/// A job that is ready to run: its state directory is locked, its store open.
pub struct Job {
    plan: Plan,
    spec: JobSpec,
    store: SnapshotStore,
    resume: Resume,
    lock: Option<Arc<File>>,
    /// What it began from and owns.
    claimed: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    seed: u64,
    observer: Arc<dyn Observer>,
    metrics: Arc<Metrics>,
    logs: Arc<Logs>,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
    requests: Arc<SavepointRequests>,
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
        Self::prepare_locked(checked, options, observer, None)
    }

    /// The same; where an earlier run of the job in this process has locked the state directory, that lock is kept.
    pub(crate) fn prepare_locked(
        checked: CheckedJob,
        options: &JobOptions,
        observer: Arc<dyn Observer>,
        lock: Option<Arc<File>>,
    ) -> Result<Self, Problem> {
        let identities = checked.identities();
        let CheckedJob { spec, operators, sandbox } = checked;
        let share = Share::new(options.weight, sandbox).map_err(|error| {
            Problem::new(Code::CannotStart, "cannot start the threads of guests").because(&error)
        })?;
        let tasks: Vec<TaskId> = spec.graph.tasks().into_iter().collect();
        let nodes = prepare_nodes(&spec, &operators)?;
        let state_dir = options.state_dir.as_deref().or_else(|| spec.storage.state_dir());
        let unusable = |error: &(dyn Error + 'static)| unusable_state(state_dir, error);
        let lock = locked(state_dir, lock)?;
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
        let outputs =
            claim_outputs(&spec, &identities, &resumption.chosen, state_dir, options, false)?;
        let Resumption { mut record, before, is_over, looked, chosen } = resumption;
        drop(looked);
        warn(&*observer, &chosen.warnings);
        before.mark(&record, state_dir).map_err(|error| unusable(&error))?;
        let locals = locals(&tasks, &identities, &spec, state_dir).map_err(|it| unusable(&it))?;
        let partitions = partitions(&spec, state_dir).map_err(|error| unusable(&error))?;
        targets.locals = &locals;
        let mut store = open_store(&spec, state_dir, &identities, is_over, options.faults.as_ref())
            .map_err(|error| unusable(&error))?;
        let own = own_components(&spec, &operators, &tasks, &identities);
        let untried = untried(&spec, &identities, &chosen, &locals, &own);
        let components = components_of(&spec, &operators).into_values().collect();
        store.set_components(components, Arc::new(own));
        let resume = restore::adopt(&targets, &mut store, &chosen)?;
        outputs.values().try_for_each(|output| output.begin())?;
        let begun_from = options.from.as_ref().and_then(|from| restore::absolute(&from.dir));
        if let Some(dir) = state_dir {
            record.begin(dir, chosen.lineage.job, begun_from).map_err(|error| unusable(&error))?;
        }
        let requests = savepoint_requests(&store, &resume).map_err(|error| unusable(&error))?;
        let mut plan = Plan::new(&spec, chosen.lineage.job, nodes, outputs, &operators, share);
        (plan.partitions, plan.locals, plan.untried) = (partitions, locals, untried);
        plan.reach = Arc::new(Reach::new(spec.files(), state_dir));
        let metrics = Arc::new(Metrics::of(spec.nodes.iter().map(|node| node.name.as_str())));
        let (events, inbox) = mpsc::unbounded_channel();
        Ok(Self {
            plan,
            store,
            resume,
            lock,
            claimed: options.claimed(),
            state_dir: state_dir.map(Path::to_owned),
            seed: options.seed,
            observer,
            metrics,
            logs: Arc::default(),
            events,
            inbox,
            requests,
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
        JobControl::new(self.events.clone(), self.requests.clone())
    }

    /// The lock of its state directory.
    pub(crate) fn lock(&self) -> Option<Arc<File>> {
        self.lock.clone()
    }

    /// Keeps what its guests log there.
    pub(crate) fn log_to(&mut self, logs: Arc<Logs>) {
        self.logs = logs;
    }

    /// Runs the job to its end, on the tokio runtime that calls it.
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
        let started = StorageHandle::start(self.store, report()).map_err(|error| {
            self.requests.close();
            Problem::new(Code::CannotStart, "cannot start the storage thread").because(&error)
        });
        let (storage, thread) = started?;
        self.requests.look_with(storage.inspector());
        let graph = self.plan.graph.clone();
        let monitor = Monitor::new(&report(), storage, self.metrics, self.logs);
        let (blocking, mut calls_ended) = Blocking::new();
        let requests = self.requests.clone();
        let driver =
            Driver::new(self.plan, core, monitor, &report(), self.inbox, requests, blocking);
        let outcome = tokio::spawn(driver.run(first)).await;
        self.requests.close();
        let outcome = outcome.map_err(|panic| {
            let message = format!("the driver of the job panicked: {panic}");
            Problem::new(Code::HostBug, message)
        })?;
        // The next run of the job takes over the directories of this one: nothing may still work in them.
        calls_ended.wait().await;
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
        let is_kept = ending.record(&outcome, store, self.requests.last_saved());
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
fn savepoint_requests(
    store: &SnapshotStore,
    resume: &Resume,
) -> Result<Arc<SavepointRequests>, StorageError> {
    let requests = Arc::<SavepointRequests>::default();
    for checkpoint in &resume.completed {
        requests.keep(KeptCheckpoint::from(&store.metadata(checkpoint.0)?));
    }
    Ok(requests)
}

/// Passes warnings on.
fn warn(observer: &dyn Observer, warnings: &[String]) {
    let warnings = warnings.iter().cloned();
    warnings.for_each(|message| observer.observe(Progress::Warning { message }));
}

/// The lock of a state directory: the one that is held already, or a new one.
fn locked(state_dir: Option<&Path>, held: Option<Arc<File>>) -> Result<Option<Arc<File>>, Problem> {
    match held {
        Some(lock) => Ok(Some(lock)),
        None => Ok(state_dir.map(state_dir::lock).transpose()?.map(Arc::new)),
    }
}
