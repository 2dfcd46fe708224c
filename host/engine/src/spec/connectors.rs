//! What a manifest says about the connectors that are built in.

use std::{path::Path, sync::Arc, time::Duration};

use cofferdam_connector::{
    Catalog,
    catalog::{SinkConnector, SinkSpec, SourceConnector, SourceSpec},
};
use cofferdam_settings::{
    AnySetting, Located, Optional, Problem, Required, Section, Setting, table::Key,
};

use super::{
    DEAD_LETTER, FileSinkSpec, FileSourceSpec, GeneratorContent, GeneratorSpec, IfExists,
    LineContent, LineFormat, OnBadRecord, Rolling, TimeFormat,
};
use crate::sink::{DiscardSpec, StdoutSpec};

type Result<T> = std::result::Result<T, Problem>;

/// A longer record is most often a sign of a file that has no lines.
const RECORD_BYTES_DEFAULT: u64 = 16 << 20;
/// A record must fit into the memory of a guest, several times.
const RECORD_BYTES_MAX: u64 = 256 << 20;

static CONNECTOR: Required<String> = Key::text("connector", "where its records come from, or go")
    .of_job()
    .required("name a connector");
static RATE: Optional<f64> =
    Key::number("rate", "records a second, of all tasks together; above 0")
        .of_job()
        .unless(|rate| (*rate <= 0.0).then_some("it must be above 0 records a second"))
        .or_none("as fast as they are taken");

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

static CONTENT: Setting<bool> = Key::choice(
    "content",
    &[("words", true), ("sequence", false)],
    "`words`: made-up words as keys; `sequence`: the record's number",
)
.of_job()
.or(true);
static VOCABULARY: Setting<u64> =
    Key::integer("vocabulary", 1, 10_000_000, "how many different words").of_job().or(10_000);
static EXPONENT: Setting<f64> =
    Key::number("exponent", "words follow a Zipf law with this exponent, from 0 (all alike) to 10")
        .of_job()
        .unless(|it| (!(0.0..=10.0).contains(it)).then_some("it must be from 0 to 10"))
        .or(1.0);
static COUNT: Optional<u64> =
    Key::integer("count", 0, u64::MAX, "how many records, of all tasks together")
        .of_job()
        .or_none("unbounded");
static SEED: Setting<u64> =
    Key::integer("seed", 0, u64::MAX, "determines every record").of_job().or(0);
static TIMESTAMPS: Setting<bool> =
    Key::boolean("timestamps", "whether record `n` has event time `n` ms").of_job().or(false);

static LINE: Setting<LineContent> = Key::choice(
    "line",
    &[("value", LineContent::Value), ("key-value", LineContent::KeyValue)],
    "`key-value`: key, tab, value",
)
.of_job()
.or(LineContent::Value);
static SINK_PATH: Required<String> = Key::text("path", "the directory of the parts")
    .of_job()
    .required("the directory for the parts");
static IF_EXISTS: Setting<IfExists> = Key::choice(
    "if-exists",
    &[("fail", IfExists::Fail), ("replace", IfExists::Replace)],
    "`replace` removes the parts of an earlier job, and no other file",
)
.of_job()
.or(IfExists::Fail);
static ROLL_SIZE: Optional<u64> = Key::bytes(
    "roll-size",
    "a part continues over checkpoints until it has this many bytes, and is visible after that",
)
.of_job()
.unless(|bytes| (*bytes == 0).then_some("it must be above 0"))
.or_none("none: each checkpoint ends a part");
static ROLL_INTERVAL: Optional<u64> = Key::duration(
    "roll-interval",
    "a part continues over checkpoints until this much time has passed, and is visible after that",
)
.of_job()
.or_none("none: each checkpoint ends a part");

pub(super) static ROWS: &[&dyn AnySetting] = &[&CONNECTOR];
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
static GENERATOR_ROWS: &[&dyn AnySetting] =
    &[&RATE, &CONTENT, &VOCABULARY, &EXPONENT, &COUNT, &SEED, &TIMESTAMPS];
static STDOUT_ROWS: &[&dyn AnySetting] = &[&LINE];
static FILE_SINK_ROWS: &[&dyn AnySetting] =
    &[&LINE, &SINK_PATH, &IF_EXISTS, &ROLL_SIZE, &ROLL_INTERVAL];

/// The connector of a node, among those that there are.
fn chosen<'c, C: ?Sized>(
    section: &Section<'_>,
    connectors: &'c [Arc<C>],
    name: impl Fn(&C) -> &'static str,
) -> Result<&'c C> {
    let names: Vec<&str> = connectors.iter().map(|it| name(it)).collect();
    let wanted = format!("choose one of {}", names.join(", "));
    let Some(Located { value, span }) = section.try_require(&CONNECTOR) else {
        return Err(section.missing(CONNECTOR.row().key, &wanted));
    };
    let found = connectors.iter().find(|it| name(it).eq_ignore_ascii_case(&value));
    found
        .map(|found| &**found)
        .ok_or_else(|| section.not_one_of(CONNECTOR.row().key, &span, &value, &names))
}

