//! From the text of a manifest to a [`JobSpec`]: every setting checked, every name resolved.
//!
//! Settings carry Flink's names, values and defaults. What is wrong comes out as a [`Problem`] with
//! its line; the first one, because the later ones are often its consequences.

mod effective;
pub mod host;
mod reader;
pub mod value;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use cofferdam_contract::Format;
use cofferdam_core::{
    checkpoint::{CheckpointSettings, retention::Retention},
    exchange::ExchangeType,
    failover::FailoverStrategy,
    graph::{Edge, GraphError, JobGraph, Operator, Partitioner},
    ids::OperatorId,
    key_group::default_max_parallelism,
    restart::{ExponentialDelay, RestartState, RestartStrategy},
};
use cofferdam_sandbox::Limits;
use toml::de::{DeTable, DeValue};

use self::{
    host::{HostSettings, MEANINGLESS},
    reader::{Layer, Located, Section, Text, closest},
};
use crate::{
    problem::{Code, Problem},
    storage::is_url,
};

type Result<T> = std::result::Result<T, Problem>;

/// Flink's upper bound of the parallelism.
const PARALLELISM_MAX: u64 = 1 << 15;
/// Flink's largest `int`.
const FLINK_INT_MAX: u32 = i32::MAX as u32;
/// Flink caps the pause at a year.
const PAUSE_MS_MAX: u64 = 365 * 24 * 3_600_000;
/// Flink's bound below which checkpointing counts as disabled.
const INTERVAL_MS_MIN: u64 = 10;
/// A longer record is most often a sign of a file that has no lines.
const RECORD_BYTES_DEFAULT: u64 = 16 << 20;
/// A record must fit into the memory of a guest, several times.
const RECORD_BYTES_MAX: u64 = 256 << 20;

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
    /// `STREAMING`, `BATCH` or `AUTOMATIC`.
    pub runtime_mode: &'static str,
    /// Which exchanges a batch job has, by Flink's name.
    pub batch_shuffle_mode: &'static str,
    /// In a stream, readers of exchanges restart alone.
    pub is_approximate: bool,
    /// How long a barrier waits for others before it overtakes, where unaligned checkpoints are on.
    pub aligned_timeout_ms: u64,
    /// The operators and edges.
    pub graph: JobGraph,
    /// What each node of the graph is, by its id.
    pub nodes: Vec<NodeSpec>,
    /// Settings that were left out, and why.
    pub warnings: Vec<String>,
    /// Every setting that counts for the whole job, with the place where it was set, if it was.
    pub origins: BTreeMap<String, Option<String>>,
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
    /// In memory: a job whose process ends begins anew.
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
    pub from: OperatorId,
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
    Source(SourceSpec),
    /// Runs a component.
    Operator(Box<OperatorSpec>),
    /// Takes records out.
    Sink(SinkSpec),
}

/// A source.
#[derive(Debug, Clone, PartialEq)]
pub enum SourceSpec {
    /// Lines of files.
    File(FileSourceSpec),
    /// Records made up.
    Generator(GeneratorSpec),
}

/// Lines of files, restartable by byte position.
#[derive(Debug, Clone, PartialEq)]
pub struct FileSourceSpec {
    /// A glob, relative to the manifest.
    pub path: String,
    /// What the lines are.
    pub format: LineFormat,
    /// Where the key of a record is: a JSON pointer, a column, or a pattern.
    pub key: Option<String>,
    /// Where its event time is, likewise.
    pub timestamp: Option<String>,
    /// How event times are written.
    pub timestamp_format: TimeFormat,
    /// How much later than a record an earlier one may come.
    pub out_of_orderness_ms: u64,
    /// Without records for so long, a task holds event time back no longer; `None`: it always does.
    pub idle_timeout_ms: Option<u64>,
    /// Whether the first line of each file names its columns.
    pub has_header: bool,
    /// What separates columns.
    pub delimiter: u8,
    /// A longer record is a bad one.
    pub record_bytes_max: usize,
    /// What becomes of a bad record.
    pub on_bad_record: OnBadRecord,
    /// A file is shared among tasks in pieces of this size.
    pub split_bytes: u64,
    /// Records a second, by all tasks together; `None`: as fast as they are taken.
    pub rate: Option<f64>,
}

/// What becomes of a record that a source cannot make sense of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBadRecord {
    /// The job fails: to read it again cannot help.
    Fail,
    /// It is left out, and counted.
    Skip,
    /// It goes to the source's output [`DEAD_LETTER`].
    DeadLetter,
}

/// How event times are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TimeFormat {
    /// Milliseconds since 1970-01-01 UTC.
    Millis,
    /// Seconds since then, with or without a fraction.
    Seconds,
    /// `2013-01-01T05:00:00Z`.
    Rfc3339,
    /// As `strftime` has it; UTC unless it says otherwise.
    Pattern(String),
}

/// What the lines of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineFormat {
    /// Text.
    Text,
    /// One JSON document a line.
    Json,
    /// Columns, as RFC 4180 has them, on one line each.
    Csv,
}

/// Records made up by a seeded generator.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratorSpec {
    /// What the records are.
    pub content: GeneratorContent,
    /// How many, by all tasks together; `None`: without end.
    pub count: Option<u64>,
    /// Records a second, by all tasks together; `None`: as fast as they are taken.
    pub rate: Option<f64>,
    /// Determines every record.
    pub seed: u64,
    /// Whether record `n` has event time `n` milliseconds.
    pub has_timestamps: bool,
}

/// What a generator makes.
#[derive(Debug, Clone, PartialEq)]
pub enum GeneratorContent {
    /// Words as keys, with no value, by a Zipf law.
    Words {
        /// How many different ones.
        vocabulary: u32,
        /// The law's exponent; 0 makes all equally frequent.
        exponent: f64,
    },
    /// The record's number, as text, with no key.
    Sequence,
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
    /// What a checkpoint holds of it.
    pub snapshot: SnapshotMode,
    /// How many key groups it has.
    pub max_parallelism: u32,
    /// What an instance keeps of declared state where the host has it all.
    pub state_cache_bytes: u64,
    /// A record at which it has trapped so often is isolated and goes to its output
    /// [`DEAD_LETTER`]; `None`: a trap is a failure, however often.
    pub dead_letter_after: Option<u32>,
}

/// The output of isolated records. An operator that has one has it from the host.
pub const DEAD_LETTER: &str = "dead-letter";

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

/// A sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SinkSpec {
    /// Part files in a directory, exactly once.
    File(FileSinkSpec),
    /// Standard output, at least once.
    Stdout {
        /// What is written of a record.
        line: LineContent,
    },
    /// Nowhere.
    Discard,
}

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

/// What a sink writes of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineContent {
    /// The value.
    Value,
    /// The key, a tab, the value.
    KeyValue,
}

/// What to do about the parts of an earlier run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfExists {
    /// Refuse to start.
    Fail,
    /// Remove them.
    Replace,
}

impl JobSpec {
    /// Reads the manifest at `path`.
    ///
    /// # Errors
    /// All that is wrong: the first problem, with the others behind it.
    pub fn read(path: &Path) -> Result<Self> {
        Self::read_with(path, None)
    }

    /// Reads the manifest at `path`; what it leaves out, the host's settings may say.
    ///
    /// # Errors
    /// All that is wrong: the first problem, with the others behind it.
    pub fn read_with(path: &Path, host: Option<&HostSettings>) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Problem::new(
                Code::ManifestUnreadable,
                format!("cannot read the manifest {}", path.display()),
            )
            .detail(error)
            .hint("name the job's TOML file, for example `cofferdam run job.toml`")
        })?;
        Self::parse(path, &text, host)
    }

    /// Reads the text of a manifest; `path` says where relative paths begin.
    ///
    /// # Errors
    /// All that is wrong: the first problem, with the others behind it.
    pub fn parse(path: &Path, text: &str, host: Option<&HostSettings>) -> Result<Self> {
        let mut source = Text::new(path, text);
        let host_start =
            host.map(|host| source.add(&host.path, &host.text, host.has_lines)).unwrap_or(0);
        let table = parse_toml(&source, text, 0)?;
        let host_table =
            host.map(|host| parse_toml(&source, &host.text, host_start)).transpose()?;
        let mut layers = vec![Layer { table: &table, start: 0 }];
        if let Some(table) = &host_table {
            refuse_nodes(&source, table, host_start)?;
            layers.push(Layer { table, start: host_start });
        }
        let root = Section::new(&source, String::new(), 0..0, layers);
        let base_dir = path.parent().unwrap_or(Path::new("")).to_owned();
        let mut spec = read_job(&root, &base_dir)?;
        spec.warnings.extend(host.iter().flat_map(|host| host.warnings.iter().cloned()));
        spec.origins = source.looked_for();
        spec.origins.retain(|key, _| is_setting(key));
        Ok(spec)
    }

    /// Whether the records of a node come to its tasks by their key. Over a forward edge they do not,
    /// whatever comes before it: an operator gives its records keys of its own.
    #[must_use]
    pub fn is_keyed(&self, id: OperatorId) -> bool {
        let inputs = &self.node(id).inputs;
        let is_by_key = |input: &InputSpec| input.partitioner == Partitioner::Hash;
        !inputs.is_empty() && inputs.iter().all(is_by_key)
    }

    /// The spec of a node.
    ///
    /// # Panics
    /// If the id is not of this job.
    #[must_use]
    pub fn node(&self, id: OperatorId) -> &NodeSpec {
        &self.nodes[id.0 as usize]
    }
}

