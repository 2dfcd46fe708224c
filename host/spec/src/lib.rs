//! From the text of a manifest to a [`JobSpec`]: every setting checked, every name resolved.
//!
//! Settings carry Flink's names, values and defaults. Each has a row beside the code that reads it, and
//! [`tables`] lists them all. What is wrong comes out together, each as a [`Problem`] with its place.

mod connector;
mod execution;
mod flink;
pub mod grants;
pub mod host;
mod nodes;
mod operator;
mod restart;
pub mod secrets;
mod state;
pub mod tables;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_connector::{
    Catalog,
    catalog::{SinkSpec, SourceSpec},
    sink::Guarantee,
};
use cofferdam_core::{
    checkpoint::{CheckpointSettings, retention::Retention},
    exchange::ExchangeType,
    failover::FailoverStrategy,
    graph::{JobGraph, Partitioner},
    ids::NodeId,
    restart::{RestartState, RestartStrategy},
};
use cofferdam_files::Grants;
use cofferdam_sandbox::{Limits, SCRATCH};
use cofferdam_settings::{
    AnySetting, Code, Document, Effective, Problem, Required, Section, Setting, table::Key,
};
use toml::de::DeTable;

use self::{
    grants::{HostFile, HostGrants},
    host::HostSettings,
    secrets::{SecretSource, Secrets},
};

pub use self::nodes::partitioner_name;

type Result<T> = std::result::Result<T, Problem>;

/// Bytes of a manifest, and of a host's settings: ten times what a job of a thousand nodes needs.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// Bytes of a name.
const NAME_BYTES_MAX: usize = 200;

/// Flink's upper bound of the parallelism.
const PARALLELISM_MAX: u64 = 1 << 15;

static NAME: Required<String> =
    Key::text("job.name", "letters, digits, `-`, `_`; names the state directory `NAME.cofferdam`")
        .of_job()
        .required("give the job a name");
static PARALLELISM: Setting<u64> = Key::integer(
    "job.parallelism",
    1,
    PARALLELISM_MAX,
    "tasks of each node without a `parallelism` of its own",
)
.aliases(&["parallelism.default"])
.or(1);

static ROWS: &[&dyn AnySetting] = &[&NAME, &PARALLELISM];

/// A job, checked as far as its manifest goes.
#[derive(Debug, Clone)]
pub struct JobSpec {
    /// The job's name.
    pub name: String,
    /// Where relative paths begin: the manifest's directory.
    pub base_dir: PathBuf,
    /// When checkpoints are taken.
    pub checkpoint: CheckpointSettings,
    /// False: barriers block no channel, and records may be processed twice after a restart.
    pub is_exactly_once: bool,
    /// Whether snapshots are compressed.
    pub is_compressing: bool,
    /// A source whose event time is further behind the clock works off a backlog; `None`: none does.
    pub backlog_lag_ms: Option<u64>,
    /// Whether completed checkpoints outlive the job.
    pub retention: Retention,
    /// Where savepoints go unless somebody says otherwise.
    pub savepoint_dir: Option<PathBuf>,
    /// Where checkpoints are kept.
    pub storage: StorageSpec,
    /// Where declared state is kept while the job runs.
    pub state_backend: StateBackend,
    /// What a failure leads to.
    pub restart: RestartSpec,
    /// What restarts when a task fails.
    pub failover: FailoverStrategy,
    /// After so many failovers in a row without a new checkpoint everything restarts.
    pub escalates_after: Option<u32>,
    /// How many tasks a node has that says nothing of its own.
    pub parallelism: u32,
    /// The operators and edges.
    pub graph: JobGraph,
    /// What each node of the graph is, by its id.
    pub nodes: Vec<NodeSpec>,
    /// The connectors that its nodes were read with.
    pub catalog: Catalog,
    /// What it was read from.
    source: Arc<Source>,
    /// Settings that were left out, and why.
    pub warnings: Vec<String>,
    /// Every setting that was read, as it counts.
    pub effective: Vec<Effective>,
    /// What the host lets it open and use; `None`: the host says nothing, and whatever the manifest names is granted.
    pub grants: Option<HostGrants>,
}

