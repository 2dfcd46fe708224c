//! What a manifest says about an operator and its limits.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use cofferdam_connector::DEAD_LETTER;
use cofferdam_core::key_group::default_max_parallelism;
use cofferdam_sandbox::Limits;
use cofferdam_settings::{AnySetting, Optional, Problem, Required, Section, Setting, table::Key};

use super::{
    OperatorSpec, PARALLELISM_MAX, SnapshotMode,
    secrets::{SecretSource, Secrets},
};

type Result<T> = std::result::Result<T, Problem>;

/// A trap may have another reason than the record, so it takes some to call a record poison.
const TRAPS_DEFAULT: u64 = 3;

static COMPONENT: Required<String> =
    Key::text("component", "the `.wasm` file").of_job().required("the .wasm file to run");
static CONFIG: Optional<()> =
    Key::free("config", "what the component is given in `open`").of_job().or_none("empty");
static SNAPSHOT: Setting<SnapshotMode> = Key::choice(
    "snapshot",
    &[
        ("memory", SnapshotMode::Memory),
        ("declared", SnapshotMode::Declared),
        ("both", SnapshotMode::Both),
    ],
    "what a checkpoint holds. `memory`: linear memory; `declared`: declared state, handed over at every \
     checkpoint; `both`: linear memory, out of which declared state is read when another version of the \
     component or another parallelism needs it (set `declared` for that run: state that was not declared is lost \
     by it). An operator without declared state and with its memory in checkpoints keeps its version and its \
     parallelism",
)
.of_job()
.or(SnapshotMode::Both);
static MAX_PARALLELISM: Optional<u64> = Key::integer(
    "max-parallelism",
    1,
    PARALLELISM_MAX,
    "key groups; fixed by the first checkpoint",
)
.of_job()
.or_none("by the parallelism, at least 128");
static ON_TRAP: Setting<bool> = Key::choice(
    "on-trap",
    &[("fail", false), (DEAD_LETTER, true)],
    "`dead-letter`: a record at which it traps again and again goes to its output `dead-letter`",
)
.of_job()
.or(false);
static DEAD_LETTER_AFTER: Optional<u64> =
    Key::integer("dead-letter-after", 2, 1_000, "how many traps at one record that takes")
        .of_job()
        .or_none("3 with `on-trap = \"dead-letter\"`");
static MEMORY: Setting<u64> = Key::bytes("limits.memory", "linear memory, at most 4 GiB")
    .of_job()
    .unless(|bytes| (4 << 30 < *bytes).then_some("a component has at most 4 GiB"))
    .or(256 << 20);
static CALL: Setting<u64> =
    Key::duration("limits.call", "processor time of one call").of_job().or(1_000);
static WAIT: Setting<u64> =
    Key::duration("limits.wait", "how long one call may wait").of_job().or(10_000);
static OUTPUT: Setting<u64> =
    Key::bytes("limits.output", "what one call gives back").of_job().or(64 << 20);
static HANDLES: Setting<u64> =
    Key::integer("limits.handles", 0, 1_000_000, "host resources held at a time").of_job().or(64);
static TABLE_ELEMENTS: Setting<u64> =
    Key::integer("limits.table-elements", 0, 10_000_000, "elements of its tables")
        .of_job()
        .or(100_000);
static STATE: Setting<u64> =
    Key::bytes("limits.state", "declared state on disk, with 24 bytes a key for the index")
        .of_job()
        .or(16 << 30);
static PARTITION: Setting<u64> =
    Key::bytes("limits.partition", "one result partition on disk").of_job().or(64 << 30);
static LOG: Setting<u64> = Key::bytes(
    "limits.log",
    "log a second, 128 bytes a message included; messages beyond it are dropped and counted",
)
.of_job()
.or(64 << 10);

static READ: Optional<()> = Key::array(
    "grants.read",
    "directories that it may read, with all that is in them; it finds them by the names that are given here",
)
.of_job()
.or_none("none");
static SCRATCH: Setting<u64> = Key::bytes(
    "grants.scratch",
    "a directory `/scratch` of each task, empty whenever the task begins or restarts, and how much may be in it, 16 KiB \
     a file included",
)
.of_job()
.or(0);
static ENV: Optional<()> =
    Key::array("grants.env", "variables of the host's environment").of_job().or_none("none");
static SECRETS: Optional<()> =
    Key::array("grants.secrets", "secrets of the host's file, by their names")
        .of_job()
        .or_none("none");

pub(super) static GRANT_ROWS: &[&dyn AnySetting] = &[&READ, &SCRATCH, &ENV, &SECRETS];
pub(super) static ROWS: &[&dyn AnySetting] =
    &[&COMPONENT, &CONFIG, &SNAPSHOT, &MAX_PARALLELISM, &ON_TRAP, &DEAD_LETTER_AFTER];
pub(super) static LIMIT_ROWS: &[&dyn AnySetting] =
    &[&MEMORY, &CALL, &WAIT, &OUTPUT, &HANDLES, &TABLE_ELEMENTS, &STATE, &PARTITION, &LOG];

