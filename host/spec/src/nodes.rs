//! The nodes of a manifest and how they are joined: from names to a graph.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    path::Path,
    rc::Rc,
};

use cofferdam_connector::Catalog;
use cofferdam_core::{
    exchange::ExchangeType,
    graph::{Edge, GraphError, JobGraph, Node, Partitioner},
    ids::NodeId,
    shuffle::DefaultExchange,
};
use cofferdam_settings::{
    AnySetting, Code, Document, Located, Optional, Problem, Required, Section, closest, table::Key,
};
use toml::de::DeValue;

use super::{
    InputSpec, NodeKind, NodeSpec, PARALLELISM_MAX,
    connector::{read_sink, read_source},
    is_name,
    operator::read_operator,
    secrets::Secrets,
};

type Result<T> = std::result::Result<T, Problem>;

static NAME: Required<String> = Key::text("name", "what other nodes call it")
    .of_job()
    .required("other nodes refer to it by name");
static UID: Optional<String> = Key::text(
    "uid",
    "what its state is matched by when the job resumes: with its old name here a node may have a new one",
)
.of_job()
.or_none("the name");
static PARALLELISM: Optional<u64> = Key::integer(
    "parallelism",
    1,
    PARALLELISM_MAX,
    "how many tasks it has; a sink without one follows its input",
)
.of_job()
.or_none("`job.parallelism`");
static INPUTS: Optional<()> =
    Key::array("inputs", "names of nodes, `\"node.output\"`, or tables with the keys of an input")
        .of_job()
        .or_none("required");
static FROM: Required<String> = Key::text("from", "the node, or `\"node.output\"`")
    .of_job()
    .required("name the node it comes from");
static PARTITION: Optional<Partitioner> =
    Key::choice("partition", PARTITIONERS, "how records find their task")
        .of_job()
        .or_none("`forward` at equal parallelism, else `rebalance`");
static EXCHANGE: Optional<ExchangeType> = Key::choice(
    "exchange",
    EXCHANGES,
    "how records travel, and whether their readers can restart without their writers",
)
.of_job()
.or_none("by `execution.runtime-mode`");

pub(super) static SOURCE_ROWS: &[&dyn AnySetting] = &[&NAME, &UID, &PARALLELISM];
pub(super) static NODE_ROWS: &[&dyn AnySetting] = &[&NAME, &UID, &PARALLELISM, &INPUTS];
pub(super) static INPUT_ROWS: &[&dyn AnySetting] = &[&FROM, &PARTITION, &EXCHANGE];

static EXCHANGES: &[(&str, ExchangeType)] = &{
    let all = ExchangeType::ALL;
    let mut words = [("", all[0]); ExchangeType::ALL.len()];
    let mut index = 0;
    while index < all.len() {
        words[index] = (all[index].name(), all[index]);
        index += 1;
    }
    words
};

/// A node as it was read, before names are resolved.
pub(super) struct RawNode {
    name: Located<String>,
    uid: Option<Located<String>>,
    parallelism: Option<u32>,
    kind: NodeKind,
    connector: Option<&'static str>,
    inputs: Vec<RawInput>,
}

pub(super) struct RawInput {
    from: Located<String>,
    partitioner: Option<Partitioner>,
    exchange: Option<ExchangeType>,
}

/// Gives nodes another parallelism.
pub(super) fn rescale(nodes: &mut [RawNode], parallelism: &BTreeMap<String, u32>) -> Result<()> {
    for (name, tasks) in parallelism {
        if !(1..=PARALLELISM_MAX).contains(&u64::from(*tasks)) {
            let message = format!("\"{name}\" cannot have {tasks} tasks");
            return Err(Problem::new(Code::BadValue, message)
                .hint(format!("a parallelism is from 1 to {PARALLELISM_MAX}")));
        }
        let Some(node) = nodes.iter_mut().find(|node| node.name.value == *name) else {
            let known: Vec<&str> = nodes.iter().map(|node| node.name.value.as_str()).collect();
            let message = format!("the job has no node \"{name}\"");
            return Err(Problem::new(Code::BadValue, message)
                .hint(format!("its nodes: {}", known.join(", "))));
        };
        if let NodeKind::Operator(operator) = &node.kind
            && operator.max_parallelism < *tasks
        {
            let message = format!("\"{name}\" cannot have {tasks} tasks");
            return Err(Problem::new(Code::BadValue, message)
                .detail(format!("its max-parallelism is {}", operator.max_parallelism)));
        }
        node.parallelism = Some(*tasks);
    }
    Ok(())
}

