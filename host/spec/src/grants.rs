//! What a host lets the jobs of others open and use, by tables of its own file: one for all, and one for each tenant. A
//! manifest asks by naming it; both must agree.

use std::path::{Path, PathBuf};

use cofferdam_files::Grants;
use cofferdam_sandbox::Limits;
use cofferdam_settings::{
    AnySetting, Code, Document, Optional, Problem, Section, Setting, table::Key,
};
use cofferdam_store::is_url;
use toml::de::{DeTable, DeValue};

use super::{
    NodeKind, NodeSpec, OperatorSpec, SledBackend, StateBackend,
    operator::{AllLimits, LIMIT_ROWS, names, read_all_limits},
};

type Result<T> = std::result::Result<T, Problem>;

/// The tables of a host's file.
pub(super) const TABLE: &str = "grants";

/// That of any job.
const DEFAULT: &str = "default";

static READ: Optional<()> = Key::array(
    "read",
    "files and directories, with all that is in them, which sources and components may be in, and which operators may be \
     given to read",
)
.of_job()
.or_none("nothing");
static WRITE: Optional<()> = Key::array(
    "write",
    "directories and addresses (`\"s3://bucket/prefix\"`) which sinks, states and savepoints may be in; they may be read, too",
)
.of_job()
.or_none("nothing");

static SCRATCH: Setting<u64> =
    Key::bytes("scratch", "the most that a task may be given as scratch directory").of_job().or(0);
static ENV: Optional<()> =
    Key::array("env", "variables of the host's environment that operators may be given")
        .of_job()
        .or_none("nothing");
static SECRETS: Optional<()> =
    Key::array("secrets", "secrets of the host's file that operators may be given")
        .of_job()
        .or_none("nothing");

pub(super) static ROWS: &[&dyn AnySetting] = &[&READ, &WRITE, &SCRATCH, &ENV, &SECRETS];

/// What a job may ask for.
#[derive(Debug, Clone)]
pub struct HostGrants {
    /// The files.
    pub files: Grants,
    /// How the addresses begin.
    addresses: Vec<String>,
    scratch_bytes_max: u64,
    env: Vec<String>,
    secrets: Vec<String>,
    limits: AllLimits,
    /// The table whose limits count first.
    table: String,
    /// What the host's own settings give a backend.
    backend: SledBackend,
}

/// What counts of a host's file beside its tables.
pub(super) struct HostFile<'h> {
    pub(super) path: &'h Path,
    /// Whose job it is.
    pub(super) tenant: Option<&'h str>,
    /// What the file says about state on disk.
    pub(super) backend: SledBackend,
}

/// The lists of one table.
#[derive(Default)]
struct Lists {
    read: Vec<String>,
    write: Vec<String>,
    env: Vec<String>,
    secrets: Vec<String>,
}

impl Lists {
    fn read(section: &Section<'_>) -> Result<Self> {
        section.know(ROWS);
        section.know(LIMIT_ROWS);
        let read = section.texts(&READ, "a path is a text")?;
        if let Some((address, span)) = read.iter().find(|(text, _)| is_address(text)) {
            let why =
                format!("{address} is no path; what checkpoints may be in is granted by `write`");
            return Err(section.bad_value("read", span, why));
        }
        let lists = Self {
            read: names(read),
            write: names(section.texts(&WRITE, "a path is a text")?),
            env: names(section.texts(&ENV, "a variable has a name")?),
            secrets: names(section.texts(&SECRETS, "a secret has a name")?),
        };
        // What is wrong with limits is known here, too.
        read_all_limits(section);
        section.get(&SCRATCH);
        section.finish();
        Ok(lists)
    }

    fn add(&mut self, mut other: Self) {
        self.read.append(&mut other.read);
        self.write.append(&mut other.write);
        self.env.append(&mut other.env);
        self.secrets.append(&mut other.secrets);
    }
}