/// What failures lead to.
#[derive(Debug, Clone, PartialEq)]
pub struct RestartSpec {
    /// When tasks restart, and when the job is given up.
    pub strategy: RestartStrategy,
    /// Failures of one incident count as one; see [`RestartState::merging`].
    pub is_merging_failures: bool,
}

impl RestartSpec {
    /// The strategy before the first failure.
    #[must_use]
    pub fn state(&self) -> RestartState {
        RestartState::new(self.strategy.clone()).merging(self.is_merging_failures)
    }
}

/// Where checkpoints are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StorageSpec {
    /// In sled, in this directory.
    Sled(PathBuf),
    /// As objects.
    Objects {
        /// A directory or a URL.
        location: String,
        /// What belongs to one machine: the lock, the socket, the history.
        state_dir: PathBuf,
    },
    /// In memory: a job whose process ends starts from the beginning.
    Memory,
}

impl StorageSpec {
    /// The directory of the lock, the socket and the history.
    #[must_use]
    pub fn state_dir(&self) -> Option<&Path> {
        match self {
            Self::Sled(dir) | Self::Objects { state_dir: dir, .. } => Some(dir),
            Self::Memory => None,
        }
    }
}

/// Where declared state is kept while a job runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateBackend {
    /// In the memory of each guest.
    Hashmap,
    /// By the host, on disk: it may be larger than the memory.
    Sled(SledBackend),
}

/// What state on disk takes of the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SledBackend {
    /// The database's cache, for all tasks together; beside it, it takes some 20 bytes a key.
    pub cache_bytes: u64,
    /// What a task has changed since the last checkpoint and is not on disk yet.
    pub write_buffer_bytes: u64,
    /// What a guest keeps in its own memory, at most a quarter of `limits.memory`.
    pub guest_cache_bytes: u64,
}

impl Default for SledBackend {
    fn default() -> Self {
        Self { cache_bytes: 256 << 20, write_buffer_bytes: 64 << 20, guest_cache_bytes: 16 << 20 }
    }
}

impl StateBackend {
    /// Its name in a manifest.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hashmap => "hashmap",
            Self::Sled(_) => "sled",
        }
    }
}

/// One node of the job graph.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Its name in the manifest.
    pub name: String,
    /// What it does.
    pub kind: NodeKind,
    /// The name of its connector; `None`: it is an operator.
    pub connector: Option<&'static str>,
    /// What its state is matched by when the job resumes: the name, unless the manifest says
    /// otherwise.
    pub uid: String,
    /// Where its records come from, in the order of the manifest.
    pub inputs: Vec<InputSpec>,
}

/// One input of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputSpec {
    /// The node it comes from.
    pub from: NodeId,
    /// The producer's output by name; `None`: its first.
    pub output: Option<String>,
    /// How records find their task.
    pub partitioner: Partitioner,
    /// Where it stands in the manifest.
    pub place: String,
}

/// What a node does.
#[derive(Debug, Clone)]
pub enum NodeKind {
    /// Brings records in.
    Source(Arc<dyn SourceSpec>),
    /// Runs a component.
    Operator(Box<OperatorSpec>),
    /// Takes records out.
    Sink(Arc<dyn SinkSpec>),
}

impl NodeKind {
    /// The limits of its instances; the defaults where it has none.
    #[must_use]
    pub fn limits(&self) -> Limits {
        match self {
            Self::Operator(operator) => operator.limits.clone(),
            Self::Source(_) | Self::Sink(_) => Limits::default(),
        }
    }
}

