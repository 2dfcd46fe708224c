//! Prints problems and figures, for people and for machines.

use cofferdam_engine::problem::Problem;
use serde_json::json;

/// Prints a problem: to standard error, or as one JSON object to standard output.
pub(crate) fn problem(problem: &Problem, is_json: bool) {
    if !is_json {
        eprintln!("{problem}");
        return;
    }
    line(&json!({
        "event": "error",
        "code": problem.code.number(),
        "message": problem.message,
        "details": problem.details,
        "hint": problem.hint,
    }));
}

/// Prints one JSON object as a line.
pub(crate) fn line(object: &serde_json::Value) {
    use std::io::Write;
    // Whoever reads this may be gone; that is no reason to fail.
    let _ = writeln!(std::io::stdout().lock(), "{object}");
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
