//! What a manifest says about a source of files, and the files that it finds.

use std::{
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use cofferdam_connector::{
    Answer, DEAD_LETTER, Source, TaskContext,
    blocking::OffThread,
    catalog::{Formats, NodeContext, SourcePlan, SourceSpec},
    ready,
    state::mismatch,
};
use cofferdam_contract::Format;
use cofferdam_settings::{AnySetting, Located, Optional, Required, Section, Setting, table::Key};

use super::{FilePlan, FileSource, share};
use crate::settings::{BuiltIn, RATE, Result};

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

/// A longer record is most often a sign of a file that has no lines.
const RECORD_BYTES_DEFAULT: u64 = 16 << 20;

/// A record must fit into the memory of a guest, several times.
const RECORD_BYTES_MAX: u64 = 256 << 20;

static SOURCE_PATH: Required<String> = Key::text("path", "a file, or a glob such as `input/*.txt`")
    .of_job()
    .required("a file or a glob such as \"input/*.txt\"");

static FORMAT: Setting<LineFormat> = Key::choice(
    "format",
    &[("text", LineFormat::Text), ("json", LineFormat::Json), ("csv", LineFormat::Csv)],
    "`json`: one document a line; `csv`: columns, quoted as in RFC 4180, without line breaks in them. The value of \
     a record is its whole line, as it is in the file",
)
.of_job()
.or(LineFormat::Text);

static KEY: Optional<String> = Key::text(
    "key",
    "where the key of a record is: a JSON pointer; the name or the number of a column; or, in a text, a regular \
     expression, of which the first group counts",
)
.of_job()
.or_none("none");

static TIMESTAMP: Optional<String> =
    Key::text("timestamp", "where its event time is, likewise").of_job().or_none("none");

static TIMESTAMP_FORMAT: Optional<String> = Key::text(
    "timestamp-format",
    "`millis`, `seconds`, `rfc3339`, or a pattern such as `%Y-%m-%d %H:%M:%S` (`strftime`; UTC unless it has an \
     offset)",
)
.of_job()
.or_none("millis");

static OUT_OF_ORDERNESS: Setting<u64> = Key::duration(
    "max-out-of-orderness",
    "how much later than a record an earlier one may come: the watermark stays behind by it, and by 1 ms",
)
.of_job()
.or(0);

static IDLE_TIMEOUT: Optional<u64> = Key::duration(
    "idle-timeout",
    "a task without records for this long does not hold event time back any more",
)
.of_job()
.or_none("none");

static HEADER: Setting<bool> =
    Key::boolean("header", "whether the first line of a file names its columns (`csv`)")
        .of_job()
        .or(true);

static DELIMITER: Optional<String> =
    Key::text("delimiter", "what separates columns (`csv`): one ASCII character")
        .of_job()
        .or_none(",");

static RECORD_SIZE: Setting<u64> =
    Key::bytes("max-record-size", "a longer record is a bad one; 256 MiB at most")
        .of_job()
        .unless(|bytes| {
            (!(1..=RECORD_BYTES_MAX).contains(bytes)).then_some("it must be from 1 byte to 256 MiB")
        })
        .or(RECORD_BYTES_DEFAULT);

static ON_BAD_RECORD: Setting<OnBadRecord> = Key::choice(
    "on-bad-record",
    &[
        ("fail", OnBadRecord::Fail),
        ("skip", OnBadRecord::Skip),
        (DEAD_LETTER, OnBadRecord::DeadLetter),
    ],
    "`skip`: it is left out and counted; `dead-letter`: it goes to the output `dead-letter` of the source, with \
     file, line and offset",
)
.of_job()
.or(OnBadRecord::Fail);

static SPLIT_SIZE: Setting<u64> =
    Key::bytes("split-size", "a file is shared among tasks in pieces of this size; at least 4 KiB")
        .of_job()
        .unless(|bytes| (*bytes < 4096).then_some("it must be at least 4 KiB"))
        .or(64 << 20);

static FILE_SOURCE_ROWS: &[&dyn AnySetting] = &[
    &RATE,
    &SOURCE_PATH,
    &FORMAT,
    &KEY,
    &TIMESTAMP,
    &TIMESTAMP_FORMAT,
    &OUT_OF_ORDERNESS,
    &IDLE_TIMEOUT,
    &HEADER,
    &DELIMITER,
    &RECORD_SIZE,
    &ON_BAD_RECORD,
    &SPLIT_SIZE,
];

/// Lines of files.
pub(crate) const FILE_SOURCE: BuiltIn<dyn SourceSpec> = BuiltIn {
    name: "file",
    rows: FILE_SOURCE_ROWS,
    read: |section, _| Ok(Arc::new(read_file_source(section)?)),
};

fn read_file_source(section: &Section<'_>) -> Result<FileSourceSpec> {
    let path = section.require(&SOURCE_PATH)?;
    if let Err(error) = glob::Pattern::new(&path.value) {
        return Err(section.bad_value("path", &path.span, format!("not a glob: {error}")));
    }
    let format = section.get(&FORMAT);
    let header = section.located(&HEADER);
    let delimiter = section.find(&DELIMITER);
    if format != LineFormat::Csv {
        let other = header.as_ref().map(|it| ("header", &it.span));
        let other = other.or_else(|| delimiter.as_ref().map(|it| ("delimiter", &it.span)));
        if let Some((key, span)) = other {
            return Err(section.bad_value(key, span, "only format = \"csv\" has it"));
        }
        let unused = ["header", "delimiter"].map(|key| section.shown_key(key));
        section.document().forget(|key| unused.iter().any(|it| it == key));
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
    let field = |setting| read_field(section, setting, format, has_header);
    let (key, timestamp) = (field(&KEY)?, field(&TIMESTAMP)?);
    let timestamp_format = section.find(&TIMESTAMP_FORMAT);
    if let (Some(located), None) = (&timestamp_format, &timestamp) {
        let why = "it is the format of `timestamp`, which is not set";
        return Err(section.bad_value("timestamp-format", &located.span, why));
    }
    let timestamp_format = match timestamp_format {
        Some(located) => read_time_format(section, located)?,
        None => TimeFormat::Millis,
    };
    let out_of_orderness_ms = section.get(&OUT_OF_ORDERNESS);
    let idle_timeout = section.find(&IDLE_TIMEOUT);
    let on_bad_record = section.get(&ON_BAD_RECORD);
    let record_bytes_max = section.get(&RECORD_SIZE);
    let split_bytes = section.get(&SPLIT_SIZE);
    let rate = section.find(&RATE).map(|rate| rate.value);
    Ok(FileSourceSpec {
        path: path.value,
        format,
        key,
        timestamp,
        timestamp_format,
        out_of_orderness_ms,
        idle_timeout_ms: idle_timeout.map(|it| it.value),
        has_header,
        delimiter,
        record_bytes_max: usize::try_from(record_bytes_max).unwrap_or(usize::MAX),
        on_bad_record,
        split_bytes,
        rate,
    })
}

/// Where a field of a line is.
fn read_field(
    section: &Section<'_>,
    setting: &'static Optional<String>,
    format: LineFormat,
    has_header: bool,
) -> Result<Option<String>> {
    let Some(Located { value, span }) = section.find(setting) else { return Ok(None) };
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
    Err(section.bad_value(setting.row().key, &span, why))
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
            let why = "the name of a time zone defines no offset: write %z for one such as +0100, or \
                       leave it out for UTC";
            return Err(section.bad_value("timestamp-format", &span, why));
        }
        pattern => TimeFormat::Pattern(pattern.to_owned()),
    })
}

