//! Says what a running job does: its events, its figures and how it ended, as text or as JSON.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    JobHandle,
    metrics::{Metrics, OperatorReading, Reading},
    problem::Problem,
    progress::{FailureFacts, Observer, Progress, Restart},
};
use cofferdam_spec::NodeKind;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tracing::Level;

use crate::report;

/// How often the line of a terminal is redrawn.
const REDRAW: Duration = Duration::from_millis(200);
/// How often figures are given out elsewhere.
const REPORT: Duration = Duration::from_secs(1);

/// How a run is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Events and figures as JSON on standard output.
    Json,
    /// One line that is redrawn, and log lines above it.
    Live,
    /// Log lines.
    Log,
}

/// Shows what happens, as it happens.
pub(crate) struct Watcher(pub(crate) Mode);

impl Observer for Watcher {
    fn observe(&self, progress: Progress) {
        if self.0 == Mode::Json {
            match serde_json::to_value(&progress) {
                Ok(value) => report::line(&value),
                Err(error) => tracing::error!(%error, "cannot serialize an event"),
            }
            return;
        }
        for (level, line) in log_lines(progress, self.0) {
            match level {
                Level::DEBUG => tracing::debug!("{line}"),
                Level::WARN => tracing::warn!("{line}"),
                _ => tracing::info!("{line}"),
            }
        }
    }
}

/// The log lines of an event.
fn log_lines(progress: Progress, mode: Mode) -> Vec<(Level, String)> {
    let info = |line: String| vec![(Level::INFO, line)];
    let warn = |line: String| vec![(Level::WARN, line)];
    match progress {
        Progress::Started { attempt, restored_from, tasks } => info(match restored_from {
            Some(checkpoint) => {
                format!("attempt {attempt}: {tasks} tasks, from checkpoint {checkpoint}")
            }
            None => format!("attempt {attempt}: {tasks} tasks, from the beginning"),
        }),
        Progress::CheckpointCompleted {
            checkpoint,
            duration_ms,
            pause_ms,
            bytes,
            alignment_ms,
            in_flight_bytes,
            ..
        } => {
            let size = report::bytes(bytes);
            let in_flight = match in_flight_bytes {
                0 => String::new(),
                bytes => format!(", {} in flight", report::bytes(bytes)),
            };
            let line = format!(
                "checkpoint {checkpoint}: {duration_ms:.1} ms, alignment {alignment_ms:.1} ms, \
                 pause {pause_ms:.2} ms, {size}{in_flight}"
            );
            // On a terminal the line of progress says so already.
            let level = if mode == Mode::Live { Level::DEBUG } else { Level::INFO };
            vec![(level, line)]
        }
        Progress::Running { tasks } => vec![(Level::DEBUG, format!("all {tasks} tasks run"))],
        Progress::Restoring { checkpoint, step } => {
            info(format!("checkpoint {checkpoint}: {step}"))
        }
        Progress::CheckpointFailed { checkpoint, reason, .. } => {
            warn(format!("checkpoint {checkpoint} given up: {reason}"))
        }
        Progress::Restarting(restart) => {
            restart_lines(restart).into_iter().map(|line| (Level::WARN, line)).collect()
        }
        // The summary says so, with what to do next.
        Progress::Failed { .. } => Vec::new(),
        Progress::Recovered { recovery_us } => {
            info(format!("recovered in {:.2} ms", recovery_us as f64 / 1e3))
        }
        Progress::DeadLetter { task, failure, traps, isolation_us } => {
            let (took, failure) = (report::micros(isolation_us), failure_words(&failure));
            warn(format!(
                "{task}: a record went to the dead letters after {traps} failures, found in {took}: {failure}"
            ))
        }
        Progress::RecordsLost { from, to, lost, regained, is_exact } => {
            let lines = loss_lines(&from, &to, lost, regained, is_exact);
            lines.into_iter().map(|line| (Level::WARN, line)).collect()
        }
        Progress::Warning { message } => warn(message),
        other => info(format!("{other:?}")),
    }
}