/// A component and how it is run.
#[derive(Debug, Clone)]
pub struct OperatorSpec {
    /// The component's file.
    pub component: PathBuf,
    /// What it is told in `open`.
    pub config: Vec<(String, String)>,
    /// What each instance may use.
    pub limits: Limits,
    /// Bytes of declared state of one task that the host keeps: keys, values and what an index takes of each. Default:
    /// 16 GiB, of which a disk of 1 TB has 60.
    pub state_bytes_max: u64,
    /// How many bytes one result partition of it may take on disk.
    pub partition_bytes_max: u64,
    /// What a checkpoint holds of it.
    pub snapshot: SnapshotMode,
    /// How many key groups it has.
    pub max_parallelism: u32,
    /// What an instance keeps of declared state where the host has it all.
    pub state_cache_bytes: u64,
    /// A record at which it has trapped so often is isolated and goes to its output
    /// [`DEAD_LETTER`](cofferdam_connector::DEAD_LETTER); `None`: a trap is a failure, however often.
    pub dead_letter_after: Option<u32>,
    /// Directories that it may read, each with the name that it finds it by.
    pub read: Vec<(String, PathBuf)>,
    /// How much may be in the scratch directory of a task; 0: it has none.
    pub scratch_bytes: u64,
    /// Variables of the host's environment that it is given.
    pub env: Vec<String>,
    /// Secrets that it is given, and where they are.
    pub secrets: Vec<(String, SecretSource)>,
}

impl OperatorSpec {
    /// What it finds of files, by name.
    #[must_use]
    pub fn directories(&self) -> Vec<String> {
        let scratch = (0 < self.scratch_bytes).then(|| SCRATCH.to_owned());
        self.read.iter().map(|(name, _)| name.clone()).chain(scratch).collect()
    }
}

/// What a checkpoint holds of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotMode {
    /// Its linear memory.
    Memory,
    /// Its declared state.
    Declared,
    /// Both; a restart restores the memory.
    Both,
}

impl SnapshotMode {
    /// Whether linear memory is in it.
    #[must_use]
    pub fn has_memory(self) -> bool {
        matches!(self, Self::Memory | Self::Both)
    }

    /// Whether declared state is in it.
    #[must_use]
    pub fn has_declared(self) -> bool {
        matches!(self, Self::Declared | Self::Both)
    }
}

impl JobSpec {
    /// Reads the manifest at `path`; what it leaves out, the host's settings may say. Its sources and sinks are
    /// of the catalog's kinds.
    ///
    /// # Errors
    /// All that is wrong: the first problem, with the others behind it.
    pub fn read_with(path: &Path, host: Option<&HostSettings>, catalog: &Catalog) -> Result<Self> {
        let text = read_text(path).map_err(|error| {
            Problem::new(
                Code::ManifestUnreadable,
                format!("cannot read the manifest {}", path.display()),
            )
            .because(&error)
            .hint("name the job's TOML file, for example `cofferdam run job.toml`")
        })?;
        Self::parse(path, &text, host, catalog)
    }

    /// Reads the text of a manifest; `path` says where relative paths begin.
    ///
    /// # Errors
    /// All that is wrong: the first problem, with the others behind it.
    pub fn parse(
        path: &Path,
        text: &str,
        host: Option<&HostSettings>,
        catalog: &Catalog,
    ) -> Result<Self> {
        let (path, text) = (path.to_owned(), text.to_owned());
        Source { path, text, host: host.cloned(), parallelism: BTreeMap::new() }.read(catalog)
    }

    /// The same job, with another parallelism of the nodes that are named.
    ///
    /// # Errors
    /// Where the job has no such node, or cannot have that parallelism.
    pub fn with_parallelism(&self, parallelism: &BTreeMap<String, u32>) -> Result<Self> {
        let mut source = (*self.source).clone();
        source.parallelism.extend(parallelism.iter().map(|(name, tasks)| (name.clone(), *tasks)));
        source.read(&self.catalog)
    }