/// The nodes that a manifest names, as far as they could be read.
#[derive(Default)]
pub(super) struct RawNodes {
    pub(super) nodes: Vec<RawNode>,
    /// The names of those with a mistake that is noted: inputs may name them.
    unread: BTreeSet<String>,
}

impl RawNodes {
    fn add(&mut self, section: &Section<'_>, node: Result<RawNode>) {
        match section.document().noted(node) {
            Some(node) => self.nodes.push(node),
            None => self.unread.extend(section.try_require(&NAME).map(|name| name.value)),
        }
    }
}

/// What a job may consist of: a task and a channel cost the host about a kilobyte each.
const NODES_MAX: usize = 1_000;
const INPUTS_MAX: usize = 256;
const EDGES_MAX: usize = 10_000;
const TASKS_MAX: u64 = 100_000;
const CHANNELS_MAX: u64 = 1_000_000;

fn too_many(what: &str, count: impl Display, max: impl Display) -> Problem {
    Problem::new(Code::BadValue, format!("{what}: {count}, but at most {max} are allowed"))
        .hint("split the job into several jobs")
}

/// Reads the nodes, and notes what is wrong with each.
pub(super) fn read_nodes(
    root: &Section<'_>,
    base_dir: &Path,
    parallelism: u32,
    catalog: &Catalog,
    secrets: &Secrets,
) -> RawNodes {
    let document = root.document();
    let mut raw = RawNodes::default();
    let count_of = |kind| root.items(kind).map_or(0, |items| items.len());
    let count: usize = ["source", "operator", "sink"].into_iter().map(count_of).sum();
    if NODES_MAX < count {
        document.mistake(too_many("nodes of the job", count, NODES_MAX));
        return raw;
    }
    let sections = |kind: &'static str| document.noted(root.sections(kind)).unwrap_or_default();
    let sources = document.noted(root.sections("source"));
    if sources.as_ref().is_some_and(Vec::is_empty) {
        document.mistake(root.missing("source", "a job needs at least one [[source]]"));
    }
    for section in sources.unwrap_or_default() {
        let node = read_node(&section, None, |_| {
            let (connector, spec) = read_source(&section, base_dir, catalog)?;
            Ok((NodeKind::Source(spec), Some(connector)))
        });
        raw.add(&section, node);
    }
    for section in sections("operator") {
        let node = read_inputs(&section).and_then(|inputs| {
            read_node(&section, Some(inputs), |own| {
                let spec = read_operator(&section, base_dir, own.unwrap_or(parallelism), secrets)?;
                Ok((NodeKind::Operator(Box::new(spec)), None))
            })
        });
        raw.add(&section, node);
    }
    for section in sections("sink") {
        let node = read_inputs(&section).and_then(|inputs| {
            read_node(&section, Some(inputs), |_| {
                let (connector, spec) = read_sink(&section, base_dir, catalog)?;
                Ok((NodeKind::Sink(spec), Some(connector)))
            })
        });
        raw.add(&section, node);
    }
    raw
}

fn read_node(
    section: &Section<'_>,
    inputs: Option<Vec<RawInput>>,
    kind: impl FnOnce(Option<u32>) -> Result<(NodeKind, Option<&'static str>)>,
) -> Result<RawNode> {
    let name = section.require(&NAME)?;
    // It is part of the keys of everything else that is listed.
    let listed = section.shown_key("name");
    section.document().forget(|key| key == listed);
    if !is_name(&name.value) {
        let why = "a name has at most 200 letters, digits, `-` and `_`, and begins with a letter";
        return Err(section.bad_value("name", &name.span, why));
    }
    section.call(&name.value);
    let uid = section.find(&UID);
    if let Some(Located { value, span }) = &uid
        && (value.is_empty() || 200 < value.len())
    {
        return Err(section.bad_value("uid", span, "it has from 1 to 200 bytes"));
    }
    let parallelism = section.find(&PARALLELISM);
    let parallelism = parallelism.map(|it| u32::try_from(it.value).unwrap_or(1));
    let (kind, connector) = kind(parallelism).inspect_err(|_| section.finish_early())?;
    section.finish();
    Ok(RawNode { name, uid, parallelism, kind, connector, inputs: inputs.unwrap_or_default() })
}

static PARTITIONERS: &[(&str, Partitioner)] = &[
    ("forward", Partitioner::Forward),
    ("hash", Partitioner::Hash),
    ("rebalance", Partitioner::Rebalance),
    ("rescale", Partitioner::Rescale),
    ("broadcast", Partitioner::Broadcast),
    ("global", Partitioner::Global),
];

/// A partitioner's name in a manifest.
#[must_use]
pub fn partitioner_name(partitioner: Partitioner) -> &'static str {
    let found = PARTITIONERS.iter().find(|(_, other)| *other == partitioner);
    found.map_or("", |(name, _)| name)
}