/// What has failed, and the setting of the limit where it was one.
fn failure_words(failure: &FailureFacts) -> String {
    let FailureFacts { class, message, limit, .. } = failure;
    let limit = limit.map_or(String::new(), |setting| format!(" (setting: {setting})"));
    format!("{class}: {message}{limit}")
}

/// That tasks restart, and why.
fn restart_lines(restart: Restart) -> Vec<String> {
    let Restart { task, failure, delay_ms, new_attempt, remaining_attempts, restarting, tasks } =
        restart;
    let who = task.unwrap_or_else(|| "the job".to_owned());
    let FailureFacts { backtrace, .. } = &failure;
    let mut lines = vec![format!("{who}: {}", failure_words(&failure))];
    lines.extend(backtrace.iter().map(|frame| format!("  in {frame}")));
    let left = remaining_attempts.map_or(String::new(), |left| format!(", {left} more allowed"));
    let counted = if new_attempt { "" } else { ", counted together with the previous failure" };
    let count = restarting.len();
    lines.push(format!("restarting {count} of {tasks} tasks in {delay_ms} ms{left}{counted}"));
    lines
}

/// How many records an approximate exchange has lost, or will send again after all.
fn loss_lines(from: &str, to: &str, lost: u64, regained: u64, is_exact: bool) -> Vec<String> {
    let at_most = if is_exact { "" } else { "at most " };
    let mut lines = Vec::new();
    if 0 < regained {
        lines.push(format!(
            "{at_most}{regained} records from {from} to {to} will be sent again: {from} was rewound too"
        ));
    }
    if 0 < lost {
        lines.push(format!(
            "{at_most}{lost} records from {from} to {to} are lost: {to} has restarted without all of {from}"
        ));
    }
    lines
}

/// The figures of a running job.
#[derive(Clone)]
pub(crate) struct View {
    mode: Mode,
    job: String,
    metrics: Arc<Metrics>,
    /// Which operators are sources and which are sinks.
    kinds: Arc<Vec<(bool, bool)>>,
    bar: ProgressBar,
    started: Instant,
}

impl View {
    pub(crate) fn new(job: &JobHandle, mode: Mode, screen: &MultiProgress) -> Self {
        let is = |kind: &NodeKind| {
            (matches!(kind, NodeKind::Source(_)), matches!(kind, NodeKind::Sink(_)))
        };
        let kinds = job.spec().nodes.iter().map(|node| is(&node.kind)).collect();
        let bar = screen.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        let job_name = job.spec().name.clone();
        Self {
            mode,
            job: job_name,
            metrics: job.metrics(),
            kinds: Arc::new(kinds),
            bar,
            started: Instant::now(),
        }
    }

    fn read(&self) -> Reading {
        self.metrics.read(|index| self.kinds[index].0, |index| self.kinds[index].1)
    }

    /// Shows figures, until what it gives back is dropped. On a thread of its own: a terminal may be held.
    pub(crate) fn watch(self) -> mpsc::Sender<Infallible> {
        let (watched, ended) = mpsc::channel();
        std::thread::spawn(move || self.show_until(&ended));
        watched
    }

    fn show_until(&self, ended: &mpsc::Receiver<Infallible>) {
        let period = if self.mode == Mode::Live { REDRAW } else { REPORT };
        let mut before = (Instant::now(), self.read());
        while ended.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
            let now = (Instant::now(), self.read());
            let rates = Rates::between(&before.1, &now.1, now.0.duration_since(before.0));
            before = now;
            match self.mode {
                Mode::Json => {
                    let operators = self.metrics.read_operators();
                    report::line(&figures(&before.1, rates, self.started.elapsed(), &operators));
                }
                Mode::Live => {
                    self.bar.tick();
                    self.bar.set_message(live_line(&self.job, &before.1, rates));
                }
                Mode::Log => {}
            }
        }
    }

    pub(crate) fn summarise(&self, outcome: &Result<Outcome, Problem>) {
        let summary = Summary {
            job: &self.job,
            outcome,
            took: self.started.elapsed(),
            reading: self.read(),
            operators: self.metrics.read_operators(),
        };
        match self.mode {
            Mode::Json => report::line(&summary.to_json()),
            Mode::Live | Mode::Log => {
                summary.lines().iter().for_each(|line| say_aside!("{line}"));
            }
        }
    }
}