    /// Whether the records of a node come to its tasks by their key. Over a forward edge they do not,
    /// whatever comes before it: an operator gives its records keys of its own.
    #[must_use]
    pub fn is_keyed(&self, id: NodeId) -> bool {
        let inputs = &self.node(id).inputs;
        let is_by_key = |input: &InputSpec| input.partitioner == Partitioner::Hash;
        !inputs.is_empty() && inputs.iter().all(is_by_key)
    }

    /// Which files it may open.
    #[must_use]
    pub fn files(&self) -> Grants {
        self.grants.as_ref().map_or_else(Grants::default, |grants| grants.files.clone())
    }

    /// What a reader of a sink's output can rely on after a failure: what the sink promises, as far as checkpoints
    /// do. `None`: it is not a sink, or an approximate exchange may lose records on the way to one.
    #[must_use]
    pub fn guarantee(&self, id: NodeId) -> Option<Guarantee> {
        let NodeKind::Sink(sink) = &self.node(id).kind else { return None };
        match sink.guarantee() {
            _ if self.graph.has_exchange(ExchangeType::is_approximate) => None,
            Guarantee::ExactlyOnce if !self.is_exactly_once => Some(Guarantee::AtLeastOnce),
            guarantee => Some(guarantee),
        }
    }

    /// The spec of a node.
    ///
    /// # Panics
    /// If the id is not of this job.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &NodeSpec {
        &self.nodes[id.0 as usize]
    }
}

/// The text of a file of settings. It may be a pipe, but not one without end.
fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MANIFEST_BYTES_MAX + 1).read_to_string(&mut text)?;
    match text.len() as u64 <= MANIFEST_BYTES_MAX {
        true => Ok(text),
        false => Err(io::Error::other(format!("it has more than {MANIFEST_BYTES_MAX} bytes"))),
    }
}

/// What a job is read from.
#[derive(Debug, Clone, Default)]
struct Source {
    path: PathBuf,
    text: String,
    host: Option<HostSettings>,
    /// What counts in the place of what the manifest says.
    parallelism: BTreeMap<String, u32>,
}

impl Source {
    fn read(self, catalog: &Catalog) -> Result<JobSpec> {
        let source = Arc::new(self);
        let mut spec = source.parsed(catalog)?;
        spec.source = source;
        Ok(spec)
    }

    fn parsed(&self, catalog: &Catalog) -> Result<JobSpec> {
        let mut document = Document::new(&self.path, &self.text);
        let host = self.host.as_ref();
        let host_start =
            host.map(|host| document.add(&host.path, &host.text, host.has_lines)).unwrap_or(0);
        let table = document.parse(&self.text, 0)?;
        let mut host_table = host
            .map(|host| {
                let parsed = document.parse(&host.text, host_start);
                // The line may have a secret that stands there by mistake.
                parsed.map_err(|problem| match host.text.contains(secrets::TABLE) {
                    true => problem.without_line(),
                    false => problem,
                })
            })
            .transpose()?;
        let mut layers = vec![(&table, 0)];
        // These are no settings of a job.
        let granted = host_table.as_mut().and_then(|table| table.remove(grants::TABLE));
        let grants = match (&granted, host) {
            (Some(granted), Some(host)) => {
                let (tenant, backend) = (host.tenant.as_deref(), host_backend(host)?);
                let file = HostFile { path: &host.path, tenant, backend };
                Some(HostGrants::read(&document, granted, &file, host_start)?)
            }
            _ => None,
        };
        if let (None, Some(tenant)) = (&grants, host.and_then(|host| host.tenant.as_deref())) {
            let message =
                format!("the host's file grants nothing to tenant \"{tenant}\" or to any job");
            return Err(Problem::new(Code::NotGranted, message).hint(
                "add a table [grants.default] or [grants.NAME] to a host's file in TOML, or leave the tenant out",
            ));
        }
        let secrets = host_table.as_mut().and_then(|table| table.remove(secrets::TABLE));
        let secrets = match (&secrets, host) {
            (Some(all), Some(host)) => {
                secrets::read(all.get_ref(), host.tenant.as_deref(), &host.path)?
            }
            _ => Secrets::new(),
        };
        if let Some(table) = &host_table {
            refuse_nodes(&document, table, host_start)?;
            layers.push((table, host_start));
        }
        let root = Section::root(&document, &layers);
        let base_dir = self.path.parent().unwrap_or_else(|| Path::new("")).to_owned();
        let mut spec = read_job(&root, &base_dir, catalog, &secrets, &self.parallelism)?;
        if let Some(grants) = &grants {
            grants.check_backend(&spec.state_backend)?;
            grants.check_operators(&spec.nodes)?;
        }
        spec.grants = grants;
        spec.warnings.extend(host.iter().flat_map(|host| host.warnings.iter().cloned()));
        spec.effective = document.effective();
        Ok(spec)
    }
}

