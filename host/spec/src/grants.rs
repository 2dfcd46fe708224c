//! What a host lets the jobs of others open and use, by a table of its own file. A manifest asks by naming it; both must
//! agree.

use std::path::{Path, PathBuf};

use cofferdam_files::Grants;
use cofferdam_sandbox::Limits;
use cofferdam_settings::{AnySetting, Code, Optional, Problem, Section, table::Key};
use cofferdam_store::is_url;
use toml::de::DeValue;

use super::{
    OperatorSpec, SledBackend, StateBackend,
    operator::{AllLimits, LIMIT_ROWS, read_all_limits},
};

type Result<T> = std::result::Result<T, Problem>;

/// The table of a host's file.
pub(super) const TABLE: &str = "grants";

static READ: Optional<()> = Key::array(
    "read",
    "files and directories, with all that is in them, which sources and components may be in",
)
.of_job()
.or_none("nothing");
static WRITE: Optional<()> = Key::array(
    "write",
    "directories and addresses (`\"s3://bucket/prefix\"`) which sinks, states and savepoints may be in; they may be read, too",
)
.of_job()
.or_none("nothing");

pub(super) static ROWS: &[&dyn AnySetting] = &[&READ, &WRITE];

/// What any job may ask for.
#[derive(Debug, Clone)]
pub struct HostGrants {
    /// The files.
    pub files: Grants,
    /// How the addresses begin.
    addresses: Vec<String>,
    limits: AllLimits,
    /// What the host's own settings give a backend.
    backend: SledBackend,
}

impl HostGrants {
    /// Reads the table of the default; relative paths begin at the directory of the host's file.
    pub(super) fn read(
        section: &Section<'_>,
        base_dir: &Path,
        backend: SledBackend,
    ) -> Result<Self> {
        section.know(ROWS);
        section.know(LIMIT_ROWS);
        let (read, write) = (texts(section, "read")?, texts(section, "write")?);
        if let Some(address) = read.iter().find(|text| is_address(text)) {
            let span = section.items("read")?.first().map_or(0..0, |(_, span)| span.clone());
            let why =
                format!("{address} is no path; what checkpoints may be in is granted by `write`");
            return Err(section.bad_value("read", &span, why));
        }
        let limits = read_all_limits(section);
        section.finish();
        let paths = |texts: &[String]| -> Vec<PathBuf> {
            let paths = texts.iter().filter(|text| !is_address(text));
            paths.map(|text| base_dir.join(path_of(text))).collect()
        };
        let files = Grants::of(&paths(&read), &paths(&write));
        let addresses = write.into_iter().filter(|text| is_address(text)).collect();
        Ok(Self { files, addresses, limits, backend })
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
    pub(super) fn check_limits(&self, name: &str, operator: &OperatorSpec) -> Result<()> {
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
        let Some((limit, (wanted, most))) = pairs.into_iter().find(|(_, (own, most))| most < own)
        else {
            return Ok(());
        };
        let message = format!("operator \"{name}\" asks for more than the host grants");
        Err(Problem::new(Code::NotGranted, message)
            .detail(format!("limits.{limit}: it wants {wanted}, and may have {most}"))
            .hint(format!(
                "the operator of the host can raise `grants.default.limits.{limit}` in its file"
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

fn texts(section: &Section<'_>, key: &'static str) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for (value, span) in section.items(key)? {
        match value {
            DeValue::String(text) if !text.is_empty() => texts.push(text.to_string()),
            _ => return Err(section.bad_value(key, &span, "a path is a text")),
        }
    }
    Ok(texts)
}
