//! What is needed to build the workers of an attempt.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cofferdam_connector::{
    catalog::{NodeContext, SinkPlan, SourcePlan},
    identity::Id,
};
use cofferdam_contract::{Description, StateDeclaration};
use cofferdam_core::{
    align::{Aligner, Barriers, Tracker},
    call_size::CallSize,
    graph::JobGraph,
    ids::{Attempt, CheckpointId, NodeId, TaskId},
};
use cofferdam_sandbox::Component;
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{JobSpec, NodeKind, NodeSpec, OperatorSpec, StateBackend};
use cofferdam_store::{
    declared::OwnKeys,
    metadata::{StateIdentity, TaskIdentity},
};
use twox_hash::XxHash3_64;

use super::{component::CheckedOperator, restore};
use crate::{
    exchange::{link::Links, partition::Partitions},
    job::{
        read_out::{OwnComponent, OwnComponents},
        rehearsal::Untried,
    },
    state::local::TaskLocal,
    task::{
        Processed,
        node::{Node, Work},
        operator::OperatorTask,
        reach::Reach,
    },
    threads::Share,
};

/// What is needed to build the workers of an attempt.
pub(crate) struct Plan {
    /// The job's name.
    pub(crate) job: String,
    /// Of the job alone.
    pub(super) secret: [u8; 32],
    pub(crate) graph: JobGraph,
    pub(super) nodes: Vec<NodePlan>,
    pub(super) slots: BTreeMap<TaskId, usize>,
    /// By operator and output: whether its records have keys.
    pub(super) outputs: Vec<Arc<[bool]>>,
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
    /// What its guests are given comes from there.
    pub(crate) reach: Arc<Reach>,
    /// Runs its tasks.
    pub(crate) share: Arc<Share>,
}

pub(super) enum NodePlan {
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
    /// The plan of a job without what its tasks keep between attempts.
    pub(super) fn new(
        spec: &JobSpec,
        job: Id,
        nodes: Vec<NodePlan>,
        outputs: BTreeMap<String, Box<dyn SinkPlan>>,
        operators: &BTreeMap<NodeId, CheckedOperator>,
        share: Arc<Share>,
    ) -> Self {
        let ids = (0..).map(NodeId).zip(&spec.nodes);
        Self {
            job: spec.name.clone(),
            secret: *blake3::hash(job.bytes()).as_bytes(),
            graph: spec.graph.clone(),
            nodes: with_outputs(spec, nodes, outputs),
            slots: spec.graph.tasks().into_iter().zip(0..).collect(),
            outputs: ids.map(|(id, node)| keyed_outputs(node, operators.get(&id))).collect(),
            is_exactly_once: spec.is_exactly_once,
            unaligned_after: spec.checkpoint.unaligned_after_ms.map(Duration::from_millis),
            backlog_lag_ms: spec.backlog_lag_ms,
            links: Links::default(),
            partitions: None,
            locals: BTreeMap::new(),
            untried: Vec::new(),
            reach: Arc::default(),
            share,
        }
    }

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
        let work = match &self.nodes[task.node.0 as usize] {
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
                reach: self.reach.clone(),
                has_states: *has_states,
                tracks_changes: *tracks_changes,
                expects_snapshots: *expects_snapshots,
                own_keys: own_keys(&self.graph, task, *is_keyed, spec.max_parallelism),
                random_key: self.random_key(uid, task.index),
                restored_from: None,
                instance: None,
                dead_letter_output: *dead_letter_output,
                processed: Processed::default(),
                guard: None,
                unsaved: Vec::new(),
                call_size: CallSize::new(0),
            })),
        };
        Node {
            task,
            slot: self.slots[&task],
            attempt,
            parallelism: self.graph.node(task.node).parallelism,
            work,
            targets: Vec::new(),
            local: self.locals[&task].clone(),
            is_drained: false,
            outputs: self.outputs[task.node.0 as usize].clone(),
        }
    }

    /// What a task's guest gets for random numbers is a function of the job, the operator and the task.
    fn random_key(&self, uid: &str, index: u32) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(uid.as_bytes()).update(&index.to_le_bytes());
        *hasher.finalize().as_bytes()
    }

    /// Without records for so long a source holds event time back no longer.
    pub(crate) fn idle_after(&self, operator: NodeId) -> Option<Duration> {
        match &self.nodes[operator.0 as usize] {
            NodePlan::Source(source) => source.idle_after(),
            NodePlan::Operator { .. } | NodePlan::Sink { .. } => None,
        }
    }

    /// How many bytes a result partition of an operator may have. Sources are the host's own.
    pub(crate) fn partition_bytes_max(&self, operator: NodeId) -> u64 {
        match &self.nodes[operator.0 as usize] {
            NodePlan::Operator { spec, .. } => spec.partition_bytes_max,
            NodePlan::Source(_) | NodePlan::Sink { .. } => u64::MAX,
        }
    }

    /// The number of key groups by which records are sent to an operator.
    pub(crate) fn max_parallelism(&self, operator: NodeId) -> u32 {
        match &self.nodes[operator.0 as usize] {
            NodePlan::Operator { spec, .. } => spec.max_parallelism,
            // Sinks keep no state by key: any number will do, as long as it stays the same.
            NodePlan::Source(_) | NodePlan::Sink { .. } => 1 << 15,
        }
    }
}

