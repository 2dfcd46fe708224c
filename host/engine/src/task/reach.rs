//! What a task's guest is given beside its sandbox, made anew for each attempt.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use cofferdam_core::failure::{EnvironmentError, FailureCause};
use cofferdam_files::{FOR_OWNER, Grants, make_dir};
use cofferdam_sandbox::Capabilities;
use cofferdam_spec::OperatorSpec;
use tempfile::TempDir;

/// In the state directory: the scratch directories of all attempts.
const SCRATCH: &str = "scratch";

/// What the name of each begins with.
const PREFIX: &str = "cofferdam-scratch-";

/// From where the tasks of a job are given things.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    files: Grants,
    /// Holds the scratch directories; `None`: that of the system for temporary files does.
    scratch: Option<PathBuf>,
}

impl Reach {
    /// Those of a job. The scratch directories that earlier runs have left are removed.
    pub(crate) fn new(files: Grants, state_dir: Option<&Path>) -> Self {
        let scratch = state_dir.map(|dir| dir.join(SCRATCH));
        let entries = scratch.as_deref().and_then(|dir| fs::read_dir(dir).ok());
        for entry in entries.into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(PREFIX)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                let path = entry.path();
                tracing::warn!(path = %path.display(), %error, "remove what an earlier run has left");
            }
        }
        Self { files, scratch }
    }

    /// What an attempt of a task is given, and what removes its scratch directory.
    ///
    /// # Errors
    /// Where something is not there, or there no more.
    pub(crate) fn capabilities(
        &self,
        spec: &OperatorSpec,
    ) -> Result<(Capabilities, Option<TempDir>), FailureCause> {
        let cannot = |what: String, error: io::Error| {
            let error = EnvironmentError::of(format!("give the operator {what}"), error);
            FailureCause::Environment(error)
        };
        let mut capabilities = Capabilities::default();
        for (name, path) in &spec.read {
            let dir = self.files.lend(path).map_err(|error| cannot(name.clone(), error))?;
            capabilities.read.push((name.clone(), dir));
        }
        for variable in &spec.env {
            let missing =
                |_| cannot(variable.clone(), io::Error::other("it is not set, or is no text"));
            let value = std::env::var(variable).map_err(missing)?;
            capabilities.env.push((variable.clone(), value));
        }
        for (name, source) in &spec.secrets {
            let secret = source.read().map_err(|error| cannot(format!("secret {name}"), error))?;
            capabilities.secrets.push((name.clone(), secret));
        }
        let scratch = match spec.scratch_bytes {
            0 => None,
            bytes_max => {
                let made = self.make_scratch().and_then(|dir| Ok((File::open(dir.path())?, dir)));
                let (open, dir) =
                    made.map_err(|error| cannot("a scratch directory".to_owned(), error))?;
                capabilities.scratch = Some((open, bytes_max));
                Some(dir)
            }
        };
        Ok((capabilities, scratch))
    }

    /// Whether an operator is given anything.
    pub(crate) fn is_wanted(spec: &OperatorSpec) -> bool {
        let has_scratch = 0 < spec.scratch_bytes;
        has_scratch || !(spec.read.is_empty() && spec.env.is_empty() && spec.secrets.is_empty())
    }

    fn make_scratch(&self) -> io::Result<TempDir> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX);
        match &self.scratch {
            Some(dir) => {
                make_dir(dir, FOR_OWNER)?;
                builder.tempdir_in(dir)
            }
            None => builder.tempdir(),
        }
    }
}

impl Drop for Reach {
    /// The last attempt has removed its own.
    fn drop(&mut self) {
        if let Some(dir) = &self.scratch {
            let _ = fs::remove_dir(dir);
        }
    }
}
