//! `cofferdam savepoint | stop | cancel`: asks a running job, and says what came of it.

use std::{
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use cofferdam_connectors::builtin;
use cofferdam_engine::{
    job::check_places,
    location::JobLocation,
    problem::{Code, Problem},
    socket::{Answer, Request, ask, other_answer},
};
use cofferdam_spec::JobSpec;
use cofferdam_store::is_url;
use indicatif::HumanDuration;
use serde_json::json;

use crate::{
    args::{CancelArguments, JobArgument, SavepointArguments, StopArguments},
    report,
};

/// Where the job keeps things that is named by its manifest, its state directory or where its checkpoints are.
pub(crate) fn location(job: &JobArgument) -> Result<JobLocation, Problem> {
    JobLocation::find(&job.job, job.state_dir.as_deref(), || {
        let spec = JobSpec::read_with(&job.job, job.host.read()?.as_ref(), &builtin())?;
        check_places(&spec)?;
        Ok(spec.storage)
    })
}

/// The state directory of a job.
pub(crate) fn state_dir(job: &JobArgument) -> Result<PathBuf, Problem> {
    Ok(location(job)?.state_dir)
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

/// What has failed, and what was done about it.
pub(crate) fn history(job: &JobArgument, is_json: bool) -> Result<(), Problem> {
    let dir = state_dir(job)?;
    let entries = cofferdam_engine::history::read(&dir).map_err(|error| {
        Problem::new(Code::StateUnusable, format!("{} cannot be read", dir.display()))
            .because(&error)
    })?;
    if entries.is_empty() && !is_json {
        say!("nothing has failed");
    }
    for entry in entries {
        if is_json {
            let line = serde_json::to_value(&entry);
            report::line(&line.map_err(|error| Problem::new(Code::HostBug, error.to_string()))?);
            continue;
        }
        let text = |key: &str| entry.event[key].as_str().unwrap_or_default();
        let task = entry.event["task"].as_str().unwrap_or("the job");
        let at = UNIX_EPOCH + Duration::from_millis(entry.at_ms);
        let ago = at.elapsed().map_or(String::new(), |ago| format!("{} ago", HumanDuration(ago)));
        match text("event") {
            "restarting" => {
                let count = entry.event["restarting"].as_object().map_or(0, serde_json::Map::len);
                say!("{ago}: {task}: {}: {}", text("class"), text("message"));
                say!(
                    "    restarted {count} of {} tasks after {} ms",
                    entry.event["tasks"],
                    entry.event["delay_ms"]
                );
            }
            "dead-letter" => {
                say!("{ago}: {task}: {}: {}", text("class"), text("message"));
                say!(
                    "    its record went to the dead letters after {} failures",
                    entry.event["traps"]
                );
            }
            "records-lost" => {
                let number = |key: &str| entry.event[key].as_u64().unwrap_or(0);
                say!(
                    "{ago}: {} records from {} to {} lost, {} of earlier losses regained",
                    number("lost"),
                    text("from"),
                    text("to"),
                    number("regained")
                );
            }
            "failed" => {
                say!("{ago}: {task}: {}: {}", text("class"), text("message"));
                say!("    the job failed");
            }
            _ => say!("{ago}: checkpoint {}: {}", entry.event["checkpoint"], text("reason")),
        }
        for frame in entry.event["backtrace"].as_array().into_iter().flatten() {
            say!("      in {}", frame.as_str().unwrap_or_default());
        }
    }
    Ok(())
}

/// The job may run in another directory.
fn absolute(path: &Path) -> Result<PathBuf, Problem> {
    if let Some(path) = path.to_str().and_then(|path| path.strip_prefix("file://")) {
        return absolute(Path::new(path));
    }
    if is_url(path) {
        return Ok(path.to_owned());
    }
    std::path::absolute(path).map_err(|error| {
        Problem::new(Code::BadValue, format!("{} is not a path", path.display())).because(&error)
    })
}

fn say(answer: Answer, what: &str, is_json: bool) -> Result<(), Problem> {
    match answer {
        Answer::Saved { savepoint, checkpoint } if is_json => {
            report::line(&json!({ "savepoint": savepoint, "checkpoint": checkpoint }));
        }
        Answer::Saved { savepoint, checkpoint } => {
            say!("{what} {checkpoint}: {}", savepoint.display());
        }
        Answer::Accepted { accepted } if is_json => report::line(&json!({ "accepted": accepted })),
        Answer::Accepted { .. } => say!("{what}"),
        Answer::Kept { .. } => return Err(other_answer()),
        Answer::Refused { error, os_error } => {
            return Err(Problem::new(Code::RequestRefused, error)
                .with_os_error(os_error)
                .hint("see the log of the job"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_means_the_same_in_the_directory_of_the_job() {
        let here = std::env::current_dir().expect("a directory");
        for (given, expected) in [
            ("saved", here.join("saved")),
            ("/srv/saved", PathBuf::from("/srv/saved")),
            ("file:///srv/saved", PathBuf::from("/srv/saved")),
            ("s3://bucket/saved", PathBuf::from("s3://bucket/saved")),
        ] {
            assert_eq!(absolute(Path::new(given)).expect(given), expected);
        }
        assert_eq!(absolute(Path::new("")).expect_err("no path").code, Code::BadValue);
    }

    #[test]
    fn an_answer_that_refuses_is_an_error_with_what_the_system_says() {
        let refused = Answer::Refused { error: "no".to_owned(), os_error: Some(28) };
        let problem = say(refused, "savepoint", true).expect_err("it was refused");
        assert_eq!(problem.code, Code::RequestRefused);
        assert!(problem.advice().expect("some").contains("make room"), "{problem}");
    }
}
