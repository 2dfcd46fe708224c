//! Prints problems and figures, for people and for machines.

use std::{
    fmt,
    io::{self, Write},
};

use cofferdam_engine::problem::{Code, Problem};
use serde_json::json;

/// Prints a line to standard output. Its reader may be gone, which is no reason to fail.
macro_rules! say {
    ($($text:tt)*) => { $crate::report::to_stdout(format_args!($($text)*)) };
}

/// Prints a line to standard error, likewise.
macro_rules! say_aside {
    ($($text:tt)*) => { $crate::report::to_stderr(format_args!($($text)*)) };
}

pub(crate) fn to_stdout(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout().lock(), "{text}");
}

pub(crate) fn to_stderr(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{text}");
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
        "details": problem.details,
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