fn parse_toml<'t>(source: &Text<'_>, text: &'t str, start: usize) -> Result<DeTable<'t>> {
    DeTable::parse(text).map(toml::Spanned::into_inner).map_err(|error| {
        let span = error.span().map_or(start..start, |span| span.start + start..span.end + start);
        source.problem(Code::ManifestSyntax, &span, format!("not TOML: {}", error.message()))
    })
}

/// Nodes are a job's own.
fn refuse_nodes(source: &Text<'_>, table: &DeTable<'_>, start: usize) -> Result<()> {
    for node in ["source", "operator", "sink"] {
        if let Some((key, _)) = table.get_key_value(node) {
            let span = key.span().start + start..key.span().end + start;
            let message = format!("the host's settings cannot have a [[{node}]]");
            return Err(source
                .problem(Code::BadValue, &span, message)
                .hint("what a job consists of is in its manifest"));
        }
    }
    Ok(())
}

/// Whether a key is one that `check --effective` shows.
fn is_setting(key: &str) -> bool {
    let of = ["execution.", "pipeline.", "state.", "restart-strategy.", "jobmanager."];
    key == "job.parallelism" || of.iter().any(|prefix| key.starts_with(prefix))
}

/// The job's name and parallelism.
fn read_head(root: &Section<'_>) -> Result<(String, u32)> {
    let job = root
        .section("job")?
        .ok_or_else(|| root.missing("job", "a manifest begins with [job] and its name"))?;
    let name = job.text("name").ok_or_else(|| job.missing("name", "give the job a name"))?;
    if !is_name(&name.value) {
        let why = "a name has letters, digits, `-` and `_`, and begins with a letter";
        return Err(job.bad_value("name", &name.span, why));
    }
    let parallelism = parallelism(&job).unwrap_or(1);
    job.finish();
    Ok((name.value, parallelism))
}

fn read_job(root: &Section<'_>, base_dir: &Path) -> Result<JobSpec> {
    let head = root.noted(read_head(root));
    let (name, parallelism) = head.clone().unwrap_or_else(|| ("job".to_owned(), 1));
    let execution = root.noted(read_execution(root, base_dir, &name));
    let backlog_lag = root.noted(read_backlog_lag(root));
    let mut warnings = Vec::new();
    let state_backend = root.noted(read_state_backend(root, &mut warnings));
    let nodes = read_nodes(root, base_dir, parallelism);
    // For what is wrong in it: whether the job has checkpoints is known when its graph is.
    let restart = root.noted(read_restart(root, true).and_then(|_| read_failover(root, true)));
    if head.is_some() && execution.is_some() && backlog_lag.is_some() && restart.is_some() {
        root.finish();
    }
    root.mistakes()?;
    let (Some(mut execution), Some(backlog_lag_ms), Some(state_backend), Some(nodes)) =
        (execution, backlog_lag, state_backend, nodes)
    else {
        return Err(Problem::new(Code::HostBug, "a manifest without a mistake was not read"));
    };

    execution.warnings.append(&mut warnings);
    let mut warnings = execution.warnings;
    if execution.checkpoint.backlog_interval_ms.is_some() && backlog_lag_ms.is_none() {
        let key = "execution.checkpointing.interval-during-backlog";
        warnings.push(format!(
            "`{key}` means nothing without `{BACKLOG_LAG}`: no source has a backlog"
        ));
    }
    let (graph, mut nodes) = resolve(root, nodes, parallelism, &execution.mode)?;
    warn_of_doubles(&nodes, &mut warnings);
    let is_batch = graph.has_exchange(ExchangeType::has_partition);
    if is_batch && execution.checkpoint.interval_ms.take().is_some() {
        let key = "execution.checkpointing.interval";
        let why =
            "regions that run one after the other have nothing to go back to but their inputs";
        warnings
            .push(format!("`{key}` means nothing with exchanges that are not pipelined: {why}"));
    }
    let is_checkpointed = execution.checkpoint.interval_ms.is_some();
    let restart = read_restart(root, is_checkpointed)?;
    let (failover, escalates_after) = read_failover(root, is_checkpointed)?;
    if let StateBackend::Sled(backend) = &state_backend {
        for node in &mut nodes {
            if let NodeKind::Operator(operator) = &mut node.kind {
                let bytes_max = operator.limits.memory_bytes_max / 4;
                operator.state_cache_bytes = backend.guest_cache_bytes.min(bytes_max);
            }
        }
    }
    root.mistakes()?;
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
        runtime_mode: execution.mode.name,
        batch_shuffle_mode: execution.mode.batch_name,
        is_approximate: execution.mode.is_approximate,
        aligned_timeout_ms: execution.aligned_timeout_ms,
        graph,
        nodes,
        warnings,
        origins: BTreeMap::new(),
    })
}

/// The restart strategy that settings of the form `restart-strategy.type`, `fixed-delay` lead to.
///
/// # Errors
/// The first problem, with the setting it is in.
pub fn restart_of(settings: &[(String, String)]) -> Result<RestartSpec> {
    let text: String = settings.iter().map(|(key, value)| setting_line(key, value)).collect();
    let source = Text::new(Path::new("--set"), &text);
    let table = parse_toml(&source, &text, 0)?;
    let layers = vec![Layer { table: &table, start: 0 }];
    let root = Section::new(&source, String::new(), 0..0, layers);
    let read = read_execution(&root, Path::new(""), "job")
        .and_then(|it| read_restart(&root, it.checkpoint.interval_ms.is_some()));
    let strategy = root.noted(read);
    if strategy.is_some() {
        root.finish();
    }
    root.mistakes()?;
    strategy.ok_or_else(|| Problem::new(Code::HostBug, "settings without a mistake were not read"))
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
    text.starts_with(|letter: char| letter.is_ascii_alphabetic())
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_".contains(letter))
}

fn parallelism(section: &Section<'_>) -> Option<u32> {
    let read = section.integer("parallelism", 1..=PARALLELISM_MAX);
    read.map(|number| u32::try_from(number.value).unwrap_or(1))
}

/// What `[execution]` says.
struct Execution {
    checkpoint: CheckpointSettings,
    is_exactly_once: bool,
    is_compressing: bool,
    retention: Retention,
    savepoint_dir: Option<PathBuf>,
    storage: StorageSpec,
    mode: RuntimeMode,
    aligned_timeout_ms: u64,
    warnings: Vec<String>,
}

/// Which exchange an edge has that says none of its own.
struct RuntimeMode {
    mode: ModeName,
    name: &'static str,
    batch: ShuffleMode,
    batch_name: &'static str,
    /// In a stream, readers restart alone.
    is_approximate: bool,
}

/// Which exchange the edges of a batch job have.
#[derive(Clone, Copy)]
enum ShuffleMode {
    /// This one, but for forward edges, which are chained.
    All(ExchangeType),
    /// What Flink's `ExecutionMode` says.
    Execution(ExecutionMode),
}