/// What the host's file alone says about state on disk.
fn host_backend(host: &HostSettings) -> Result<SledBackend> {
    let document = Document::new(&host.path, &host.text);
    let table = document.parse(&host.text, 0)?;
    Ok(state::read_sled(&Section::root(&document, &[(&table, 0)])))
}

/// Nodes are a job's own.
fn refuse_nodes(document: &Document<'_>, table: &DeTable<'_>, start: usize) -> Result<()> {
    for node in ["source", "operator", "sink"] {
        if let Some((key, _)) = table.get_key_value(node) {
            let span = key.span().start + start..key.span().end + start;
            let message = format!("the host's settings cannot have a [[{node}]]");
            return Err(document
                .problem(Code::BadValue, &span, message)
                .hint("what a job consists of is in its manifest"));
        }
    }
    Ok(())
}

/// The job's name and parallelism.
fn read_head(root: &Section<'_>) -> Result<(String, u32)> {
    if !root.has_table("job") {
        return Err(root.missing("job", "a manifest begins with [job] and its name"));
    }
    let parallelism = u32::try_from(root.get(&PARALLELISM)).unwrap_or(1);
    let name = root.require(&NAME)?;
    if !is_name(&name.value) {
        let why = "a name has at most 200 letters, digits, `-` and `_`, and begins with a letter";
        return Err(root.bad_value(NAME.row().key, &name.span, why));
    }
    Ok((name.value, parallelism))
}

/// What each guest keeps of declared state that the host has.
fn share_guest_cache(document: &Document<'_>, backend: &StateBackend, nodes: &mut [NodeSpec]) {
    let StateBackend::Sled(backend) = backend else { return };
    for node in nodes {
        if let NodeKind::Operator(operator) = &mut node.kind {
            let bytes_max = operator.limits.memory_bytes_max / 4;
            operator.state_cache_bytes = backend.guest_cache_bytes.min(bytes_max);
            let shown = format!("{} bytes", operator.state_cache_bytes);
            document.amend(&format!("operator.{}.state-cache", node.name), shown);
        }
    }
}

