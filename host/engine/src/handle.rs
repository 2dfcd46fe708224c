//! A submitted job: what it does, what can be asked of it, and the loop that runs it until it ends.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use cofferdam_connector::catalog::Conflicts;
use cofferdam_core::job::Outcome;
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::JobSpec;
use cofferdam_store::inspect::TaskReport;
use tokio::sync::{oneshot, watch};

use crate::{
    job::{CheckedJob, Job, JobOptions},
    watch::{
        control::{JobControl, KeptCheckpoint, Refusal},
        events::{Events, JobState, Watch},
        history::Entry,
        log::{LogLine, Logs},
        metrics::Metrics,
        progress::{Observer, Progress},
    },
};

/// How a job is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct JobStatus {
    /// Its state.
    pub state: JobState,
    /// Since when, in milliseconds since 1970-01-01 UTC.
    pub since_ms: u64,
    /// How many tasks it has.
    pub tasks: usize,
    /// How often tasks were restarted after a failure.
    pub restarts: u64,
    /// The newest completed checkpoint.
    pub last_checkpoint: Option<u64>,
}

/// The way to a submitted job. Cloning it gives another way to the same job.
#[derive(Clone)]
pub struct JobHandle {
    shared: Arc<Submission>,
}

struct Submission {
    name: String,
    state_dir: Option<PathBuf>,
    resumed_from: Option<u64>,
    watch: Arc<Watch>,
    logs: Arc<Logs>,
    run: Mutex<Run>,
    ended: watch::Sender<Option<Result<Outcome, Problem>>>,
}

/// The run that is under way: a job that is rescaled has several, one after the other.
struct Run {
    checked: CheckedJob,
    /// What the next run begins with.
    options: JobOptions,
    control: JobControl,
    metrics: Arc<Metrics>,
    /// What was asked for, so that it also holds for a run that is about to begin.
    wish: Option<Wish>,
    rescale: Option<Rescale>,
    /// How many wait for a savepoint that ends the job.
    stopping: u32,
    /// Counts the runs; what was asked of one is not done to another.
    number: u64,
    /// No run is there to be asked: one has ended and the next has not begun, or none will.
    is_between: bool,
    /// Keeps the state directory this job's from one run to the next.
    lock: Option<Arc<File>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wish {
    Stop,
    Cancel,
}

/// The job with another parallelism, and who waits for it.
struct Rescale {
    checked: CheckedJob,
    answer: oneshot::Sender<Result<(), Problem>>,
}

impl JobHandle {
    pub(crate) async fn submit(
        checked: CheckedJob,
        options: JobOptions,
        observer: Arc<dyn Observer>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<Self, Problem> {
        let watch = Arc::new(Watch::new(observer));
        let mut job = prepare(checked.clone(), options.clone(), watch.clone(), None).await?;
        let logs = Arc::<Logs>::default();
        job.log_to(logs.clone());
        watch.recall(job.state_dir());
        // Whatever comes after this run resumes from the job's own state.
        let options = JobOptions { from: None, again: false, ..options };
        let shared = Arc::new(Submission {
            name: checked.spec.name.clone(),
            state_dir: job.state_dir().map(Path::to_owned),
            resumed_from: job.resumes_from(),
            watch,
            logs,
            run: Mutex::new(Run {
                checked,
                options,
                control: job.control(),
                metrics: job.metrics(),
                wish: None,
                rescale: None,
                stopping: 0,
                number: 0,
                is_between: false,
                lock: job.lock(),
            }),
            ended: watch::Sender::new(None),
        });
        let ended = supervise(shared.clone(), job);
        tokio::spawn(async move {
            ended.await;
            on_end();
        });
        Ok(Self { shared })
    }

    /// The job's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The directory that it has locked; `None` where its state is in memory.
    #[must_use]
    pub fn state_dir(&self) -> Option<&Path> {
        self.shared.state_dir.as_deref()
    }

    /// The checkpoint that it has resumed from; `None`: it has begun.
    #[must_use]
    pub fn resumed_from(&self) -> Option<u64> {
        self.shared.resumed_from
    }

    /// What it is, with the parallelism that it has now.
    #[must_use]
    pub fn spec(&self) -> JobSpec {
        self.shared.run().checked.spec.clone()
    }

    /// How it is. Costs a lock, and no question to the job.
    #[must_use]
    pub fn status(&self) -> JobStatus {
        let (state, since_ms) = self.shared.watch.state();
        let run = self.shared.run();
        JobStatus {
            state,
            since_ms,
            tasks: run.checked.spec.graph.tasks().len(),
            restarts: run.metrics.restarts.load(Ordering::Relaxed),
            last_checkpoint: run.control.checkpoints().last().map(|newest| newest.checkpoint),
        }
    }

    /// Waits until every task runs, as after a submission or a restart. Checkpoints and savepoints are refused before.
    ///
    /// # Errors
    /// Where the job has ended.
    pub async fn running(&self) -> Result<(), Problem> {
        match self.shared.watch.begun_or_ended().await {
            JobState::Running => Ok(()),
            ended => Err(refused("to run", &format!("it is {}", ended.flink_name()))),
        }
    }

    /// Its counters. They begin at zero with each rescale.
    #[must_use]
    pub fn metrics(&self) -> Arc<Metrics> {
        self.shared.run().metrics.clone()
    }

    /// Takes a checkpoint now, beside those of the timer; gives its id when it is complete.
    ///
    /// # Errors
    /// Why there is none. The job continues.
    pub async fn checkpoint(&self) -> Result<u64, Problem> {
        let control = self.shared.control();
        control.checkpoint().await.map_err(|why| declined("a checkpoint", &why))
    }

    /// The completed checkpoints that it keeps, oldest first.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<KeptCheckpoint> {
        self.shared.control().checkpoints()
    }

