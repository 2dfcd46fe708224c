//! How others talk to a running job: stop it, cancel it, ask for a savepoint.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cofferdam_core::{checkpoint::AbortReason, ids::CheckpointId, job::Event};
use cofferdam_store::{inspect::TaskReport, metadata::CheckpointMetadata, savepoint};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use crate::storage::Inspector;

/// The way to a running job. Cloning it gives another way to the same job.
#[derive(Clone)]
pub struct JobControl {
    events: UnboundedSender<Event>,
    requests: Arc<SavepointRequests>,
}

/// A completed checkpoint that a running job keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptCheckpoint {
    /// Its id.
    pub checkpoint: u64,
    /// The job's name.
    pub job: String,
    /// How many tasks it holds the state of.
    pub tasks: usize,
    /// When it was written, in milliseconds since 1970-01-01 UTC.
    pub written_at_ms: u64,
}

impl From<&CheckpointMetadata> for KeptCheckpoint {
    fn from(metadata: &CheckpointMetadata) -> Self {
        Self {
            checkpoint: metadata.checkpoint,
            job: metadata.job.clone(),
            tasks: metadata.tasks.len(),
            written_at_ms: metadata.written_at_ms,
        }
    }
}

/// The answer to a request for a savepoint: its checkpoint's id, or why there is none.
pub type SavepointResult = Result<u64, Refusal>;

/// Why a job does not do what it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The reason, for people.
    pub reason: String,
    /// The number of the operating system's error that lies behind it.
    pub os_error: Option<i32>,
}

impl From<AbortReason> for Refusal {
    fn from(reason: AbortReason) -> Self {
        Self { os_error: reason.os_error(), reason: reason.message() }
    }
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self { reason, os_error: None }
    }
}

impl JobControl {
    pub(crate) fn new(events: UnboundedSender<Event>, requests: Arc<SavepointRequests>) -> Self {
        Self { events, requests }
    }

    /// Asks for a last checkpoint and the end of the job. Asking again changes nothing.
    pub fn stop(&self) {
        self.send(Event::StopRequested { savepoint: None, drain: false });
    }

    /// Asks for the end of the job at once.
    pub fn cancel(&self) {
        self.send(Event::CancelRequested);
    }

    /// The completed checkpoints that it keeps, oldest first.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<KeptCheckpoint> {
        self.requests.lock().kept.values().cloned().collect()
    }

    /// Takes a checkpoint now.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn checkpoint(&self) -> SavepointResult {
        self.ask(None, |ticket| Event::CheckpointRequested { ticket }).await
    }

    /// What a completed checkpoint consists of, task by task.
    ///
    /// # Errors
    /// Where it is not kept, or cannot be read.
    pub async fn checkpoint_tasks(&self, checkpoint: u64) -> Result<Vec<TaskReport>, String> {
        let asked =
            self.requests.lock().inspector.as_ref().map(|it| it.inspect(CheckpointId(checkpoint)));
        let Some(answer) = asked else { return Err("the job does not run".to_owned()) };
        answer.await.unwrap_or_else(|_| Err("the job has ended".to_owned()))
    }

    /// Writes a savepoint into `dir`, which must not be there. The job continues.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn savepoint(&self, dir: PathBuf) -> SavepointResult {
        self.ask(Some(dir), |ticket| Event::SavepointRequested { ticket }).await
    }

    /// Writes a savepoint into `dir` and ends the job with it. With `drain`, sources end first and
    /// everything that waits in the job is processed and emitted.
    ///
    /// # Errors
    /// Why there is none; the job then continues.
    pub async fn stop_with_savepoint(&self, dir: PathBuf, drain: bool) -> SavepointResult {
        self.ask(Some(dir), |ticket| Event::StopRequested { savepoint: Some(ticket), drain }).await
    }

    async fn ask(&self, dir: Option<PathBuf>, event: impl FnOnce(u64) -> Event) -> SavepointResult {
        // A place that cannot be is no reason to stop anything.
        dir.as_deref().map_or(Ok(()), savepoint::check_place)?;
        let (ticket, answer) = self.requests.open(dir);
        self.send(event(ticket));
        answer
            .await
            .unwrap_or_else(|_| Err("the job ended before it was complete".to_owned().into()))
    }

    fn send(&self, event: Event) {
        // A job that is over needs to know nothing more.
        let _ = self.events.send(event);
    }
}

/// Requests that wait for their savepoint, and what can be told at once.
#[derive(Default)]
pub(crate) struct SavepointRequests(Mutex<Requests>);

#[derive(Default)]
struct Requests {
    last_ticket: u64,
    is_over: bool,
    /// By ticket: where a savepoint goes, and who waits for the answer.
    open: BTreeMap<u64, (Option<PathBuf>, oneshot::Sender<SavepointResult>)>,
    /// The last savepoint that was written.
    saved: Option<PathBuf>,
    kept: BTreeMap<u64, KeptCheckpoint>,
    /// Looks into checkpoints while the job runs.
    inspector: Option<Inspector>,
}

impl SavepointRequests {
    fn lock(&self) -> MutexGuard<'_, Requests> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, dir: Option<PathBuf>) -> (u64, oneshot::Receiver<SavepointResult>) {
        let (sender, receiver) = oneshot::channel();
        let mut requests = self.lock();
        requests.last_ticket += 1;
        let ticket = requests.last_ticket;
        // Of a job that is over nobody would answer: the receiver learns that from the sender, which is gone.
        if !requests.is_over {
            requests.open.insert(ticket, (dir, sender));
        }
        (ticket, receiver)
    }

    /// Where the savepoint goes.
    pub(crate) fn dir(&self, ticket: u64) -> Option<PathBuf> {
        self.lock().open.get(&ticket).and_then(|(dir, _)| dir.clone())
    }

    /// Answers a request.
    pub(crate) fn answer(&self, ticket: u64, result: Result<CheckpointId, AbortReason>) {
        let mut requests = self.lock();
        if let Some((dir, sender)) = requests.open.remove(&ticket) {
            if result.is_ok() && dir.is_some() {
                requests.saved = dir;
            }
            // The caller may have gone.
            let _ = sender.send(result.map(|checkpoint| checkpoint.0).map_err(Refusal::from));
        }
    }

    /// The last savepoint that was written: of a job that was stopped with one, that.
    pub(crate) fn last_saved(&self) -> Option<PathBuf> {
        self.lock().saved.clone()
    }

    /// The job runs: this looks into its checkpoints.
    pub(crate) fn look_with(&self, inspector: Inspector) {
        self.lock().inspector = Some(inspector);
    }

    /// A checkpoint is complete and kept.
    pub(crate) fn keep(&self, checkpoint: KeptCheckpoint) {
        self.lock().kept.insert(checkpoint.checkpoint, checkpoint);
    }

    /// A checkpoint is not kept any more.
    pub(crate) fn forget(&self, checkpoint: CheckpointId) {
        self.lock().kept.remove(&checkpoint.0);
    }

    /// The job is over: nobody else will be answered.
    pub(crate) fn close(&self) {
        let mut requests = self.lock();
        requests.is_over = true;
        requests.open.clear();
        requests.inspector = None;
    }
}