/// Records a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rates {
    read: u64,
    written: u64,
}

impl Rates {
    fn between(before: &Reading, now: &Reading, time: Duration) -> Self {
        let rate =
            |new: u64, old: u64| (new.saturating_sub(old) as f64 / time.as_secs_f64()) as u64;
        Self {
            read: rate(now.records_read, before.records_read),
            written: rate(now.records_written, before.records_written),
        }
    }
}

fn figures(
    reading: &Reading,
    rates: Rates,
    elapsed: Duration,
    operators: &[OperatorReading],
) -> Value {
    json!({
        "event": "progress",
        "elapsed_ms": elapsed.as_millis() as u64,
        "records_read": reading.records_read,
        "records_written": reading.records_written,
        "records_read_per_second": rates.read,
        "records_written_per_second": rates.written,
        "checkpoints": reading.checkpoints,
        "restarts": reading.restarts,
        "records_lost": reading.records_lost,
        "watermark": reading.watermark,
        "operators": operators,
    })
}

fn live_line(job: &str, reading: &Reading, rates: Rates) -> String {
    // Behind the last record it is at the end of time.
    let watermark = reading.watermark.filter(|at| *at != i64::MAX);
    format!(
        "{job} | in {}/s, out {}/s | {} read | checkpoint {} | restarts {}{}",
        report::count(rates.read),
        report::count(rates.written),
        report::count(reading.records_read),
        reading.checkpoints,
        reading.restarts,
        watermark.map_or(String::new(), |at| format!(" | watermark {at}")),
    )
}

/// How a run has ended.
struct Summary<'a> {
    job: &'a str,
    outcome: &'a Result<Outcome, Problem>,
    took: Duration,
    reading: Reading,
    operators: Vec<OperatorReading>,
}

