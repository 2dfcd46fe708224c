//! Tries whether declared state can be read out of the memory that it lies in, long before a savepoint,
//! another parallelism or another version of the component needs it.
//!
//! The components of tasks that begin without an image are put on the image of their first completed
//! checkpoint, and hand over to nobody. This happens beside the running tasks, which wait for a copy of the
//! image at most.

use std::sync::{
    Arc, Mutex, PoisonError, TryLockError,
    atomic::{AtomicBool, Ordering},
};

use cofferdam_core::{
    failure::{FailureCause, Obstacle},
    job::Event,
};
use cofferdam_sandbox::GuestError;
use tokio::sync::mpsc::UnboundedSender;

use crate::{
    job::read_out::OwnComponent,
    state::local::TaskLocal,
    watch::progress::{Observer, Progress},
};

/// A task whose state was not read out yet.
pub(crate) struct Untried {
    /// `operator/index`.
    pub(crate) task: String,
    pub(crate) local: Arc<TaskLocal>,
    pub(crate) own: OwnComponent,
}

/// What is to be tried.
pub(crate) struct Rehearsal {
    untried: Mutex<Vec<Untried>>,
    is_over: AtomicBool,
    events: UnboundedSender<Event>,
    observer: Arc<dyn Observer>,
}

impl Rehearsal {
    pub(crate) fn new(
        untried: Vec<Untried>,
        events: UnboundedSender<Event>,
        observer: Arc<dyn Observer>,
    ) -> Self {
        Self { untried: Mutex::new(untried), is_over: AtomicBool::new(false), events, observer }
    }

    /// Tries every task whose image is here, once. Blocks for as long as that takes; does nothing where it
    /// is under way already.
    pub(crate) fn run(&self) {
        let mut untried = match self.untried.try_lock() {
            Ok(untried) => untried,
            Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            Err(TryLockError::WouldBlock) => return,
        };
        untried.retain(|task| !self.is_over() && !self.is_tried(task));
    }

    /// The job ends: what is under way is left.
    pub(crate) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// False where there is no image yet, or none just now.
    fn is_tried(&self, Untried { task, local, own }: &Untried) -> bool {
        let image = match local.copy_image() {
            Ok(image) if !image.is_empty() => image,
            _ => return false,
        };
        let go_on = || !self.is_over();
        match own.rehearse(&image, go_on) {
            Ok(()) => {}
            Err(_) if self.is_over() => {}
            Err(GuestError::ForeignKey(message)) => {
                let (obstacle, message) = (Obstacle::ForeignKey, format!("{task}: {message}"));
                let cause = FailureCause::Permanent { obstacle, message };
                // The driver is the last to go; after it nobody needs to know.
                let _ = self.events.send(Event::TaskFailed { task: None, cause, lost: None });
            }
            Err(error) => self.observer.observe(Progress::Warning {
                message: format!(
                    "the declared state of {task} cannot be read out of its memory: {error}; until this is \
                     fixed, savepoints fail, and the task can resume only with this component and this \
                     parallelism"
                ),
            }),
        }
        true
    }
}
