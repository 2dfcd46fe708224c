//! What a manifest says about checkpoints, storage and exchanges.

use std::path::{Path, PathBuf};

use cofferdam_core::{
    checkpoint::{CheckpointSettings, retention::Retention},
    exchange::ExchangeType,
    shuffle::{DefaultExchange, ExecutionMode, RuntimeMode, ShuffleMode},
};
use cofferdam_settings::{AnySetting, Located, Optional, Section, Setting, table::Key};
use cofferdam_store::is_url;

use super::{StorageSpec, flink::MEANINGLESS};

/// Flink's largest `int`.
pub(super) const FLINK_INT_MAX: u32 = i32::MAX as u32;
/// Flink caps the pause at a year.
const PAUSE_MS_MAX: u64 = 365 * 24 * 3_600_000;
/// Flink's bound below which checkpointing counts as disabled.
const INTERVAL_MS_MIN: u64 = 10;

static RUNTIME_MODE: Setting<RuntimeMode> = Key::choice(
    "execution.runtime-mode",
    &[
        ("STREAMING", RuntimeMode::Streaming),
        ("BATCH", RuntimeMode::Batch),
        ("AUTOMATIC", RuntimeMode::Automatic),
    ],
    "`BATCH`: edges without an exchange of their own have that of the next setting; `AUTOMATIC`: the same if \
     every source is bounded",
)
.or(RuntimeMode::Streaming);

static BATCH_SHUFFLE_MODE: Setting<ShuffleMode> = Key::choice(
    "execution.batch-shuffle-mode",
    &[
        ("ALL_EXCHANGES_BLOCKING", ShuffleMode::All(ExchangeType::Blocking)),
        ("ALL_EXCHANGES_PIPELINED", ShuffleMode::All(ExchangeType::PipelinedBounded)),
        ("ALL_EXCHANGES_HYBRID_FULL", ShuffleMode::All(ExchangeType::HybridFull)),
        ("ALL_EXCHANGES_HYBRID_SELECTIVE", ShuffleMode::All(ExchangeType::HybridSelective)),
        ("PIPELINED_FORCED", ShuffleMode::Execution(ExecutionMode::PipelinedForced)),
        ("PIPELINED", ShuffleMode::Execution(ExecutionMode::Pipelined)),
        ("BATCH", ShuffleMode::Execution(ExecutionMode::Batch)),
        ("BATCH_FORCED", ShuffleMode::Execution(ExecutionMode::BatchForced)),
    ],
    "the exchange of a batch job's edges; the last four are Flink's older execution modes",
)
.or(ShuffleMode::All(ExchangeType::Blocking));

static APPROXIMATE: Setting<bool> = Key::boolean(
    "execution.state-recovery.approximate-local-recovery",
    "edges of a stream that have no exchange of their own, and are not chained, are `pipelined-approximate`: \
     readers restart alone and lose records, which are counted and reported",
)
.aliases(&["execution.checkpointing.approximate-local-recovery"])
.or(false);

static INTERVAL: Optional<u64> = Key::duration(
    "execution.checkpointing.interval",
    "time between the triggers of two checkpoints; below 10 ms there are none",
)
.or_none("none");

static MODE: Setting<bool> = Key::choice(
    "execution.checkpointing.mode",
    &[("EXACTLY_ONCE", true), ("AT_LEAST_ONCE", false)],
    "`AT_LEAST_ONCE`: no channel waits for the barrier of another one",
)
.or(true);

static TIMEOUT: Setting<u64> = Key::duration(
    "execution.checkpointing.timeout",
    "a checkpoint that takes longer is aborted; at least 10 ms",
)
.unless(|ms| (*ms < INTERVAL_MS_MIN).then_some("it must be at least 10 ms"))
.or(600_000);

static MIN_PAUSE: Setting<u64> = Key::duration(
    "execution.checkpointing.min-pause",
    "time from the end of one checkpoint to the trigger of the next, at most a year",
)
.or(0);

static MAX_CONCURRENT: Setting<u64> = Key::integer(
    "execution.checkpointing.max-concurrent-checkpoints",
    1,
    FLINK_INT_MAX as u64,
    "checkpoints pending at a time; must be 1 where they are unaligned",
)
.or(1);

