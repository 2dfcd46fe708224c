//! Prints problems and figures, for people and for machines.

use std::{
    fmt,
    io::{self, Write},
    sync::OnceLock,
};

use cofferdam_engine::problem::{Code, Problem};
use serde_json::json;

use crate::lines::Lines;

/// What standard output and standard error get while a job runs; see [`never_block`].
static QUEUES: OnceLock<(Lines, Lines)> = OnceLock::new();

/// From now on printing never waits for a reader.
///
/// # Errors
/// Where no thread can be started for it.
pub(crate) fn never_block(write_error: impl FnMut(&[u8]) + Send + 'static) -> io::Result<()> {
    let write_output = |line: &[u8]| {
        let mut out = io::stdout().lock();
        // Its reader may be gone, which is no reason to fail.
        let _ = out.write_all(line).and_then(|()| out.flush());
    };
    let missed_events = |count| format!("{}\n", json!({ "event": "dropped", "lines": count }));
    let missed_lines =
        |count| format!("... {count} lines were dropped: their reader was too slow\n");
    let output = Lines::new("cofferdam-output", write_output, missed_events)?;
    let error = Lines::new("cofferdam-log", write_error, missed_lines)?;
    let _ = QUEUES.set((output, error));
    Ok(())
}

/// Waits until everything is printed, if anybody reads it.
pub(crate) fn drain() {
    if let Some((output, error)) = QUEUES.get() {
        output.drain();
        error.drain();
    }
}

/// Prints lines to standard error.
pub(crate) fn log(bytes: &[u8]) {
    match QUEUES.get() {
        Some((_, error)) => error.push(bytes.to_vec()),
        None => drop(io::stderr().lock().write_all(bytes)),
    }
}

/// Prints a line to standard output. Its reader may be gone, which is no reason to fail.
macro_rules! say {
    ($($text:tt)*) => { $crate::report::to_stdout(format_args!($($text)*)) };
}

/// Prints a line to standard error, likewise.
macro_rules! say_aside {
    ($($text:tt)*) => { $crate::report::to_stderr(format_args!($($text)*)) };
}

pub(crate) fn to_stdout(text: fmt::Arguments<'_>) {
    match QUEUES.get() {
        Some((output, _)) => output.push(format!("{text}\n").into_bytes()),
        None => drop(writeln!(io::stdout().lock(), "{text}")),
    }
}

pub(crate) fn to_stderr(text: fmt::Arguments<'_>) {
    log(format!("{text}\n").as_bytes());
}

/// Prints a problem: to standard error, or as one JSON object to standard output.
pub(crate) fn problem(problem: &Problem, is_json: bool) {
    if !is_json && problem.code == Code::AlreadyFinished {
        // Nothing is wrong.
        say_aside!("{}", problem.message);
        if let Some(hint) = &problem.hint {
            say_aside!("  {hint}");
        }
        return;
    }
    if !is_json {
        say_aside!("{problem}");
        return;
    }
    line(&json!({
        "event": "error",
        "code": problem.code.number(),
        "message": problem.message,
        "details": problem.all_details(),
        "hint": problem.advice(),
    }));
    problem.more.iter().for_each(|other| self::problem(other, is_json));
}

/// Prints one JSON object as a line.
pub(crate) fn line(object: &serde_json::Value) {
    say!("{object}");
}

/// A number of bytes as people read it.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

/// A count with its thousands apart.
pub(crate) fn count(count: u64) -> String {
    indicatif::HumanCount(count).to_string()
}

/// A duration as people read it.
pub(crate) fn micros(count: u64) -> String {
    match count {
        0 => "0".to_owned(),
        1..1_000 => format!("{count} µs"),
        1_000..1_000_000 => format!("{:.1} ms", count as f64 / 1e3),
        _ => format!("{:.1} s", count as f64 / 1e6),
    }
}
