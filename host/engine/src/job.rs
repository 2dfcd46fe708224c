//! From a checked spec to a running job: loads components, compares the ends of edges, opens the
//! state directory, and hands everything to the driver.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cofferdam_connector::{
    DEAD_LETTER,
    catalog::{Conflicts, Formats, NodeContext, OutputContext, SinkPlan, SourcePlan},
    identity::Id,
    source::DEAD_LETTER_OUTPUT,
};
use cofferdam_contract::{Description, Format, Port, StateDeclaration};
use cofferdam_core::{
    align::{Aligner, Barriers, Tracker},
    checkpoint::retention::End,
    exchange::ExchangeType,
    failure::{FailureCause, Obstacle},
    graph::{Edge, JobGraph, Partitioner},
    ids::{Attempt, CheckpointId, OperatorId, TaskId},
    job::{Event, Job as CoreJob, JobSettings, Outcome, Resume},
};
use cofferdam_files::resolved;
use cofferdam_sandbox::{
    Component, ComponentError, GuestError, Host, InstanceSetup, Level, Limits, Sandbox,
    SandboxError, SandboxOptions,
};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{
    InputSpec, JobSpec, NodeKind, NodeSpec, OperatorSpec, StateBackend, StorageSpec,
};
use cofferdam_store::{
    self, Storage, StorageError,
    declared::OwnKeys,
    faulty::Faults,
    manifest::{Manifest, StateIdentity, TaskIdentity},
    memory::MemoryStorage,
    sled::SledStorage,
    snapshot::{Found, SnapshotStore},
    table::Tables,
};
use tokio::sync::mpsc;
use twox_hash::XxHash3_64;

use crate::{
    clock::now_ms,
    control::{Desk, JobHandle, KeptCheckpoint},
    driver::{Driver, Stats, WriterReport},
    exchange::{link::Links, partition::Partitions},
    history::Recorder,
    metrics::{Metrics, OperatorMetrics},
    progress::{Observer, Progress},
    read_out::{OwnComponent, OwnComponents},
    rehearsal::Untried,
    restore::{self, Restorable, RestoreFrom},
    state::{
        keyed::{KeyedLimits, KeyedState},
        local::TaskLocal,
    },
    state_dir::{self, Ended, JobRecord},
    storage::StorageHandle,
    task::{
        Processed,
        node::{Node, Work},
        operator::OperatorTask,
    },
};

/// What the manifest does not say.
#[derive(Debug, Clone, Default)]
pub struct JobOptions {
    /// Where the state is, instead of where the manifest says.
    pub state_dir: Option<PathBuf>,
    /// Seeds jitter and the first checkpoint.
    pub seed: u64,
    /// What to begin from, instead of the newest checkpoint of the state directory.
    pub from: Option<RestoreFrom>,
    /// Runs a job anew that has finished.
    pub again: bool,
    /// Ways out of conflicts between the state and the output.
    pub conflicts: Conflicts,
    /// Makes the storage fail, for tests of what follows from that.
    pub faults: Option<Faults>,
}

/// A job whose manifest and components fit together. Nothing runs yet, nothing was written.
#[derive(Clone)]
pub struct CheckedJob {
    /// The spec, with every output resolved.
    pub spec: JobSpec,
    operators: BTreeMap<OperatorId, CheckedOperator>,
}

/// An operator whose component was loaded and asked what it is.
#[derive(Clone)]
struct CheckedOperator {
    component: Component,
    description: Description,
}

/// In the state directory: tables of the state that the host keeps while the job runs.
const WORKING: &str = "working";
/// And the results of exchanges that are not pipelined.
const PARTITIONS: &str = "partitions";
/// And what file sinks have committed.
const OUTPUTS: &str = "outputs";

/// What is needed to build the workers of an attempt.
pub(crate) struct Plan {
    /// The job's name.
    pub(crate) job: String,
    /// Of the job alone.
    secret: [u8; 32],
    pub(crate) graph: JobGraph,
    nodes: Vec<NodePlan>,
    slots: BTreeMap<TaskId, usize>,
    /// By operator and output: whether its records have keys.
    outputs: Vec<Arc<[bool]>>,
    pub(crate) is_exactly_once: bool,
    /// When a barrier overtakes; see [`CheckpointSettings::unaligned_after_ms`].
    pub(crate) unaligned_after: Option<Duration>,
    /// See [`JobSpec::backlog_lag_ms`].
    pub(crate) backlog_lag_ms: Option<u64>,
    /// The channels of approximate exchanges.
    pub(crate) links: Links,
    /// Where the results of exchanges that are not pipelined lie, if there are any.
    pub(crate) partitions: Option<Arc<Partitions>>,
    /// What this process keeps of each task between its attempts.
    pub(crate) locals: BTreeMap<TaskId, Arc<TaskLocal>>,
    /// The tasks whose declared state is to be read out for a trial.
    pub(crate) untried: Vec<Untried>,
}

enum NodePlan {
    Source(Arc<dyn SourcePlan>),
    Operator {
        name: String,
        uid: String,
        component: Component,
        spec: Arc<OperatorSpec>,
        has_states: bool,
        /// See [`OperatorTask::tracks_changes`].
        tracks_changes: bool,
        /// See [`OperatorTask::expects_snapshots`].
        expects_snapshots: bool,
        /// See [`dead_letter_output`].
        dead_letter_output: u32,
        /// Records come by their key.
        is_keyed: bool,
    },
    Sink {
        /// Once its output is claimed.
        plan: Option<Arc<dyn SinkPlan>>,
    },
}

impl Plan {
    /// A task's number in the checkpoints.
    pub(crate) fn slot(&self, task: TaskId) -> usize {
        self.slots[&task]
    }

    /// How a task treats barriers that begins after a checkpoint was given up.
    pub(crate) fn barriers(&self, channels: usize, given_up: Option<CheckpointId>) -> Barriers {
        let channels = u32::try_from(channels).unwrap_or(u32::MAX);
        let mut barriers = match self.is_exactly_once {
            true => Barriers::Aligned(Aligner::new(channels)),
            false => Barriers::Tracked(Tracker::new(channels)),
        };
        if let Some(checkpoint) = given_up {
            barriers.begin_after(checkpoint);
        }
        barriers
    }

    pub(crate) fn node(&self, task: TaskId, attempt: Attempt) -> Node {
        let work = match &self.nodes[task.operator.0 as usize] {
            NodePlan::Source(plan) => Work::Source { plan: plan.clone(), source: None },
            NodePlan::Sink { plan } => Work::Sink { plan: plan.clone(), sink: None },
            NodePlan::Operator {
                name,
                uid,
                component,
                spec,
                has_states,
                tracks_changes,
                expects_snapshots,
                dead_letter_output,
                is_keyed,
            } => Work::Operator(Box::new(OperatorTask {
                name: name.clone(),
                component: component.clone(),
                spec: spec.clone(),
                has_states: *has_states,
                tracks_changes: *tracks_changes,
                expects_snapshots: *expects_snapshots,
                own_keys: own_keys(&self.graph, task, *is_keyed, spec.max_parallelism),
                random_seed: self.random_seed(uid, task.index),
                restored_from: 0,
                instance: None,
                dead_letter_output: *dead_letter_output,
                processed: Processed::default(),
                guard: None,
                unsaved: Vec::new(),
            })),
        };
        Node {
            task,
            slot: self.slots[&task],
            attempt,
            parallelism: self.graph.operator(task.operator).parallelism,
            work,
            targets: Vec::new(),
            local: self.locals[&task].clone(),
            is_drained: false,
            outputs: self.outputs[task.operator.0 as usize].clone(),
        }
    }

