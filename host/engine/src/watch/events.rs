//! What happens to a job, for those who follow it: its state, its failures, and every event.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cofferdam_core::job::Outcome;
use cofferdam_settings::Problem;
use serde::Serialize;
use tokio::sync::{broadcast, watch};

use super::{
    history::{self, ENTRIES_MAX, Entry, is_kept},
    progress::{Observer, Progress},
};
use crate::clock::now_ms;

/// How many events a slow reader may be behind.
const EVENTS_MAX: usize = 1_024;

/// The state of a submitted job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Its state is being restored, or its tasks are about to start.
    Initializing,
    /// Its tasks run.
    Running,
    /// Some of its tasks restart after a failure.
    Restarting,
    /// It stops, to resume with another parallelism.
    Rescaling,
    /// Every input was processed, and every sink has committed.
    Finished,
    /// It was stopped, and resumes when it is submitted again, or from its savepoint.
    Stopped,
    /// It was ended at once.
    Canceled,
    /// It has failed, and is not restarted.
    Failed,
}

impl JobState {
    /// Flink's name of the state.
    #[must_use]
    pub fn flink_name(self) -> &'static str {
        match self {
            Self::Initializing => "INITIALIZING",
            Self::Running => "RUNNING",
            Self::Restarting | Self::Rescaling => "RESTARTING",
            Self::Finished => "FINISHED",
            Self::Stopped => "SUSPENDED",
            Self::Canceled => "CANCELED",
            Self::Failed => "FAILED",
        }
    }

    /// Whether nothing follows it.
    #[must_use]
    pub fn is_last(self) -> bool {
        matches!(self, Self::Finished | Self::Stopped | Self::Canceled | Self::Failed)
    }
}

/// An event that a subscriber gets.
#[derive(Debug, Clone)]
pub enum JobEvent {
    /// Something has happened.
    Progress(Arc<Progress>),
    /// The reader was too slow: so many events were left out.
    Missed(u64),
}

/// The events of a job, from the subscription on.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Arc<Progress>>);

impl Events {
    /// Waits for the next event; `None`: the job has ended, and there will be none.
    pub async fn next(&mut self) -> Option<JobEvent> {
        match self.0.recv().await {
            Ok(progress) => Some(JobEvent::Progress(progress)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(JobEvent::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// Follows a job through all of its runs, and passes everything on.
pub(crate) struct Watch {
    observer: Arc<dyn Observer>,
    state: watch::Sender<(JobState, u64)>,
    known: Mutex<Known>,
}

struct Known {
    /// The failures of earlier runs.
    recalled: Vec<Entry>,
    /// When something has failed, and what.
    failures: VecDeque<(u64, Arc<Progress>)>,
    /// Gone when the job has ended.
    events: Option<broadcast::Sender<Arc<Progress>>>,
}

impl Watch {
    pub(crate) fn new(observer: Arc<dyn Observer>) -> Self {
        let known = Known {
            recalled: Vec::new(),
            failures: VecDeque::new(),
            events: Some(broadcast::Sender::new(EVENTS_MAX)),
        };
        let state = watch::Sender::new((JobState::Initializing, now_ms()));
        Self { observer, state, known: Mutex::new(known) }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the failures of earlier runs, if they are known.
    pub(crate) fn recall(&self, state_dir: Option<&Path>) {
        // A history that cannot be read is told where it is written.
        let entries = state_dir.and_then(|dir| history::read(dir).ok()).unwrap_or_default();
        self.lock().recalled = entries;
    }

    pub(crate) fn state(&self) -> (JobState, u64) {
        *self.state.borrow()
    }

    pub(crate) fn set(&self, state: JobState) {
        self.state.send_if_modified(|known| {
            let is_other = known.0 != state;
            if is_other {
                *known = (state, now_ms());
            }
            is_other
        });
    }

    /// Waits until the job runs, or has ended; gives which.
    pub(crate) async fn begun_or_ended(&self) -> JobState {
        let mut states = self.state.subscribe();
        let is_known =
            |(state, _): &(JobState, u64)| state.is_last() || *state == JobState::Running;
        // The sender is here, so it is not gone.
        states.wait_for(is_known).await.map_or(JobState::Failed, |it| it.0)
    }

    /// The job has ended: subscribers have heard everything.
    pub(crate) fn end(&self, outcome: &Result<Outcome, Problem>) {
        self.set(match outcome {
            Ok(Outcome::Finished) => JobState::Finished,
            Ok(Outcome::Stopped { .. }) => JobState::Stopped,
            Ok(Outcome::Canceled { .. }) => JobState::Canceled,
            Ok(Outcome::Failed { .. }) | Err(_) => JobState::Failed,
        });
        self.lock().events = None;
    }

    pub(crate) fn failures(&self) -> Vec<Entry> {
        let known = self.lock();
        let own = known.failures.iter().filter_map(|(at_ms, progress)| Entry::of(*at_ms, progress));
        let all: Vec<Entry> = known.recalled.iter().cloned().chain(own).collect();
        all[all.len().saturating_sub(ENTRIES_MAX)..].to_vec()
    }

    pub(crate) fn subscribe(&self) -> Events {
        let known = self.lock();
        // Of a job that has ended a subscriber learns just that.
        let receiver = known.events.as_ref().map(broadcast::Sender::subscribe);
        Events(receiver.unwrap_or_else(|| broadcast::channel(1).1))
    }
}

impl Observer for Watch {
    fn observe(&self, progress: Progress) {
        match &progress {
            Progress::Running { .. } => self.set(JobState::Running),
            Progress::Restarting(_) => self.set(JobState::Restarting),
            _ => {}
        }
        let mut known = self.lock();
        let events = known.events.as_ref().filter(|events| 0 < events.receiver_count()).cloned();
        if events.is_some() || is_kept(&progress) {
            let shared = Arc::new(progress.clone());
            if is_kept(&progress) {
                known.failures.push_back((now_ms(), shared.clone()));
                let excess = known.failures.len().saturating_sub(ENTRIES_MAX);
                known.failures.drain(..excess);
            }
            // The subscriber may have gone.
            let _ = events.map(|events| events.send(shared));
        }
        drop(known);
        self.observer.observe(progress);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_reader_learns_what_it_has_missed_and_when_the_job_has_ended() {
        let watch = Watch::new(Arc::new(()));
        let mut events = watch.subscribe();
        let warning = |n: usize| Progress::Warning { message: n.to_string() };
        (0..EVENTS_MAX + 3).for_each(|n| watch.observe(warning(n)));
        watch.end(&Ok(Outcome::Finished));
        let heard = futures::executor::block_on(async {
            let mut heard = Vec::new();
            while let Some(event) = events.next().await {
                heard.push(event);
            }
            heard
        });
        assert!(matches!(heard[0], JobEvent::Missed(3)), "{:?}", heard[0]);
        assert_eq!(heard.len(), EVENTS_MAX + 1);
        assert_eq!(watch.state().0, JobState::Finished);
        let late = futures::executor::block_on(watch.subscribe().next());
        assert!(late.is_none(), "nothing more will happen");
    }

    #[test]
    fn failures_are_kept_beside_those_of_earlier_runs() {
        let watch = Watch::new(Arc::new(()));
        let (code, reason) = ("CHECKPOINT_EXPIRED", "late".to_owned());
        watch.observe(Progress::CheckpointFailed { checkpoint: 7, code, reason });
        watch.observe(Progress::Warning { message: "of no interest".to_owned() });
        let failures = watch.failures();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].event["checkpoint"], 7);
    }
}