static TOLERABLE_FAILURES: Setting<u64> = Key::integer(
    "execution.checkpointing.tolerable-failed-checkpoints",
    0,
    FLINK_INT_MAX as u64,
    "consecutive checkpoint failures tolerated before the job fails; 2147483647: any number",
)
.or(0);

static NUM_RETAINED: Setting<u64> = Key::integer(
    "execution.checkpointing.num-retained",
    1,
    FLINK_INT_MAX as u64,
    "completed checkpoints that are kept",
)
.aliases(&["state.checkpoints.num-retained"])
.or(1);

static RETENTION: Setting<Retention> = Key::choice(
    "execution.checkpointing.externalized-checkpoint-retention",
    &[
        (Retention::NeverRetain.name(), Retention::NeverRetain),
        (Retention::RetainOnFailure.name(), Retention::RetainOnFailure),
        (Retention::RetainOnCancellation.name(), Retention::RetainOnCancellation),
    ],
    "whether checkpoints outlive a job that is cancelled or fails",
)
.or(Retention::NeverRetain);

static UNALIGNED: Setting<bool> = Key::boolean(
    "execution.checkpointing.unaligned.enabled",
    "barriers overtake the records that wait in the channels; needs `EXACTLY_ONCE` and one checkpoint at a time",
)
.aliases(&["execution.checkpointing.unaligned"])
.or(false);

static ALIGNED_TIMEOUT: Setting<u64> = Key::duration(
    "execution.checkpointing.aligned-checkpoint-timeout",
    "barriers overtake only after this time since the trigger",
)
.aliases(&["execution.checkpointing.alignment-timeout"])
.or(0);

static BACKLOG_INTERVAL: Optional<u64> = Key::duration(
    "execution.checkpointing.interval-during-backlog",
    "the interval while a source works off a backlog; 0: no checkpoints meanwhile",
)
.or_none("as at other times");

/// Proposed for Flink as FLIP-328.
pub(super) static BACKLOG_LAG: Optional<u64> = Key::duration(
    "pipeline.backlog.watermark-lag-threshold",
    "a source whose event time lags further behind the clock counts as backlogged",
)
.or_none("none");

static COMPRESSION: Setting<bool> = Key::boolean(
    "execution.checkpointing.snapshot-compression",
    "snapshots are compressed as LZ4 blocks",
)
.or(false);

static STORAGE: Optional<StorageName> = Key::choice(
    "execution.checkpointing.storage",
    &[
        ("sled", StorageName::Sled),
        ("memory", StorageName::Memory),
        ("jobmanager", StorageName::Memory),
        ("filesystem", StorageName::Objects),
    ],
    "`filesystem`: objects in a directory or a bucket, which `dir` names; `memory` or `jobmanager`: in this \
     process only",
)
.aliases(&["state.checkpoint-storage"])
.or_none("sled");

static DIR: Optional<String> = Key::text(
    "execution.checkpointing.dir",
    "the state directory, or where objects are kept: a path, `file://` or `s3://bucket/checkpoints` (an S3 URL \
     alone implies `filesystem`)",
)
.aliases(&["state.checkpoints.dir", "state.backend.fs.checkpointdir"])
.or_none("JOB.cofferdam");

static SAVEPOINT_DIR: Optional<String> = Key::text(
    "execution.checkpointing.savepoint-dir",
    "where `cofferdam savepoint` and `stop` write if they are given no directory",
)
.aliases(&["state.savepoints.dir"])
.or_none("none");

pub(super) static EXCHANGE_ROWS: &[&dyn AnySetting] =
    &[&RUNTIME_MODE, &BATCH_SHUFFLE_MODE, &APPROXIMATE];
pub(super) static CHECKPOINT_ROWS: &[&dyn AnySetting] = &[
    &INTERVAL,
    &MODE,
    &TIMEOUT,
    &MIN_PAUSE,
    &MAX_CONCURRENT,
    &TOLERABLE_FAILURES,
    &NUM_RETAINED,
    &RETENTION,
    &UNALIGNED,
    &ALIGNED_TIMEOUT,
    &BACKLOG_INTERVAL,
    &BACKLOG_LAG,
    &COMPRESSION,
    &STORAGE,
    &DIR,
    &SAVEPOINT_DIR,
];