fn read_inputs(section: &Section<'_>) -> Result<Vec<RawInput>> {
    let mut inputs = Vec::new();
    let items = section.items("inputs")?;
    if INPUTS_MAX < items.len() {
        return Err(too_many("inputs of one node", items.len(), INPUTS_MAX));
    }
    for (value, span) in items {
        inputs.push(match value {
            DeValue::String(from) => {
                let from = Located { value: from.to_string(), span };
                RawInput { from, partitioner: None, exchange: None }
            }
            DeValue::Table(table) => {
                let input = section.nested("inputs", span, table);
                let from = input.require(&FROM)?;
                let partitioner = input.find(&PARTITION).map(|choice| choice.value);
                let exchange = input.find(&EXCHANGE).map(|choice| choice.value);
                input.finish();
                // What counts of them is listed with their node, when the graph is known.
                section.document().forget(|key| key.starts_with("inputs."));
                RawInput { from, partitioner, exchange }
            }
            _ => {
                let why = "an input is a name or { from = \"name\", partition = \"hash\" }";
                return Err(section.bad_value("inputs", &span, why));
            }
        });
    }
    if inputs.is_empty() {
        return Err(section.missing("inputs", "name the nodes whose records it takes"));
    }
    Ok(inputs)
}

/// The number of each node, by its name.
fn ids_of<'r>(root: &Section<'_>, raw: &'r [RawNode]) -> BTreeMap<&'r str, NodeId> {
    let mut ids: BTreeMap<&str, NodeId> = BTreeMap::new();
    for (id, node) in (0..).map(NodeId).zip(raw) {
        if ids.contains_key(&*node.name.value) {
            let message = format!("there are two nodes called \"{}\"", node.name.value);
            let problem = root.document().problem(Code::DuplicateName, &node.name.span, message);
            root.document().mistake(problem.hint("sources, operators and sinks share their names"));
        } else {
            ids.insert(&node.name.value, id);
        }
    }
    ids
}

/// Each node's name and parallelism. A sink without one of its own follows its input, so that the two are chained.
fn nodes_of(raw: &[RawNode], ids: &BTreeMap<&str, NodeId>, parallelism: u32) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    for node in raw {
        let followed = match (&node.kind, node.inputs.as_slice()) {
            (NodeKind::Sink(_), [only]) => ids
                .get(only.producer())
                .and_then(|id| nodes.get(id.0 as usize))
                .map(|node| node.parallelism),
            _ => None,
        };
        let parallelism = node.parallelism.or(followed).unwrap_or(parallelism);
        nodes.push(Node { name: node.name.value.clone(), parallelism });
    }
    nodes
}

/// The node that an input names, and its output, if it names one.
fn producer_of(
    root: &Section<'_>,
    raw: &[RawNode],
    ids: &BTreeMap<&str, NodeId>,
    node: &RawNode,
    input: &RawInput,
) -> Result<(NodeId, Option<String>)> {
    let (producer, output) = match input.from.value.split_once('.') {
        Some((producer, output)) => (producer, Some(output.to_owned())),
        None => (input.from.value.as_str(), None),
    };
    let Some(&from) = ids.get(producer) else {
        return Err(unknown_input(root, node, input, producer, ids.keys().copied()));
    };
    if matches!(raw[from.0 as usize].kind, NodeKind::Sink(_)) {
        let message = format!("\"{producer}\" is a sink: nothing comes out of it");
        return Err(root.document().problem(Code::UnknownInput, &input.from.span, message));
    }
    Ok((from, output))
}

/// What the state of a node is matched by: no other node may have it.
fn uid_of(root: &Section<'_>, node: &RawNode, known: &[NodeSpec]) -> String {
    let name = &node.name.value;
    let uid = node.uid.as_ref().map_or_else(|| name.clone(), |uid| uid.value.clone());
    // Of two with one name that is said already.
    if let Some(other) = known.iter().find(|other| other.uid == uid && other.name != *name) {
        let span = node.uid.as_ref().map_or(&node.name.span, |uid| &uid.span);
        let message = format!("\"{}\" and \"{name}\" have the same uid \"{uid}\"", other.name);
        let problem = root.document().problem(Code::DuplicateName, span, message);
        root.document().mistake(problem.hint("state is matched by it: give each its own"));
    }
    uid
}

