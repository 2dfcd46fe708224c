//! Whether a manifest and its components fit together: loads every component, asks it what it is, and compares.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_contract::{Description, Port};
use cofferdam_core::{
    exchange::ExchangeType,
    graph::JobGraph,
    ids::{OperatorId, TaskId},
};
use cofferdam_files::resolved;
use cofferdam_sandbox::{
    Component, ComponentError, GuestError, InstanceSetup, Limits, QuietHost, Sandbox, SandboxError,
    SandboxOptions,
};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{JobSpec, NodeKind, OperatorSpec};
use cofferdam_store::{self, Storage, manifest::TaskIdentity, memory::MemoryStorage};

use super::{
    edges::{check_dead_letters, check_snapshots, resolve_edges},
    files::{is_nothing_there, storage_at, unusable_state},
    plan::{components_of, digest_of, identity, prepare_nodes, sources_of},
    resume::{JobOptions, Resumption, claim_outputs, look},
};
use crate::{
    job::{
        restore::{self, Restorable},
        state_dir,
    },
    watch::progress::Observer,
};

/// A job whose manifest and components fit together. Nothing runs yet, nothing was written.
#[derive(Clone)]
pub struct CheckedJob {
    /// The spec, with every output resolved.
    pub spec: JobSpec,
    pub(super) operators: BTreeMap<OperatorId, CheckedOperator>,
}

/// An operator whose component was loaded and asked what it is.
#[derive(Clone)]
pub(super) struct CheckedOperator {
    pub(super) component: Component,
    pub(super) description: Description,
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

#[cfg(test)]
mod tests {
    use cofferdam_contract::{Format, StateDeclaration, StateKind};

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
