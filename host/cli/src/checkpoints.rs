//! `cofferdam checkpoints list | inspect | verify | delete`: looks into a state directory, a
//! savepoint or a place with objects that no job is using. `list` asks the job if one is.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use cofferdam_engine::{
    control::KeptCheckpoint,
    location::JobLocation,
    problem::{Code, Problem},
    socket::{Answer, Request, ask, other_answer},
    state_dir::{Ended, JobRecord, lock_existing},
};
use cofferdam_store::{
    OpenedStore, SnapshotStore, StorageError, inspect::TaskReport, metadata::CheckpointMetadata,
};
use serde_json::json;

use crate::{
    args::{CheckpointsVerb, JobArgument},
    control::location,
    report, with_runtime,
};

pub(crate) fn run(verb: &CheckpointsVerb, is_json: bool) -> Result<(), Problem> {
    match verb {
        CheckpointsVerb::List { job } => {
            // The store belongs to the run that uses it, so that is asked.
            if let Some(running) = with_runtime(kept_by_a_run(&location(job)?.state_dir))? {
                running.iter().for_each(|checkpoint| list(checkpoint, is_json));
                return Ok(());
            }
            let opened = Opened::new(job)?;
            opened.found.checkpoints.iter().for_each(|metadata| list(&metadata.into(), is_json));
            opened.warn();
            Ok(())
        }
        CheckpointsVerb::Inspect { job, id } => {
            let opened = Opened::new(job)?;
            let metadata = opened.metadata(*id)?;
            let tasks = opened
                .store
                .inspect(metadata.checkpoint)
                .map_err(|error| opened.damaged(metadata.checkpoint, &error))?;
            inspect(metadata, &tasks, is_json);
            Ok(())
        }
        CheckpointsVerb::Verify { job } => Opened::new(job)?.verify(is_json),
        CheckpointsVerb::Delete { job, id } => {
            let mut opened = Opened::new(job)?;
            let id = opened.metadata(Some(*id))?.checkpoint;
            let deleted = opened.store.delete(id).and_then(|()| opened.store.flush());
            deleted.map_err(|error| opened.damaged(id, &error))?;
            match is_json {
                true => report::line(&json!({ "deleted": id })),
                false => say!("deleted checkpoint {id}"),
            }
            Ok(())
        }
    }
}

/// The checkpoints of a running job; `None` where none runs.
async fn kept_by_a_run(state_dir: &Path) -> Result<Option<Vec<KeptCheckpoint>>, Problem> {
    match ask(state_dir, &Request::Checkpoints).await {
        Ok(Answer::Kept { checkpoints }) => Ok(Some(checkpoints)),
        Ok(_) => Err(other_answer()),
        Err(problem) if problem.code == Code::NotRunning => Ok(None),
        Err(problem) => Err(problem),
    }
}

pub(crate) struct Opened {
    pub(crate) dir: PathBuf,
    pub(crate) store: SnapshotStore,
    found: OpenedStore,
    /// Held as long as the store is open: a run must not begin meanwhile.
    _lock: Option<File>,
}

impl Opened {
    pub(crate) fn new(job: &JobArgument) -> Result<Self, Problem> {
        let JobLocation { state_dir, checkpoints: dir } = location(job)?;
        let lock = lock_existing(&state_dir)?;
        let opened = cofferdam_store::open_at(&dir).and_then(SnapshotStore::open_existing);
        let (store, found) = opened.map_err(|error| {
            if let Ok(Some(ended)) =
                JobRecord::read(&state_dir).map(|it| it.and_then(|it| it.ended))
            {
                return has_ended(&dir, &ended);
            }
            Problem::new(Code::StateUnusable, format!("{} cannot be read", dir.display()))
                .because(&error)
                .hint("name a state directory, a savepoint, or the manifest of a job that has run")
        })?;
        Ok(Self { dir, store, found, _lock: lock })
    }

    /// The checkpoint with this id, or the newest.
    pub(crate) fn metadata(&self, id: Option<u64>) -> Result<&CheckpointMetadata, Problem> {
        let mut checkpoints = self.found.checkpoints.iter();
        let found = match id {
            Some(id) => checkpoints.find(|found| found.checkpoint == id),
            None => checkpoints.next_back(),
        };
        found.ok_or_else(|| {
            let known: Vec<String> =
                self.found.checkpoints.iter().map(|found| found.checkpoint.to_string()).collect();
            let what =
                id.map_or_else(|| "no checkpoint".to_owned(), |id| format!("no checkpoint {id}"));
            Problem::new(Code::BadValue, format!("there is {what} in {}", self.dir.display()))
                .hint(format!("there are: {}", known.join(", ")))
        })
    }