    /// What one of its completed checkpoints consists of, task by task.
    ///
    /// # Errors
    /// Where it is not kept, or cannot be read.
    pub async fn checkpoint_tasks(&self, checkpoint: u64) -> Result<Vec<TaskReport>, Problem> {
        let control = self.shared.control();
        control.checkpoint_tasks(checkpoint).await.map_err(|why| refused("a checkpoint", &why))
    }

    /// Writes a savepoint into `dir`, which must not be there; gives the id of its checkpoint. The job continues.
    ///
    /// # Errors
    /// Why there is none. The job continues.
    pub async fn savepoint(&self, dir: PathBuf) -> Result<u64, Problem> {
        let control = self.shared.control();
        control.savepoint(dir).await.map_err(|why| declined("a savepoint", &why))
    }

    /// Takes a last checkpoint and ends the job, which resumes from it when it is submitted again. Asking again
    /// changes nothing.
    pub fn stop(&self) {
        self.shared.wish(Wish::Stop);
    }

    /// Writes a savepoint into `dir` and ends the job with it. With `drain`, sources end first and everything that
    /// waits in the job is processed and emitted.
    ///
    /// # Errors
    /// Why there is none. The job continues then.
    pub async fn stop_with_savepoint(&self, dir: PathBuf, drain: bool) -> Result<u64, Problem> {
        let control = {
            let mut run = self.shared.run();
            if run.rescale.is_some() || run.is_between {
                return Err(refused("to stop", "it is being rescaled, or has ended"));
            }
            run.stopping += 1;
            run.control.clone()
        };
        // Counted down also where nobody waits for the answer any more.
        let _stopping = Stopping(&self.shared);
        control.stop_with_savepoint(dir, drain).await.map_err(|why| declined("to stop", &why))
    }

    /// Ends the job at once.
    pub fn cancel(&self) {
        self.shared.wish(Wish::Cancel);
    }

    /// Gives nodes another parallelism: the job takes a last checkpoint, stops, and resumes from it with its state
    /// distributed over the new tasks. Nodes that are not named keep theirs.
    ///
    /// # Errors
    /// Where the job cannot have that parallelism, or its state cannot be distributed: then it continues, or resumes,
    /// with the parallelism that it had.
    pub async fn rescale(&self, parallelism: &BTreeMap<String, u32>) -> Result<(), Problem> {
        let (known, number) = {
            let run = self.shared.run();
            (run.checked.clone(), run.number)
        };
        let cannot = |why: &str| {
            Problem::new(Code::RequestRefused, "the job cannot be rescaled").detail(why)
        };
        if self.shared.state_dir.is_none() {
            return Err(cannot("its state is in memory, and is lost when it stops")
                .hint("set execution.checkpointing.storage = \"sled\""));
        }
        let checked = known.rescaled(parallelism)?;
        let (answer, answered) = oneshot::channel();
        {
            let mut run = self.shared.run();
            if run.wish.is_some() || 0 < run.stopping || self.has_ended() {
                return Err(cannot("it ends"));
            }
            if run.rescale.is_some() || run.is_between || run.number != number {
                return Err(cannot("it is being rescaled already"));
            }
            run.rescale = Some(Rescale { checked, answer });
            self.shared.watch.set(JobState::Rescaling);
            run.control.stop();
        }
        answered.await.unwrap_or_else(|_| Err(cannot("it has ended meanwhile")))
    }

    /// What has failed, and what was done about it, oldest first: at most 1,000 entries, also of earlier runs where
    /// the job has a state directory.
    #[must_use]
    pub fn failures(&self) -> Vec<Entry> {
        self.shared.watch.failures()
    }

