//! What a job would open, compared with what the host grants.

use std::path::Path;

use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{JobSpec, NodeKind, StorageSpec, grants::HostGrants};

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
    problems.extend(state_problems(spec, grants));
    Problem::all(problems).map_or(Ok(()), Err)
}

/// The job's own directories and buckets.
fn state_problems(spec: &JobSpec, grants: &HostGrants) -> Vec<Problem> {
    let mut places: Vec<(&str, &Path)> = Vec::new();
    match &spec.storage {
        StorageSpec::Sled(dir) => places.push(("the job keeps its state in", dir)),
        StorageSpec::Objects { location, state_dir } => {
            places.push(("the job keeps its checkpoints in", Path::new(location)));
            places.push(("the job keeps its state in", state_dir));
        }
        StorageSpec::Memory => {}
    }
    places.extend(spec.savepoint_dir.iter().map(|dir| ("savepoints go to", dir.as_path())));
    let is_granted = |path: &Path| match path.to_str().filter(|text| text.contains("://")) {
        Some(address) => grants.may_use(address),
        // Where nothing else is said, the state lies beside the manifest.
        None => grants.files.may_write(path) || is_beside(&spec.base_dir, path),
    };
    let refused = |(what, path): (&str, &Path)| refused(what, path, "write");
    places.into_iter().filter(|(_, path)| !is_granted(path)).map(refused).collect()
}

/// Whether a path leads to something in a directory, or below it.
fn is_beside(dir: &Path, path: &Path) -> bool {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    cofferdam_files::resolved(path).starts_with(cofferdam_files::resolved(dir))
}

fn refused(what: &str, path: &Path, list: &str) -> Problem {
    Problem::new(Code::NotGranted, format!("{what} a place that the host does not grant"))
        .detail(path.display())
        .hint(format!("whoever runs the host can add it to `grants.default.{list}` in its file"))
}