/// What is wrong with a graph, where the manifest has it.
fn graph_problem(
    root: &Section<'_>,
    raw: &[RawNode],
    edges: &[Edge],
    spans: &[std::ops::Range<usize>],
    error: GraphError,
) -> Problem {
    match error {
        GraphError::Cycle(cycle) => {
            let names: Vec<&str> =
                cycle.iter().map(|id| raw[id.0 as usize].name.value.as_str()).collect();
            let first = cycle.first().map_or(0, |id| id.0 as usize);
            let path =
                format!("{} -> {}", names.join(" -> "), names.first().copied().unwrap_or_default());
            root.document()
                .problem(
                    Code::Cycle,
                    &raw[first].name.span,
                    format!("the inputs form a cycle: {path}"),
                )
                .hint("a job's records flow one way; remove one of these inputs")
        }
        GraphError::ForwardNeedsEqualParallelism(edge) => {
            let place = edges.iter().position(|other| *other == edge).unwrap_or(0);
            let (from, to) =
                (&raw[edge.from.0 as usize].name.value, &raw[edge.to.0 as usize].name.value);
            let message =
                format!("a forward edge needs equal parallelism: \"{from}\" and \"{to}\" differ");
            root.document().problem(Code::ForwardParallelism, &spans[place], message).hint(
                "use partition = \"rebalance\" or \"hash\", or give both the same parallelism",
            )
        }
    }
}

/// The graph of the nodes.
///
/// # Errors
/// Every mistake of the manifest, those that were noted before included.
pub(super) fn resolve(
    root: &Section<'_>,
    RawNodes { nodes: raw, unread }: RawNodes,
    parallelism: u32,
    default_exchange: &DefaultExchange,
) -> Result<(JobGraph, Vec<NodeSpec>)> {
    let ids = ids_of(root, &raw);
    let of_graph = nodes_of(&raw, &ids, parallelism);
    let is_bounded = raw.iter().all(RawNode::is_bounded);
    let mut origins = Origins::default();
    let count: usize = raw.iter().map(|node| node.inputs.len()).sum();
    if EDGES_MAX < count {
        root.document().mistake(too_many("inputs of the job", count, EDGES_MAX));
        root.document().mistakes()?;
    }
    let (mut edges, mut nodes, mut spans) = (Vec::new(), Vec::new(), Vec::new());
    for (to, node) in (0..).map(NodeId).zip(&raw) {
        let mut inputs = Vec::new();
        for (input, raw_input) in (0..).zip(&node.inputs) {
            if unread.contains(raw_input.producer()) {
                continue;
            }
            let producer = producer_of(root, &raw, &ids, node, raw_input);
            let Some((from, output)) = root.document().noted(producer) else { continue };
            let is_equal =
                of_graph[from.0 as usize].parallelism == of_graph[to.0 as usize].parallelism;
            let default = if is_equal { Partitioner::Forward } else { Partitioner::Rebalance };
            let partitioner = raw_input.partitioner.unwrap_or(default);
            // Which output a name means is known once the component has been asked.
            let exchange = raw_input.exchange.unwrap_or_else(|| {
                let breaks_pipeline = origins.meet(&raw, &ids, node, input as usize);
                default_exchange.of(partitioner, breaks_pipeline, is_bounded)
            });
            edges.push(Edge { from, output: 0, to, input, partitioner, exchange });
            spans.push(raw_input.from.span.clone());
            let place = root.document().place(&raw_input.from.span);
            inputs.push(InputSpec { from, output, partitioner, place });
        }
        let uid = uid_of(root, node, &nodes);
        let name = node.name.value.clone();
        let (kind, connector) = (node.kind.clone(), node.connector);
        nodes.push(NodeSpec { name, uid, kind, connector, inputs });
    }
    // Of nodes or edges that are missing nothing can be said.
    check_size(root.document(), &of_graph, &edges);
    root.document().mistakes()?;
    let graph = JobGraph::new(of_graph, edges.clone())
        .map_err(|error| graph_problem(root, &raw, &edges, &spans, error))?;
    list(root.document(), &graph, &nodes);
    Ok((graph, nodes))
}

impl RawInput {
    /// The node that it names.
    fn producer(&self) -> &str {
        self.from.value.split('.').next().unwrap_or_default()
    }
}

