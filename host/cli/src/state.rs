//! `cofferdam state`: declared state from outside, entry by entry.

use std::io::{self, BufWriter, Write};

use cofferdam_engine::{
    job,
    job::each_declared,
    problem::{Code, Problem},
    schema::to_json,
};
use cofferdam_sandbox::Sandbox;
use cofferdam_store::{
    declared::DeclaredKey,
    metadata::{CheckpointMetadata, TaskIdentity},
};
use serde_json::{Value, json};

use crate::{
    args::StateArguments,
    checkpoints::Opened,
    report::{bytes, count},
};

pub(crate) fn run(arguments: &StateArguments, is_json: bool) -> Result<(), Problem> {
    let opened = Opened::new(&arguments.job)?;
    opened.warn();
    let metadata = opened.metadata(arguments.id)?;
    check_names(arguments, metadata)?;
    let sandbox = job::sandbox(arguments.cache.engine())?;
    let wants_entries =
        arguments.operator.is_some() || arguments.state.is_some() || arguments.key.is_some();
    match wants_entries {
        true => entries(arguments, &opened, metadata, &sandbox, is_json),
        false => summary(&opened, metadata, &sandbox, is_json),
    }
}

fn unknown(message: String, known: Vec<&str>) -> Problem {
    let hint = match known.is_empty() {
        true => "no operator in this checkpoint has declared state".to_owned(),
        false => format!("there are: {}", known.join(", ")),
    };
    Problem::new(Code::UnknownInput, message).hint(hint)
}

/// Refuses a name that nothing in the checkpoint has.
fn check_names(arguments: &StateArguments, metadata: &CheckpointMetadata) -> Result<(), Problem> {
    let tasks = metadata.tasks.iter().map(|task| &task.identity);
    let mut declared: Vec<&TaskIdentity> = tasks.filter(|task| task.has_declared).collect();
    declared.dedup_by(|left, right| left.operator == right.operator);
    if let Some(operator) = &arguments.operator
        && !declared.iter().any(|task| task.operator == *operator)
    {
        let message = format!("the checkpoint has no operator \"{operator}\" with declared state");
        return Err(unknown(message, declared.iter().map(|task| &*task.operator).collect()));
    }
    let is_asked = |task: &&TaskIdentity| {
        arguments.operator.as_ref().is_none_or(|operator| *operator == task.operator)
    };
    let states: Vec<&str> = declared
        .iter()
        .copied()
        .filter(is_asked)
        .flat_map(|task| task.states.iter().map(|state| &*state.name))
        .collect();
    match &arguments.state {
        Some(state) if !states.contains(&&**state) => {
            Err(unknown(format!("the checkpoint has no state \"{state}\""), states))
        }
        _ => Ok(()),
    }
}

/// The bytes of a key that was given as text.
fn key_of(text: &str) -> Result<Vec<u8>, Problem> {
    let Some(digits) = text.strip_prefix("0x") else { return Ok(text.as_bytes().to_vec()) };
    let byte = |pair: &[u8]| {
        let is_hex = pair.len() == 2 && pair.iter().all(u8::is_ascii_hexdigit);
        let pair = std::str::from_utf8(pair).ok().filter(|_| is_hex)?;
        u8::from_str_radix(pair, 16).ok()
    };
    digits.as_bytes().chunks(2).map(byte).collect::<Option<_>>().ok_or_else(|| {
        Problem::new(Code::BadValue, format!("\"{text}\" is not a valid key"))
            .hint("0x must be followed by pairs of hexadecimal digits")
    })
}

/// Text where it is text that people can read, else hexadecimal digits behind `0x`.
fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.starts_with("0x") && !text.chars().any(char::is_control) => {
            text.to_owned()
        }
        _ => {
            let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("0x{digits}")
        }
    }
}

/// The record key of an entry, and the namespace behind it.
fn parts(key: &DeclaredKey) -> (&[u8], &[u8]) {
    key.key.split_at(key.key.len().saturating_sub(key.namespace as usize))
}