/// What `[execution]` says.
pub(super) struct Execution {
    pub(super) checkpoint: CheckpointSettings,
    pub(super) is_exactly_once: bool,
    pub(super) is_compressing: bool,
    pub(super) retention: Retention,
    pub(super) savepoint_dir: Option<PathBuf>,
    pub(super) storage: StorageSpec,
    pub(super) exchange: DefaultExchange,
    pub(super) warnings: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StorageName {
    Sled,
    Memory,
    Objects,
}

/// Reads what a job says about its execution; what is wrong with it is noted.
pub(super) fn read(root: &Section<'_>, base_dir: &Path, job: &str) -> Execution {
    let mut warnings = Vec::new();
    let exchange = DefaultExchange {
        mode: root.get(&RUNTIME_MODE),
        batch: root.get(&BATCH_SHUFFLE_MODE),
        is_approximate: root.get(&APPROXIMATE),
    };
    let mut checkpoint = read_checkpoint(root, &mut warnings);
    let is_exactly_once = root.get(&MODE);
    checkpoint.unaligned_after_ms =
        read_unaligned(root, is_exactly_once, checkpoint.concurrent_max, &mut warnings);
    warn_meaningless(root, &mut warnings);
    let is_compressing = root.get(&COMPRESSION);
    let retention = root.get(&RETENTION);
    let storage = read_storage(root, base_dir, job);
    let shown = match &storage {
        StorageSpec::Sled(dir) => dir.display().to_string(),
        StorageSpec::Objects { location, .. } => location.clone(),
        StorageSpec::Memory => "none".to_owned(),
    };
    root.document().amend(DIR.row().key, shown);
    let savepoint_dir = read_savepoint_dir(root, base_dir);
    if let Some(dir) = &savepoint_dir {
        root.document().amend(SAVEPOINT_DIR.row().key, dir.display().to_string());
    }
    Execution {
        checkpoint,
        is_exactly_once,
        is_compressing,
        retention,
        savepoint_dir,
        storage,
        exchange,
        warnings,
    }
}

fn read_checkpoint(root: &Section<'_>, warnings: &mut Vec<String>) -> CheckpointSettings {
    let mut settings = CheckpointSettings::default();
    // Flink: an interval below 10 ms counts as none.
    if let Some(Located { value, span }) = root.find(&INTERVAL) {
        settings.interval_ms = Some(value).filter(|ms| INTERVAL_MS_MIN <= *ms);
        if settings.interval_ms.is_none() {
            root.document().amend(INTERVAL.row().key, "none");
        }
        if (1..INTERVAL_MS_MIN).contains(&value) {
            warnings.push(format!(
                "`execution.checkpointing.interval` is {value} ms: below {INTERVAL_MS_MIN} ms there are no \
                 checkpoints, and no restarts by default; give it a unit, such as \"{value} s\" ({})",
                root.document().place(&span)
            ));
        }
    }
    if let Some(Located { value, span }) = root.find(&BACKLOG_INTERVAL) {
        if value != 0 && settings.interval_ms.is_none_or(|interval| value < interval) {
            let why = "it must be 0, for no checkpoints, or at least the interval";
            root.refuse(&BACKLOG_INTERVAL, &span, why);
        }
        settings.backlog_interval_ms = Some(value);
    }
    settings.min_pause_ms = root.get(&MIN_PAUSE).min(PAUSE_MS_MAX);
    root.document().amend(MIN_PAUSE.row().key, format!("{} ms", settings.min_pause_ms));
    settings.timeout_ms = root.get(&TIMEOUT);
    let failures = u32::try_from(root.get(&TOLERABLE_FAILURES)).unwrap_or(FLINK_INT_MAX);
    // Flink: its largest number stands for any.
    settings.tolerable_failures = (failures != FLINK_INT_MAX).then_some(failures);
    if settings.tolerable_failures.is_none() {
        root.document().amend(TOLERABLE_FAILURES.row().key, "any");
    }
    settings.concurrent_max = usize::try_from(root.get(&MAX_CONCURRENT)).unwrap_or(usize::MAX);
    settings.retained_max = usize::try_from(root.get(&NUM_RETAINED)).unwrap_or(usize::MAX);
    settings
}

/// Flink: an unaligned checkpoint needs EXACTLY_ONCE, and that no other is pending beside it.
fn read_unaligned(
    root: &Section<'_>,
    is_exactly_once: bool,
    concurrent_max: usize,
    warnings: &mut Vec<String>,
) -> Option<u64> {
    let timeout_ms = root.get(&ALIGNED_TIMEOUT);
    let Located { span, .. } = root.located(&UNALIGNED).filter(|enabled| enabled.value)?;
    let path = UNALIGNED.row().key;
    if !is_exactly_once {
        root.document().amend(path, "false");
        let why = "without EXACTLY_ONCE no barrier waits for another";
        warnings.push(format!("`{path}` is ignored: {why}"));
        return None;
    }
    if 1 < concurrent_max {
        let why = format!(
            "it needs max-concurrent-checkpoints = 1, and that is {concurrent_max}: a barrier that \
             overtakes must not meet another"
        );
        root.refuse(&UNALIGNED, &span, why);
        return None;
    }
    Some(timeout_ms)
}

/// Takes note of settings that Flink has and that mean nothing here.
fn warn_meaningless(root: &Section<'_>, warnings: &mut Vec<String>) {
    for (path, why) in MEANINGLESS {
        if path.starts_with("execution.checkpointing.") && root.has(path) {
            warnings.push(format!("`{path}` is ignored: {why}"));
        }
    }
}

fn read_savepoint_dir(root: &Section<'_>, base_dir: &Path) -> Option<PathBuf> {
    let dir = root.find(&SAVEPOINT_DIR)?;
    if !is_scheme_known(root, &SAVEPOINT_DIR, &dir) {
        return None;
    }
    match is_url(Path::new(&dir.value)) && !dir.value.starts_with("file") {
        true => Some(PathBuf::from(dir.value)),
        false => Some(local_dir(root, &SAVEPOINT_DIR, base_dir, &dir)),
    }
}

/// Flink: a directory alone stands for `filesystem`. Here that is so for a URL; a path alone is the
/// job's own state directory.
fn read_storage(root: &Section<'_>, base_dir: &Path, job: &str) -> StorageSpec {
    use StorageName::{Memory, Objects, Sled};
    let default_dir = base_dir.join(format!("{job}.cofferdam"));
    let name = root.find(&STORAGE);
    let dir = root.find(&DIR).filter(|dir| is_scheme_known(root, &DIR, dir));
    let is_remote = dir
        .as_ref()
        .is_some_and(|it| is_url(Path::new(&it.value)) && !it.value.starts_with("file"));
    let storage = match (name.as_ref().map(|name| name.value), dir) {
        (Some(Memory), _) => StorageSpec::Memory,
        (Some(Objects), Some(dir)) => objects_at(&dir.value, base_dir, default_dir, job),
        (None, Some(dir)) if is_remote => objects_at(&dir.value, base_dir, default_dir, job),
        (Some(Objects), None) => {
            let span = name.map_or(0..0, |name| name.span);
            let why = "it needs `dir`, a directory or a URL such as \"s3://bucket/checkpoints\"";
            root.refuse(&STORAGE, &span, why);
            StorageSpec::Sled(default_dir)
        }
        (Some(Sled) | None, Some(dir)) => StorageSpec::Sled(local_dir(root, &DIR, base_dir, &dir)),
        (Some(Sled) | None, None) => StorageSpec::Sled(default_dir),
    };
    let shown = match storage {
        StorageSpec::Sled(_) => "sled",
        StorageSpec::Objects { .. } => "filesystem",
        StorageSpec::Memory => "memory",
    };
    root.document().amend(STORAGE.row().key, shown);
    storage
}

fn is_scheme_known(root: &Section<'_>, key: &Optional<String>, dir: &Located<String>) -> bool {
    match dir.value.split_once("://") {
        Some((scheme, _)) if !["file", "s3", "s3a"].contains(&scheme) => {
            let why = format!("{scheme}:// is not known, file:// and s3:// are");
            root.refuse(key, &dir.span, why);
            false
        }
        _ => true,
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
    root: &Section<'_>,
    key: &Optional<String>,
    base_dir: &Path,
    dir: &Located<String>,
) -> PathBuf {
    let path = dir.value.strip_prefix("file://").unwrap_or(&dir.value);
    if let Some((scheme, _)) = path.split_once("://") {
        let why = format!("it must be a local directory, and {scheme}:// is none");
        root.refuse(key, &dir.span, why);
    }
    base_dir.join(path)
}

/// When a source counts as backlogged.
pub(super) fn read_backlog_lag(root: &Section<'_>) -> Option<u64> {
    root.find(&BACKLOG_LAG).map(|lag| lag.value)
}