    /// What a task's guest gets for random numbers is a function of the job, the operator and the task.
    fn random_seed(&self, uid: &str, index: u32) -> u64 {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(uid.as_bytes()).update(&index.to_le_bytes());
        let hash = hasher.finalize();
        hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// Without records for so long a source holds event time back no longer.
    pub(crate) fn idle_after(&self, operator: OperatorId) -> Option<Duration> {
        match &self.nodes[operator.0 as usize] {
            NodePlan::Source(source) => source.idle_after(),
            NodePlan::Operator { .. } | NodePlan::Sink { .. } => None,
        }
    }

    /// How many bytes a result partition of an operator may have. Sources are the host's own.
    pub(crate) fn partition_bytes_max(&self, operator: OperatorId) -> u64 {
        match &self.nodes[operator.0 as usize] {
            NodePlan::Operator { spec, .. } => spec.limits.partition_bytes_max,
            NodePlan::Source(_) | NodePlan::Sink { .. } => u64::MAX,
        }
    }

    /// The number of key groups by which records are sent to an operator.
    pub(crate) fn max_parallelism(&self, operator: OperatorId) -> u32 {
        match &self.nodes[operator.0 as usize] {
            NodePlan::Operator { spec, .. } => spec.max_parallelism,
            // Sinks keep no state by key: any number will do, as long as it stays the same.
            NodePlan::Source(_) | NodePlan::Sink { .. } => 1 << 15,
        }
    }
}

impl CheckedJob {
    /// Loads every component and compares both ends of every edge.
    ///
    /// # Errors
    /// All that is wrong: the first problem, with the others behind it.
    pub async fn new(mut spec: JobSpec, sandbox: &Sandbox) -> Result<Self, Problem> {
        let all = |problems: Vec<Problem>| Problem::all(problems).map_or(Ok(()), Err);
        let mut problems = Vec::new();
        problems.extend(check_approximate(&spec).err());
        problems.extend(check_outputs(&spec).err());
        let mut operators = BTreeMap::new();
        for (id, node) in (0..).map(OperatorId).zip(&spec.nodes) {
            if let NodeKind::Operator(operator) = &node.kind {
                match load(sandbox, &node.name, operator).await {
                    Ok(loaded) => drop(operators.insert(id, loaded)),
                    Err(problem) => problems.push(problem),
                }
            }
        }
        all(problems)?;
        let mut problems = Vec::new();
        problems.extend(check_dead_letters(&spec, &operators).err());
        problems.extend(check_snapshots(&spec, &operators).err());
        let edges = resolve_edges(&spec, &operators).map_err(|problem| problems.push(problem));
        all(problems)?;
        let edges = edges.unwrap_or_default();
        let nodes = spec.graph.operators().map(|(_, operator)| operator.clone()).collect();
        spec.graph = JobGraph::new(nodes, edges).map_err(|error| {
            Problem::new(Code::HostBug, format!("a graph that was checked is wrong: {error:?}"))
        })?;
        Ok(Self { spec, operators })
    }

