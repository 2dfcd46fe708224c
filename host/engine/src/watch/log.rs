//! The last lines that the guests of a job have logged.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use cofferdam_sandbox::Level;
use serde::Serialize;

use crate::clock::now_ms;

/// How many lines are kept, and how many bytes of them.
const LINES_MAX: usize = 1_000;
const BYTES_MAX: usize = 1 << 20;

/// A line that a guest has logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LogLine {
    /// When, in milliseconds since 1970-01-01 UTC.
    pub at_ms: u64,
    /// The task, `operator/index`.
    pub task: String,
    /// How much it matters: `trace`, `debug`, `info`, `warn` or `error`.
    pub level: &'static str,
    /// What it says.
    pub message: String,
}

impl LogLine {
    fn bytes(&self) -> usize {
        self.task.len() + self.message.len()
    }
}

/// The last lines of a job's guests.
#[derive(Debug, Default)]
pub(crate) struct Logs(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    lines: VecDeque<LogLine>,
    bytes: usize,
}

impl Logs {
    /// Keeps a line, and forgets the oldest ones where there are too many.
    pub(crate) fn add(&self, task: &str, level: Level, message: &str) {
        let level = match level {
            Level::Trace => "trace",
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
        };
        let (task, message) = (task.to_owned(), message.to_owned());
        let line = LogLine { at_ms: now_ms(), task, level, message };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.bytes += line.bytes();
        kept.lines.push_back(line);
        while LINES_MAX < kept.lines.len() || BYTES_MAX < kept.bytes {
            let Some(oldest) = kept.lines.pop_front() else { break };
            kept.bytes -= oldest.bytes();
        }
    }

    /// The lines that are kept, oldest first.
    pub(crate) fn lines(&self) -> Vec<LogLine> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.lines.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_by_number_and_by_size() {
        let logs = Logs::default();
        (0..LINES_MAX + 5).for_each(|n| logs.add("count/0", Level::Info, &n.to_string()));
        let lines = logs.lines();
        assert_eq!((lines.len(), lines[0].message.as_str()), (LINES_MAX, "5"));
        logs.add("count/1", Level::Error, &"x".repeat(BYTES_MAX - 100));
        let lines = logs.lines();
        assert!(lines.len() < 20, "{} lines", lines.len());
        assert_eq!(lines.last().map(|line| line.level), Some("error"));
        logs.add("count/1", Level::Error, &"x".repeat(BYTES_MAX + 1));
        assert_eq!(logs.lines(), [], "one that is too large is not kept, either");
    }
}
