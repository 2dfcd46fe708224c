//! How a job ends: what its state directory records, what its user is to do.

use std::{
    io,
    path::{Path, PathBuf},
};

use cofferdam_core::{
    checkpoint::retention::End,
    failure::{FailureCause, Obstacle},
    graph::JobGraph,
    ids::TaskId,
    job::Outcome,
};
use cofferdam_settings::Problem;

use crate::{
    clock::now_ms,
    job::state_dir::{Ended, JobRecord},
};

/// What helps before a job is run again; to run it again alone does not.
pub(super) fn remedy(obstacle: Obstacle) -> &'static str {
    match obstacle {
        Obstacle::InputChanged => "put the files back as they were",
        Obstacle::BadRecord => {
            "correct the record, or choose what becomes of such ones with on-bad-record"
        }
        Obstacle::OpenRefused => "correct the operator's config",
        Obstacle::ForeignKey => "correct the operator",
        Obstacle::OutputTaken => "put the part back, or use an older checkpoint or savepoint",
        Obstacle::StateMismatch => "put back what was changed",
        Obstacle::StoreDamaged => "restore the state directory from a copy",
        // What is there is read again.
        Obstacle::StoreInDoubt => "",
    }
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

/// Flink's terminal status; none for a job that was only interrupted and resumes by itself.
pub(super) fn end_of(outcome: &Outcome) -> Option<End> {
    match outcome {
        Outcome::Finished | Outcome::Stopped { has_savepoint: true, .. } => Some(End::Finished),
        Outcome::Stopped { has_savepoint: false, .. } => None,
        Outcome::Canceled { .. } => Some(End::Canceled),
        Outcome::Failed { .. } => Some(End::Failed),
    }
}

pub(super) fn failure(graph: &JobGraph, task: Option<TaskId>, cause: &FailureCause) -> Problem {
    let who = task.map_or("the job".to_owned(), |task| format!("task {}", graph.task_name(task)));
    let problem = Problem::new(cause.into(), format!("{who} {cause}"));
    match cause {
        FailureCause::Trap { backtrace, .. } => {
            backtrace.iter().fold(problem, |problem, frame| problem.detail(format!("in {frame}")))
        }
        _ => problem,
    }
}