fn entries(
    arguments: &StateArguments,
    opened: &Opened,
    metadata: &CheckpointMetadata,
    sandbox: &Sandbox,
    is_json: bool,
) -> Result<(), Problem> {
    let wanted = arguments.key.as_deref().map(key_of).transpose()?;
    let mut out = BufWriter::new(io::stdout().lock());
    let mut failed: Option<io::Error> = None;
    for (slot, task) in metadata.tasks.iter().enumerate() {
        let TaskIdentity { operator, states, has_declared, .. } = &task.identity;
        let is_asked = arguments.operator.as_ref().is_none_or(|asked| asked == operator);
        if !has_declared || !is_asked || failed.is_some() {
            continue;
        }
        each_declared(sandbox, &opened.store, metadata, slot, |key, value| {
            let Some(state) = states.get(key.state as usize) else { return true };
            let (record_key, namespace) = parts(key);
            let is_asked = arguments.state.as_ref().is_none_or(|asked| *asked == state.name)
                && wanted.as_ref().is_none_or(|wanted| wanted == record_key);
            if !is_asked {
                return true;
            }
            // What nobody can look into is shown as it lies there.
            let value =
                to_json(&state.schema, value).unwrap_or_else(|_| Value::String(shown(value)));
            let written = match is_json {
                true => writeln!(
                    out,
                    "{}",
                    json!({
                        "operator": operator,
                        "state": state.name,
                        "key": shown(record_key),
                        "namespace": (!namespace.is_empty()).then(|| shown(namespace)),
                        "value": value,
                    })
                ),
                false => {
                    let within = match namespace {
                        [] => String::new(),
                        namespace => format!(" [{}]", shown(namespace)),
                    };
                    let key = shown(record_key);
                    writeln!(out, "{operator}.{} {key}{within} = {value}", state.name)
                }
            };
            failed = written.err();
            failed.is_none()
        })?;
    }
    match failed.map_or_else(|| out.flush(), Err) {
        // The reader has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Problem::new(Code::OutputUnwritable, "the entries cannot be written")
                .because(&error))
        }
        _ => Ok(()),
    }
}

fn summary(
    opened: &Opened,
    metadata: &CheckpointMetadata,
    sandbox: &Sandbox,
    is_json: bool,
) -> Result<(), Problem> {
    // By operator and state, in the order of the checkpoint.
    let mut rows: Vec<(&str, &str, &str, u64, u64)> = Vec::new();
    for (slot, task) in metadata.tasks.iter().enumerate() {
        let TaskIdentity { operator, states, has_declared, .. } = &task.identity;
        if !has_declared {
            continue;
        }
        let first = match rows.iter().position(|row| row.0 == operator) {
            Some(first) => first,
            None => {
                let row = states.iter().map(|it| (&**operator, &*it.name, &*it.schema, 0, 0));
                rows.extend(row);
                rows.len() - states.len()
            }
        };
        each_declared(sandbox, &opened.store, metadata, slot, |key, value| {
            if let Some(row) = rows.get_mut(first + key.state as usize) {
                row.3 += 1;
                row.4 += (key.key.len() + value.len()) as u64;
            }
            true
        })?;
    }
    if !is_json {
        say!("checkpoint {} in {}", metadata.checkpoint, opened.dir.display());
        if rows.is_empty() {
            say!("  no operator in it has declared state");
        }
    }
    for (operator, state, schema, entries, size) in rows {
        match is_json {
            true => crate::report::line(&json!({
                "checkpoint": metadata.checkpoint,
                "operator": operator,
                "state": state,
                "schema": schema,
                "entries": entries,
                "bytes": size,
            })),
            false => say!(
                "  {operator}.{state}: {} entries, {}, each a {schema}",
                count(entries),
                bytes(size)
            ),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_shown_is_the_key_that_can_be_asked_for() {
        for key in [
            &b"the"[..],
            b"",
            b"0x",
            b"0xff",
            b"\x00\x01",
            b"line\nbreak",
            "\u{fc}".as_bytes(),
            b"\xff",
        ] {
            assert_eq!(key_of(&shown(key)).expect("readable"), key, "{}", shown(key));
        }
        assert_eq!(shown(b"the"), "the");
        assert_eq!(shown(b"\x00\xff"), "0x00ff");
        for wrong in ["0xf", "0xzz", "0x+f", "0x\u{fc}"] {
            assert_eq!(key_of(wrong).expect_err(wrong).code, Code::BadValue);
        }
    }

    #[test]
    fn a_namespace_lies_behind_the_key_of_the_record() {
        let key = DeclaredKey::new(0, b"keyspace", 5, 128);
        assert_eq!(parts(&key), (&b"key"[..], &b"space"[..]));
        assert_eq!(parts(&DeclaredKey::new(0, b"key", 0, 128)), (&b"key"[..], &b""[..]));
    }

    #[test]
    fn a_name_that_nothing_has_is_answered_with_those_that_there_are() {
        let problem = unknown("no state \"x\"".to_owned(), vec!["counts", "totals"]);
        assert_eq!(problem.hint.as_deref(), Some("there are: counts, totals"));
        let problem = unknown("no state \"x\"".to_owned(), Vec::new());
        assert_eq!(
            problem.hint.as_deref(),
            Some("no operator in this checkpoint has declared state")
        );
    }
}
