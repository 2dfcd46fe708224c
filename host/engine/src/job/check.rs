//! Whether a manifest and its components fit together: loads every component, asks it what it is, and compares.

use std::{collections::BTreeMap, path::PathBuf};

use cofferdam_contract::Description;
use cofferdam_core::{exchange::ExchangeType, graph::JobGraph, ids::NodeId};
use cofferdam_files::resolved;
use cofferdam_sandbox::Sandbox;
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{JobSpec, NodeKind};

use super::{
    component::{CheckedOperator, load},
    edges::{check_dead_letters, check_snapshots, resolve_edges},
    granted::{check_granted, check_reach},
};

/// A job whose manifest and components fit together. Nothing runs yet, nothing was written.
#[derive(Clone)]
pub struct CheckedJob {
    /// The spec, with every output resolved.
    pub spec: JobSpec,
    pub(super) operators: BTreeMap<NodeId, CheckedOperator>,
    /// Where its operators were loaded.
    pub(super) sandbox: Sandbox,
}

impl CheckedJob {
    /// Loads every component and compares both ends of every edge.
    ///
    /// # Errors
    /// All that is wrong: the first problem, with the others behind it.
    pub async fn new(spec: JobSpec, sandbox: &Sandbox) -> Result<Self, Problem> {
        // Nothing is opened that is not granted.
        check_granted(&spec)?;
        let all = |problems: Vec<Problem>| Problem::all(problems).map_or(Ok(()), Err);
        let mut problems = Vec::new();
        problems.extend(check_approximate(&spec).err());
        problems.extend(check_outputs(&spec).err());
        let mut operators = BTreeMap::new();
        for (id, node) in (0..).map(NodeId).zip(&spec.nodes) {
            if let NodeKind::Operator(operator) = &node.kind {
                match load(sandbox, &node.name, operator).await {
                    Ok(loaded) => {
                        let reach = check_reach(&node.name, operator, &loaded.component);
                        problems.extend(reach.err());
                        operators.insert(id, loaded);
                    }
                    Err(problem) => problems.push(problem),
                }
            }
        }
        all(problems)?;
        Self::of(spec, operators, sandbox.clone())
    }

    /// A job whose components are loaded: compares both ends of every edge.
    pub(super) fn of(
        mut spec: JobSpec,
        operators: BTreeMap<NodeId, CheckedOperator>,
        sandbox: Sandbox,
    ) -> Result<Self, Problem> {
        let mut problems = Vec::new();
        problems.extend(check_dead_letters(&spec, &operators).err());
        problems.extend(check_snapshots(&spec, &operators).err());
        let edges = resolve_edges(&spec, &operators).map_err(|problem| problems.push(problem));
        Problem::all(problems).map_or(Ok(()), Err)?;
        let edges = edges.unwrap_or_default();
        let nodes = spec.graph.nodes().map(|(_, operator)| operator.clone()).collect();
        spec.graph = JobGraph::new(nodes, edges).map_err(|error| {
            Problem::new(Code::HostBug, format!("a graph that was checked is wrong: {error:?}"))
        })?;
        Ok(Self { spec, operators, sandbox })
    }

    /// What its components make of the manifest, and people should know before the state is written.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for (id, operator) in &self.operators {
            let (node, states) = (self.spec.node(*id), &operator.description.states);
            if !states.is_empty() && !self.spec.is_keyed(*id) {
                warnings.push(format!(
                    "operator \"{}\" has declared state, but its input is not partitioned by key \
                     (partition = \"hash\"): the state belongs to its task, and the parallelism cannot be \
                     changed later",
                    node.name
                ));
            }
            if let NodeKind::Operator(spec) = &node.kind
                && states.is_empty()
                && !spec.snapshot.has_memory()
            {
                warnings.push(format!(
                    "operator \"{}\" declares no state, and snapshot = \"declared\" keeps nothing else: the \
                     contents of its memory are lost at every restart",
                    node.name
                ));
            }
        }
        warnings
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
            let hint = "in-flight records in a checkpoint would be lost or duplicated; set `execution.checkpointing.unaligned.enabled = false`";
            ("unaligned checkpoints", hint)
        }
        None if is_batch => {
            let hint = "a job that runs region by region has no checkpoints to resume from; use \"pipelined-bounded\" or \"blocking\"";
            ("exchanges that are not pipelined", hint)
        }
        None => return Ok(()),
    };
    let node = spec.node(edge.to);
    let place = node.inputs.get(edge.input as usize).map_or("", |input| &input.place);
    let message = format!(
        "the exchange \"{}\" between \"{}\" and \"{}\" cannot be combined with {other}",
        edge.exchange.name(),
        spec.node(edge.from).name,
        node.name
    );
    Err(Problem::new(Code::Excluded, message).detail(place).hint(hint))
}