impl RawNode {
    /// Whether its records come to an end, if those of all others do.
    fn is_bounded(&self) -> bool {
        match &self.kind {
            NodeKind::Source(source) => source.is_bounded(),
            NodeKind::Operator(_) | NodeKind::Sink(_) => true,
        }
    }
}

/// Lists what counts for nodes beside what they are set to: it follows from the graph.
fn list(document: &Document<'_>, graph: &JobGraph, nodes: &[NodeSpec]) {
    for ((id, operator), node) in graph.nodes().zip(nodes) {
        let kind = match node.kind {
            NodeKind::Source(_) => "source",
            NodeKind::Operator(_) => "operator",
            NodeKind::Sink(_) => "sink",
        };
        let list = |key: &str, value: String| {
            document.amend(&format!("{kind}.{}.{key}", node.name), value);
        };
        list("uid", node.uid.clone());
        list("parallelism", operator.parallelism.to_string());
        for (index, input) in node.inputs.iter().enumerate() {
            let producer = &nodes[input.from.0 as usize].name;
            let output = input.output.as_ref().map_or(String::new(), |output| format!(".{output}"));
            let partition = partitioner_name(input.partitioner);
            let edge = graph.inputs(id).find(|edge| edge.input as usize == index);
            let exchange = edge.map_or("", |edge| edge.exchange.name());
            list(
                &format!("inputs[{index}]"),
                format!("{producer}{output}, {partition}, {exchange}"),
            );
        }
    }
}

/// How many tasks and channels a job has is known before any of them is made.
fn check_size(document: &Document<'_>, nodes: &[Node], edges: &[Edge]) {
    let tasks: u64 = nodes.iter().map(|node| u64::from(node.parallelism)).sum();
    if TASKS_MAX < tasks {
        document.mistake(too_many("tasks of the job", tasks, TASKS_MAX));
    }
    let parallelism = |id: NodeId| u64::from(nodes[id.0 as usize].parallelism);
    let channels_of = |edge: &Edge| match edge.partitioner {
        Partitioner::Forward => parallelism(edge.to),
        Partitioner::Rescale => parallelism(edge.from).max(parallelism(edge.to)),
        _ => parallelism(edge.from) * parallelism(edge.to),
    };
    let channels: u64 = edges.iter().map(channels_of).sum();
    if CHANNELS_MAX < channels {
        document.mistake(too_many("channels between tasks of the job", channels, CHANNELS_MAX));
    }
}

/// The nodes that records of each node come from, its own number included.
#[derive(Default)]
struct Origins(BTreeMap<NodeId, Rc<BTreeSet<NodeId>>>);

impl Origins {
    /// Whether what comes in by an input has an origin in common with an input before it: a node that reads
    /// one of both to its end first would wait for ever if both were pipelined.
    fn meet(
        &mut self,
        nodes: &[RawNode],
        ids: &BTreeMap<&str, NodeId>,
        node: &RawNode,
        input: usize,
    ) -> bool {
        let mut of = |input: &RawInput| self.of(nodes, ids, input);
        let own = of(&node.inputs[input]);
        node.inputs[..input].iter().any(|before| !own.is_disjoint(&of(before)))
    }

    fn of(
        &mut self,
        nodes: &[RawNode],
        ids: &BTreeMap<&str, NodeId>,
        input: &RawInput,
    ) -> Rc<BTreeSet<NodeId>> {
        let Some(from) = ids.get(input.producer()) else { return Rc::default() };
        if let Some(known) = self.0.get(from) {
            return known.clone();
        }
        let (mut found, mut waiting) = (BTreeSet::new(), vec![input]);
        while let Some(input) = waiting.pop() {
            if let Some(id) = ids.get(input.producer())
                && found.insert(*id)
            {
                waiting.extend(&nodes[id.0 as usize].inputs);
            }
        }
        let found = Rc::new(found);
        self.0.insert(*from, found.clone());
        found
    }
}

fn unknown_input<'n>(
    root: &Section<'_>,
    node: &RawNode,
    input: &RawInput,
    producer: &str,
    names: impl Iterator<Item = &'n str> + Clone,
) -> Problem {
    let message =
        format!("\"{}\" takes its input from \"{producer}\", which is not there", node.name.value);
    let problem = root.document().problem(Code::UnknownInput, &input.from.span, message);
    match closest(producer, names.clone()) {
        Some(name) => problem.hint(format!("did you mean \"{name}\"?")),
        None => problem.hint(format!("there are: {}", names.collect::<Vec<_>>().join(", "))),
    }
}