impl HostGrants {
    /// Reads the tables; relative paths begin at the directory of the host's file. What all may ask for a tenant may,
    /// too; its own limits come before those of all.
    pub(super) fn read(
        document: &Document<'_>,
        granted: &toml::Spanned<DeValue<'_>>,
        host: &HostFile<'_>,
        start: usize,
    ) -> Result<Self> {
        let span = granted.span().start + start..granted.span().end + start;
        let wrong = |what: &str| {
            let problem = document.problem(Code::BadValue, &span, format!("`grants`: {what}"));
            problem.hint("what any job may ask for is in [grants.default], and what a tenant may, in [grants.NAME]")
        };
        let DeValue::Table(tables) = granted.get_ref() else { return Err(wrong("it is a table")) };
        let (mut lists, mut layers): (Lists, Vec<&DeTable<'_>>) = (Lists::default(), Vec::new());
        for (name, table) in tables {
            let name = name.get_ref().as_ref();
            let DeValue::Table(table) = table.get_ref() else {
                return Err(wrong(&format!("`{name}` must be a table")));
            };
            let of_table = format!("{TABLE}.{name}");
            let own = Lists::read(&Section::of_tables(document, &of_table, &[table], start))?;
            if name == DEFAULT {
                layers.push(table);
                lists.add(own);
            } else if host.tenant == Some(name) {
                layers.insert(0, table);
                lists.add(own);
            }
        }
        // What others are granted is theirs to know.
        document.forget(|key| {
            let of = key.strip_prefix("grants.").and_then(|rest| rest.split('.').next());
            of.is_some_and(|of| of != DEFAULT && Some(of) != host.tenant)
        });
        let table = format!("{TABLE}.{}", host.tenant.unwrap_or(DEFAULT));
        let section = Section::of_tables(document, &table, &layers, start);
        let base_dir = host.path.parent().unwrap_or_else(|| Path::new(""));
        let paths = |texts: &[String]| -> Vec<PathBuf> {
            let paths = texts.iter().filter(|text| !is_address(text));
            paths.map(|text| base_dir.join(path_of(text))).collect()
        };
        let files = Grants::of(&paths(&lists.read), &paths(&lists.write));
        let addresses = lists.write.into_iter().filter(|text| is_address(text)).collect();
        Ok(Self {
            files,
            addresses,
            scratch_bytes_max: section.get(&SCRATCH),
            env: lists.env,
            secrets: lists.secrets,
            limits: read_all_limits(&section),
            table,
            backend: host.backend.clone(),
        })
    }

    /// No operator has more than the host grants.
    pub(super) fn check_operators(&self, nodes: &[NodeSpec]) -> Result<()> {
        let mut problems = Vec::new();
        for node in nodes {
            if let NodeKind::Operator(operator) = &node.kind {
                problems.extend(self.check_limits(&node.name, operator).err());
                problems.extend(self.check_names(&node.name, operator).err());
            }
        }
        Problem::all(problems).map_or(Ok(()), Err)
    }

    /// The first variable or secret that an operator asks for and the host does not grant.
    fn check_names(&self, name: &str, operator: &OperatorSpec) -> Result<()> {
        let first = |asked: &[String], granted: &[String]| {
            asked.iter().find(|it| !granted.contains(it)).cloned()
        };
        let secrets: Vec<String> = operator.secrets.iter().map(|(name, _)| name.clone()).collect();
        let (list, missing) = match first(&operator.env, &self.env) {
            Some(missing) => ("env", missing),
            None => match first(&secrets, &self.secrets) {
                Some(missing) => ("secrets", missing),
                None => return Ok(()),
            },
        };
        let message = format!("operator \"{name}\" asks for what the host does not grant");
        Err(Problem::new(Code::NotGranted, message)
            .detail(format!("grants.{list}: {missing}"))
            .hint(format!(
                "the operator of the host can add it to `{}.{list}` in its file",
                self.table
            )))
    }

    /// Whether a directory, or a bucket and what is in it by a prefix, may be written.
    #[must_use]
    pub fn may_write(&self, place: &Path) -> bool {
        let text = place.to_string_lossy();
        if !is_address(&text) {
            return self.files.may_write(Path::new(path_of(&text)));
        }
        // "s3://a/b" grants "s3://a/b/c", and not "s3://a/bc".
        let is_in = |known: &String| {
            let rest = text.strip_prefix(known.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        !text.contains("/../") && self.addresses.iter().any(is_in)
    }

    /// What a backend takes of the host's memory is not the tenant's to raise.
    pub(super) fn check_backend(&self, backend: &StateBackend) -> Result<()> {
        let StateBackend::Sled(own) = backend else { return Ok(()) };
        for (key, wanted, most) in [
            ("cache", own.cache_bytes, self.backend.cache_bytes),
            ("write-buffer", own.write_buffer_bytes, self.backend.write_buffer_bytes),
        ] {
            if most < wanted {
                let message = format!("`state.backend.sled.{key}` is more than the host grants");
                return Err(Problem::new(Code::NotGranted, message)
                    .detail(format!("the job wants {wanted} bytes, and may have {most}"))
                    .hint("the operator of the host can set it in its file"));
            }
        }
        Ok(())
    }

    /// The first limit that an operator has beyond what the host grants.
    fn check_limits(&self, name: &str, operator: &OperatorSpec) -> Result<()> {
        let (own, most) = (&operator.limits, &self.limits.sandbox);
        let number = |of: fn(&Limits) -> u64| (of(own), of(most));
        let pairs = [
            ("memory", number(|it| it.memory_bytes_max)),
            ("call", number(|it| millis(it.call_max))),
            ("wait", number(|it| millis(it.wait_max))),
            ("output", number(|it| it.output_bytes_max)),
            ("handles", number(|it| u64::from(it.handles_max))),
            ("table-elements", number(|it| it.table_elements_max)),
            ("log", number(|it| it.log_bytes_per_second_max)),
            ("state", (operator.state_bytes_max, self.limits.state_bytes_max)),
            ("partition", (operator.partition_bytes_max, self.limits.partition_bytes_max)),
        ];
        let scratch = ("", "scratch", (operator.scratch_bytes, self.scratch_bytes_max));
        let limits = pairs.into_iter().map(|(limit, pair)| ("limits.", limit, pair));
        let mut too_much = limits.chain([scratch]).filter(|(_, _, (own, most))| most < own);
        let Some((prefix, limit, (wanted, most))) = too_much.next() else { return Ok(()) };
        let own = if prefix.is_empty() { "grants." } else { prefix };
        let message = format!("operator \"{name}\" asks for more than the host grants");
        Err(Problem::new(Code::NotGranted, message)
            .detail(format!("{own}{limit}: it wants {wanted}, and may have {most}"))
            .hint(format!(
                "the operator of the host can raise `{}.{prefix}{limit}` in its file",
                self.table
            )))
    }
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Whether a text names something that is no file.
fn is_address(text: &str) -> bool {
    is_url(Path::new(text)) && !text.starts_with(FILE)
}

const FILE: &str = "file://";

/// The path that a text is.
fn path_of(text: &str) -> &str {
    text.strip_prefix(FILE).unwrap_or(text)
}
