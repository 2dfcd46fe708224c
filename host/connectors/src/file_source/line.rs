//! Finds the key and the event time in a line: by a JSON pointer, a column, or a pattern.

use std::{fs::File, io, os::unix::fs::FileExt};

use chrono::{
    DateTime, NaiveTime,
    format::{self, Parsed, StrftimeItems},
};
use regex::bytes::Regex;

use super::{
    plan::byte_order_mark,
    spec::{FileSourceSpec, LineFormat, TimeFormat},
};

/// From here on a number of JSON may be an integer that does not fit into 64 bits.
const EXACT_MAX: f64 = 9.2e18;

/// What a line says of itself.
#[derive(Debug, Default)]
pub(super) struct Fields {
    pub(super) key: Option<Vec<u8>>,
    pub(super) timestamp: Option<i64>,
}

/// How the lines of one file are read.
#[derive(Debug)]
pub(super) struct LineReader {
    format: LineFormat,
    key: Option<Field>,
    timestamp: Option<(Field, TimeFormat)>,
    delimiter: u8,
}

#[derive(Debug)]
enum Field {
    Pointer(String),
    Column { name: String, index: usize },
    Pattern(Regex),
}

/// Why the lines of a file cannot be read.
#[derive(Debug)]
pub(super) enum Unread {
    /// The header does not name what the manifest asks for, or is none.
    Header(String),
    /// The file cannot be read now.
    Io(io::Error),
}

impl LineReader {
    /// For lines of a file; the header is read from it where there is one.
    pub(super) fn new(spec: &FileSourceSpec, file: &File) -> Result<Self, Unread> {
        let header = match spec.has_header && (spec.key.is_some() || spec.timestamp.is_some()) {
            true => Some(read_header(file, spec)?),
            false => None,
        };
        let place = |field: &String| -> Result<Field, String> {
            Ok(match spec.format {
                LineFormat::Json => Field::Pointer(field.clone()),
                LineFormat::Text => {
                    Field::Pattern(Regex::new(field).map_err(|error| error.to_string())?)
                }
                LineFormat::Csv => {
                    let named = header.iter().flatten().position(|name| name == field.as_bytes());
                    let numbered = || field.parse::<usize>().ok()?.checked_sub(1);
                    let index = named.or_else(numbered);
                    let index = index.ok_or_else(|| format!("there is no column \"{field}\""))?;
                    Field::Column { name: field.clone(), index }
                }
            })
        };
        let key = spec.key.as_ref().map(place).transpose().map_err(Unread::Header)?;
        let timestamp = spec.timestamp.as_ref().map(place).transpose().map_err(Unread::Header)?;
        let timestamp = timestamp.map(|place| (place, spec.timestamp_format.clone()));
        Ok(Self { format: spec.format, key, timestamp, delimiter: spec.delimiter })
    }

    /// The fields of a line.
    pub(super) fn read(&self, line: &[u8]) -> Result<Fields, String> {
        if self.format == LineFormat::Text && self.key.is_none() && self.timestamp.is_none() {
            return Ok(Fields::default());
        }
        let document = match self.format {
            LineFormat::Json => Some(
                serde_json::from_slice::<serde_json::Value>(line)
                    .map_err(|error| format!("not JSON: {error}"))?,
            ),
            _ => None,
        };
        let columns = match self.format {
            LineFormat::Csv => columns(line, self.delimiter)?,
            _ => Vec::new(),
        };
        let field = |place: &Field| -> Result<Vec<u8>, String> {
            match place {
                Field::Pointer(pointer) => {
                    let found = document.as_ref().and_then(|document| document.pointer(pointer));
                    match found.ok_or_else(|| format!("there is no {pointer}"))? {
                        serde_json::Value::String(text) => Ok(text.clone().into_bytes()),
                        // An integer of more than 64 bits has lost its last digits by now.
                        serde_json::Value::Number(number)
                            if number
                                .as_f64()
                                .is_some_and(|it| number.is_f64() && EXACT_MAX <= it.abs()) =>
                        {
                            Err(format!("{pointer} is a number of more than 64 bits: {number}"))
                        }
                        other => Ok(other.to_string().into_bytes()),
                    }
                }
                Field::Column { name, index } => {
                    let column = columns.get(*index);
                    column.cloned().ok_or_else(|| format!("there is no column \"{name}\""))
                }
                Field::Pattern(pattern) => {
                    let found = pattern.captures(line).and_then(|found| {
                        found.iter().skip(1).flatten().next().or_else(|| found.get(0))
                    });
                    let found = found.map(|found| found.as_bytes().to_vec());
                    found.ok_or_else(|| format!("it does not match {pattern}"))
                }
            }
        };
        let key = self.key.as_ref().map(field).transpose()?;
        let timestamp = match &self.timestamp {
            Some((place, format)) => {
                let text = field(place)?;
                let text = String::from_utf8_lossy(&text);
                let time = format.parse(text.trim());
                Some(time.ok_or_else(|| {
                    format!("\"{text}\" is not a valid time ({})", format.wanted())
                })?)
            }
            None => None,
        };
        Ok(Fields { key, timestamp })
    }
}

impl TimeFormat {
    fn wanted(&self) -> String {
        match self {
            Self::Millis => "a whole number of milliseconds".to_owned(),
            Self::Seconds => "a number of seconds".to_owned(),
            Self::Rfc3339 => "such as 2013-01-01T05:00:00Z".to_owned(),
            Self::Pattern(pattern) => format!("as {pattern}"),
        }
    }

