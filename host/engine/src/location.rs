//! Where a job keeps things, found from outside: by its manifest, its state directory, a savepoint or a URL.

use std::path::{Path, PathBuf};

use cofferdam_settings::{Code, Problem};
use cofferdam_spec::StorageSpec;
use cofferdam_store::is_url;

/// Where a job keeps things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobLocation {
    /// Its lock, its socket, its history.
    pub state_dir: PathBuf,
    /// Its checkpoints: that directory, another one, or a URL.
    pub checkpoints: PathBuf,
}

impl JobLocation {
    /// The location of what a user names: the manifest of a job, its state directory, a savepoint, or the URL of
    /// its checkpoints. `state_dir` takes the place of the state directory that follows from it. `storage` reads
    /// the manifest, and is called only where one is named.
    ///
    /// # Errors
    /// Those of reading the manifest; `C0026` where it keeps its checkpoints in memory, so that nothing of it can
    /// be found.
    pub fn find(
        job: &Path,
        state_dir: Option<&Path>,
        storage: impl FnOnce() -> Result<StorageSpec, Problem>,
    ) -> Result<Self, Problem> {
        let both = |dir: &Path| Self { state_dir: dir.to_owned(), checkpoints: dir.to_owned() };
        if job.is_dir() || is_url(job) {
            return Ok(both(state_dir.unwrap_or(job)));
        }
        if let (Some(dir), false) = (state_dir, job.is_file()) {
            return Ok(both(dir));
        }
        let storage = storage()?;
        let state_dir = state_dir.or_else(|| storage.state_dir());
        let checkpoints = match &storage {
            StorageSpec::Objects { location, .. } => Some(Path::new(location)),
            StorageSpec::Sled(_) | StorageSpec::Memory => state_dir,
        };
        match (state_dir, checkpoints) {
            (Some(state_dir), Some(checkpoints)) => {
                Ok(Self { state_dir: state_dir.to_owned(), checkpoints: checkpoints.to_owned() })
            }
            _ => {
                let message = format!("{} keeps its state in memory", job.display());
                Err(Problem::new(Code::NotRunning, message).hint(
                    "only a job with a state directory accepts commands: set storage = \"sled\"",
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_found_by_whatever_names_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let (state, manifest) = (dir.path().join("state"), dir.path().join("job.toml"));
        std::fs::create_dir(&state).expect("made");
        std::fs::write(&manifest, "").expect("written");
        let other = Path::new("other");
        let objects =
            StorageSpec::Objects { location: "s3://b/j".into(), state_dir: "here".into() };
        let sled = StorageSpec::Sled("job.cofferdam".into());
        let gone = dir.path().join("gone.toml");
        let s3 = Path::new("s3://b/j");
        let beside = Path::new("job.cofferdam");
        let here = Path::new("here");
        // What is named, and what the manifest says; the state directory and the checkpoints, and those with
        // `--state-dir other`.
        let rows = [
            (&*state, None, [&*state, &state], [other, other]),
            (s3, None, [s3, s3], [other, other]),
            (&manifest, Some(sled), [beside, beside], [other, other]),
            (&manifest, Some(objects), [here, s3], [other, s3]),
        ];
        let both = rows.into_iter().flat_map(|(job, storage, plain, with)| {
            [(job, storage.clone(), None, plain), (job, storage, Some(other), with)]
        });
        let gone = (&*gone, None, Some(other), [other, other]);
        for (job, storage, state_dir, [expected_state, expected_checkpoints]) in both.chain([gone])
        {
            let read = || storage.clone().ok_or_else(|| panic!("{} is no manifest", job.display()));
            let found = JobLocation::find(job, state_dir, read).expect("found");
            let expected = JobLocation {
                state_dir: expected_state.to_owned(),
                checkpoints: expected_checkpoints.to_owned(),
            };
            assert_eq!(found, expected, "{} {state_dir:?} {storage:?}", job.display());
        }
        let problem = JobLocation::find(&manifest, None, || Ok(StorageSpec::Memory));
        assert_eq!(problem.expect_err("in memory").code, Code::NotRunning);
    }
}
