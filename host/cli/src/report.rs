//! Prints problems and figures, for people and for machines.

use std::{
    fmt,
    io::{self, Write},
    sync::OnceLock,
};

use cofferdam_contract::text::printable;
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

/// Names, messages and values come from manifests, guests and checkpoints: none of them controls the terminal.
pub(crate) fn to_stdout(text: fmt::Arguments<'_>) {
    print(printable(format!("{text}\n")));
}

pub(crate) fn to_stderr(text: fmt::Arguments<'_>) {
    log(printable(format!("{text}\n")).as_bytes());
}

fn print(text: String) {
    match QUEUES.get() {
        Some((output, _)) => output.push(text.into_bytes()),
        None => drop(io::stdout().lock().write_all(text.as_bytes())),
    }
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
    objects(problem).iter().for_each(line);
}

/// A problem and those behind it, for machines.
fn objects(problem: &Problem) -> Vec<serde_json::Value> {
    let own = json!({
        "event": "error",
        "code": problem.code.number(),
        "message": problem.message,
        "details": problem.all_details(),
        "hint": problem.advice(),
    });
    std::iter::once(own).chain(problem.more.iter().flat_map(objects)).collect()
}

/// Prints one JSON object as a line.
pub(crate) fn line(object: &serde_json::Value) {
    print(format!("{object}\n"));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_the_unit_that_people_would_use() {
        let shown = [0, 1, 999, 1_000, 1_550, 999_999, 1_000_000, 90_000_000].map(micros);
        let expected =
            ["0", "1 \u{b5}s", "999 \u{b5}s", "1.0 ms", "1.6 ms", "1000.0 ms", "1.0 s", "90.0 s"];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_problem_is_one_object_for_machines() {
        let other = Problem::new(Code::BadValue, "and another");
        let problem = Problem::all([
            Problem::new(Code::MissingKey, "no name").detail("in job.toml").hint("name it"),
            other,
        ]);
        let objects: Vec<_> = problem.iter().flat_map(objects).collect();
        assert_eq!(objects.len(), 2);
        assert_eq!(objects[0]["code"], Code::MissingKey.number());
        assert_eq!(objects[0]["details"], json!(["in job.toml"]));
        assert_eq!(objects[0]["hint"], "name it");
        assert_eq!(
            (&objects[1]["message"], &objects[1]["hint"]),
            (&json!("and another"), &json!(null))
        );
    }
}