pub(super) fn read_source(
    section: &Section<'_>,
    base_dir: &Path,
    catalog: &Catalog,
) -> Result<Arc<dyn SourceSpec>> {
    let connector = chosen(section, catalog.sources(), |it| it.name())?;
    section.know(connector.settings());
    connector.read(section, base_dir)
}

pub(super) fn read_sink(
    section: &Section<'_>,
    base_dir: &Path,
    catalog: &Catalog,
) -> Result<Arc<dyn SinkSpec>> {
    let connector = chosen(section, catalog.sinks(), |it| it.name())?;
    section.know(connector.settings());
    connector.read(section, base_dir)
}

/// A connector that is built in: its name, its settings, and what reads them.
pub(crate) struct BuiltIn<S: ?Sized> {
    name: &'static str,
    rows: &'static [&'static dyn AnySetting],
    read: fn(&Section<'_>, &Path) -> Result<Arc<S>>,
}

impl SourceConnector for BuiltIn<dyn SourceSpec> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        self.rows
    }

    fn read(&self, section: &Section<'_>, base_dir: &Path) -> Result<Arc<dyn SourceSpec>> {
        (self.read)(section, base_dir)
    }
}

impl SinkConnector for BuiltIn<dyn SinkSpec> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        self.rows
    }

    fn read(&self, section: &Section<'_>, base_dir: &Path) -> Result<Arc<dyn SinkSpec>> {
        (self.read)(section, base_dir)
    }
}

/// Lines of files.
pub(crate) const FILE_SOURCE: BuiltIn<dyn SourceSpec> = BuiltIn {
    name: "file",
    rows: FILE_SOURCE_ROWS,
    read: |section, _| Ok(Arc::new(read_file_source(section)?)),
};

/// Records that are made up.
pub(crate) const GENERATOR: BuiltIn<dyn SourceSpec> = BuiltIn {
    name: "generator",
    rows: GENERATOR_ROWS,
    read: |section, _| Ok(Arc::new(read_generator(section))),
};

/// Part files.
pub(crate) const FILE_SINK: BuiltIn<dyn SinkSpec> = BuiltIn {
    name: "file",
    rows: FILE_SINK_ROWS,
    read: |section, base_dir| Ok(Arc::new(read_file_sink(section, base_dir)?)),
};

/// Standard output.
pub(crate) const STDOUT: BuiltIn<dyn SinkSpec> = BuiltIn {
    name: "stdout",
    rows: STDOUT_ROWS,
    read: |section, _| Ok(Arc::new(StdoutSpec { line: section.get(&LINE) })),
};

/// Nowhere.
pub(crate) const DISCARD: BuiltIn<dyn SinkSpec> =
    BuiltIn { name: "discard", rows: &[], read: |_, _| Ok(Arc::new(DiscardSpec)) };

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
        let other = other.or(delimiter.as_ref().map(|it| ("delimiter", &it.span)));
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
        let why = "it says how `timestamp` is written, and there is none";
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
            let why = "the name of a time zone says no offset: write %z for one such as +0100, or \
                       leave it out for UTC";
            return Err(section.bad_value("timestamp-format", &span, why));
        }
        pattern => TimeFormat::Pattern(pattern.to_owned()),
    })
}

fn read_generator(section: &Section<'_>) -> GeneratorSpec {
    let is_words = section.get(&CONTENT);
    let vocabulary = section.get(&VOCABULARY);
    let exponent = section.get(&EXPONENT);
    let content = match is_words {
        true => GeneratorContent::Words {
            vocabulary: u32::try_from(vocabulary).unwrap_or(u32::MAX),
            exponent,
        },
        false => {
            let unused = ["vocabulary", "exponent"].map(|key| section.shown_key(key));
            section.document().forget(|key| unused.iter().any(|it| it == key));
            GeneratorContent::Sequence
        }
    };
    let count = section.find(&COUNT).map(|number| number.value);
    let rate = section.find(&RATE).map(|rate| rate.value);
    let seed = section.get(&SEED);
    let has_timestamps = section.get(&TIMESTAMPS);
    GeneratorSpec { content, count, rate, seed, has_timestamps }
}

fn read_file_sink(section: &Section<'_>, base_dir: &Path) -> Result<FileSinkSpec> {
    let path = base_dir.join(section.require(&SINK_PATH)?.value);
    let shown = section.shown_key(SINK_PATH.row().key);
    section.document().amend(&shown, path.display().to_string());
    let size = section.find(&ROLL_SIZE);
    let interval = section.find(&ROLL_INTERVAL);
    Ok(FileSinkSpec {
        path,
        line: section.get(&LINE),
        if_exists: section.get(&IF_EXISTS),
        rolling: Rolling {
            size: size.map(|size| size.value),
            interval: interval.map(|interval| Duration::from_millis(interval.value)),
        },
    })
}