    /// What its components make of the manifest, and people should know before the state is written.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for (id, operator) in &self.operators {
            let (node, states) = (self.spec.node(*id), &operator.description.states);
            if !states.is_empty() && !self.spec.is_keyed(*id) {
                warnings.push(format!(
                    "operator \"{}\" has declared state, and its records do not come by their key \
                     (partition = \"hash\"): the state stays with its task, and the parallelism cannot be \
                     changed later",
                    node.name
                ));
            }
            if let NodeKind::Operator(spec) = &node.kind
                && states.is_empty()
                && !spec.snapshot.has_memory()
            {
                warnings.push(format!(
                    "operator \"{}\" declares no state, and snapshot = \"declared\" keeps nothing else: what it \
                     has in its memory is lost with every restart",
                    node.name
                ));
            }
        }
        warnings
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
        let tasks = self.spec.graph.tasks();
        let identity = |task: &TaskId| identity(&self.spec, &self.operators, *task);
        let identities: Vec<TaskIdentity> = tasks.iter().map(identity).collect();
        let nodes = prepare_nodes(&self.spec, &self.operators)?;
        let tasks = restore::Tasks {
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

    /// Each operator's name with what its component says it is.
    pub fn descriptions(&self) -> impl Iterator<Item = (&str, &Description)> {
        self.operators
            .iter()
            .map(|(id, operator)| (self.spec.node(*id).name.as_str(), &operator.description))
    }
}

/// Refuses directories that two sinks, or a sink and the state, would write to.
fn check_outputs(spec: &JobSpec) -> Result<(), Problem> {
    let mut known: Vec<(&str, PathBuf)> = Vec::new();
    let state_dir = spec.storage.state_dir().map(resolved);
    for node in &spec.nodes {
        let NodeKind::Sink(sink) = &node.kind else { continue };
        let Some(path) = sink.directory() else { continue };
        let dir = resolved(path);
        if let Some((other, _)) = known.iter().find(|(_, other)| *other == dir) {
            let message =
                format!("sinks \"{other}\" and \"{}\" write to the same directory", node.name);
            return Err(Problem::new(Code::OutputTaken, message)
                .detail(path.display())
                .hint("give each its own path"));
        }
        if state_dir.as_ref().is_some_and(|state_dir| dir.starts_with(state_dir)) {
            let message = format!("sink \"{}\" writes to the job's state directory", node.name);
            return Err(Problem::new(Code::OutputTaken, message)
                .detail(path.display())
                .hint("choose a path outside of it"));
        }
        known.push((&node.name, dir));
    }
    Ok(())
}

/// Refuses what does not go together with exchanges that may lose records.
fn check_approximate(spec: &JobSpec) -> Result<(), Problem> {
    let mut edges = spec.graph.edges().iter();
    let Some(edge) = edges.find(|edge| edge.exchange.is_approximate()) else { return Ok(()) };
    let is_batch = spec.graph.has_exchange(ExchangeType::has_partition);
    let (other, hint) = match spec.checkpoint.unaligned_after_ms {
        Some(_) => {
            let hint = "what a checkpoint holds of the channels would be missing or come twice; set `execution.checkpointing.unaligned.enabled = false`";
            ("unaligned checkpoints", hint)
        }
        None if is_batch => {
            let hint = "a job that runs region by region has no checkpoints to go on from; use \"pipelined-bounded\" or \"blocking\"";
            ("exchanges that are not pipelined", hint)
        }
        None => return Ok(()),
    };
    let node = spec.node(edge.to);
    let place = node.inputs.get(edge.input as usize).map_or("", |input| &input.place);
    let message = format!(
        "the exchange \"{}\" between \"{}\" and \"{}\" does not go together with {other}",
        edge.exchange.name(),
        spec.node(edge.from).name,
        node.name
    );
    Err(Problem::new(Code::Excluded, message).detail(place).hint(hint))
}

/// Sets up the sandbox of a program.
///
/// # Errors
/// Where the engine does not work on this machine, or the cache cannot be made.
pub fn sandbox(cache_dir: Option<PathBuf>) -> Result<Sandbox, Problem> {
    let options = SandboxOptions { cache_dir, ..SandboxOptions::default() };
    Sandbox::new(options).map_err(|error| {
        let problem = Problem::new(Code::CannotStart, error.to_string());
        match error {
            SandboxError::Cache { source, .. } => {
                problem.detail(source).hint("set --cache-dir to a directory of your own")
            }
            _ => problem,
        }
    })
}

async fn load(
    sandbox: &Sandbox,
    name: &str,
    spec: &OperatorSpec,
) -> Result<CheckedOperator, Problem> {
    let component = load_component(sandbox, name, &spec.component)?;
    let description = describe(&component, name)
        .await
        .map_err(|problem| problem.detail(spec.component.display()))?;
    Ok(CheckedOperator { component, description })
}

/// Asks a component what it is.
///
/// # Errors
/// Where it traps or exceeds the default limits instead of answering.
pub async fn describe(component: &Component, name: &str) -> Result<Description, Problem> {
    let setup = InstanceSetup { host: Arc::new(QuietHost), limits: Limits::default(), seed: 0 };
    let description = component.describe(setup).await.map_err(|error| match error {
        GuestError::Unavailable(_) => {
            Problem::new(Code::CannotStart, format!("operator \"{name}\" cannot be instantiated"))
                .detail(error)
        }
        error => {
            Problem::new(Code::OtherWorld, format!("operator \"{name}\" cannot say what it is"))
                .detail(error)
        }
    })?;
    check_description(&description).map_err(|what| {
        let message = format!("operator \"{name}\" describes itself as nothing that can be");
        Problem::new(Code::OtherWorld, message)
            .detail(what)
            .hint("#[operator] makes a description that can be; build the component with it")
    })?;
    Ok(description)
}

/// How many inputs, outputs or states an operator may describe, and how long their names may be.
const DESCRIBED_MAX: usize = 1_024;
const NAME_BYTES_MAX: usize = 256;
const SCHEMA_BYTES_MAX: usize = 64 << 10;

/// What the contract promises of a description holds, whoever has made it.
fn check_description(description: &Description) -> Result<(), String> {
    let ports = |ports: &[Port]| ports.iter().map(|port| port.name.clone()).collect::<Vec<_>>();
    let states = &description.states;
    for (what, names) in [
        ("input", ports(&description.inputs)),
        ("output", ports(&description.outputs)),
        ("state", states.iter().map(|state| state.name.clone()).collect()),
    ] {
        if DESCRIBED_MAX < names.len() {
            return Err(format!("it has {} {what}s, and may have {DESCRIBED_MAX}", names.len()));
        }
        let mut known = BTreeSet::new();
        for name in names {
            let is_usable = !name.is_empty()
                && name.len() <= NAME_BYTES_MAX
                && !name.chars().any(|c| c.is_control() || c == '.');
            if !is_usable {
                return Err(format!("{what} cannot be called {name:.64?}"));
            }
            if !known.insert(name.clone()) {
                return Err(format!("two {what}s have the name {name:?}"));
            }
        }
    }
    if description.inputs.is_empty() {
        return Err("it has no input".to_owned());
    }
    let mut origins = BTreeSet::new();
    for state in states {
        if SCHEMA_BYTES_MAX < state.schema.len() {
            return Err(format!("the schema of state {:?} is too long", state.name));
        }
        let Some(origin) = &state.renamed_from else { continue };
        if states.iter().any(|other| other.name == *origin) || !origins.insert(origin) {
            return Err(format!("two states claim what was called {origin:.64?}"));
        }
    }
    Ok(())
}

/// Reads and checks one component.
///
/// # Errors
/// What is wrong with the file, with a code for each kind.
pub fn load_component(sandbox: &Sandbox, name: &str, path: &Path) -> Result<Component, Problem> {
    let bytes = fs::read(path).map_err(|error| {
        Problem::new(Code::ComponentUnreadable, format!("cannot read the component of operator \"{name}\""))
            .detail(format!("{}: {error}", path.display()))
            .hint("build it first: `cofferdam build DIR`; relative paths begin at the manifest's directory")
    })?;
    sandbox.load(&bytes).map_err(|error| {
        let (code, hint) = match &error {
            ComponentError::NotWasm { .. } | ComponentError::Malformed { .. } => {
                (Code::NotAComponent, "build it again: `cofferdam build DIR`")
            }
            ComponentError::CoreModule => {
                (Code::NotAComponent, "build it for wasm32-wasip2, which makes components: `cofferdam build DIR`")
            }
            ComponentError::Unsound(_) => (
                Code::CannotCheckpoint,
                "a snapshot holds linear memory and numeric globals; docs/errors.md lists what lies outside",
            ),
            ComponentError::Import { .. } => {
                (Code::OtherWorld, "an operator gets logging, metrics, clocks, randomness and standard output: no files, no network")
            }
            _ => (Code::OtherWorld, "an operator is a crate with one #[operator]; see `cofferdam new`"),
        };
        Problem::new(code, format!("the component of operator \"{name}\" cannot be used: {error}"))
            .detail(path.display())
            .hint(hint)
    })
}

fn formats_of(port: &Port) -> Formats {
    Formats { key: port.key, value: port.value }
}

fn resolve_edges(
    spec: &JobSpec,
    operators: &BTreeMap<OperatorId, CheckedOperator>,
) -> Result<Vec<Edge>, Problem> {
    let mut edges = spec.graph.edges().to_vec();
    for (to, node) in (0..).map(OperatorId).zip(&spec.nodes) {
        let declared = operators.get(&to).map_or(1, |operator| operator.description.inputs.len());
        if 1 < declared && declared != node.inputs.len() {
            let message = format!(
                "operator \"{}\" has {declared} inputs, the manifest gives it {}",
                node.name,
                node.inputs.len()
            );
            let ports = operators.get(&to).map(|operator| port_names(&operator.description.inputs));
            return Err(Problem::new(Code::BadValue, message)
                .detail(format!("its inputs, in order: {}", ports.unwrap_or_default())));
        }
        for (place, input) in (0u32..).zip(&node.inputs) {
            let Some(edge) = edges.iter_mut().find(|edge| edge.to == to && edge.input == place)
            else {
                continue;
            };
            // An operator with one input takes the records of all its edges through it.
            let (output, produced) =
                output_of(spec, operators, input.from, input.output.as_deref())?;
            edge.output = output;
            edge.input = if declared == 1 { 0 } else { place };
            let producer = &spec.node(input.from).name;
            check_edge(producer, node, operators.get(&to), edge, &produced)?;
        }
    }
    Ok(edges)
}

/// By output: whether its records have keys. The last one is that of dead letters.
fn keyed_outputs(node: &NodeSpec, operator: Option<&CheckedOperator>) -> Arc<[bool]> {
    let declared: Vec<bool> = match (&node.kind, operator) {
        (NodeKind::Source(source), _) => vec![source.formats().key.is_some()],
        (_, Some(operator)) => {
            operator.description.outputs.iter().map(|port| port.key.is_some()).collect()
        }
        _ => return Arc::new([]),
    };
    declared.into_iter().chain([false]).collect()
}

/// The host's own output, behind those of the component.
fn dead_letter_output(description: &Description) -> u32 {
    u32::try_from(description.outputs.len()).unwrap_or(u32::MAX)
}

fn has_dead_letters(spec: &JobSpec, id: OperatorId) -> bool {
    match &spec.node(id).kind {
        NodeKind::Operator(operator) => operator.dead_letter_after.is_some(),
        NodeKind::Source(source) => source.has_dead_letters(),
        NodeKind::Sink(_) => false,
    }
}

/// Isolated records must go somewhere, and nowhere else.
fn check_dead_letters(
    spec: &JobSpec,
    operators: &BTreeMap<OperatorId, CheckedOperator>,
) -> Result<(), Problem> {
    let nodes = (0..).map(OperatorId).zip(&spec.nodes);
    for (id, node) in nodes.filter(|(id, _)| has_dead_letters(spec, *id)) {
        let name = &node.name;
        let outputs = operators.get(&id).map(|operator| &operator.description.outputs);
        if outputs.into_iter().flatten().any(|port| port.name == DEAD_LETTER) {
            let message = format!("operator \"{name}\" has an output \"{DEAD_LETTER}\" of its own");
            return Err(Problem::new(Code::BadValue, message)
                .hint("leave on-trap out, or name that output otherwise"));
        }
        let takes =
            |input: &InputSpec| input.from == id && input.output.as_deref() == Some(DEAD_LETTER);
        if !spec.nodes.iter().flat_map(|node| &node.inputs).any(takes) {
            let message = format!("nothing takes the dead letters of \"{name}\"");
            return Err(Problem::new(Code::BadValue, message)
                .hint(format!("give a sink inputs = [\"{name}.{DEAD_LETTER}\"]")));
        }
    }
    Ok(())
}

/// State that the host keeps must be in the checkpoints.
fn check_snapshots(
    spec: &JobSpec,
    operators: &BTreeMap<OperatorId, CheckedOperator>,
) -> Result<(), Problem> {
    if spec.state_backend == StateBackend::Hashmap {
        return Ok(());
    }
    for (id, checked) in operators {
        let node = spec.node(*id);
        if let NodeKind::Operator(operator) = &node.kind
            && !operator.snapshot.has_declared()
            && !checked.description.states.is_empty()
        {
            let message =
                format!("the checkpoints of operator \"{}\" would miss its state", node.name);
            return Err(Problem::new(Code::BadValue, message)
                .detail("with state.backend.type = \"sled\" the host keeps declared state, and snapshot = \"memory\" leaves it out")
                .hint("set snapshot = \"both\" or \"declared\""));
        }
    }
    Ok(())
}

fn port_names(ports: &[Port]) -> String {
    ports.iter().map(|port| port.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn output_of(
    spec: &JobSpec,
    operators: &BTreeMap<OperatorId, CheckedOperator>,
    from: OperatorId,
    name: Option<&str>,
) -> Result<(u32, Formats), Problem> {
    let node = spec.node(from);
    let unknown = |known: String| {
        let message = format!("\"{}\" has no output \"{}\"", node.name, name.unwrap_or_default());
        Problem::new(Code::UnknownInput, message).hint(format!("its outputs: {known}"))
    };
    let Some(operator) = operators.get(&from) else {
        let NodeKind::Source(source) = &node.kind else { return Err(unknown(String::new())) };
        let has_letters = has_dead_letters(spec, from);
        if name == Some(DEAD_LETTER) && has_letters {
            return Ok((DEAD_LETTER_OUTPUT, Formats { key: None, value: Format::Json }));
        }
        if name.is_some_and(|name| name != "out") {
            let known = if has_letters { format!("out, {DEAD_LETTER}") } else { "out".to_owned() };
            return Err(unknown(known));
        }
        return Ok((0, source.formats()));
    };
    let outputs = &operator.description.outputs;
    if name == Some(DEAD_LETTER) && has_dead_letters(spec, from) {
        let output = dead_letter_output(&operator.description);
        return Ok((output, Formats { key: None, value: Format::Json }));
    }
    let found = (0u32..).zip(outputs).find(|(_, port)| name.is_none_or(|name| name == port.name));
    found
        .map(|(output, port)| (output, formats_of(port)))
        .ok_or_else(|| unknown(port_names(outputs)))
}

fn check_edge(
    producer: &str,
    node: &NodeSpec,
    operator: Option<&CheckedOperator>,
    edge: &Edge,
    produced: &Formats,
) -> Result<(), Problem> {
    if edge.partitioner == Partitioner::Hash && produced.key.is_none() {
        let message = format!(
            "the edge from \"{producer}\" to \"{}\" is by hash, but its records have no key",
            node.name
        );
        return Err(Problem::new(Code::HashWithoutKey, message).hint(
            "emit a key, let the source take one from a field, or use partition = \"rebalance\"",
        ));
    }
    let mismatch = |what: &str, out: Option<Format>, into: Option<Format>| {
        let message =
            format!("\"{producer}\" and \"{}\" disagree on the format of {what}", node.name);
        Problem::new(Code::FormatMismatch, message).detail(format!(
            "\"{producer}\" gives {}, \"{}\" takes {}",
            format_name(out),
            node.name,
            format_name(into)
        ))
    };
    let fits =
        |out: Format, into: Format| into == Format::Bytes || out == Format::Bytes || out == into;
    if let Some(operator) = operator {
        let port = &operator.description.inputs[edge.input as usize];
        if !fits(produced.value, port.value) {
            return Err(mismatch("values", Some(produced.value), Some(port.value)));
        }
        return match (produced.key, port.key) {
            (_, None) => Ok(()),
            (Some(out), Some(into)) if fits(out, into) => Ok(()),
            (out, into) => Err(mismatch("keys", out, into)),
        };
    }
    let NodeKind::Sink(sink) = &node.kind else { return Ok(()) };
    if !sink.takes(produced.value) {
        return Err(mismatch("values", Some(produced.value), Some(Format::Text)).hint(
            "values leave a job as Text or Json: change the type `Out` of the last operator",
        ));
    }
    Ok(())
}

fn format_name(format: Option<Format>) -> &'static str {
    match format {
        None => "none",
        Some(Format::Bytes) => "bytes",
        Some(Format::Text) => "text",
        Some(Format::Json) => "json",
        Some(Format::Postcard) => "postcard",
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
        let ids = (0..).map(OperatorId).zip(&spec.nodes);
        let keyed = ids.map(|(id, node)| keyed_outputs(node, operators.get(&id))).collect();
        let state_dir = options.state_dir.as_deref().or(spec.storage.state_dir());
        let state_dir = state_dir.map(Path::to_owned);
        let unusable = |error: &dyn std::fmt::Display| unusable_state(state_dir.as_deref(), error);
        let lock = state_dir.as_deref().map(state_dir::lock).transpose()?;
        let digest = digest_of(&identities, &spec);
        let open = || open_storage(&spec.storage, state_dir.as_deref());
        let mut targets = restore::Tasks {
            spec: &spec,
            identities: &identities,
            locals: &BTreeMap::new(),
            sources: &sources_of(&spec, &nodes),
            components: &components_of(&spec, &operators),
            observer: &*observer,
        };
        // A refused run leaves everything as it was: what is there is looked at before it is opened.
        let storage = storage_at(&spec.storage, state_dir.as_deref());
        let storage = storage.map_err(|error| unusable(&error))?;
        let resumption = look(&targets, storage, state_dir.as_deref(), options, &digest)?;
        let Resumption { mut record, before, is_over, looked, chosen } = resumption;
        // Everything that may be refused is refused by now, or here.
        let mut outputs =
            claim_outputs(&spec, &identities, &chosen, state_dir.as_deref(), options, false)?;
        for message in &chosen.warnings {
            observer.observe(Progress::Warning { message: message.clone() });
        }
        drop(looked);
        // Before an output is said to be this job's.
        if let Some(dir) = &state_dir
            && matches!(before, Before::Nothing)
        {
            record.write(dir).map_err(|error| unusable(&error))?;
        }
        let locals = locals(&tasks, &identities, &spec, state_dir.as_deref())
            .map_err(|error| unusable(&error))?;
        let partitions =
            partitions(&spec, state_dir.as_deref()).map_err(|error| unusable(&error))?;
        targets.locals = &locals;
        let storage = open().map_err(|error| unusable(&error))?;
        let storage = match is_over {
            true => {
                let (over, _) = SnapshotStore::open(storage, &spec.name, identities.clone())
                    .map_err(|error| unusable(&error))?;
                over.clear().and_then(|()| open()).map_err(|error| unusable(&error))?
            }
            false => storage,
        };
        let storage = match &options.faults {
            Some(faults) => faults.around(storage),
            None => storage,
        };
        let (mut store, _) = SnapshotStore::open(storage, &spec.name, identities.clone())
            .map_err(|error| unusable(&error))?;
        store.compress(spec.is_compressing);
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
        if let Some(dir) = &state_dir {
            record.job = chosen.lineage.job;
            if let Some(from) = &options.from {
                record.begun_from = restore::absolute(&from.dir);
            }
            record.write(dir).map_err(|error| unusable(&error))?;
        }
        let desk = Arc::<Desk>::default();
        for checkpoint in &resume.completed {
            let manifest = store.manifest(checkpoint.0).map_err(|error| unusable(&error))?;
            desk.keep(KeptCheckpoint::from(&manifest));
        }
        let slots = tasks.iter().copied().zip(0..).collect();
        let metrics = Metrics {
            operators: spec.nodes.iter().map(|node| OperatorMetrics::new(&node.name)).collect(),
            ..Metrics::default()
        };
        let (events, inbox) = mpsc::unbounded_channel();
        let (graph, is_exactly_once) = (spec.graph.clone(), spec.is_exactly_once);
        let job = spec.name.clone();
        let unaligned_after = spec.checkpoint.unaligned_after_ms.map(Duration::from_millis);
        Ok(Self {
            plan: Plan {
                job,
                secret: *blake3::hash(chosen.lineage.job.bytes()).as_bytes(),
                graph,
                nodes,
                slots,
                outputs: keyed,
                is_exactly_once,
                unaligned_after,
                backlog_lag_ms: spec.backlog_lag_ms,
                links: Links::default(),
                partitions,
                locals,
                untried,
            },
            spec,
            store,
            resume,
            _lock: lock,
            claimed: options.from.as_ref().filter(|from| from.claim).map(|from| from.dir.clone()),
            state_dir,
            seed: options.seed,
            observer,
            metrics: Arc::new(metrics),
            events,
            inbox,
            desk,
            digest,
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

    /// The checkpoint it goes on from.
    #[must_use]
    pub fn resumes_from(&self) -> Option<u64> {
        self.resume.completed.last().map(|checkpoint| checkpoint.0)
    }

    /// The way to it while it runs.
    #[must_use]
    pub fn handle(&self) -> JobHandle {
        JobHandle::new(self.events.clone(), self.desk.clone())
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
        let recorder =
            self.state_dir.as_deref().map(|dir| Recorder::start(dir, self.observer.clone()));
        let (observer, history): (Arc<dyn Observer>, _) = match recorder {
            Some(Ok((recorder, writer))) => (Arc::new(recorder), Some(writer)),
            Some(Err(error)) => {
                let message = format!("failures are not written down: {error}");
                self.observer.observe(Progress::Warning { message });
                (self.observer.clone(), None)
            }
            None => (self.observer.clone(), None),
        };
        let stats = Arc::new(Stats::default());
        let report = || WriterReport {
            events: self.events.clone(),
            observer: observer.clone(),
            stats: stats.clone(),
        };
        let (storage, thread) = StorageHandle::start(self.store, report()).map_err(|error| {
            Problem::new(Code::CannotStart, "start the storage thread").detail(error)
        })?;
        let graph = self.plan.graph.clone();
        let desk = self.desk.clone();
        let driver =
            Driver::new(self.plan, core, storage, &report(), self.inbox, self.metrics, self.desk);
        // On the runtime's own threads, next to the workers: a failure is answered without waking
        // another thread.
        let outcome = match tokio::spawn(driver.run(first)).await {
            Ok(outcome) => outcome,
            Err(panic) => {
                let message = format!("the driver of the job panicked: {panic}");
                return Err(Problem::new(Code::HostBug, message));
            }
        };
        desk.close();
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
        let end = end_of(&outcome);
        let noted = match self.state_dir.as_deref() {
            Some(dir) => note_end(dir, &outcome, &self.digest, desk.last_saved()),
            None => Ok(()),
        };
        if let Err(error) = &noted {
            // Without its last checkpoint the next run would begin anew.
            let message = format!(
                "the end of the job could not be recorded: {error}; its last checkpoint is kept, and the \
                 next run resumes from it"
            );
            self.observer.observe(Progress::Warning { message });
        }
        // What this run has added nothing to is not its own to remove: it may not even fit.
        let is_untouched = matches!(
            &outcome,
            Outcome::Failed { checkpoint, .. } if checkpoint.is_some() && *checkpoint == resumed_from
        );
        let is_needed = is_untouched || noted.is_err();
        let is_kept = is_needed || end.is_none_or(|end| self.spec.retention.keeps(end));
        if let Some(claimed) = self.claimed.filter(|_| !is_needed)
            && let Err(error) = remove_claimed(&claimed)
        {
            let message = format!("remove {}, which was claimed: {error}", claimed.display());
            self.observer.observe(Progress::Warning { message });
        }
        if !is_kept
            && let Some(store) = store
            && let Err(error) = store.clear()
        {
            let message = format!("remove the state of the job: {error}");
            self.observer.observe(Progress::Warning { message });
        }
        match outcome {
            Outcome::Failed { task, cause, checkpoint } => {
                let problem = failure(&graph, task, &cause);
                let first = match &cause {
                    FailureCause::Permanent { obstacle, .. } => remedy(*obstacle),
                    _ => "",
                };
                Err(problem.hint(match checkpoint {
                    Some(id) if is_kept && !first.is_empty() => {
                        format!("{first}; then run it again, and it goes on from checkpoint {id}")
                    }
                    None if !first.is_empty() => format!("{first}; then run it again"),
                    Some(id) if is_kept => {
                        format!("run it again and it goes on from checkpoint {id}")
                    }
                    Some(_) => format!(
                        "its checkpoints were removed, as externalized-checkpoint-retention = \"{}\" says; \
                         with RETAIN_ON_CANCELLATION they are kept",
                        self.spec.retention.name()
                    ),
                    None => "no checkpoint was completed: run again, it begins anew".to_owned(),
                }))
            }
            ended => Ok(ended),
        }
    }
}

/// What helps before a job is run again; to run it again alone does not.
fn remedy(obstacle: Obstacle) -> &'static str {
    match obstacle {
        Obstacle::InputChanged => "put the files back as they were",
        Obstacle::BadRecord => {
            "correct the record, or choose what becomes of such ones with on-bad-record"
        }
        Obstacle::OpenRefused => "correct the operator's config",
        Obstacle::ForeignKey => "correct the operator",
        Obstacle::OutputTaken => "put the part back, or use an older checkpoint or savepoint",
        Obstacle::StateMismatch => "put back what was changed",
        Obstacle::StoreDamaged => "restore the state directory from a copy",
        // What is there is read again.
        Obstacle::StoreInDoubt => "",
    }
}

/// Writes down how a job has ended, before its state is removed: it must not begin by itself again.
fn note_end(
    dir: &Path,
    outcome: &Outcome,
    digest: &str,
    savepoint: Option<PathBuf>,
) -> io::Result<()> {
    let at_ms = now_ms();
    let ended = match outcome {
        Outcome::Finished => Ended::Finished { at_ms, digest: digest.to_owned() },
        Outcome::Stopped { has_savepoint: true, .. } => Ended::Stopped { at_ms, savepoint },
        _ => return Ok(()),
    };
    let Some(mut record) = JobRecord::read(dir)? else { return Ok(()) };
    record.ended = Some(ended);
    record.write(dir)
}

/// Flink's terminal status; none for a job that was only interrupted and resumes by itself.
fn end_of(outcome: &Outcome) -> Option<End> {
    match outcome {
        Outcome::Finished | Outcome::Stopped { has_savepoint: true, .. } => Some(End::Finished),
        Outcome::Stopped { has_savepoint: false, .. } => None,
        Outcome::Canceled { .. } => Some(End::Canceled),
        Outcome::Failed { .. } => Some(End::Failed),
    }
}

fn failure(graph: &JobGraph, task: Option<TaskId>, cause: &FailureCause) -> Problem {
    let who = task.map_or("the job".to_owned(), |task| format!("task {}", graph.task_name(task)));
    let problem = Problem::new(cause.into(), format!("{who} {cause}"));
    match cause {
        FailureCause::Trap { backtrace, .. } => {
            backtrace.iter().fold(problem, |problem, frame| problem.detail(format!("in {frame}")))
        }
        _ => problem,
    }
}

fn config_of(kind: &NodeKind) -> u64 {
    let NodeKind::Operator(operator) = kind else { return 0 };
    let text = format!("{:?}", operator.config);
    XxHash3_64::oneshot(text.as_bytes())
}

fn identity(
    spec: &JobSpec,
    operators: &BTreeMap<OperatorId, CheckedOperator>,
    task: TaskId,
) -> TaskIdentity {
    let node = spec.node(task.operator);
    let (max_parallelism, has_memory, has_declared) =
        match (&node.kind, operators.get(&task.operator)) {
            (NodeKind::Operator(operator), Some(checked)) => (
                operator.max_parallelism,
                operator.snapshot.has_memory(),
                operator.snapshot.has_declared() && !checked.description.states.is_empty(),
            ),
            _ => (0, false, false),
        };
    TaskIdentity {
        operator: node.name.clone(),
        uid: node.uid.clone(),
        index: task.index,
        parallelism: spec.graph.operator(task.operator).parallelism,
        max_parallelism,
        digest: operators.get(&task.operator).map(|operator| operator.component.digest().0),
        has_memory,
        has_declared,
        has_host_state: has_declared && matches!(spec.state_backend, StateBackend::Sled(_)),
        is_sink: matches!(node.kind, NodeKind::Sink(_)),
        config: config_of(&node.kind),
        is_keyed: spec.is_keyed(task.operator),
        states: operators.get(&task.operator).map_or_else(Vec::new, |operator| {
            let states = operator.description.states.iter();
            let identity = |state: &StateDeclaration| StateIdentity {
                name: state.name.clone(),
                renamed_from: state.renamed_from.clone(),
                schema: state.schema.clone(),
            };
            states.map(identity).collect()
        }),
    }
}

/// A directory of this run alone, which it removes.
fn scratch_dir(state_dir: Option<&Path>, name: &str) -> io::Result<PathBuf> {
    match state_dir {
        Some(dir) => Ok(dir.join(name)),
        None => {
            let dir = tempfile::Builder::new().prefix("cofferdam-").tempdir()?;
            Ok(dir.keep())
        }
    }
}

/// Where the results of exchanges that are not pipelined lie.
fn partitions(spec: &JobSpec, state_dir: Option<&Path>) -> io::Result<Option<Arc<Partitions>>> {
    if !spec.graph.has_exchange(ExchangeType::has_partition) {
        return Ok(None);
    }
    Ok(Some(Arc::new(Partitions::new(&scratch_dir(state_dir, PARTITIONS)?)?)))
}

/// What this process keeps of each task: nothing yet, and a place for state that the host keeps.
fn locals(
    tasks: &[TaskId],
    identities: &[TaskIdentity],
    spec: &JobSpec,
    state_dir: Option<&Path>,
) -> Result<BTreeMap<TaskId, Arc<TaskLocal>>, StorageError> {
    let tables = match &spec.state_backend {
        StateBackend::Sled(backend) if identities.iter().any(|task| task.has_host_state) => {
            let dir = scratch_dir(state_dir, WORKING)
                .map_err(|error| StorageError::store("make room for state", error))?;
            Some((Tables::new(&dir, backend.cache_bytes)?, backend.write_buffer_bytes))
        }
        _ => None,
    };
    let local = |(task, identity): (&TaskId, &TaskIdentity)| {
        let limits = match &spec.node(task.operator).kind {
            NodeKind::Operator(operator) => operator.limits.clone(),
            _ => Limits::default(),
        };
        let keyed = tables.as_ref().filter(|_| identity.has_host_state);
        let keyed = keyed.map(|(tables, write_buffer_bytes)| {
            let limits = KeyedLimits {
                bytes_max: limits.state_bytes_max,
                write_buffer_bytes: *write_buffer_bytes,
                max_parallelism: identity.max_parallelism,
                own_keys: own_keys(&spec.graph, *task, identity.is_keyed, identity.max_parallelism),
            };
            KeyedState::new(tables.clone(), limits).map(Arc::new)
        });
        Ok((*task, Arc::new(TaskLocal::new(keyed.transpose()?))))
    };
    tasks.iter().zip(identities).map(local).collect()
}

/// The keys of a task's records, where they come by their key and to more than one task.
fn own_keys(
    graph: &JobGraph,
    task: TaskId,
    is_keyed: bool,
    max_parallelism: u32,
) -> Option<OwnKeys> {
    let parallelism = graph.operator(task.operator).parallelism;
    OwnKeys { index: task.index, parallelism, max_parallelism }.if_any(is_keyed)
}

/// The limits of an operator's instances.
pub(crate) fn limits_of(kind: &NodeKind) -> Limits {
    match kind {
        NodeKind::Operator(operator) => operator.limits.clone(),
        NodeKind::Source(_) | NodeKind::Sink(_) => Limits::default(),
    }
}

/// How the declared state of each task is read out of its memory.
fn own_components(
    spec: &JobSpec,
    operators: &BTreeMap<OperatorId, CheckedOperator>,
    tasks: &[TaskId],
    identities: &[TaskIdentity],
) -> OwnComponents {
    let own = |(task, identity): (&TaskId, &TaskIdentity)| {
        let TaskIdentity { is_keyed, max_parallelism, .. } = *identity;
        Some(OwnComponent {
            component: operators.get(&task.operator)?.component.clone(),
            max_parallelism,
            own_keys: own_keys(&spec.graph, *task, is_keyed, max_parallelism),
            limits: limits_of(&spec.node(task.operator).kind),
        })
    };
    OwnComponents { tasks: tasks.iter().zip(identities).map(own).collect() }
}

/// The tasks whose declared state will lie in an image that nobody has tried to read yet: those that resume
/// from one had their trial in the run in which it was new.
fn untried(
    spec: &JobSpec,
    identities: &[TaskIdentity],
    chosen: &restore::Chosen,
    locals: &BTreeMap<TaskId, Arc<TaskLocal>>,
    own: &OwnComponents,
) -> Vec<Untried> {
    let tasks = identities.iter().zip(&chosen.shares).zip(locals).zip(&own.tasks);
    let untried = tasks.filter_map(|(((identity, share), (task, local)), own)| {
        let is_in_image = identity.has_declared && identity.has_memory && !identity.has_host_state;
        (is_in_image && share.state.memory.is_empty()).then_some(())?;
        let (task, local) = (spec.graph.task_name(*task), local.clone());
        Some(Untried { task, local, own: own.clone()? })
    });
    untried.collect()
}

/// The sources by name.
fn sources_of(spec: &JobSpec, nodes: &[NodePlan]) -> BTreeMap<String, Arc<dyn SourcePlan>> {
    let source = |(plan, node): (&NodePlan, &NodeSpec)| match plan {
        NodePlan::Source(source) => Some((node.name.clone(), source.clone())),
        _ => None,
    };
    nodes.iter().zip(&spec.nodes).filter_map(source).collect()
}

/// The components by the names of their operators.
fn components_of(
    spec: &JobSpec,
    operators: &BTreeMap<OperatorId, CheckedOperator>,
) -> BTreeMap<String, Component> {
    let component = |(id, operator): (&OperatorId, &CheckedOperator)| {
        (spec.node(*id).name.clone(), operator.component.clone())
    };
    operators.iter().map(component).collect()
}

fn prepare_nodes(
    spec: &JobSpec,
    operators: &BTreeMap<OperatorId, CheckedOperator>,
) -> Result<Vec<NodePlan>, Problem> {
    let nodes = (0..).map(OperatorId).zip(&spec.nodes);
    nodes
        .map(|(id, node)| {
            Ok(match (&node.kind, operators.get(&id)) {
                (NodeKind::Source(source), _) => {
                    let context = NodeContext { name: &node.name, base_dir: &spec.base_dir };
                    NodePlan::Source(source.prepare(context)?)
                }
                (NodeKind::Sink(_), _) => NodePlan::Sink { plan: None },
                (NodeKind::Operator(operator), Some(checked)) => NodePlan::Operator {
                    name: node.name.clone(),
                    uid: node.uid.clone(),
                    component: checked.component.clone(),
                    spec: Arc::new((**operator).clone()),
                    has_states: !checked.description.states.is_empty(),
                    // What is read out of the memory is read out whole.
                    tracks_changes: operator.snapshot.has_declared()
                        && !checked.description.states.is_empty()
                        && (spec.state_backend != StateBackend::Hashmap
                            || (spec.checkpoint.interval_ms.is_some()
                                && !operator.snapshot.has_memory())),
                    expects_snapshots: operator.snapshot.has_memory()
                        && spec.checkpoint.interval_ms.is_some(),
                    dead_letter_output: dead_letter_output(&checked.description),
                    is_keyed: spec.is_keyed(id),
                },
                (NodeKind::Operator(_), None) => {
                    return Err(Problem::new(Code::HostBug, "an operator without a component"));
                }
            })
        })
        .collect()
}

pub(crate) fn unusable_state(location: Option<&Path>, error: &dyn std::fmt::Display) -> Problem {
    let place = location.map_or("memory".to_owned(), |path| path.display().to_string());
    Problem::new(Code::StateUnusable, format!("the state directory {place} cannot be used"))
        .detail(error)
        .hint(
            "set --state-dir, or execution.checkpointing.dir, to a directory that you can write to",
        )
}

/// Whether a job has no storage yet: not even to look into it one is made.
fn is_nothing_there(spec: &StorageSpec, state_dir: &Path) -> bool {
    match spec {
        StorageSpec::Objects { location, .. } => {
            let location = Path::new(location);
            !cofferdam_store::is_url(location) && !location.exists()
        }
        StorageSpec::Sled(_) | StorageSpec::Memory => !state_dir.exists(),
    }
}

/// The storage of a job, to look into it.
fn storage_at(
    spec: &StorageSpec,
    state_dir: Option<&Path>,
) -> Result<Box<dyn Storage>, StorageError> {
    match (spec, state_dir) {
        (StorageSpec::Objects { location, .. }, _) => cofferdam_store::objects_at(location),
        (_, Some(dir)) => Ok(Box::new(SledStorage::new(dir.to_owned()))),
        (_, None) => Ok(Box::new(MemoryStorage::default())),
    }
}

/// The same, to write to it: what an earlier run was still removing goes.
fn open_storage(
    spec: &StorageSpec,
    state_dir: Option<&Path>,
) -> Result<Box<dyn Storage>, StorageError> {
    if let (StorageSpec::Sled(_) | StorageSpec::Memory, Some(dir)) = (spec, state_dir) {
        SledStorage::new(dir.to_owned()).finish_removals()?;
    }
    storage_at(spec, state_dir)
}

fn remove_claimed(place: &Path) -> Result<(), StorageError> {
    if cofferdam_store::is_url(place) {
        let (store, _) = cofferdam_store::open_at(place).and_then(SnapshotStore::open_existing)?;
        return store.clear();
    }
    fs::remove_dir_all(place).map_err(|error| StorageError::store("remove a directory", error))
}

/// What a job is, so that another one is told from it: its tasks, their components and settings.
fn digest_of(identities: &[TaskIdentity], spec: &JobSpec) -> String {
    let configs = spec.nodes.iter().map(|node| match &node.kind {
        NodeKind::Operator(operator) => operator.config.as_slice(),
        NodeKind::Source(_) | NodeKind::Sink(_) => &[],
    });
    let text = format!("{identities:?}{:?}", configs.collect::<Vec<_>>());
    blake3::hash(text.as_bytes()).to_hex()[..16].to_owned()
}

/// What a state directory was before a run.
enum Before {
    Nothing,
    Running,
    /// Its job has ended, and what begins now is something else.
    Ended(Id),
}

impl Before {
    /// Whether the checkpoints that are there belong to a job that has ended. A crash may have left them
    /// behind after its end was recorded. What the run is to begin from is not over, whatever its place is
    /// called.
    fn is_over(&self, found: &Found, from: Option<&RestoreFrom>) -> bool {
        let Self::Ended(job) = self else { return false };
        let is_its = |manifest: &Manifest| manifest.lineage.job == *job;
        if found.is_headless || found.manifests.is_empty() || !found.manifests.iter().all(is_its) {
            return false;
        }
        let named = from.and_then(|from| restore::open_named(&from.dir).ok());
        named.is_none_or(|(_, named)| !found.manifests.iter().any(|it| it.is_that_of(&named)))
    }
}

/// What a run would go on from.
struct Resumption {
    record: JobRecord,
    before: Before,
    /// What is in the store is of a job that has ended.
    is_over: bool,
    /// The store that was looked into.
    looked: SnapshotStore,
    chosen: restore::Chosen,
}

/// Finds out what a run would go on from, or why it is refused. Changes nothing.
fn look(
    tasks: &restore::Tasks<'_>,
    storage: Box<dyn Storage>,
    state_dir: Option<&Path>,
    options: &JobOptions,
    digest: &str,
) -> Result<Resumption, Problem> {
    let (record, before) = read_record(tasks.spec, state_dir, options, digest)?;
    let (looked, mut found) =
        SnapshotStore::look(storage).map_err(|error| unusable_state(state_dir, &error))?;
    let is_over = before.is_over(&found, options.from.as_ref());
    if is_over {
        found = Found::default();
    }
    let chosen = restore::choose(tasks, &looked, &found, options.from.as_ref(), &record)?;
    let is_half_way = || chosen.shares.iter().any(|share| !share.state.is_drained);
    let has_partitions = tasks.spec.graph.has_exchange(ExchangeType::has_partition);
    if has_partitions && chosen.checkpoint().is_some() && is_half_way() {
        let message = "the checkpoint is of a job half-way, and this one runs region by region";
        return Err(Problem::new(Code::StateMismatch, message)
            .detail("what its sources had still to read would be lost")
            .hint("make its exchanges pipelined again, or begin anew with another --state-dir"));
    }
    if chosen.checkpoint().is_none() {
        tasks.sources.values().try_for_each(|source| source.check_fresh())?;
    }
    Ok(Resumption { record, before, is_over, looked, chosen })
}

/// The record of the job in a state directory. One that has ended does not begin by itself.
fn read_record(
    spec: &JobSpec,
    state_dir: Option<&Path>,
    options: &JobOptions,
    digest: &str,
) -> Result<(JobRecord, Before), Problem> {
    let nothing = || Ok((JobRecord::new(&spec.name), Before::Nothing));
    let Some(dir) = state_dir else { return nothing() };
    let known = JobRecord::read(dir).map_err(|error| {
        let message = format!("the record of the job in {} cannot be read", dir.display());
        Problem::new(Code::StateUnusable, message).detail(error).hint(
            "put `JOB` back from a copy; without it nobody knows whose state and output this is",
        )
    })?;
    let Some(mut record) = known else { return nothing() };
    let before = match &record.ended {
        Some(_) => Before::Ended(record.job),
        None => Before::Running,
    };
    let anew = "to run it from its beginning, say so: --again";
    let from = options.from.as_ref().and_then(|from| restore::absolute(&from.dir));
    match &record.ended {
        Some(_) if options.again => record = JobRecord::new(&spec.name),
        Some(Ended::Finished { digest: finished, .. }) => {
            let is_the_same = finished == digest && (from.is_none() || from == record.begun_from);
            if from.is_some() && !is_the_same {
                record = JobRecord::new(&spec.name);
            } else if is_the_same {
                let message = format!("job \"{}\" has finished; there is nothing to do", spec.name);
                return Err(Problem::new(Code::AlreadyFinished, message).hint(anew));
            } else {
                let message = format!("job \"{}\" has finished, and was another one", spec.name);
                return Err(Problem::new(Code::OtherFinished, message)
                    .detail(format!("its state directory is {}", dir.display()))
                    .hint(format!("{anew}; or give it another --state-dir")));
            }
        }
        Some(Ended::Stopped { savepoint, .. }) if from.is_none() => {
            let message = format!("job \"{}\" was stopped with a savepoint", spec.name);
            let problem = Problem::new(Code::OtherFinished, message);
            return Err(match savepoint {
                Some(dir) => problem
                    .detail(dir.display())
                    .hint(format!("resume from it: --from {}; {anew}", dir.display())),
                None => problem.hint(format!("resume from it: --from DIR; {anew}")),
            });
        }
        Some(Ended::Stopped { .. }) => record.ended = None,
        None => {}
    }
    Ok((record, before))
}

/// Takes the outputs of all sinks, or asks for them. Refuses before anything in them has changed.
fn claim_outputs(
    spec: &JobSpec,
    identities: &[TaskIdentity],
    chosen: &restore::Chosen,
    state_dir: Option<&Path>,
    options: &JobOptions,
    is_asking: bool,
) -> Result<BTreeMap<String, Box<dyn SinkPlan>>, Problem> {
    let mut claimed: BTreeMap<PathBuf, &str> = BTreeMap::new();
    let mut plans: BTreeMap<String, Box<dyn SinkPlan>> = BTreeMap::new();
    for node in &spec.nodes {
        let NodeKind::Sink(sink) = &node.kind else { continue };
        let tasks = identities.iter().zip(&chosen.shares);
        let own = tasks.filter(|(identity, _)| identity.operator == node.name);
        let states: Vec<&[u8]> =
            own.map(|(_, share)| &*share.state.state).filter(|it| !it.is_empty()).collect();
        if let Some(path) = sink.directory()
            && let Some(other) = path.canonicalize().ok().and_then(|dir| claimed.get(&dir))
        {
            let message = format!("sinks \"{other}\" and \"{}\" write to one directory", node.name);
            return Err(Problem::new(Code::OutputTaken, message)
                .detail(path.display())
                .hint("give each a directory of its own"));
        }
        let plan = sink.claim(OutputContext {
            sink: &node.name,
            job: &spec.name,
            lineage: &chosen.lineage,
            // A sink that the checkpoint does not know begins with the run.
            restored: chosen.checkpoint().filter(|_| !states.is_empty()),
            states,
            record_dir: state_dir.map(|dir| dir.join(OUTPUTS)),
            conflicts: options.conflicts,
            is_asking,
        })?;
        claimed.extend(sink.directory().map(|path| (resolved(path), node.name.as_str())));
        plans.insert(node.name.clone(), plan);
    }
    let claimed: BTreeSet<PathBuf> = claimed.into_keys().collect();
    plans.values_mut().try_for_each(|plan| plan.claim_elsewhere(&claimed))?;
    Ok(plans)
}

/// For asking a component what it is: whatever it says meanwhile is of no interest.
pub(crate) struct QuietHost;

impl Host for QuietHost {
    fn log(&self, _: Level, _: &str) {}
    fn add_to_counter(&self, _: &str, _: u64) {}
    fn set_gauge(&self, _: &str, _: f64) {}
    fn now_ms(&self) -> u64 {
        0
    }
    fn random(&self) -> u64 {
        0
    }
    fn attempt(&self) -> u32 {
        0
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_contract::StateKind;

    use super::*;

    #[test]
    fn a_description_keeps_what_the_contract_promises() {
        let port = |name: &str| Port { name: name.to_owned(), key: None, value: Format::Bytes };
        let state = |name: &str, renamed_from: Option<&str>| StateDeclaration {
            name: name.to_owned(),
            renamed_from: renamed_from.map(str::to_owned),
            kind: StateKind::Value,
            schema: "u64".to_owned(),
        };
        let good = Description {
            name: "count".to_owned(),
            inputs: vec![port("left"), port("right")],
            outputs: vec![port("out")],
            states: vec![state("counts", Some("totals")), state("seen", None)],
        };
        assert_eq!(check_description(&good), Ok(()));
        let says = |change: &dyn Fn(&mut Description)| {
            let mut description = good.clone();
            change(&mut description);
            check_description(&description).err().unwrap_or_default()
        };
        assert_eq!(says(&|it| it.inputs.clear()), "it has no input");
        assert!(says(&|it| it.inputs.push(port("left"))).contains("two inputs"));
        assert!(says(&|it| it.outputs.push(port("out"))).contains("two outputs"));
        assert!(says(&|it| it.outputs.push(port("a\u{1b}[2J"))).contains("cannot be called"));
        assert!(says(&|it| it.outputs.push(port(""))).contains("cannot be called"));
        assert!(says(&|it| it.states.push(state("seen", None))).contains("two states"));
        assert!(says(&|it| it.states.push(state("x", Some("seen")))).contains("claim"));
        assert!(says(&|it| it.states.push(state("x", Some("totals")))).contains("claim"));
        assert!(says(&|it| it.outputs = vec![port("x"); 2_000]).contains("2000 outputs"));
        assert!(says(&|it| it.states[0].schema = "x".repeat(1 << 17)).contains("too long"));
    }
}
