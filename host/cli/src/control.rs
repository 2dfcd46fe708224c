//! `cofferdam savepoint | stop | cancel`: asks a running job, and says what came of it.

use std::path::{Path, PathBuf};

use cofferdam_engine::{
    problem::{Code, Problem},
    spec::{JobSpec, StorageSpec},
};
use serde_json::json;

use crate::{
    args::{CancelArguments, JobArgument, SavepointArguments, StopArguments},
    report,
    socket::{Answer, Request, ask},
};

/// The state directory of a job that is named by its manifest or by that directory.
pub(crate) fn state_dir(job: &JobArgument) -> Result<PathBuf, Problem> {
    if let Some(dir) = &job.state_dir {
        return Ok(dir.clone());
    }
    if job.job.is_dir() {
        return Ok(job.job.clone());
    }
    match JobSpec::read(&job.job)?.storage {
        StorageSpec::Sled(dir) => Ok(dir),
        StorageSpec::Memory => Err(Problem::new(
            Code::NotRunning,
            format!("{} keeps its state in memory", job.job.display()),
        )
        .hint("only a job with a state directory can be talked to: set storage = \"sled\"")),
    }
}

pub(crate) async fn savepoint(
    arguments: &SavepointArguments,
    is_json: bool,
) -> Result<(), Problem> {
    let target = arguments.target.as_deref().map(absolute).transpose()?;
    let request = Request::Savepoint { target };
    say(ask(&state_dir(&arguments.job)?, &request).await?, "savepoint", is_json)
}

pub(crate) async fn stop(arguments: &StopArguments, is_json: bool) -> Result<(), Problem> {
    let target = arguments.savepoint_path.as_deref().map(absolute).transpose()?;
    let request = Request::Stop { target, drain: arguments.drain };
    say(ask(&state_dir(&arguments.job)?, &request).await?, "stopped with savepoint", is_json)
}

pub(crate) async fn cancel(arguments: &CancelArguments, is_json: bool) -> Result<(), Problem> {
    say(ask(&state_dir(&arguments.job)?, &Request::Cancel).await?, "cancelling", is_json)
}

/// The job may run in another directory.
fn absolute(path: &Path) -> Result<PathBuf, Problem> {
    std::path::absolute(path).map_err(|error| {
        Problem::new(Code::BadValue, format!("{} is not a path", path.display())).detail(error)
    })
}

fn say(answer: Answer, what: &str, is_json: bool) -> Result<(), Problem> {
    match answer {
        Answer::Saved { savepoint, checkpoint } if is_json => {
            report::line(&json!({ "savepoint": savepoint, "checkpoint": checkpoint }));
        }
        Answer::Saved { savepoint, checkpoint } => {
            println!("{what} {checkpoint}: {}", savepoint.display());
        }
        Answer::Accepted { accepted } if is_json => report::line(&json!({ "accepted": accepted })),
        Answer::Accepted { .. } => println!("{what}"),
        Answer::Refused { error } => {
            return Err(Problem::new(Code::RequestRefused, format!("the job says no: {error}"))
                .hint("its own log says more"));
        }
    }
    Ok(())
}
