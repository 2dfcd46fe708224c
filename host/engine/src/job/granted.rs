//! What a job would open, compared with what the host grants.

use std::path::Path;

use cofferdam_files::link_below;
use cofferdam_sandbox::{Component, Need};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{JobSpec, NodeKind, OperatorSpec, StorageSpec, grants::HostGrants};

/// Refuses what the host does not grant: nothing of it was opened yet.
///
/// # Errors
/// All that is not granted: the first problem, with the others behind it.
pub(super) fn check_granted(spec: &JobSpec) -> Result<(), Problem> {
    let Some(grants) = &spec.grants else { return Ok(()) };
    let mut problems = Vec::new();
    for node in &spec.nodes {
        let name = &node.name;
        match &node.kind {
            NodeKind::Source(source) => {
                for path in source.reads(&spec.base_dir) {
                    if !grants.files.may_read(&path) {
                        problems.push(refused(&format!("source \"{name}\" reads"), &path, "read"));
                    }
                }
            }
            NodeKind::Operator(operator) => {
                // What lies beside the manifest is as much the tenant's as the manifest.
                let path = &operator.component;
                if !grants.files.may_read(path) && !is_beside(&spec.base_dir, path) {
                    let what = format!("operator \"{name}\" loads its component from");
                    problems.push(refused(&what, path, "read"));
                }
                for (_, path) in &operator.read {
                    if !grants.files.may_lend(path) {
                        let what = format!("operator \"{name}\" is to read");
                        problems.push(refused(&what, path, "read"));
                    }
                }
            }
            NodeKind::Sink(sink) => {
                if let Some(path) = sink.directory()
                    && !grants.files.may_write(path)
                {
                    problems.push(refused(&format!("sink \"{name}\" writes to"), path, "write"));
                }
            }
        }
    }
    problems.extend(check_places(spec).err());
    problems.extend(savepoint_problem(spec, grants));
    Problem::all(problems).map_or(Ok(()), Err)
}

/// Refuses a component that imports what the manifest does not ask for, and what an operator could not be given.
///
/// # Errors
/// The first such import, or what is not there.
pub(super) fn check_reach(
    name: &str,
    operator: &OperatorSpec,
    component: &Component,
) -> Result<(), Problem> {
    for (need, import) in component.needs() {
        let (is_met, hint) = match need {
            Need::Files => (
                !operator.directories().is_empty(),
                "give it directories to read, grants = { read = [\"DIR\"] }, or one of its own, grants = { scratch = \"100 MiB\" }; \
                 or build it without files",
            ),
            Need::Secrets => (
                !operator.secrets.is_empty(),
                "name the secrets that it may have: grants = { secrets = [\"NAME\"] }",
            ),
        };
        if !is_met {
            let message =
                format!("the component of operator \"{name}\" imports what it is not granted");
            return Err(Problem::new(Code::NotGranted, message).detail(import).hint(hint));
        }
    }
    let cannot = |what: String| {
        let message = format!("operator \"{name}\" cannot be given what it asks for");
        Problem::new(Code::NotGranted, message).detail(what)
    };
    for (_, path) in &operator.read {
        if !path.is_dir() {
            let problem = cannot(format!("grants.read: {} is no directory", path.display()));
            return Err(problem.hint("name a directory, and not a file in it"));
        }
    }
    for variable in &operator.env {
        if std::env::var(variable).is_err() {
            let problem = cannot(format!("grants.env: {variable} is not set, or is no text"));
            return Err(problem.hint("set it in the environment of the host"));
        }
    }
    for (secret, source) in &operator.secrets {
        if let Err(error) = source.read() {
            let problem = cannot(format!("grants.secrets: {secret}: {error}"));
            return Err(problem.hint(
                "the operator of the host names its place in the table `secrets` of its file",
            ));
        }
    }
    Ok(())
}

/// Refuses a state, or checkpoints, at a place that the host does not grant: of another job, it may be.
///
/// # Errors
/// The first such place.
pub fn check_places(spec: &JobSpec) -> Result<(), Problem> {
    let Some(grants) = &spec.grants else { return Ok(()) };
    let (state_dir, location) = match &spec.storage {
        StorageSpec::Sled(dir) => (dir, None),
        StorageSpec::Objects { location, state_dir } => (state_dir, Some(location)),
        StorageSpec::Memory => return Ok(()),
    };
    if let Some(location) = location.filter(|location| !grants.may_write(Path::new(location))) {
        return Err(refused("the job keeps its checkpoints in", Path::new(location), "write"));
    }
    // Where nothing else is said, the state lies beside the manifest under the job's name.
    let own = spec.base_dir.join(format!("{}.cofferdam", spec.name));
    let is_own = *state_dir == own && is_beside(&spec.base_dir, state_dir);
    if !is_own && !grants.may_write(state_dir) {
        return Err(refused("the job keeps its state in", state_dir, "write"));
    }
    match link_below(state_dir) {
        Some(link) => Err(refused("the job's state has a link to", &link, "write")),
        None => Ok(()),
    }
}

fn savepoint_problem(spec: &JobSpec, grants: &HostGrants) -> Option<Problem> {
    let dir = spec.savepoint_dir.as_ref().filter(|dir| !grants.may_write(dir))?;
    Some(refused("savepoints go to", dir, "write"))
}

/// Whether a path leads to something in a directory, or below it.
fn is_beside(dir: &Path, path: &Path) -> bool {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    cofferdam_files::resolved(path).starts_with(cofferdam_files::resolved(dir))
}

fn refused(what: &str, path: &Path, list: &str) -> Problem {
    Problem::new(Code::NotGranted, format!("{what} a place that the host does not grant"))
        .detail(path.display())
        .hint(format!("the operator of the host can add it to `grants.default.{list}` in its file"))
}