impl Summary<'_> {
    /// How it has ended, in a word, and the checkpoint that it left.
    fn outcome(&self) -> (&'static str, Option<u64>) {
        let (word, checkpoint) = match self.outcome {
            Ok(Outcome::Finished) => ("finished", None),
            Ok(Outcome::Stopped { checkpoint, .. }) => ("stopped", *checkpoint),
            Ok(Outcome::Canceled { checkpoint }) => ("canceled", *checkpoint),
            Ok(Outcome::Failed { checkpoint, .. }) => ("failed", *checkpoint),
            Err(_) => ("failed", None),
        };
        (word, checkpoint.map(|checkpoint| checkpoint.0))
    }

    fn to_json(&self) -> Value {
        let (word, checkpoint) = self.outcome();
        json!({
            "event": "summary",
            "job": self.job,
            "outcome": word,
            "checkpoint": checkpoint,
            "elapsed_ms": self.took.as_millis() as u64,
            "records_read": self.reading.records_read,
            "records_written": self.reading.records_written,
            "checkpoints": self.reading.checkpoints,
            "restarts": self.reading.restarts,
            "records_lost": self.reading.records_lost,
            "bad_records": self.reading.bad_records,
            "operators": self.operators,
        })
    }

    fn lines(&self) -> Vec<String> {
        let Self { job, reading, .. } = self;
        let (word, checkpoint) = self.outcome();
        let lost = match reading.records_lost {
            0 => String::new(),
            lost => format!(", {} records lost", report::count(lost)),
        };
        let bad = match reading.bad_records {
            0 => String::new(),
            bad => format!(", {} bad records left out", report::count(bad)),
        };
        let mut lines = vec![format!(
            "{job} {word} after {:.2} s: {} records read, {} written, {} checkpoints, {} restarts{lost}{bad}",
            self.took.as_secs_f64(),
            report::count(reading.records_read),
            report::count(reading.records_written),
            reading.checkpoints,
            reading.restarts,
        )];
        for operator in self.operators.iter().filter(|operator| !operator.metrics.is_empty()) {
            let each = |(name, value): (&String, &f64)| format!("{name} {value}");
            let metrics: Vec<String> = operator.metrics.iter().map(each).collect();
            lines.push(format!("  {} counted: {}", operator.name, metrics.join(", ")));
        }
        if let Ok(Outcome::Stopped { is_last, has_savepoint: false, .. }) = self.outcome {
            lines.push(match (checkpoint, is_last) {
                (Some(id), true) => format!("run it again to resume from checkpoint {id}"),
                (Some(id), false) => format!(
                    "the last checkpoint failed: run it again to resume from checkpoint {id}"
                ),
                (None, _) => {
                    "no checkpoint completed; the next run starts from the beginning".to_owned()
                }
            });
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cofferdam_core::ids::CheckpointId;

    use super::*;

    fn failure(limit: Option<&'static str>) -> FailureFacts {
        FailureFacts {
            class: "trap",
            message: "one too many".to_owned(),
            backtrace: vec!["count::process".to_owned()],
            limit,
            os_error: None,
        }
    }

    #[test]
    fn a_restart_is_reported_with_its_reason_and_what_remains() {
        let restart = Restart {
            task: Some("count/1".to_owned()),
            failure: failure(None),
            delay_ms: 50,
            new_attempt: true,
            remaining_attempts: Some(2),
            restarting: BTreeMap::from([("count/1".to_owned(), "it failed".to_owned())]),
            tasks: 8,
        };
        let lines = log_lines(Progress::Restarting(restart.clone()), Mode::Log);
        let expected = [
            "count/1: trap: one too many",
            "  in count::process",
            "restarting 1 of 8 tasks in 50 ms, 2 more allowed",
        ];
        assert!(lines.iter().map(|(_, line)| line.as_str()).eq(expected), "{lines:?}");
        assert!(lines.iter().all(|(level, _)| *level == Level::WARN));

        let of_the_job = Restart {
            task: None,
            failure: failure(Some("limits.memory")),
            new_attempt: false,
            remaining_attempts: None,
            ..restart
        };
        let lines = restart_lines(of_the_job);
        assert_eq!(lines[0], "the job: trap: one too many (setting: limits.memory)");
        assert!(lines[2].ends_with("in 50 ms, counted together with the previous failure"));
    }

    #[test]
    fn a_checkpoint_is_a_line_of_the_log_but_not_above_a_line_that_shows_it_already() {
        let completed = Progress::CheckpointCompleted {
            checkpoint: 7,
            duration_ms: 1.25,
            pause_ms: 0.5,
            bytes: 2048,
            state_bytes: 4096,
            alignment_ms: 0.0,
            in_flight_bytes: 1024,
        };
        let expected =
            "checkpoint 7: 1.2 ms, alignment 0.0 ms, pause 0.50 ms, 2.00 KiB, 1.00 KiB in flight";
        for (mode, level) in [(Mode::Log, Level::INFO), (Mode::Live, Level::DEBUG)] {
            let lines = log_lines(completed.clone(), mode);
            assert_eq!(lines, [(level, expected.to_owned())], "{mode:?}");
        }
    }

    #[test]
    fn losses_are_upper_bounds_where_they_are_not_exact() {
        assert_eq!(loss_lines("a", "b", 0, 0, true), Vec::<String>::new());
        let lines = loss_lines("a", "b", 5, 3, false);
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("at most 3 records from a to b will be sent again"));
        assert!(lines[1].starts_with("at most 5 records from a to b are lost"));
        assert!(loss_lines("a", "b", 5, 0, true)[0].starts_with("5 records"));
    }

    #[test]
    fn every_event_but_the_failure_of_the_job_is_a_line() {
        // The summary has that one, with what to do next.
        let failed = Progress::Failed { task: None, failure: failure(None) };
        assert_eq!(log_lines(failed, Mode::Log), []);
        let letter = Progress::DeadLetter {
            task: "count/0".to_owned(),
            failure: failure(Some("limits.call")),
            traps: 3,
            isolation_us: 1_500,
        };
        assert_eq!(
            log_lines(letter, Mode::Log)[0].1,
            "count/0: a record went to the dead letters after 3 failures, found in 1.5 ms: trap: one too many \
             (setting: limits.call)"
        );
        let beginning = Progress::Started { attempt: 0, restored_from: None, tasks: 2 };
        assert_eq!(log_lines(beginning, Mode::Log)[0].1, "attempt 0: 2 tasks, from the beginning");
    }

    /// The reference has the event, and each of its fields.
    fn assert_documented(event: &Value) {
        let reference = include_str!("../../../docs/events.md");
        let name = event["event"].as_str().expect("a name");
        let (_, section) = reference.split_once(&format!("### `{name}`\n")).expect("a section");
        let section = section.split("\n##").next().unwrap_or_default();
        for field in event.as_object().expect("an object").keys() {
            assert!(field == "event" || section.contains(&format!("`{field}`")), "{name}: {field}");
        }
    }

    #[test]
    fn rates_are_those_of_the_time_between_two_readings() {
        let reading = |read, written| Reading {
            records_read: read,
            records_written: written,
            ..Reading::default()
        };
        let rates =
            Rates::between(&reading(100, 50), &reading(300, 40), Duration::from_millis(500));
        assert_eq!(rates, Rates { read: 400, written: 0 }, "a restart counts nothing back");
        let line = live_line("words", &reading(1_234_567, 0), Rates { read: 4_000, written: 2 });
        assert_eq!(
            line,
            "words | in 4,000/s, out 2/s | 1,234,567 read | checkpoint 0 | restarts 0"
        );
        let shown = figures(&reading(1, 2), rates, Duration::from_secs(1), &[]);
        assert_eq!(shown["event"], "progress");
        assert_documented(&shown);
        assert_eq!(
            (&shown["elapsed_ms"], &shown["records_read_per_second"]),
            (&json!(1000), &json!(400))
        );
    }

    #[test]
    fn a_summary_says_what_the_next_run_begins_from() {
        let stopped = |checkpoint: Option<u64>, is_last, has_savepoint| {
            let checkpoint = checkpoint.map(CheckpointId);
            Ok(Outcome::Stopped { checkpoint, is_last, has_savepoint })
        };
        let rows: [(Result<Outcome, Problem>, &str, Option<&str>); 5] = [
            (Ok(Outcome::Finished), "finished", None),
            (stopped(Some(3), true, false), "stopped", Some("resume from checkpoint 3")),
            (stopped(Some(3), false, false), "stopped", Some("the last checkpoint failed")),
            (stopped(None, false, false), "stopped", Some("starts from the beginning")),
            (stopped(Some(3), true, true), "stopped", None),
        ];
        for (outcome, word, next) in rows {
            let summary = Summary {
                job: "words",
                outcome: &outcome,
                took: Duration::from_millis(1_500),
                reading: Reading { records_lost: 4, ..Reading::default() },
                operators: Vec::new(),
            };
            let lines = summary.lines();
            let expected = format!(
                "words {word} after 1.50 s: 0 records read, 0 written, 0 checkpoints, 0 restarts, 4 records lost"
            );
            assert_eq!(lines[0], expected);
            assert_eq!(lines.len(), 1 + usize::from(next.is_some()), "{lines:?}");
            assert!(next.is_none_or(|next| lines[1].contains(next)), "{lines:?}");
            assert_eq!(summary.to_json()["outcome"], word);
            assert_documented(&summary.to_json());
        }
    }
}