impl SourceSpec for FileSourceSpec {
    fn formats(&self) -> Formats {
        let value = match self.format {
            LineFormat::Text | LineFormat::Csv => Format::Text,
            LineFormat::Json => Format::Json,
        };
        Formats { key: self.key.as_ref().map(|_| Format::Text), value }
    }

    fn is_bounded(&self) -> bool {
        true
    }

    fn has_dead_letters(&self) -> bool {
        self.on_bad_record == OnBadRecord::DeadLetter
    }

    fn reads(&self, base_dir: &Path) -> Vec<PathBuf> {
        vec![fixed_part(base_dir, &self.path).0]
    }

    fn prepare(&self, node: NodeContext<'_>) -> Result<Arc<dyn SourcePlan>> {
        Ok(Arc::new(Files(Arc::new(FilePlan::new(node, self)?))))
    }
}

/// Files that were listed.
#[derive(Debug)]
struct Files(Arc<FilePlan>);

impl SourcePlan for Files {
    fn open(
        &self,
        task: &TaskContext,
        position: Option<Vec<u8>>,
    ) -> Answer<'static, Box<dyn Source>> {
        let (index, parallelism) = (task.index, task.parallelism);
        let (plan, blocking) = (self.0.clone(), task.blocking.clone());
        let open = move || FileSource::open(&plan, index, parallelism, position.as_deref());
        let opening = OffThread::open(blocking, open);
        Box::pin(async move { Ok(Box::new(opening.await?) as Box<dyn Source>) })
    }

    fn check_fresh(&self) -> Result<()> {
        self.0.check_fresh()
    }

    fn check_positions(&self, positions: &[&[u8]]) -> Result<Vec<String>> {
        self.0.check_positions(positions)
    }

    fn idle_after(&self) -> Option<std::time::Duration> {
        self.0.idle_after()
    }

    fn redistribute<'a>(
        &'a self,
        positions: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        ready(share(positions, parallelism).map_err(mismatch))
    }
}

/// A pattern as the directory before its first wildcard, and the rest. Without a wildcard all of it
/// is fixed.
pub(super) fn fixed_part(base_dir: &Path, pattern: &str) -> (PathBuf, String) {
    let mut root = base_dir.to_owned();
    let mut rest: Vec<&str> = Vec::new();
    for component in Path::new(pattern).components() {
        let text = component.as_os_str().to_str().unwrap_or_default();
        let is_fixed = rest.is_empty() && !text.contains(['*', '?', '[']);
        match component {
            _ if !is_fixed => rest.push(text),
            Component::CurDir => {}
            component => root.push(component),
        }
    }
    (root, rest.join("/"))
}