fn read_job(
    root: &Section<'_>,
    base_dir: &Path,
    catalog: &Catalog,
    secrets: &Secrets,
    rescaled: &BTreeMap<String, u32>,
) -> Result<JobSpec> {
    let document = root.document();
    let head = document.noted(read_head(root));
    let (name, parallelism) = head.unwrap_or_else(|| ("job".to_owned(), 1));
    let mut execution = execution::read(root, base_dir, &name);
    let backlog_lag_ms = execution::read_backlog_lag(root);
    let mut warnings = std::mem::take(&mut execution.warnings);
    let state_backend = state::read(root, &mut warnings);
    let mut nodes = nodes::read_nodes(root, base_dir, parallelism, catalog, secrets);
    let strategies = restart::read(root);
    let (failover, escalation) = restart::read_failover(root);
    root.finish();
    document.noted(nodes::rescale(&mut nodes.nodes, rescaled));

    if execution.checkpoint.backlog_interval_ms.is_some() && backlog_lag_ms.is_none() {
        let key = "execution.checkpointing.interval-during-backlog";
        let lag = execution::BACKLOG_LAG.row().key;
        warnings.push(format!("`{key}` is ignored without `{lag}`: no source has a backlog"));
    }
    let (graph, mut nodes) = nodes::resolve(root, nodes, parallelism, &execution.exchange)?;
    warn_of_doubles(&nodes, &mut warnings);
    let is_batch = graph.has_exchange(ExchangeType::has_partition);
    if is_batch && execution.checkpoint.interval_ms.take().is_some() {
        let key = "execution.checkpointing.interval";
        document.amend(key, "none");
        let why =
            "regions that run one after the other have nothing to go back to but their inputs";
        warnings.push(format!("`{key}` is ignored with exchanges that are not pipelined: {why}"));
    }
    let is_checkpointed = execution.checkpoint.interval_ms.is_some();
    let restart = strategies.resolve(root, is_checkpointed);
    let escalates_after = restart::resolve_escalation(root, escalation, is_checkpointed);
    share_guest_cache(document, &state_backend, &mut nodes);
    document.mistakes()?;
    Ok(JobSpec {
        name,
        base_dir: base_dir.to_owned(),
        checkpoint: execution.checkpoint,
        is_exactly_once: execution.is_exactly_once,
        is_compressing: execution.is_compressing,
        backlog_lag_ms,
        retention: execution.retention,
        savepoint_dir: execution.savepoint_dir,
        storage: execution.storage,
        state_backend,
        restart,
        failover,
        escalates_after,
        parallelism,
        graph,
        nodes,
        catalog: catalog.clone(),
        source: Arc::default(),
        warnings,
        effective: Vec::new(),
        grants: None,
    })
}

/// The restart strategy that settings of the form `restart-strategy.type`, `fixed-delay` lead to.
///
/// # Errors
/// Everything that is wrong, with the setting it is in.
pub fn restart_of(settings: &[(String, String)]) -> Result<RestartSpec> {
    let text: String = settings.iter().map(|(key, value)| setting_line(key, value)).collect();
    let document = Document::new(Path::new("--set"), &text);
    let table = document.parse(&text, 0)?;
    let root = Section::root(&document, &[(&table, 0)]);
    let execution = execution::read(&root, Path::new(""), "job");
    let strategies = restart::read(&root);
    root.finish();
    document.mistakes()?;
    Ok(strategies.resolve(&root, execution.checkpoint.interval_ms.is_some()))
}

/// A setting as a line of TOML. Flink's older spelling of the strategy's name is taken, too.
fn setting_line(key: &str, value: &str) -> String {
    let key = if key == "restart-strategy" { "restart-strategy.type" } else { key };
    // Numbers as Flink takes them: "010" is ten.
    let value = match (value.parse::<i64>(), value.parse::<f64>(), value.parse::<bool>()) {
        (Ok(number), ..) => toml::Value::Integer(number),
        (_, Ok(number), _) if number.is_finite() => toml::Value::Float(number),
        (_, _, Ok(flag)) => toml::Value::Boolean(flag),
        _ => toml::Value::String(value.to_owned()),
    };
    format!("{key} = {value}\n")
}

fn is_name(text: &str) -> bool {
    text.len() <= NAME_BYTES_MAX
        && text.starts_with(|letter: char| letter.is_ascii_alphabetic())
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_".contains(letter))
}

/// An input that is named twice is no mistake where a stream meets itself, and mostly one elsewhere.
fn warn_of_doubles(nodes: &[NodeSpec], warnings: &mut Vec<String>) {
    for node in nodes {
        for (place, input) in node.inputs.iter().enumerate() {
            let is_same =
                |other: &&InputSpec| (other.from, &other.output) == (input.from, &input.output);
            if node.inputs[..place].iter().any(|other| is_same(&other)) {
                let producer = &nodes[input.from.0 as usize].name;
                warnings.push(format!(
                    "\"{}\" has \"{producer}\" among its inputs more than once: each record comes as often",
                    node.name
                ));
            }
        }
    }
}