pub(super) fn read_operator(
    section: &Section<'_>,
    base_dir: &Path,
    parallelism: u32,
    secrets: &Secrets,
) -> Result<OperatorSpec> {
    section.know(ROWS);
    section.know(LIMIT_ROWS);
    section.know(GRANT_ROWS);
    let component = section.require(&COMPONENT)?;
    let component = base_dir.join(component.value);
    let document = section.document();
    document.amend(&section.shown_key(COMPONENT.row().key), component.display().to_string());
    let config = section.free(CONFIG.row().key)?;
    let AllLimits { sandbox: limits, state_bytes_max, partition_bytes_max } =
        read_all_limits(section);
    let snapshot = section.get(&SNAPSHOT);
    let max_parallelism = match section.find(&MAX_PARALLELISM) {
        Some(number) if number.value < u64::from(parallelism) => {
            let why = format!("it is below the parallelism, {parallelism}");
            return Err(section.bad_value("max-parallelism", &number.span, why));
        }
        Some(number) => u32::try_from(number.value).unwrap_or(u32::MAX),
        None => default_max_parallelism(parallelism),
    };
    document.amend(&section.shown_key(MAX_PARALLELISM.row().key), max_parallelism.to_string());
    Ok(OperatorSpec {
        component,
        config,
        limits,
        state_bytes_max,
        partition_bytes_max,
        snapshot,
        max_parallelism,
        state_cache_bytes: 0,
        dead_letter_after: read_on_trap(section)?,
        read: read_directories(section, base_dir)?,
        scratch_bytes: section.get(&SCRATCH),
        env: names(section.texts(&ENV, "a variable has a name")?),
        secrets: read_secrets(section, secrets)?,
    })
}

/// The directories that it is given, by the names that it finds them by.
fn read_directories(section: &Section<'_>, base_dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut directories: Vec<(String, PathBuf)> = Vec::new();
    for (text, span) in section.texts(&READ, "a path is a text")? {
        let name = match text.trim_end_matches('/') {
            "" => "/",
            name => name,
        };
        let wrong = |why: &str| section.bad_value(READ.row().key, &span, why);
        if name.chars().any(char::is_control) {
            return Err(wrong("it has control characters"));
        }
        // The library of guests leaves out what a name may begin with.
        let plain = |name: &str| name.trim_start_matches(['.', '/']).to_owned();
        if directories.iter().any(|(known, _)| plain(known) == plain(name)) {
            return Err(wrong("it is there twice"));
        }
        if Path::new(&plain(name)).starts_with("scratch") {
            return Err(wrong("/scratch is the task's own directory"));
        }
        directories.push((name.to_owned(), base_dir.join(name)));
    }
    Ok(directories)
}

/// Texts without their places.
pub(super) fn names(texts: Vec<(String, std::ops::Range<usize>)>) -> Vec<String> {
    texts.into_iter().map(|(text, _)| text).collect()
}

fn read_secrets(section: &Section<'_>, known: &Secrets) -> Result<Vec<(String, SecretSource)>> {
    let mut secrets = Vec::new();
    for (name, span) in section.texts(&SECRETS, "a secret has a name")? {
        let Some(source) = known.get(&name) else {
            let why = format!("the host's file has no secret `{name}`");
            let problem = section.bad_value(SECRETS.row().key, &span, why);
            return Err(problem.hint(
                "secrets are named in its table [secrets.default], or in that of the tenant",
            ));
        };
        secrets.push((name, source.clone()));
    }
    Ok(secrets)
}

fn read_on_trap(section: &Section<'_>) -> Result<Option<u32>> {
    let has_dead_letters = section.get(&ON_TRAP);
    let traps = section.find(&DEAD_LETTER_AFTER);
    let shown = section.shown_key(DEAD_LETTER_AFTER.row().key);
    if has_dead_letters && 0 < section.get(&SCRATCH) {
        let why = "it cannot be combined with grants.scratch: a record is isolated from memory as it was before, and files are not";
        let span = section.span_of(&ON_TRAP).unwrap_or_default();
        return Err(section.bad_value(ON_TRAP.row().key, &span, why));
    }
    if !has_dead_letters {
        section.document().forget(|key| key == shown);
        return match traps {
            Some(traps) => {
                let why = "it says when a record is isolated: set on-trap = \"dead-letter\"";
                Err(section.bad_value("dead-letter-after", &traps.span, why))
            }
            None => Ok(None),
        };
    }
    let traps = traps.map_or(TRAPS_DEFAULT, |traps| traps.value);
    section.document().amend(&shown, traps.to_string());
    Ok(Some(u32::try_from(traps).unwrap_or(u32::MAX)))
}

/// What an operator may have beside the limits of its sandbox.
#[derive(Debug, Clone)]
pub(super) struct AllLimits {
    pub(super) sandbox: Limits,
    pub(super) state_bytes_max: u64,
    pub(super) partition_bytes_max: u64,
}

pub(super) fn read_all_limits(section: &Section<'_>) -> AllLimits {
    AllLimits {
        sandbox: read_limits(section),
        state_bytes_max: section.get(&STATE),
        partition_bytes_max: section.get(&PARTITION),
    }
}

fn read_limits(section: &Section<'_>) -> Limits {
    Limits {
        memory_bytes_max: section.get(&MEMORY),
        call_max: Duration::from_millis(section.get(&CALL)),
        wait_max: Duration::from_millis(section.get(&WAIT)),
        output_bytes_max: section.get(&OUTPUT),
        handles_max: u32::try_from(section.get(&HANDLES)).unwrap_or(u32::MAX),
        table_elements_max: section.get(&TABLE_ELEMENTS),
        log_bytes_per_second_max: section.get(&LOG),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_are_not_set_are_those_of_the_sandbox() {
        let document = cofferdam_settings::Document::new(Path::new("job.toml"), "");
        let limits = read_limits(&Section::root(&document, &[]));
        assert_eq!(format!("{limits:?}"), format!("{:?}", Limits::default()));
    }
}