    /// What its guests have logged, oldest first: at most 1,000 lines and 1 MiB.
    #[must_use]
    pub fn logs(&self) -> Vec<LogLine> {
        self.shared.logs.lines()
    }

    /// Everything that happens from now on. A reader that is slower than 1,024 events learns how many it has missed.
    #[must_use]
    pub fn subscribe(&self) -> Events {
        self.shared.watch.subscribe()
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.shared.ended.borrow().is_some()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Where it has failed: the failure that the restart strategy did not allow to restart.
    pub async fn ended(&self) -> Result<Outcome, Problem> {
        let mut ended = self.shared.ended.subscribe();
        // The sender is in `shared`, so it is not gone.
        let outcome = ended.wait_for(Option::is_some).await.ok().and_then(|it| it.clone());
        outcome.unwrap_or_else(|| Err(Problem::new(Code::HostBug, "the job is lost")))
    }
}

/// Somebody waits for a savepoint that ends the job.
struct Stopping<'a>(&'a Submission);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.run().stopping -= 1;
    }
}

fn declined(what: &str, why: &Refusal) -> Problem {
    refused(what, &why.reason).with_os_error(why.os_error)
}

fn refused(what: &str, why: &str) -> Problem {
    Problem::new(Code::RequestRefused, format!("the job refused {what}: {why}"))
}

impl Submission {
    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(&self) -> JobControl {
        self.run().control.clone()
    }

    /// Ends the job; a rescale that has not begun its new run is given up.
    fn wish(&self, wish: Wish) {
        let mut run = self.run();
        run.wish = run.wish.max(Some(wish));
        run.rescale = None;
        run.obey(wish);
    }
}

impl Run {
    fn obey(&self, wish: Wish) {
        match wish {
            Wish::Stop => self.control.stop(),
            Wish::Cancel => self.control.cancel(),
        }
    }
}

/// Runs a job to its end, through every rescale.
async fn supervise(shared: Arc<Submission>, mut job: Job) {
    let ended = loop {
        let outcome = tokio::spawn(job.run()).await.unwrap_or_else(|panic| {
            Err(Problem::new(Code::HostBug, "the run of a job panicked").detail(panic))
        });
        let rescale = {
            let mut run = shared.run();
            run.is_between = true;
            run.rescale.take()
        };
        let Some(Rescale { checked, answer }) = rescale else { break outcome };
        match &outcome {
            Ok(Outcome::Stopped { has_savepoint: false, is_last: true, .. }) => {
                // What was chosen about the output is done.
                shared.run().options.conflicts = Conflicts::default();
            }
            Ok(Outcome::Stopped { has_savepoint: false, checkpoint, .. }) => {
                let from = checkpoint.map_or("the beginning".to_owned(), |it| it.to_string());
                shared.watch.observe(Progress::Warning {
                    message: format!(
                        "the last checkpoint before the rescale failed: the job resumes from {from}"
                    ),
                });
            }
            // It has ended of itself, or with a savepoint; the caller learns that.
            _ => break outcome,
        }
        match resume(&shared, checked).await {
            Ok(next) => {
                // The caller may have gone.
                let _ = answer.send(Ok(()));
                job = next;
            }
            Err(problem) => {
                let _ = answer.send(Err(problem));
                let before = shared.run().checked.clone();
                match resume(&shared, before).await {
                    Ok(next) => job = next,
                    Err(problem) => break Err(problem),
                }
            }
        }
    };
    shared.run().lock = None;
    shared.watch.end(&ended);
    shared.ended.send_replace(Some(ended));
}

/// The next run of a job that has stopped.
async fn resume(shared: &Submission, checked: CheckedJob) -> Result<Job, Problem> {
    let (options, lock) = {
        let run = shared.run();
        (run.options.clone(), run.lock.clone())
    };
    let mut job = prepare(checked.clone(), options, shared.watch.clone(), lock).await?;
    job.log_to(shared.logs.clone());
    shared.watch.set(JobState::Initializing);
    let mut run = shared.run();
    (run.checked, run.control, run.metrics) = (checked, job.control(), job.metrics());
    (run.number, run.is_between) = (run.number + 1, false);
    if let Some(wish) = run.wish {
        run.obey(wish);
    }
    Ok(job)
}

/// Prepares a job where that may block.
async fn prepare(
    checked: CheckedJob,
    options: JobOptions,
    observer: Arc<dyn Observer>,
    lock: Option<Arc<File>>,
) -> Result<Job, Problem> {
    let prepared =
        tokio::task::spawn_blocking(move || Job::prepare_locked(checked, &options, observer, lock));
    prepared.await.unwrap_or_else(|error| {
        Err(Problem::new(Code::HostBug, "the preparation of a job panicked").because(&error))
    })
}