    fn damaged(&self, id: u64, error: &StorageError) -> Problem {
        let message = format!("checkpoint {id} in {} is damaged", self.dir.display());
        Problem::new(Code::StoreDamaged, message).because(error)
    }

    pub(crate) fn warn(&self) {
        for damage in &self.found.damaged {
            say_aside!("warning: {damage}");
        }
    }

    fn verify(&self, is_json: bool) -> Result<(), Problem> {
        let mut damages = self.found.damaged.clone();
        if let Err(error) = JobRecord::read(&self.dir) {
            damages.push(format!("the record of the job, `JOB`: {error}"));
        }
        for metadata in &self.found.checkpoints {
            let id = metadata.checkpoint;
            let (mut bytes, mut bytes_of_components) = (0, 0);
            let mut read = (0..metadata.tasks.len()).map(|task| {
                let has_declared = metadata.tasks[task].identity.has_declared;
                match self.store.is_in_image(task, id)? {
                    // Without its components a checkpoint of memory alone is whole.
                    true if !has_declared => {}
                    true => bytes_of_components += self.store.component(task, id)?.len() as u64,
                    false => _ = self.store.check_declared(task, id)?,
                }
                self.store.load(task, id)
            });
            let whole = read.try_for_each(|loaded| loaded.map(|loaded| bytes += loaded.bytes));
            bytes += bytes_of_components;
            if let Err(error) = &whole {
                damages.push(format!("checkpoint {id}: {error}"));
            }
            match is_json {
                true => report::line(&json!({
                    "checkpoint": id,
                    "whole": whole.is_ok(),
                    "bytes_read": bytes,
                    "error": whole.err().map(|error| error.to_string()),
                })),
                false => match whole {
                    Ok(()) => say!("checkpoint {id}: whole, {} read", report::bytes(bytes)),
                    Err(error) => say!("checkpoint {id}: damaged: {error}"),
                },
            }
        }
        damages.extend(self.store.flaws());
        if damages.is_empty() {
            return Ok(());
        }
        let problem = Problem::new(
            Code::StoreDamaged,
            format!("{} is damaged in {} places", self.dir.display(), damages.len()),
        );
        Err(damages
            .iter()
            .fold(problem, Problem::detail)
            .hint(
                "a run resumes from the newest intact checkpoint, unless that would write committed output \
                 again",
            ))
    }
}

/// A job that is over keeps no checkpoints.
fn has_ended(dir: &Path, ended: &Ended) -> Problem {
    let no_more = format!("there are no checkpoints in {}", dir.display());
    match ended {
        Ended::Finished { .. } => {
            Problem::new(Code::AlreadyFinished, format!("the job has finished: {no_more}"))
        }
        Ended::Stopped { savepoint, .. } => {
            let message = format!("the job was stopped with a savepoint: {no_more}");
            let problem = Problem::new(Code::AlreadyFinished, message);
            match savepoint {
                Some(savepoint) => problem.detail(savepoint.display()),
                None => problem,
            }
        }
    }
}

fn age(written_at_ms: u64) -> String {
    let written = UNIX_EPOCH + Duration::from_millis(written_at_ms);
    match written.elapsed() {
        Ok(age) if written_at_ms != 0 => format!("{} ago", indicatif::HumanDuration(age)),
        _ => "at an unknown time".to_owned(),
    }
}

fn list(kept: &KeptCheckpoint, is_json: bool) {
    let KeptCheckpoint { checkpoint, job, tasks, written_at_ms } = kept;
    match is_json {
        true => report::line(&json!({
            "checkpoint": checkpoint,
            "job": job,
            "tasks": tasks,
            "written_at_ms": written_at_ms,
        })),
        false => {
            say!("checkpoint {checkpoint} of \"{job}\": {tasks} tasks, {}", age(*written_at_ms))
        }
    }
}

/// What `inspect` shows of each task.
const COLUMNS: [&str; 10] = [
    "task",
    "memory",
    "entries",
    "written",
    "chain",
    "start delay",
    "alignment",
    "sync",
    "async",
    "in flight",
];

