//! Several jobs in one process: the way in for a program that embeds Cofferdam.
//!
//! ```no_run
//! # use std::path::Path;
//! # use cofferdam_connector::Catalog;
//! use cofferdam_engine::{Engine, EngineOptions, job::JobOptions};
//! use cofferdam_spec::JobSpec;
//!
//! # async fn example(catalog: Catalog) -> Result<(), cofferdam_settings::Problem> {
//! let engine = Engine::new(EngineOptions::default())?;
//! let spec = JobSpec::read_with(Path::new("job.toml"), None, &catalog)?;
//! let checked = engine.check(spec).await?;
//! let job = engine.submit(checked, JobOptions::default()).await?;
//! job.running().await?;
//! job.checkpoint().await?;
//! let outcome = job.ended().await?;
//! # Ok(())
//! # }
//! ```

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use cofferdam_sandbox::{Sandbox, compiler::Compiler};
use cofferdam_settings::Problem;
use cofferdam_spec::JobSpec;

use crate::{
    handle::JobHandle,
    job::{self, CheckedJob, JobOptions},
    watch::progress::Observer,
};

/// What an engine is made with.
#[derive(Debug, Clone, Default)]
pub struct EngineOptions {
    /// Where compiled components are kept between runs; `None`: each engine compiles them.
    pub cache_dir: Option<PathBuf>,
    /// Where they are compiled. Default: in this process, so a component can use all of its memory and processor
    /// time.
    pub compiler: Compiler,
}

/// Runs jobs, any number of them, on the tokio runtime that it is called on. Cloning it gives another way to the
/// same engine.
#[derive(Clone)]
pub struct Engine {
    sandbox: Sandbox,
    jobs: Arc<Mutex<Vec<JobHandle>>>,
}

impl Engine {
    /// An engine without jobs.
    ///
    /// # Errors
    /// Where WebAssembly cannot run on this machine, or the cache cannot be made.
    pub fn new(options: EngineOptions) -> Result<Self, Problem> {
        Ok(Self { sandbox: job::sandbox(options)?, jobs: Arc::default() })
    }

    /// Loads the components of a job, asks each what it is, and compares both ends of every edge. Nothing runs, and
    /// nothing is written.
    ///
    /// # Errors
    /// All that is wrong: the first problem, with the others behind it.
    pub async fn check(&self, spec: JobSpec) -> Result<CheckedJob, Problem> {
        CheckedJob::new(spec, &self.sandbox).await
    }

    /// Begins a job, or resumes it from its state directory. It runs until it ends, whether or not somebody keeps
    /// the handle.
    ///
    /// # Errors
    /// Where it is refused: then nothing was changed.
    pub async fn submit(&self, job: CheckedJob, options: JobOptions) -> Result<JobHandle, Problem> {
        self.submit_observed(job, options, Arc::new(())).await
    }

    /// As [`submit`](Self::submit); `observer` hears of everything that happens, from the beginning on and without
    /// a gap. It is called from the job's own loop, so it must not block.
    ///
    /// # Errors
    /// As `submit`.
    pub async fn submit_observed(
        &self,
        checked: CheckedJob,
        options: JobOptions,
        observer: Arc<dyn Observer>,
    ) -> Result<JobHandle, Problem> {
        let engine = self.clone();
        let on_end = move || engine.forget_ended();
        let handle = JobHandle::submit(checked, options, observer, on_end).await?;
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).push(handle.clone());
        // It may have ended before it was there.
        self.forget_ended();
        Ok(handle)
    }

    /// The jobs that have not ended, oldest first.
    #[must_use]
    pub fn jobs(&self) -> Vec<JobHandle> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.iter().filter(|job| !job.has_ended()).cloned().collect()
    }

    /// Forgets the jobs that have ended.
    fn forget_ended(&self) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.retain(|job| !job.has_ended());
    }
}