/// Flink's older names (`ExecutionConfig`, until 1.20).
#[derive(Clone, Copy, PartialEq, Eq)]
enum ExecutionMode {
    /// Every edge is pipelined.
    PipelinedForced,
    /// And those that break the pipeline are blocking.
    Pipelined,
    /// Only forward edges are pipelined.
    Batch,
    /// None is.
    BatchForced,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ModeName {
    Streaming,
    Batch,
    /// Batch where every source is bounded.
    Automatic,
}

fn read_execution(root: &Section<'_>, base_dir: &Path, job: &str) -> Result<Execution> {
    let default_dir = base_dir.join(format!("{job}.cofferdam"));
    let mut execution = Execution {
        checkpoint: CheckpointSettings::default(),
        is_exactly_once: true,
        is_compressing: false,
        retention: Retention::default(),
        savepoint_dir: None,
        storage: StorageSpec::Sled(default_dir.clone()),
        mode: RuntimeMode {
            mode: ModeName::Streaming,
            name: "STREAMING",
            batch: ShuffleMode::All(ExchangeType::Blocking),
            batch_name: "ALL_EXCHANGES_BLOCKING",
            is_approximate: false,
        },
        aligned_timeout_ms: 0,
        warnings: Vec::new(),
    };
    let Some(section) = root.section("execution")? else { return Ok(execution) };
    let modes = [
        ("STREAMING", ModeName::Streaming),
        ("BATCH", ModeName::Batch),
        ("AUTOMATIC", ModeName::Automatic),
    ];
    let modes = modes.map(|(name, mode)| (name, (name, mode)));
    if let Some(mode) = section.choice("runtime-mode", &modes) {
        (execution.mode.name, execution.mode.mode) = mode.value;
    }
    let shuffles = [
        ("ALL_EXCHANGES_BLOCKING", ShuffleMode::All(ExchangeType::Blocking)),
        ("ALL_EXCHANGES_PIPELINED", ShuffleMode::All(ExchangeType::PipelinedBounded)),
        ("ALL_EXCHANGES_HYBRID_FULL", ShuffleMode::All(ExchangeType::HybridFull)),
        ("ALL_EXCHANGES_HYBRID_SELECTIVE", ShuffleMode::All(ExchangeType::HybridSelective)),
        ("PIPELINED_FORCED", ShuffleMode::Execution(ExecutionMode::PipelinedForced)),
        ("PIPELINED", ShuffleMode::Execution(ExecutionMode::Pipelined)),
        ("BATCH", ShuffleMode::Execution(ExecutionMode::Batch)),
        ("BATCH_FORCED", ShuffleMode::Execution(ExecutionMode::BatchForced)),
    ];
    let shuffles = shuffles.map(|(name, shuffle)| (name, (name, shuffle)));
    if let Some(shuffle) = section.choice("batch-shuffle-mode", &shuffles) {
        (execution.mode.batch_name, execution.mode.batch) = shuffle.value;
    }
    if let Some(checkpointing) = section.section("checkpointing")? {
        read_checkpointing(&checkpointing, base_dir, default_dir, job, &mut execution)?;
        checkpointing.finish();
    }
    if let Some(recovery) = section.section("state-recovery")? {
        let is_approximate = recovery.boolean("approximate-local-recovery");
        execution.mode.is_approximate = is_approximate.is_some_and(|it| it.value);
        recovery.finish();
    }
    section.finish();
    Ok(execution)
}

fn read_checkpointing(
    section: &Section<'_>,
    base_dir: &Path,
    default_dir: PathBuf,
    job: &str,
    execution: &mut Execution,
) -> Result<()> {
    let settings = &mut execution.checkpoint;
    // Flink: an interval below 10 ms counts as none.
    if let Some(Located { value, span }) = section.duration_ms("interval") {
        settings.interval_ms = Some(value).filter(|ms| INTERVAL_MS_MIN <= *ms);
        if (1..INTERVAL_MS_MIN).contains(&value) {
            execution.warnings.push(format!(
                "`execution.checkpointing.interval` is {value} ms: below {INTERVAL_MS_MIN} ms there are no \
                 checkpoints, and no restarts by default; give it a unit, such as \"{value} s\" ({})",
                section.place(&span).lines().next().unwrap_or_default()
            ));
        }
    }
    if let Some(Located { value, span }) = section.duration_ms("interval-during-backlog") {
        if value != 0 && settings.interval_ms.is_none_or(|interval| value < interval) {
            let why = "it must be 0, for no checkpoints, or at least the interval";
            return Err(section.bad_value("interval-during-backlog", &span, why));
        }
        settings.backlog_interval_ms = Some(value);
    }
    if let Some(pause) = section.duration_ms("min-pause") {
        settings.min_pause_ms = pause.value.min(PAUSE_MS_MAX);
    }
    if let Some(timeout) = section.duration_ms("timeout") {
        if timeout.value < INTERVAL_MS_MIN {
            return Err(section.bad_value("timeout", &timeout.span, "it must be at least 10 ms"));
        }
        settings.timeout_ms = timeout.value;
    }
    let number = |key| section.integer(key, 0..=u64::from(FLINK_INT_MAX));
    if let Some(Located { value, .. }) = number("tolerable-failed-checkpoints") {
        let count = u32::try_from(value).unwrap_or(FLINK_INT_MAX);
        // Flink: its largest number stands for any.
        settings.tolerable_failures = (count != FLINK_INT_MAX).then_some(count);
    }
    let at_least_one = |key| section.integer(key, 1..=u64::from(FLINK_INT_MAX));
    if let Some(Located { value, .. }) = at_least_one("max-concurrent-checkpoints") {
        settings.concurrent_max = usize::try_from(value).unwrap_or(usize::MAX);
    }
    if let Some(Located { value, .. }) = at_least_one("num-retained") {
        settings.retained_max = usize::try_from(value).unwrap_or(usize::MAX);
    }
    if let Some(mode) = section.choice("mode", &[("EXACTLY_ONCE", true), ("AT_LEAST_ONCE", false)])
    {
        execution.is_exactly_once = mode.value;
    }
    if let Some(compression) = section.boolean("snapshot-compression") {
        execution.is_compressing = compression.value;
    }
    read_unaligned(section, execution)?;
    let policies =
        [Retention::NeverRetain, Retention::RetainOnFailure, Retention::RetainOnCancellation];
    let policies = policies.map(|policy| (policy.name(), policy));
    if let Some(policy) = section.choice("externalized-checkpoint-retention", &policies) {
        execution.retention = policy.value;
    }
    warn_meaningless(section, "execution.checkpointing.", &mut execution.warnings);
    let savepoint_dir = section.text("savepoint-dir");
    savepoint_dir.iter().try_for_each(|dir| check_scheme(section, "savepoint-dir", dir))?;
    execution.savepoint_dir = match savepoint_dir {
        Some(dir) if is_url(Path::new(&dir.value)) && !dir.value.starts_with("file") => {
            Some(PathBuf::from(dir.value))
        }
        Some(dir) => Some(local_dir(section, "savepoint-dir", base_dir, &dir)?),
        None => None,
    };
    execution.storage = read_storage(section, base_dir, default_dir, job)?;
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum StorageName {
    Sled,
    Memory,
    Objects,
}

/// Flink: a directory alone stands for `filesystem`. Here that is so for a URL; a path alone is the
/// job's own state directory.
fn read_storage(
    section: &Section<'_>,
    base_dir: &Path,
    default_dir: PathBuf,
    job: &str,
) -> Result<StorageSpec> {
    use StorageName::{Memory, Objects, Sled};
    let names =
        [("sled", Sled), ("memory", Memory), ("jobmanager", Memory), ("filesystem", Objects)];
    let name = section.choice("storage", &names);
    let dir = section.text("dir");
    dir.iter().try_for_each(|dir| check_scheme(section, "dir", dir))?;
    let is_remote = dir
        .as_ref()
        .is_some_and(|it| is_url(Path::new(&it.value)) && !it.value.starts_with("file"));
    match (name.as_ref().map(|name| name.value), dir) {
        (Some(Memory), _) => Ok(StorageSpec::Memory),
        (Some(Objects), Some(dir)) => Ok(objects_at(&dir.value, base_dir, default_dir, job)),
        (None, Some(dir)) if is_remote => Ok(objects_at(&dir.value, base_dir, default_dir, job)),
        (Some(Objects), None) => {
            let span = name.map_or(0..0, |name| name.span);
            let why = "it needs `dir`, a directory or a URL such as \"s3://bucket/checkpoints\"";
            Err(section.bad_value("storage", &span, why))
        }
        (Some(Sled) | None, Some(dir)) => {
            Ok(StorageSpec::Sled(local_dir(section, "dir", base_dir, &dir)?))
        }
        (Some(Sled) | None, None) => Ok(StorageSpec::Sled(default_dir)),
    }
}

fn check_scheme(section: &Section<'_>, key: &'static str, dir: &Located<String>) -> Result<()> {
    match dir.value.split_once("://") {
        Some((scheme, _)) if !["file", "s3", "s3a"].contains(&scheme) => {
            let why = format!("{scheme}:// is not known, file:// and s3:// are");
            Err(section.bad_value(key, &dir.span, why))
        }
        _ => Ok(()),
    }
}

/// Each job has a folder of its own, as in Flink.
fn objects_at(dir: &str, base_dir: &Path, state_dir: PathBuf, job: &str) -> StorageSpec {
    let dir = match is_url(Path::new(dir)) {
        true => dir.to_owned(),
        false => base_dir.join(dir).display().to_string(),
    };
    StorageSpec::Objects { location: format!("{}/{job}", dir.trim_end_matches('/')), state_dir }
}

fn local_dir(
    section: &Section<'_>,
    key: &str,
    base_dir: &Path,
    dir: &Located<String>,
) -> Result<PathBuf> {
    let path = dir.value.strip_prefix("file://").unwrap_or(&dir.value);
    match path.split_once("://") {
        Some((scheme, _)) => {
            let why = format!("it must be a local directory, and {scheme}:// is none");
            Err(section.bad_value(key, &dir.span, &why))
        }
        None => Ok(base_dir.join(path)),
    }
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

/// Takes note of settings that Flink has and that mean nothing here.
fn warn_meaningless(section: &Section<'_>, prefix: &str, warnings: &mut Vec<String>) {
    for (path, why) in MEANINGLESS {
        if let Some(key) = path.strip_prefix(prefix)
            && section.has(key)
        {
            warnings.push(format!("`{path}` means nothing here: {why}"));
        }
    }
}

/// Flink: an unaligned checkpoint needs EXACTLY_ONCE, and that no other is pending beside it.
fn read_unaligned(section: &Section<'_>, execution: &mut Execution) -> Result<()> {
    let timeout = section.duration_ms("aligned-checkpoint-timeout").map_or(0, |it| it.value);
    execution.aligned_timeout_ms = timeout;
    let Some(unaligned) = section.section("unaligned")? else { return Ok(()) };
    let is_enabled = unaligned.boolean("enabled");
    let prefix = "execution.checkpointing.unaligned.";
    warn_meaningless(&unaligned, prefix, &mut execution.warnings);
    unaligned.finish();
    let Some(Located { span, .. }) = is_enabled.filter(|enabled| enabled.value) else {
        return Ok(());
    };
    if !execution.is_exactly_once {
        let path = "execution.checkpointing.unaligned.enabled";
        let why = "without EXACTLY_ONCE no barrier waits for another";
        execution.warnings.push(format!("`{path}` means nothing here: {why}"));
        return Ok(());
    }
    let concurrent = execution.checkpoint.concurrent_max;
    if 1 < concurrent {
        let why = format!(
            "it needs max-concurrent-checkpoints = 1, and that is {concurrent}: a barrier that \
             overtakes must not meet another"
        );
        return Err(unaligned.bad_value("enabled", &span, &why));
    }
    execution.checkpoint.unaligned_after_ms = Some(timeout);
    Ok(())
}

/// Proposed for Flink as FLIP-328.
const BACKLOG_LAG: &str = "pipeline.backlog.watermark-lag-threshold";

fn read_backlog_lag(root: &Section<'_>) -> Result<Option<u64>> {
    let Some(pipeline) = root.section("pipeline")? else { return Ok(None) };
    let backlog = pipeline.section("backlog")?;
    let lag = backlog.as_ref().map(|section| section.duration_ms("watermark-lag-threshold"));
    backlog.iter().for_each(Section::finish);
    pipeline.finish();
    Ok(lag.flatten().map(|lag| lag.value))
}

/// Below this a cache or buffer would hold next to nothing.
const BACKEND_BYTES_MIN: u64 = 4 << 10;

/// Flink's backends on disk do what sled does here.
fn read_state_backend(root: &Section<'_>, warnings: &mut Vec<String>) -> Result<StateBackend> {
    let Some(state) = root.section("state")? else { return Ok(StateBackend::Hashmap) };
    let Some(section) = state.section("backend")? else {
        state.finish();
        return Ok(StateBackend::Hashmap);
    };
    let names = [
        ("hashmap", None),
        ("sled", Some("sled")),
        ("rocksdb", Some("rocksdb")),
        ("forst", Some("forst")),
    ];
    let name = section.choice("type", &names).and_then(|name| name.value);
    let mut backend = SledBackend::default();
    if let Some(sled) = section.section("sled")? {
        let sizes = [
            ("cache", &mut backend.cache_bytes),
            ("write-buffer", &mut backend.write_buffer_bytes),
            ("guest-cache", &mut backend.guest_cache_bytes),
        ];
        for (key, bytes) in sizes {
            match sled.bytes(key) {
                Some(Located { value, .. }) if BACKEND_BYTES_MIN <= value => *bytes = value,
                Some(Located { span, .. }) => {
                    return Err(sled.bad_value(key, &span, "it must be at least 4 KiB"));
                }
                None => {}
            }
        }
        sled.finish();
    }
    section.finish();
    state.finish();
    let Some(name) = name else { return Ok(StateBackend::Hashmap) };
    if name != "sled" {
        warnings.push(format!("`state.backend.type` = \"{name}\" is taken for \"sled\", the state on disk that there is here"));
    }
    Ok(StateBackend::Sled(backend))
}

#[derive(Clone, Copy)]
enum StrategyName {
    None,
    FixedDelay,
    FailureRate,
    ExponentialDelay,
}

fn read_restart(root: &Section<'_>, is_checkpointed: bool) -> Result<RestartSpec> {
    use StrategyName::{ExponentialDelay as Exponential, FailureRate, FixedDelay, None as Never};
    let default = match is_checkpointed {
        true => RestartStrategy::ExponentialDelay(ExponentialDelay::default()),
        false => RestartStrategy::None,
    };
    let Some(section) = root.section("restart-strategy")? else {
        return Ok(RestartSpec { strategy: default, is_merging_failures: false });
    };
    let merging = section.boolean("merge-failures");
    let names = [
        ("none", Never),
        ("off", Never),
        ("disable", Never),
        ("fixed-delay", FixedDelay),
        ("fixeddelay", FixedDelay),
        ("failure-rate", FailureRate),
        ("failurerate", FailureRate),
        ("exponential-delay", Exponential),
        ("exponentialdelay", Exponential),
    ];
    let chosen = section.choice("type", &names).map(|choice| choice.value);
    // Sections of strategies that are not chosen are read all the same: a mistake in them is one.
    let fixed_delay = read_fixed_delay(&section)?;
    let failure_rate = read_failure_rate(&section)?;
    let exponential = read_exponential(&section)?;
    section.finish();
    let strategy = match chosen {
        None => default,
        Some(Never) => RestartStrategy::None,
        Some(FixedDelay) => fixed_delay,
        Some(FailureRate) => failure_rate,
        Some(Exponential) => RestartStrategy::ExponentialDelay(exponential),
    };
    let is_merging_failures = merging.is_some_and(|merging| merging.value);
    Ok(RestartSpec { strategy, is_merging_failures })
}

fn read_fixed_delay(strategies: &Section<'_>) -> Result<RestartStrategy> {
    let (mut attempts, mut delay_ms) = (1, 1_000);
    if let Some(section) = strategies.section("fixed-delay")? {
        if let Some(number) = section.integer("attempts", 0..=u64::MAX) {
            attempts = number.value;
        }
        if let Some(delay) = section.duration_ms("delay") {
            delay_ms = delay.value;
        }
        section.finish();
    }
    Ok(RestartStrategy::FixedDelay { attempts, delay_ms })
}

fn read_failure_rate(strategies: &Section<'_>) -> Result<RestartStrategy> {
    let (mut failures_per_interval_max, mut interval_ms, mut delay_ms) = (1, 60_000, 1_000);
    if let Some(section) = strategies.section("failure-rate")? {
        if let Some(number) = section.integer("max-failures-per-interval", 1..=u64::from(u32::MAX))
        {
            failures_per_interval_max = u32::try_from(number.value).unwrap_or(u32::MAX);
        }
        if let Some(interval) = section.duration_ms("failure-rate-interval") {
            if interval.value == 0 {
                return Err(section.bad_value(
                    "failure-rate-interval",
                    &interval.span,
                    "it must be above 0",
                ));
            }
            interval_ms = interval.value;
        }
        if let Some(delay) = section.duration_ms("delay") {
            delay_ms = delay.value;
        }
        section.finish();
    }
    Ok(RestartStrategy::FailureRate { failures_per_interval_max, interval_ms, delay_ms })
}

fn read_exponential(strategies: &Section<'_>) -> Result<ExponentialDelay> {
    let mut settings = ExponentialDelay::default();
    let Some(section) = strategies.section("exponential-delay")? else { return Ok(settings) };
    let positive = |key: &'static str, into: &mut u64| -> Result<()> {
        if let Some(duration) = section.duration_ms(key) {
            if duration.value == 0 {
                return Err(section.bad_value(key, &duration.span, "it must be at least 1 ms"));
            }
            *into = duration.value;
        }
        Ok(())
    };
    positive("initial-backoff", &mut settings.initial_backoff_ms)?;
    positive("max-backoff", &mut settings.backoff_ms_max)?;
    positive("reset-backoff-threshold", &mut settings.reset_threshold_ms)?;
    if let Some(number) = section.number("backoff-multiplier") {
        if number.value <= 1.0 {
            return Err(section.bad_value(
                "backoff-multiplier",
                &number.span,
                "it must be above 1",
            ));
        }
        settings.backoff_multiplier = number.value;
    }
    if let Some(number) = section.number("jitter-factor") {
        if !(0.0..=1.0).contains(&number.value) {
            return Err(section.bad_value("jitter-factor", &number.span, "it must be from 0 to 1"));
        }
        settings.jitter_factor = number.value;
    }
    if let Some(number) = section.integer("attempts-before-reset-backoff", 1..=u64::MAX) {
        settings.attempts_max = Some(number.value);
    }
    if settings.backoff_ms_max < settings.initial_backoff_ms {
        return Err(section.bad_value("max-backoff", &section.span, "it is below initial-backoff"));
    }
    section.finish();
    Ok(settings)
}

fn read_failover(
    root: &Section<'_>,
    is_checkpointed: bool,
) -> Result<(FailoverStrategy, Option<u32>)> {
    let (mut strategy, mut escalates_after) = (FailoverStrategy::default(), None);
    let Some(jobmanager) = root.section("jobmanager")? else { return Ok((strategy, None)) };
    if let Some(section) = jobmanager.section("execution")? {
        let strategies = [FailoverStrategy::Region, FailoverStrategy::Full];
        let strategies = strategies.map(|strategy| (strategy.name(), strategy));
        if let Some(chosen) = section.choice("failover-strategy", &strategies) {
            strategy = chosen.value;
        }
        let bound = section.integer("failover-escalation", 1..=u64::from(FLINK_INT_MAX));
        if let Some(Located { value, span }) = bound {
            if !is_checkpointed {
                let why = "it counts from checkpoint to checkpoint: set an interval for them";
                return Err(section.bad_value("failover-escalation", &span, why));
            }
            escalates_after = u32::try_from(value).ok();
        }
        section.finish();
    }
    jobmanager.finish();
    Ok((strategy, escalates_after))
}

/// A node as it was read, before names are resolved.
struct RawNode {
    name: Located<String>,
    uid: Option<Located<String>>,
    parallelism: Option<u32>,
    kind: NodeKind,
    inputs: Vec<RawInput>,
}

struct RawInput {
    from: Located<String>,
    partitioner: Option<Partitioner>,
    exchange: Option<ExchangeType>,
}

/// The nodes, or `None` where something is wrong with one.
fn read_nodes(root: &Section<'_>, base_dir: &Path, parallelism: u32) -> Option<Vec<RawNode>> {
    let mut raw = Vec::new();
    let sources = root.noted(root.sections("source"))?;
    if sources.is_empty() {
        raw.push(root.noted(Err(root.missing("source", "a job needs at least one [[source]]"))));
    }
    for section in sources {
        let node = read_node(&section, None, |_| Ok(NodeKind::Source(read_source(&section)?)));
        raw.push(root.noted(node));
    }
    for section in root.noted(root.sections("operator"))? {
        let node = read_inputs(&section).and_then(|inputs| {
            read_node(&section, Some(inputs), |own| {
                let spec = read_operator(&section, base_dir, own.unwrap_or(parallelism))?;
                Ok(NodeKind::Operator(Box::new(spec)))
            })
        });
        raw.push(root.noted(node));
    }
    for section in root.noted(root.sections("sink"))? {
        let node = read_inputs(&section).and_then(|inputs| {
            let kind = |_| Ok(NodeKind::Sink(read_sink(&section, base_dir)?));
            read_node(&section, Some(inputs), kind)
        });
        raw.push(root.noted(node));
    }
    raw.into_iter().collect()
}

fn read_node(
    section: &Section<'_>,
    inputs: Option<Vec<RawInput>>,
    kind: impl FnOnce(Option<u32>) -> Result<NodeKind>,
) -> Result<RawNode> {
    let name = section
        .text("name")
        .ok_or_else(|| section.missing("name", "other nodes refer to it by name"))?;
    if !is_name(&name.value) {
        let why = "a name has letters, digits, `-` and `_`, and begins with a letter";
        return Err(section.bad_value("name", &name.span, why));
    }
    let uid = section.text("uid");
    if let Some(Located { value, span }) = &uid
        && (value.is_empty() || 200 < value.len())
    {
        return Err(section.bad_value("uid", span, "it has from 1 to 200 bytes"));
    }
    let parallelism = parallelism(section);
    let kind = kind(parallelism)?;
    section.finish();
    Ok(RawNode { name, uid, parallelism, kind, inputs: inputs.unwrap_or_default() })
}

const PARTITIONERS: &[(&str, Partitioner)] = &[
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
    for (value, span) in section.items("inputs")? {
        inputs.push(match value {
            DeValue::String(from) => {
                let from = Located { value: from.to_string(), span };
                RawInput { from, partitioner: None, exchange: None }
            }
            DeValue::Table(table) => {
                let input = section.nested("inputs", span, table);
                let from = input
                    .text("from")
                    .ok_or_else(|| input.missing("from", "name the node it comes from"))?;
                let partitioner =
                    input.choice("partition", PARTITIONERS).map(|choice| choice.value);
                let exchanges = ExchangeType::ALL.map(|exchange| (exchange.name(), exchange));
                let exchange = input.choice("exchange", &exchanges).map(|choice| choice.value);
                input.finish();
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

fn resolve(
    root: &Section<'_>,
    raw: Vec<RawNode>,
    parallelism: u32,
    mode: &RuntimeMode,
) -> Result<(JobGraph, Vec<NodeSpec>)> {
    let mut ids: BTreeMap<&str, OperatorId> = BTreeMap::new();
    for (id, node) in (0..).map(OperatorId).zip(&raw) {
        if ids.insert(&node.name.value, id).is_some() {
            let message = format!("there are two nodes called \"{}\"", node.name.value);
            let problem = root.problem(Code::DuplicateName, &node.name.span, message);
            return Err(problem.hint("sources, operators and sinks share their names"));
        }
    }
    // A sink without a parallelism of its own follows its input, so that the two are chained.
    let mut operators: Vec<Operator> = Vec::new();
    for node in &raw {
        let followed = match (&node.kind, node.inputs.as_slice()) {
            (NodeKind::Sink(_), [only]) => {
                let producer = only.from.value.split('.').next().unwrap_or_default();
                ids.get(producer)
                    .and_then(|id| operators.get(id.0 as usize))
                    .map(|operator| operator.parallelism)
            }
            _ => None,
        };
        let parallelism = node.parallelism.or(followed).unwrap_or(parallelism);
        operators.push(Operator { name: node.name.value.clone(), parallelism });
    }
    let (mut edges, mut nodes, mut spans) = (Vec::new(), Vec::new(), Vec::new());
    for (to, node) in (0..).map(OperatorId).zip(&raw) {
        let mut inputs = Vec::new();
        for (input, raw_input) in (0..).zip(&node.inputs) {
            let (producer, output) = match raw_input.from.value.split_once('.') {
                Some((producer, output)) => (producer, Some(output.to_owned())),
                None => (raw_input.from.value.as_str(), None),
            };
            let Some(&from) = ids.get(producer) else {
                return Err(unknown_input(root, node, raw_input, producer, ids.keys().copied()));
            };
            let is_sink = matches!(raw[from.0 as usize].kind, NodeKind::Sink(_));
            if is_sink {
                let message = format!("\"{producer}\" is a sink: nothing comes out of it");
                return Err(root.problem(Code::UnknownInput, &raw_input.from.span, message));
            }
            let is_equal =
                operators[from.0 as usize].parallelism == operators[to.0 as usize].parallelism;
            let default = if is_equal { Partitioner::Forward } else { Partitioner::Rebalance };
            let partitioner = raw_input.partitioner.unwrap_or(default);
            // Which output a name means is known once the component has been asked.
            let exchange = raw_input.exchange.unwrap_or_else(|| {
                let breaks_pipeline = breaks_pipeline(&raw, &ids, node, inputs.len());
                mode.exchange(partitioner, breaks_pipeline, &raw)
            });
            edges.push(Edge { from, output: 0, to, input, partitioner, exchange });
            spans.push(raw_input.from.span.clone());
            let place = root.place(&raw_input.from.span);
            inputs.push(InputSpec { from, output, partitioner, place });
        }
        let name = node.name.value.clone();
        let uid = node.uid.as_ref().map_or_else(|| name.clone(), |uid| uid.value.clone());
        if let Some(other) = nodes.iter().find(|other: &&NodeSpec| other.uid == uid) {
            let span = node.uid.as_ref().map_or(&node.name.span, |uid| &uid.span);
            let message = format!("\"{}\" and \"{name}\" have the same uid \"{uid}\"", other.name);
            return Err(root
                .problem(Code::DuplicateName, span, message)
                .hint("state is matched by it: give each its own"));
        }
        nodes.push(NodeSpec { name, uid, kind: node.kind.clone(), inputs });
    }
    let graph = JobGraph::new(operators, edges.clone()).map_err(|error| match error {
        GraphError::Cycle(cycle) => {
            let names: Vec<&str> =
                cycle.iter().map(|id| raw[id.0 as usize].name.value.as_str()).collect();
            let first = cycle.first().map_or(0, |id| id.0 as usize);
            let path =
                format!("{} -> {}", names.join(" -> "), names.first().copied().unwrap_or_default());
            root.problem(
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
            root.problem(Code::ForwardParallelism, &spans[place], message).hint(
                "use partition = \"rebalance\" or \"hash\", or give both the same parallelism",
            )
        }
    })?;
    Ok((graph, nodes))
}

impl RuntimeMode {
    /// The exchange of an edge that says none: streams are pipelined; in a batch the mode says it.
    fn exchange(
        &self,
        partitioner: Partitioner,
        breaks_pipeline: bool,
        nodes: &[RawNode],
    ) -> ExchangeType {
        let is_bounded = |node: &RawNode| match &node.kind {
            NodeKind::Source(SourceSpec::Generator(generator)) => generator.count.is_some(),
            _ => true,
        };
        let is_batch = match self.mode {
            ModeName::Streaming => false,
            ModeName::Batch => true,
            ModeName::Automatic => nodes.iter().all(is_bounded),
        };
        let is_forward = partitioner == Partitioner::Forward;
        let is_blocking = match self.batch {
            // A forward edge costs no channel as long as it is pipelined.
            _ if !is_batch && self.is_approximate && !is_forward => {
                return ExchangeType::PipelinedApproximate;
            }
            _ if !is_batch => false,
            ShuffleMode::All(_) if is_forward => false,
            ShuffleMode::All(exchange) => return exchange,
            ShuffleMode::Execution(ExecutionMode::PipelinedForced) => false,
            ShuffleMode::Execution(ExecutionMode::Pipelined) => breaks_pipeline,
            ShuffleMode::Execution(ExecutionMode::Batch) => breaks_pipeline || !is_forward,
            ShuffleMode::Execution(ExecutionMode::BatchForced) => true,
        };
        if is_blocking { ExchangeType::Blocking } else { ExchangeType::PipelinedBounded }
    }
}

/// Whether what comes in by an input has an origin in common with an input before it: a node that reads
/// one of both to its end first would wait for ever if both were pipelined.
fn breaks_pipeline(
    nodes: &[RawNode],
    ids: &BTreeMap<&str, OperatorId>,
    node: &RawNode,
    input: usize,
) -> bool {
    let origins = |input: &RawInput| {
        let (mut found, mut waiting) = (BTreeSet::new(), vec![input]);
        while let Some(input) = waiting.pop() {
            let producer = input.from.value.split('.').next().unwrap_or_default();
            if let Some(id) = ids.get(producer)
                && found.insert(*id)
            {
                waiting.extend(&nodes[id.0 as usize].inputs);
            }
        }
        found
    };
    let own = origins(&node.inputs[input]);
    node.inputs[..input].iter().any(|before| !own.is_disjoint(&origins(before)))
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
    let problem = root.problem(Code::UnknownInput, &input.from.span, message);
    match closest(producer, names.clone()) {
        Some(name) => problem.hint(format!("did you mean \"{name}\"?")),
        None => problem.hint(format!("there are: {}", names.collect::<Vec<_>>().join(", "))),
    }
}

#[derive(Clone, Copy)]
enum Connector {
    File,
    Generator,
    Stdout,
    Discard,
}

fn connector(section: &Section<'_>, choices: &[(&str, Connector)]) -> Result<Connector> {
    let read = section.choice("connector", choices);
    let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
    read.map(|choice| choice.value)
        .ok_or_else(|| section.missing("connector", &format!("choose one of {}", words.join(", "))))
}

fn read_source(section: &Section<'_>) -> Result<SourceSpec> {
    let choices = [("file", Connector::File), ("generator", Connector::Generator)];
    match connector(section, &choices)? {
        Connector::Generator => Ok(SourceSpec::Generator(read_generator(section)?)),
        _ => Ok(SourceSpec::File(read_file_source(section)?)),
    }
}

fn read_file_source(section: &Section<'_>) -> Result<FileSourceSpec> {
    let path = section
        .text("path")
        .ok_or_else(|| section.missing("path", "a file or a glob such as \"input/*.txt\""))?;
    if let Err(error) = glob::Pattern::new(&path.value) {
        return Err(section.bad_value("path", &path.span, format!("not a glob: {error}")));
    }
    let formats =
        [("text", LineFormat::Text), ("json", LineFormat::Json), ("csv", LineFormat::Csv)];
    let format = section.choice("format", &formats);
    let format = format.map_or(LineFormat::Text, |choice| choice.value);
    let header = section.boolean("header");
    let delimiter = section.text("delimiter");
    if format != LineFormat::Csv {
        let other = header.as_ref().map(|it| ("header", &it.span));
        let other = other.or(delimiter.as_ref().map(|it| ("delimiter", &it.span)));
        if let Some((key, span)) = other {
            return Err(section.bad_value(key, span, "only format = \"csv\" has it"));
        }
    }
    let has_header = format == LineFormat::Csv && header.is_none_or(|it| it.value);
    let delimiter = match delimiter {
        None => b',',
        Some(Located { value, span }) => match value.as_bytes() {
            [byte] if !matches!(byte, b'"' | b'\n' | b'\r') => *byte,
            _ => {
                let why = "it must be one ASCII character, such as \";\" or \"\\t\"";
                return Err(section.bad_value("delimiter", &span, why));
            }
        },
    };
    let field = |key: &'static str| read_field(section, key, format, has_header);
    let (key, timestamp) = (field("key")?, field("timestamp")?);
    let timestamp_format = section.text("timestamp-format");
    if let (Some(located), None) = (&timestamp_format, &timestamp) {
        let why = "it says how `timestamp` is written, and there is none";
        return Err(section.bad_value("timestamp-format", &located.span, why));
    }
    let timestamp_format = match timestamp_format {
        Some(located) => read_time_format(section, located)?,
        None => TimeFormat::Millis,
    };
    let out_of_orderness = section.duration_ms("max-out-of-orderness");
    let idle_timeout = section.duration_ms("idle-timeout");
    let policies = [
        ("fail", OnBadRecord::Fail),
        ("skip", OnBadRecord::Skip),
        (DEAD_LETTER, OnBadRecord::DeadLetter),
    ];
    let on_bad_record = section.choice("on-bad-record", &policies);
    let record_bytes_max = match section.bytes("max-record-size") {
        Some(Located { value, .. }) if (1..=RECORD_BYTES_MAX).contains(&value) => value,
        Some(Located { span, .. }) => {
            let why = "it must be from 1 byte to 256 MiB";
            return Err(section.bad_value("max-record-size", &span, why));
        }
        None => RECORD_BYTES_DEFAULT,
    };
    let split_bytes = match section.bytes("split-size") {
        Some(Located { value, .. }) if 4096 <= value => value,
        Some(Located { span, .. }) => {
            return Err(section.bad_value("split-size", &span, "it must be at least 4 KiB"));
        }
        None => 64 << 20,
    };
    let rate = read_rate(section)?;
    Ok(FileSourceSpec {
        path: path.value,
        format,
        key,
        timestamp,
        timestamp_format,
        out_of_orderness_ms: out_of_orderness.map_or(0, |it| it.value),
        idle_timeout_ms: idle_timeout.map(|it| it.value),
        has_header,
        delimiter,
        record_bytes_max: usize::try_from(record_bytes_max).unwrap_or(usize::MAX),
        on_bad_record: on_bad_record.map_or(OnBadRecord::Fail, |it| it.value),
        split_bytes,
        rate,
    })
}

/// Where a field of a line is.
fn read_field(
    section: &Section<'_>,
    key: &'static str,
    format: LineFormat,
    has_header: bool,
) -> Result<Option<String>> {
    let Some(Located { value, span }) = section.text(key) else { return Ok(None) };
    let is_number = value.parse::<usize>().is_ok_and(|number| 0 < number);
    let why = match format {
        LineFormat::Json if !value.starts_with('/') => {
            "a JSON pointer begins with `/`, for example \"/user/id\"".to_owned()
        }
        LineFormat::Csv if !has_header && !is_number => {
            "without a header a column has a number, from 1 on".to_owned()
        }
        LineFormat::Text => match regex::bytes::Regex::new(&value) {
            Ok(_) => return Ok(Some(value)),
            Err(error) => format!("in a text it is a pattern: {error}"),
        },
        LineFormat::Json | LineFormat::Csv => return Ok(Some(value)),
    };
    Err(section.bad_value(key, &span, why))
}

fn read_time_format(section: &Section<'_>, located: Located<String>) -> Result<TimeFormat> {
    use chrono::format::{Item, StrftimeItems};
    let Located { value, span } = located;
    Ok(match value.as_str() {
        "millis" => TimeFormat::Millis,
        "seconds" => TimeFormat::Seconds,
        "rfc3339" => TimeFormat::Rfc3339,
        pattern if StrftimeItems::new(pattern).any(|item| item == Item::Error) => {
            let why = "it is neither millis, seconds nor rfc3339, nor a pattern such as \
                       \"%Y-%m-%d %H:%M:%S\"";
            return Err(section.bad_value("timestamp-format", &span, why));
        }
        pattern if !pattern.contains('%') => {
            let why = "a pattern has fields, such as \"%Y-%m-%d %H:%M:%S\"; or millis, seconds, \
                       rfc3339";
            return Err(section.bad_value("timestamp-format", &span, why));
        }
        pattern if pattern.contains("%Z") => {
            let why = "the name of a time zone says no offset: write %z for one such as +0100, or \
                       leave it out for UTC";
            return Err(section.bad_value("timestamp-format", &span, why));
        }
        pattern => TimeFormat::Pattern(pattern.to_owned()),
    })
}

/// Records a second.
fn read_rate(section: &Section<'_>) -> Result<Option<f64>> {
    match section.number("rate") {
        Some(Located { value, span }) if value <= 0.0 => {
            Err(section.bad_value("rate", &span, "it must be above 0 records a second"))
        }
        rate => Ok(rate.map(|rate| rate.value)),
    }
}

fn read_generator(section: &Section<'_>) -> Result<GeneratorSpec> {
    let is_words = section.choice("content", &[("words", true), ("sequence", false)]);
    let vocabulary = section.integer("vocabulary", 1..=10_000_000);
    let exponent = section.number("exponent");
    if let Some(Located { value, span }) = &exponent
        && !(0.0..=10.0).contains(value)
    {
        return Err(section.bad_value("exponent", span, "it must be from 0 to 10"));
    }
    let content = match is_words {
        Some(Located { value: false, .. }) => GeneratorContent::Sequence,
        _ => GeneratorContent::Words {
            vocabulary: vocabulary
                .map_or(10_000, |number| u32::try_from(number.value).unwrap_or(u32::MAX)),
            exponent: exponent.map_or(1.0, |number| number.value),
        },
    };
    let count = section.integer("count", 0..=u64::MAX).map(|number| number.value);
    let rate = read_rate(section)?;
    let seed = section.integer("seed", 0..=u64::MAX).map_or(0, |number| number.value);
    let has_timestamps = section.boolean("timestamps").is_some_and(|it| it.value);
    Ok(GeneratorSpec { content, count, rate, seed, has_timestamps })
}

fn read_operator(section: &Section<'_>, base_dir: &Path, parallelism: u32) -> Result<OperatorSpec> {
    let component = section
        .text("component")
        .ok_or_else(|| section.missing("component", "the .wasm file to run"))?;
    let config = section.free("config")?;
    let limits = match section.section("limits")? {
        Some(limits) => read_limits(&limits)?,
        None => Limits::default(),
    };
    let snapshot = section.choice(
        "snapshot",
        &[
            ("memory", SnapshotMode::Memory),
            ("declared", SnapshotMode::Declared),
            ("both", SnapshotMode::Both),
        ],
    );
    let max_parallelism = match section.integer("max-parallelism", 1..=PARALLELISM_MAX) {
        Some(number) if number.value < u64::from(parallelism) => {
            let why = format!("it is below the parallelism, {parallelism}");
            return Err(section.bad_value("max-parallelism", &number.span, why));
        }
        Some(number) => u32::try_from(number.value).unwrap_or(u32::MAX),
        None => default_max_parallelism(parallelism),
    };
    Ok(OperatorSpec {
        component: base_dir.join(component.value),
        config,
        limits,
        snapshot: snapshot.map_or(SnapshotMode::Both, |choice| choice.value),
        max_parallelism,
        state_cache_bytes: 0,
        dead_letter_after: read_on_trap(section)?,
    })
}

/// A trap may have another reason than the record, so it takes some to call a record poison.
const TRAPS_DEFAULT: u32 = 3;

fn read_on_trap(section: &Section<'_>) -> Result<Option<u32>> {
    let policies = [("fail", false), (DEAD_LETTER, true)];
    let policy = section.choice("on-trap", &policies);
    let traps = section.integer("dead-letter-after", 2..=1_000);
    if !policy.is_some_and(|policy| policy.value) {
        return match traps {
            Some(traps) => {
                let why = "it says when a record is isolated: set on-trap = \"dead-letter\"";
                Err(section.bad_value("dead-letter-after", &traps.span, why))
            }
            None => Ok(None),
        };
    }
    Ok(Some(traps.map_or(TRAPS_DEFAULT, |traps| u32::try_from(traps.value).unwrap_or(u32::MAX))))
}

fn read_limits(section: &Section<'_>) -> Result<Limits> {
    let mut limits = Limits::default();
    if let Some(memory) = section.bytes("memory") {
        if 4 << 30 < memory.value {
            return Err(section.bad_value("memory", &memory.span, "a component has at most 4 GiB"));
        }
        limits.memory_bytes_max = memory.value;
    }
    if let Some(call) = section.duration_ms("call") {
        limits.call_max = Duration::from_millis(call.value);
    }
    if let Some(output) = section.bytes("output") {
        limits.output_bytes_max = output.value;
    }
    if let Some(handles) = section.integer("handles", 0..=1_000_000) {
        limits.handles_max = u32::try_from(handles.value).unwrap_or(u32::MAX);
    }
    if let Some(elements) = section.integer("table-elements", 0..=10_000_000) {
        limits.table_elements_max = elements.value;
    }
    if let Some(state) = section.bytes("state") {
        limits.state_bytes_max = state.value;
    }
    if let Some(partition) = section.bytes("partition") {
        limits.partition_bytes_max = partition.value;
    }
    if let Some(log) = section.bytes("log") {
        limits.log_bytes_per_second_max = log.value;
    }
    section.finish();
    Ok(limits)
}

fn read_sink(section: &Section<'_>, base_dir: &Path) -> Result<SinkSpec> {
    let choices =
        [("file", Connector::File), ("stdout", Connector::Stdout), ("discard", Connector::Discard)];
    let connector = connector(section, &choices)?;
    let line = || -> Result<LineContent> {
        let choices = [("value", LineContent::Value), ("key-value", LineContent::KeyValue)];
        Ok(section.choice("line", &choices).map_or(LineContent::Value, |choice| choice.value))
    };
    match connector {
        Connector::Discard => Ok(SinkSpec::Discard),
        Connector::Stdout => Ok(SinkSpec::Stdout { line: line()? }),
        _ => {
            let path = section
                .text("path")
                .ok_or_else(|| section.missing("path", "the directory for the parts"))?;
            let choices = [("fail", IfExists::Fail), ("replace", IfExists::Replace)];
            let if_exists = section.choice("if-exists", &choices);
            let size = match section.bytes("roll-size") {
                Some(Located { value: 0, span }) => {
                    return Err(section.bad_value("roll-size", &span, "it must be above 0"));
                }
                size => size.map(|size| size.value),
            };
            let interval = section.duration_ms("roll-interval");
            let interval = interval.map(|interval| Duration::from_millis(interval.value));
            Ok(SinkSpec::File(FileSinkSpec {
                path: base_dir.join(path.value),
                line: line()?,
                if_exists: if_exists.map_or(IfExists::Fail, |choice| choice.value),
                rolling: Rolling { size, interval },
            }))
        }
    }
}

impl SourceSpec {
    /// How its keys and values are encoded; no key format: its records have no key.
    #[must_use]
    pub fn formats(&self) -> (Option<Format>, Format) {
        match self {
            Self::File(file) => {
                let value = match file.format {
                    LineFormat::Text | LineFormat::Csv => Format::Text,
                    LineFormat::Json => Format::Json,
                };
                (file.key.as_ref().map(|_| Format::Text), value)
            }
            Self::Generator(generator) => match generator.content {
                GeneratorContent::Words { .. } => (Some(Format::Text), Format::Bytes),
                GeneratorContent::Sequence => (None, Format::Text),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    //! Which strategy applies, row by row of Flink's own tests of its loaders.

    use super::*;

    fn spec(job: &str, host: Option<&str>) -> Result<JobSpec> {
        let text = format!(
            "[job]\nname = \"j\"\n\n[[source]]\nname = \"s\"\nconnector = \"generator\"\n\n{job}"
        );
        let host = host.map(|text| HostSettings {
            path: PathBuf::from("cofferdam.toml"),
            text: text.to_owned(),
            has_lines: true,
            warnings: Vec::new(),
        });
        JobSpec::parse(Path::new("job.toml"), &text, host.as_ref())
    }

    fn strategy(job: Option<&str>, host: Option<&str>, is_checkpointed: bool) -> Result<String> {
        let lines = |name: &str| format!("[restart-strategy]\ntype = \"{name}\"\n");
        let interval = match is_checkpointed {
            true => "[execution.checkpointing]\ninterval = \"1s\"\n",
            false => "",
        };
        let job = job.map_or(String::new(), lines) + interval;
        let host = host.map(lines);
        spec(&job, host.as_deref())
            .map(|spec| effective::strategy_settings(&spec.restart.strategy).0.to_owned())
    }

    /// P for each edge that is pipelined and B for each that is blocking, in the order of the manifest.
    fn exchanges(mode: &str, nodes: &str) -> String {
        let execution = format!(
            "[execution]\nruntime-mode = \"BATCH\"\nbatch-shuffle-mode = \"{mode}\"\n\n{nodes}"
        );
        let spec = spec(&execution, None).expect("a job");
        let letter = |edge: &Edge| if edge.exchange.must_be_pipelined() { 'P' } else { 'B' };
        spec.graph.edges().iter().map(letter).collect()
    }

    #[test]
    fn approximate_local_recovery_is_for_streams_and_edges_that_say_nothing() {
        let nodes = operator("a", "{ from = \"s\", partition = \"hash\" }")
            + &operator("b", "\"a\"")
            + &operator("c", "{ from = \"b\", partition = \"hash\", exchange = \"pipelined\" }");
        let names = |lines: &str| -> Vec<&'static str> {
            let spec = spec(&format!("{lines}{nodes}"), None).expect("a job");
            spec.graph.edges().iter().map(|edge| edge.exchange.name()).collect()
        };
        let on = "[execution.state-recovery]\napproximate-local-recovery = true\n";
        assert_eq!(names(on), ["pipelined-approximate", "pipelined-bounded", "pipelined"]);
        let batch = format!("[execution]\nruntime-mode = \"BATCH\"\n{on}");
        assert_eq!(names(&batch), ["blocking", "pipelined-bounded", "pipelined"]);
        assert_eq!(names(""), ["pipelined-bounded", "pipelined-bounded", "pipelined"]);
    }

    /// Every key that anything looks for.
    fn keys(lines: &str) -> BTreeSet<String> {
        let text = format!("[job]\nname = \"j\"\n{lines}");
        let source = Text::new(Path::new("job.toml"), &text);
        let table = parse_toml(&source, &text, 0).expect("TOML");
        let layers = vec![Layer { table: &table, start: 0 }];
        let root = Section::new(&source, String::new(), 0..0, layers);
        read_job(&root, Path::new("")).unwrap_or_else(|problem| panic!("{problem}"));
        source.looked_for().into_keys().collect()
    }

    #[test]
    fn every_setting_stands_in_the_reference_and_no_other() {
        let all = r#"
            [execution]
            [execution.checkpointing]
            unaligned = {}
            [execution.state-recovery]
            [pipeline.backlog]
            [state.backend]
            type = "sled"
            sled = {}
            [restart-strategy]
            fixed-delay = {}
            failure-rate = {}
            exponential-delay = {}
            [jobmanager.execution]
            [[source]]
            name = "words"
            connector = "generator"
            [[source]]
            name = "lines"
            connector = "file"
            path = "lines"
            [[operator]]
            name = "o"
            component = "o.wasm"
            inputs = [{ from = "words" }, "lines"]
            limits = {}
            on-trap = "dead-letter"
            [[sink]]
            name = "out"
            connector = "file"
            path = "output"
            inputs = ["o"]
        "#;
        let is_table = |key: &String, all: &BTreeSet<String>| {
            all.iter().any(|other| other.starts_with(&format!("{key}.")))
        };
        let known = keys(all);
        let reference = include_str!("../../../../docs/settings.md");
        let rows = reference.lines().filter(|line| line.starts_with("| `"));
        let told: BTreeSet<String> = rows
            .flat_map(|row| row.split('|').nth(1).unwrap_or_default().split(','))
            .map(|key| key.trim().trim_matches('`').to_owned())
            .collect();
        let is_meaningless = |key: &str| MEANINGLESS.iter().any(|(other, _)| key == *other);
        let known: BTreeSet<String> = known
            .iter()
            .filter(|key| !is_table(key, &known) && !is_meaningless(key))
            .cloned()
            .collect();
        let odd: Vec<&String> = known.symmetric_difference(&told).collect();
        assert!(odd.is_empty(), "in one of the two only: {odd:?}");
    }

    fn operator(name: &str, inputs: &str) -> String {
        format!("[[operator]]\nname = \"{name}\"\ncomponent = \"c.wasm\"\ninputs = [{inputs}]\n\n")
    }

    const MODES: [&str; 4] = ["PIPELINED_FORCED", "PIPELINED", "BATCH", "BATCH_FORCED"];

    #[test]
    fn data_exchange_mode_forward_test() {
        // To a map, a filter, by key to a reduce, to a sink; without the combiner, which is none here.
        let nodes = [
            operator("map", "\"s\""),
            operator("filter", "\"map\""),
            operator("reduce", "{ from = \"filter\", partition = \"hash\" }"),
            "[[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"reduce\"]\n".to_owned(),
        ];
        let found = MODES.map(|mode| exchanges(mode, &nodes.concat()));
        assert_eq!(found, ["PPPP", "PPPP", "PPBP", "BBBB"]);
    }

    #[test]
    fn branches_that_meet_again_break_the_pipeline_once() {
        let nodes = [
            operator("left", "\"s\""),
            operator("right", "{ from = \"s\", partition = \"hash\" }"),
            operator("join", "\"left\", \"right\""),
        ];
        let found = MODES.map(|mode| exchanges(mode, &nodes.concat()));
        assert_eq!(found, ["PPPP", "PPPB", "PBPB", "BBBB"]);
    }

    #[test]
    fn restart_backoff_time_strategy_factory_loader_test() {
        let rows = [
            (Some("none"), Some("fixed-delay"), "none"),
            (Some("fixed-delay"), Some("exponential-delay"), "fixed-delay"),
            (Some("exponential-delay"), Some("failure-rate"), "exponential-delay"),
            (Some("failure-rate"), Some("fixed-delay"), "failure-rate"),
            (None, Some("none"), "none"),
            (None, Some("fixed-delay"), "fixed-delay"),
            (None, Some("exponential-delay"), "exponential-delay"),
            (None, Some("failure-rate"), "failure-rate"),
            (None, None, "none"),
        ];
        for (job, host, expected) in rows {
            assert_eq!(strategy(job, host, false).as_deref(), Ok(expected), "{job:?}, {host:?}");
        }
        for (job, host) in [(Some("invalid-strategy"), None), (None, Some("invalid-strategy"))] {
            let problem = strategy(job, host, false).expect_err("no such strategy");
            assert_eq!(problem.code, Code::BadValue);
        }
        let checkpointed = spec("[execution.checkpointing]\ninterval = \"1s\"\n", None);
        assert_eq!(
            checkpointed.expect("a job").restart.strategy,
            RestartStrategy::ExponentialDelay(ExponentialDelay {
                initial_backoff_ms: 1_000,
                backoff_ms_max: 60_000,
                backoff_multiplier: 1.5,
                reset_threshold_ms: 3_600_000,
                jitter_factor: 0.1,
                attempts_max: None,
            })
        );
    }

    #[test]
    fn failover_strategy_factory_loader_test() {
        let load = |name: &str| {
            spec(&format!("[jobmanager.execution]\nfailover-strategy = \"{name}\"\n"), None)
                .map(|spec| spec.failover)
        };
        assert_eq!(load("full"), Ok(FailoverStrategy::Full));
        assert_eq!(load("region"), Ok(FailoverStrategy::Region));
        assert_eq!(spec("", None).map(|spec| spec.failover), Ok(FailoverStrategy::Region));
        assert_eq!(load("invalidStrategy").map_err(|problem| problem.code), Err(Code::BadValue));
    }

    #[test]
    fn failures_may_merge_and_failovers_escalate() {
        let lines = "[execution.checkpointing]\ninterval = \"1s\"\n\
                     [restart-strategy]\nmerge-failures = true\n\
                     [jobmanager.execution]\nfailover-escalation = 3\n";
        let both = spec(lines, None).expect("a job");
        assert_eq!((both.restart.is_merging_failures, both.escalates_after), (true, Some(3)));
        let plain = spec("", None).expect("a job");
        assert_eq!((plain.restart.is_merging_failures, plain.escalates_after), (false, None));
        let unchecked = spec("[jobmanager.execution]\nfailover-escalation = 3\n", None);
        assert_eq!(unchecked.map_err(|problem| problem.code).err(), Some(Code::BadValue));
    }

    #[test]
    fn settings_of_one_strategy_may_come_from_job_and_host() {
        let job = "[restart-strategy.fixed-delay]\nattempts = 7\n";
        let host = "[restart-strategy]\ntype = \"fixed-delay\"\nfixed-delay = { attempts = 2, delay = \"3s\" }\n";
        let spec = spec(job, Some(host)).expect("a job");
        assert_eq!(
            spec.restart.strategy,
            RestartStrategy::FixedDelay { attempts: 7, delay_ms: 3_000 }
        );
        let origin = &spec.origins["restart-strategy.fixed-delay.delay"];
        assert!(
            origin.as_ref().is_some_and(|place| place.starts_with("cofferdam.toml:3:")),
            "{origin:?}"
        );
    }

    #[test]
    fn host_cannot_have_nodes() {
        let problem = spec("", Some("[[sink]]\nname = \"x\"\n")).expect_err("a node");
        assert!(problem.message.contains("[[sink]]"), "{problem}");
    }
}