/// By output: whether its records have keys. The last one is that of dead letters.
pub(super) fn keyed_outputs(node: &NodeSpec, operator: Option<&CheckedOperator>) -> Arc<[bool]> {
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
pub(super) fn dead_letter_output(description: &Description) -> u32 {
    u32::try_from(description.outputs.len()).unwrap_or(u32::MAX)
}

fn directories_of(kind: &NodeKind) -> Option<String> {
    let NodeKind::Operator(operator) = kind else { return None };
    Some(operator.directories().join("\n")).filter(|names| !names.is_empty())
}

fn config_of(kind: &NodeKind) -> u64 {
    let NodeKind::Operator(operator) = kind else { return 0 };
    let text = format!("{:?}", operator.config);
    XxHash3_64::oneshot(text.as_bytes())
}

pub(super) fn identity(
    spec: &JobSpec,
    operators: &BTreeMap<NodeId, CheckedOperator>,
    task: TaskId,
) -> TaskIdentity {
    let node = spec.node(task.node);
    let (max_parallelism, has_memory, has_declared) = match (&node.kind, operators.get(&task.node))
    {
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
        parallelism: spec.graph.node(task.node).parallelism,
        max_parallelism,
        digest: operators.get(&task.node).map(|operator| operator.component.digest().0),
        has_memory,
        has_declared,
        has_host_state: has_declared && matches!(spec.state_backend, StateBackend::Sled(_)),
        is_sink: matches!(node.kind, NodeKind::Sink(_)),
        connector: node.connector.map(str::to_owned),
        directories: directories_of(&node.kind),
        config: config_of(&node.kind),
        is_keyed: spec.is_keyed(task.node),
        states: operators.get(&task.node).map_or_else(Vec::new, |operator| {
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

/// The keys of a task's records, where they come by their key and to more than one task.
pub(super) fn own_keys(
    graph: &JobGraph,
    task: TaskId,
    is_keyed: bool,
    max_parallelism: u32,
) -> Option<OwnKeys> {
    let parallelism = graph.node(task.node).parallelism;
    OwnKeys { index: task.index, parallelism, max_parallelism }.if_any(is_keyed)
}

/// How the declared state of each task is read out of its memory.
pub(super) fn own_components(
    spec: &JobSpec,
    operators: &BTreeMap<NodeId, CheckedOperator>,
    tasks: &[TaskId],
    identities: &[TaskIdentity],
) -> OwnComponents {
    let own = |(task, identity): (&TaskId, &TaskIdentity)| {
        let TaskIdentity { is_keyed, max_parallelism, .. } = *identity;
        Some(OwnComponent {
            component: operators.get(&task.node)?.component.clone(),
            max_parallelism,
            own_keys: own_keys(&spec.graph, *task, is_keyed, max_parallelism),
            limits: spec.node(task.node).kind.limits(),
        })
    };
    OwnComponents { tasks: tasks.iter().zip(identities).map(own).collect() }
}

/// The tasks whose declared state will lie in an image that nobody has tried to read yet: those that resume
/// from one had their trial in the run in which it was new.
pub(super) fn untried(
    spec: &JobSpec,
    identities: &[TaskIdentity],
    chosen: &restore::Chosen,
    locals: &BTreeMap<TaskId, Arc<TaskLocal>>,
    own: &OwnComponents,
) -> Vec<Untried> {
    let tasks = identities.iter().zip(&chosen.restores).zip(locals).zip(&own.tasks);
    let untried = tasks.filter_map(|(((identity, restore), (task, local)), own)| {
        let is_in_image = identity.has_declared && identity.has_memory && !identity.has_host_state;
        (is_in_image && restore.state.memory.is_empty()).then_some(())?;
        let (task, local) = (spec.graph.task_name(*task), local.clone());
        Some(Untried { task, local, own: own.clone()? })
    });
    untried.collect()
}

/// The sources by name.
pub(super) fn sources_of(
    spec: &JobSpec,
    nodes: &[NodePlan],
) -> BTreeMap<String, Arc<dyn SourcePlan>> {
    let source = |(plan, node): (&NodePlan, &NodeSpec)| match plan {
        NodePlan::Source(source) => Some((node.name.clone(), source.clone())),
        _ => None,
    };
    nodes.iter().zip(&spec.nodes).filter_map(source).collect()
}

/// The components by the names of their operators.
pub(super) fn components_of(
    spec: &JobSpec,
    operators: &BTreeMap<NodeId, CheckedOperator>,
) -> BTreeMap<String, Component> {
    let component = |(id, operator): (&NodeId, &CheckedOperator)| {
        (spec.node(*id).name.clone(), operator.component.clone())
    };
    operators.iter().map(component).collect()
}

pub(super) fn prepare_nodes(
    spec: &JobSpec,
    operators: &BTreeMap<NodeId, CheckedOperator>,
) -> Result<Vec<NodePlan>, Problem> {
    let nodes = (0..).map(NodeId).zip(&spec.nodes);
    let grants = &spec.files();
    nodes
        .map(|(id, node)| {
            Ok(match (&node.kind, operators.get(&id)) {
                (NodeKind::Source(source), _) => {
                    let context =
                        NodeContext { name: &node.name, base_dir: &spec.base_dir, grants };
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

/// What a job is, so that another one is told from it: its tasks, their components and settings.
pub(super) fn digest_of(identities: &[TaskIdentity], spec: &JobSpec) -> String {
    let configs = spec.nodes.iter().map(|node| match &node.kind {
        NodeKind::Operator(operator) => operator.config.as_slice(),
        NodeKind::Source(_) | NodeKind::Sink(_) => &[],
    });
    let text = format!("{identities:?}{:?}", configs.collect::<Vec<_>>());
    blake3::hash(text.as_bytes()).to_hex()[..16].to_owned()
}

/// The nodes, each sink with the output that was claimed for it.
fn with_outputs(
    spec: &JobSpec,
    mut nodes: Vec<NodePlan>,
    mut outputs: BTreeMap<String, Box<dyn SinkPlan>>,
) -> Vec<NodePlan> {
    for (node, work) in spec.nodes.iter().zip(&mut nodes) {
        if let NodePlan::Sink { plan } = work {
            *plan = outputs.remove(&node.name).map(Arc::from);
        }
    }
    nodes
}