fn inspect(metadata: &CheckpointMetadata, tasks: &[TaskReport], is_json: bool) {
    if is_json {
        let rows: Vec<_> = tasks
            .iter()
            .map(|task| {
                json!({
                    "task": task.name,
                    "snapshots": task.snapshots,
                    "memory_bytes": task.memory_bytes,
                    "stored_pages": task.stored_pages,
                    "increment_pages": task.increment_pages,
                    "declared_entries": task.declared_entries,
                    "declared_in_image": task.is_in_image,
                    "state_bytes": task.state_bytes,
                    "drained": task.is_drained,
                    "incremental_bytes": task.stats.bytes,
                    "sync_us": task.stats.sync_us,
                    "async_us": task.stats.async_us,
                    "start_delay_us": task.stats.start_delay_us,
                    "alignment_us": task.stats.alignment_us,
                    "in_flight_bytes": task.stats.in_flight_bytes,
                    "unaligned": task.stats.is_unaligned,
                })
            })
            .collect();
        return report::line(&json!({
            "checkpoint": metadata.checkpoint,
            "job": metadata.job,
            "written_at_ms": metadata.written_at_ms,
            "tasks": rows,
        }));
    }
    list(&metadata.into(), false);
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    for task in tasks {
        let stats = &task.stats;
        rows.push([
            task.name.clone(),
            report::bytes(task.memory_bytes),
            match task.declared_entries {
                Some(entries) => entries.to_string(),
                None if task.is_in_image => "in memory".to_owned(),
                None => "-".to_owned(),
            },
            report::bytes(stats.bytes),
            task.snapshots.to_string(),
            report::micros(stats.start_delay_us),
            report::micros(stats.alignment_us),
            report::micros(stats.sync_us),
            report::micros(stats.async_us),
            report::bytes(stats.in_flight_bytes),
        ]);
    }
    aligned(&rows).iter().for_each(|line| say!("{line}"));
}

/// Rows as lines with their columns below each other: the first to the left, the others to the right.
fn aligned(rows: &[[String; COLUMNS.len()]]) -> Vec<String> {
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; COLUMNS.len()] = std::array::from_fn(width);
    let line = |row: &[String; COLUMNS.len()]| {
        let mut line = format!("  {:<width$}", row[0], width = widths[0]);
        for (cell, width) in row.iter().zip(widths).skip(1) {
            line.push_str(&format!("  {cell:>width$}"));
        }
        line
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_lie_below_each_other_whatever_is_in_them() {
        let mut rows = vec![COLUMNS.map(str::to_owned); 2];
        rows[1] = std::array::from_fn(|column| match column {
            0 => "a-long-name/11".to_owned(),
            1 => "1.00 GiB".to_owned(),
            _ => "1 \u{b5}s".to_owned(),
        });
        let lines = aligned(&rows);
        let ends: Vec<usize> = lines.iter().map(|line| line.chars().count()).collect();
        assert_eq!(ends[0], ends[1], "{lines:?}");
        assert!(lines[0].starts_with("  task            "), "{lines:?}");
        assert!(lines[1].starts_with("  a-long-name/11  1.00 GiB  "), "{lines:?}");
    }

    #[test]
    fn an_age_is_unknown_where_the_clock_cannot_be_right() {
        assert_eq!(age(0), "at an unknown time");
        assert_eq!(age(u64::MAX / 4), "at an unknown time", "that is to come");
        assert_eq!(age(1_000), format!("{} ago", indicatif::HumanDuration(since_1970())));
    }

    fn since_1970() -> Duration {
        UNIX_EPOCH.elapsed().expect("after 1970")
    }

    #[test]
    fn a_job_that_has_ended_says_what_it_left() {
        let savepoint = Some(PathBuf::from("saved/savepoint-job-1"));
        let stopped = has_ended(Path::new("state"), &Ended::Stopped { at_ms: 1, savepoint });
        assert_eq!(stopped.code, Code::AlreadyFinished);
        assert_eq!(stopped.all_details(), ["saved/savepoint-job-1"]);
        let finished = Ended::Finished { at_ms: 1, digest: String::new() };
        assert!(
            has_ended(Path::new("state"), &finished).message.contains("no checkpoints in state")
        );
    }
}
