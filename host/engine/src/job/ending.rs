//! How a job ends: what its state directory records, what its user is to do.

use std::{
    io,
    path::{Path, PathBuf},
};

use cofferdam_core::{
    checkpoint::retention::Retention,
    failure::{FailureCause, Obstacle},
    graph::JobGraph,
    ids::{CheckpointId, TaskId},
    job::Outcome,
};
use cofferdam_settings::Problem;
use cofferdam_store::SnapshotStore;

use super::files::remove_claimed;
use crate::{
    clock::now_ms,
    job::state_dir::{Ended, JobRecord},
    watch::progress::{Observer, Progress},
};

/// What a run leaves behind, and what it removes.
pub(super) struct Ending<'a> {
    pub(super) state_dir: Option<&'a Path>,
    pub(super) digest: &'a str,
    /// What it began from and owns.
    pub(super) claimed: Option<&'a Path>,
    pub(super) retention: Retention,
    pub(super) resumed_from: Option<CheckpointId>,
    pub(super) observer: &'a dyn Observer,
}

impl Ending<'_> {
    fn warn(&self, message: String) {
        self.observer.observe(Progress::Warning { message });
    }

    /// Records how the job has ended, and removes what is not kept. Whether its checkpoints are kept.
    pub(super) fn record(
        &self,
        outcome: &Outcome,
        store: Option<SnapshotStore>,
        savepoint: Option<PathBuf>,
    ) -> bool {
        let noted =
            self.state_dir.map_or(Ok(()), |dir| note_end(dir, outcome, self.digest, savepoint));
        if let Err(error) = &noted {
            // Without its last checkpoint the next run would start from the beginning.
            self.warn(format!(
                "the end of the job could not be recorded: {error}; its last checkpoint is kept, and the next \
                 run resumes from it"
            ));
        }
        let is_untouched = outcome.is_untouched(self.resumed_from);
        let remains = self.retention.remains(outcome.end(), noted.is_ok(), is_untouched);
        if let Some(claimed) = self.claimed.filter(|_| !remains.has_claimed)
            && let Err(error) = remove_claimed(claimed)
        {
            self.warn(format!("cannot remove {}, which was claimed: {error}", claimed.display()));
        }
        if let (false, Some(store)) = (remains.has_checkpoints, store)
            && let Err(error) = store.clear()
        {
            self.warn(format!("cannot remove the state of the job: {error}"));
        }
        remains.has_checkpoints
    }
}

/// What the user of a job that has failed can do.
pub(super) fn next_step(
    cause: &FailureCause,
    checkpoint: Option<CheckpointId>,
    is_kept: bool,
    retention: Retention,
) -> String {
    let first = match cause {
        FailureCause::Permanent { obstacle, .. } => remedy(*obstacle),
        FailureCause::LimitExceeded { limit, .. } => remedy(Obstacle::Limit(*limit)),
        _ => String::new(),
    };
    match checkpoint {
        Some(id) if is_kept && !first.is_empty() => {
            format!("{first}; then run it again to resume from checkpoint {id}")
        }
        None if !first.is_empty() => format!("{first}; then run it again"),
        Some(id) if is_kept => format!("run it again to resume from checkpoint {id}"),
        Some(_) => format!(
            "its checkpoints were removed because externalized-checkpoint-retention = \"{}\"; \
             RETAIN_ON_CANCELLATION keeps them",
            retention.name()
        ),
        None => "no checkpoint completed; the next run starts from the beginning".to_owned(),
    }
}

/// What helps before a job is run again; to run it again alone does not.
fn remedy(obstacle: Obstacle) -> String {
    let remedy = match obstacle {
        Obstacle::InputChanged => "put the files back as they were",
        Obstacle::BadRecord => "correct the record, or set on-bad-record to skip or dead-letter",
        Obstacle::OpenRefused => "correct the operator's config",
        Obstacle::ForeignKey => "correct the operator",
        Obstacle::OutputTaken => "put the part back, or use an older checkpoint or savepoint",
        Obstacle::StateMismatch => "put back what was changed",
        Obstacle::StoreDamaged => "restore the state directory from a copy",
        // What is there is read again.
        Obstacle::StoreInDoubt { .. } => "",
        Obstacle::Limit(limit) => {
            return match limit.setting() {
                Some(setting) => format!("raise {setting}, or reduce what the operator uses"),
                None => "reduce what the operator uses".to_owned(),
            };
        }
    };
    remedy.to_owned()
}

/// Writes down how a job has ended, before its state is removed: it must not begin by itself again.
pub(super) fn note_end(
    dir: &Path,
    outcome: &Outcome,
    digest: &str,
    savepoint: Option<PathBuf>,
) -> io::Result<()> {
    let at_ms = now_ms();
    let ended = match outcome {
        Outcome::Finished => Ended::Finished { at_ms, digest: digest.to_owned() },
        Outcome::Stopped { has_savepoint: true, .. } => Ended::Stopped { at_ms, savepoint },
        _ => return Ok(()),
    };
    let Some(mut record) = JobRecord::read(dir)? else { return Ok(()) };
    record.ended = Some(ended);
    record.write(dir)
}

pub(super) fn failure(graph: &JobGraph, task: Option<TaskId>, cause: &FailureCause) -> Problem {
    let who =
        task.map_or_else(|| "the job".to_owned(), |task| format!("task {}", graph.task_name(task)));
    let problem = Problem::new(cause.into(), format!("{who} {cause}"));
    let problem = problem.with_os_error(cause.os_error());
    cause.backtrace().iter().fold(problem, |problem, frame| problem.detail(format!("in {frame}")))
}