    /// Milliseconds since 1970-01-01 UTC. A time without an offset is taken for UTC.
    fn parse(&self, text: &str) -> Option<i64> {
        match self {
            Self::Millis => text.parse().ok(),
            Self::Seconds => {
                let ms = text.parse::<f64>().ok()? * 1e3;
                (ms.abs() < 9e15).then_some(ms.round() as i64)
            }
            Self::Rfc3339 => Some(DateTime::parse_from_rfc3339(text).ok()?.timestamp_millis()),
            Self::Pattern(pattern) => {
                let mut parsed = Parsed::new();
                format::parse(&mut parsed, text, StrftimeItems::new(pattern)).ok()?;
                if parsed.offset().is_some() || parsed.timestamp().is_some() {
                    return Some(parsed.to_datetime().ok()?.timestamp_millis());
                }
                let has_time = parsed.hour_div_12().is_some() || parsed.hour_mod_12().is_some();
                let time = match has_time {
                    true => {
                        // "05 h" is five o'clock.
                        if parsed.minute().is_none() {
                            parsed.set_minute(0).ok()?;
                        }
                        parsed.to_naive_time().ok()?
                    }
                    false => NaiveTime::MIN,
                };
                Some(parsed.to_naive_date().ok()?.and_time(time).and_utc().timestamp_millis())
            }
        }
    }
}

fn read_header(file: &File, spec: &FileSourceSpec) -> Result<Vec<Vec<u8>>, Unread> {
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    while line.len() < spec.record_bytes_max {
        let read = file.read_at(&mut buffer, line.len() as u64).map_err(Unread::Io)?;
        line.extend_from_slice(&buffer[..read]);
        if read == 0 || buffer[..read].contains(&b'\n') {
            break;
        }
    }
    let mark = byte_order_mark(file).map_err(Unread::Io)?;
    let end = memchr::memchr(b'\n', &line).unwrap_or(line.len());
    let line = line.get(mark as usize..end).unwrap_or_default();
    columns(line.strip_suffix(b"\r").unwrap_or(line), spec.delimiter).map_err(Unread::Header)
}

/// The columns of a line as RFC 4180 has them, but for line breaks within quotes.
fn columns(line: &[u8], delimiter: u8) -> Result<Vec<Vec<u8>>, String> {
    let mut columns = Vec::new();
    let mut rest = line;
    loop {
        let mut column = Vec::new();
        if let Some(mut quoted) = rest.strip_prefix(b"\"") {
            loop {
                let Some(end) = memchr::memchr(b'"', quoted) else {
                    return Err("a quote is not closed on its line".to_owned());
                };
                column.extend_from_slice(&quoted[..end]);
                quoted = &quoted[end + 1..];
                match quoted.strip_prefix(b"\"") {
                    Some(more) => {
                        column.push(b'"');
                        quoted = more;
                    }
                    None => break,
                }
            }
            rest = quoted;
        } else {
            let end = memchr::memchr(delimiter, rest).unwrap_or(rest.len());
            column.extend_from_slice(&rest[..end]);
            rest = &rest[end..];
            // The rest of a record with a line break in it looks so.
            if column.contains(&b'"') {
                return Err("a quote is in a column that does not begin with one".to_owned());
            }
        }
        columns.push(column);
        match rest.split_first() {
            None => return Ok(columns),
            Some((&byte, more)) if byte == delimiter => rest = more,
            Some(_) => return Err("something follows a closing quote".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_may_be_quoted() {
        let split = |line: &str| {
            columns(line.as_bytes(), b',').map(|columns| {
                columns.iter().map(|c| String::from_utf8_lossy(c).into_owned()).collect::<Vec<_>>()
            })
        };
        assert_eq!(split("a,b,,").expect("columns"), ["a", "b", "", ""]);
        assert_eq!(split("\"a,\"\"b\",c").expect("columns"), ["a,\"b", "c"]);
        assert_eq!(split("").expect("columns"), [""]);
        assert!(split("\"a").is_err());
        assert!(split("\"a\"b,c").is_err());
        assert!(split("more\",5").is_err(), "the second half of a record");
    }

    #[test]
    fn times_are_milliseconds_whatever_their_form() {
        let pattern = |pattern: &str| TimeFormat::Pattern(pattern.to_owned());
        let rows = [
            (TimeFormat::Millis, "1357016400000", Some(1_357_016_400_000)),
            (TimeFormat::Millis, "1.5", None),
            (TimeFormat::Seconds, "1357016400.25", Some(1_357_016_400_250)),
            (TimeFormat::Rfc3339, "2013-01-01T05:00:00Z", Some(1_357_016_400_000)),
            (TimeFormat::Rfc3339, "2013-01-01T05:00:00+01:00", Some(1_357_012_800_000)),
            (pattern("%Y-%m-%d %H:%M:%S"), "2013-01-01 05:00:00", Some(1_357_016_400_000)),
            (pattern("%d.%m.%Y"), "01.01.2013", Some(1_356_998_400_000)),
            (pattern("%d.%m.%Y"), "yesterday", None),
            (pattern("%Y-%m-%d %H"), "2013-01-01 05", Some(1_357_016_400_000)),
            (pattern("%Y-%m-%d %I %p"), "2013-01-01 05 PM", Some(1_357_059_600_000)),
            (pattern("%Y-%m-%d %I"), "2013-01-01 05", None),
            (pattern("%Y-%m-%d %H:%M %z"), "2013-01-01 05:00 +0100", Some(1_357_012_800_000)),
            (pattern("%s"), "1357016400", Some(1_357_016_400_000)),
            (pattern("%H:%M"), "05:00", None),
        ];
        for (format, text, expected) in rows {
            assert_eq!(format.parse(text), expected, "{format:?} {text}");
        }
    }
}
