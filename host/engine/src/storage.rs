//! The one thread that writes checkpoints: what it has written and flushed, it reports.
//!
//! Snapshots that arrive while it is busy are written together and cost one flush.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use cofferdam_core::{
    checkpoint::AbortReason,
    failure::{FailureCause, Obstacle},
    ids::{Attempt, CheckpointId, TaskId},
    job::Event,
};
use cofferdam_store::{
    SnapshotStore, StorageError,
    declared::Entries,
    inspect::TaskReport,
    savepoint,
    snapshot::{LoadedTask, TaskSnapshot},
};
use tokio::sync::{
    mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    oneshot,
};

use crate::{
    clock::now_ms,
    failure::{host_bug, storage_cause, storage_error},
};

enum Command {
    Begin { slots: Vec<usize>, restored_from: Option<CheckpointId> },
    Write(Snapshot),
    Complete(CheckpointId),
    Export { checkpoint: CheckpointId, dir: PathBuf },
    Subsume { checkpoint: CheckpointId, newest: CheckpointId, oldest_pending: Option<CheckpointId> },
    Release { needed_from: CheckpointId },
    Inspect { checkpoint: CheckpointId, answer: oneshot::Sender<Inspected> },
}

struct Snapshot {
    slot: usize,
    task: TaskId,
    attempt: Attempt,
    checkpoint: CheckpointId,
    content: Arc<TaskSnapshot>,
}

/// What the writer tells beside the core's events.
pub(crate) trait Report: Send + 'static {
    /// To the core.
    fn event(&self, event: Event);
    /// So many bytes were written for a checkpoint.
    fn written(&self, checkpoint: CheckpointId, bytes: u64);
    /// Something went wrong that ends nothing.
    fn warning(&self, message: String);
}

/// What a checkpoint consists of, or why that is not known.
type Inspected = Result<Vec<TaskReport>, String>;

/// Looks into the checkpoints of a running job. The thread does not end before it is gone.
pub(crate) struct Inspector(UnboundedSender<Command>);

impl Inspector {
    /// Asks what a completed checkpoint consists of.
    pub(crate) fn inspect(&self, checkpoint: CheckpointId) -> oneshot::Receiver<Inspected> {
        let (answer, answered) = oneshot::channel();
        // The thread ends only after this sender.
        let _ = self.0.send(Command::Inspect { checkpoint, answer });
        answered
    }
}

/// The way to the writer, and to the store for reading.
pub(crate) struct StorageHandle {
    store: Arc<Mutex<SnapshotStore>>,
    commands: UnboundedSender<Command>,
}

/// The thread, to be joined when the job is over.
pub(crate) struct StorageThread {
    store: Arc<Mutex<SnapshotStore>>,
    thread: JoinHandle<()>,
}

impl StorageHandle {
    /// Starts the thread.
    pub(crate) fn start(
        store: SnapshotStore,
        report: impl Report,
    ) -> std::io::Result<(Self, StorageThread)> {
        let store = Arc::new(Mutex::new(store));
        let (commands, receiver) = unbounded_channel();
        let thread = std::thread::Builder::new().name("cofferdam-storage".to_owned()).spawn({
            let store = store.clone();
            move || {
                let ran = catch_unwind(AssertUnwindSafe(|| run(&store, receiver, &report)));
                // Nothing would be written any more, and nobody would hear of it.
                if ran.is_err() {
                    let cause = host_bug("the storage thread panicked");
                    report.event(Event::TaskFailed { task: None, cause, lost: None });
                }
            }
        })?;
        Ok((Self { store: store.clone(), commands }, StorageThread { store, thread }))
    }

    /// What looks into checkpoints.
    pub(crate) fn inspector(&self) -> Inspector {
        Inspector(self.commands.clone())
    }

    /// Writes a snapshot. Answer: `SnapshotAcked` or `SnapshotDeclined`.
    pub(crate) fn write(
        &self,
        slot: usize,
        task: TaskId,
        attempt: Attempt,
        checkpoint: CheckpointId,
        content: Arc<TaskSnapshot>,
    ) {
        self.send(Command::Write(Snapshot { slot, task, attempt, checkpoint, content }));
    }

    /// Tasks begin a new attempt; what is written for them from now on is its own.
    pub(crate) fn begin(&self, slots: Vec<usize>, restored_from: Option<CheckpointId>) {
        self.send(Command::Begin { slots, restored_from });
    }

    /// Writes the metadata. Answer: `MetadataDurable` or `MetadataLost`.
    pub(crate) fn complete(&self, checkpoint: CheckpointId) {
        self.send(Command::Complete(checkpoint));
    }

    /// Writes a savepoint into a directory. Answer: `SavepointDurable` or `SavepointLost`.
    pub(crate) fn export(&self, checkpoint: CheckpointId, dir: PathBuf) {
        self.send(Command::Export { checkpoint, dir });
    }

    /// A completed checkpoint is no longer needed. Answer: `CheckpointCleaned`.
    pub(crate) fn subsume(
        &self,
        checkpoint: CheckpointId,
        newest: CheckpointId,
        oldest_pending: Option<CheckpointId>,
    ) {
        self.send(Command::Subsume { checkpoint, newest, oldest_pending });
    }

    /// A checkpoint was given up: pending ones from `needed_from` on are all that may still complete. Answer:
    /// `CheckpointCleaned`, when what was handed in before is written.
    pub(crate) fn release(&self, needed_from: CheckpointId) {
        self.send(Command::Release { needed_from });
    }

    /// Reads a task's state. Blocks.
    pub(crate) fn load(
        &self,
        slot: usize,
        checkpoint: CheckpointId,
    ) -> Result<LoadedTask, FailureCause> {
        lock(&self.store).load(slot, checkpoint.0).map_err(storage_cause)
    }

    /// Reads a task's declared state, entry by entry; that of some key groups alone, where they are given.
    /// Blocks, and the writer waits meanwhile.
    pub(crate) fn read_declared<T>(
        &self,
        slot: usize,
        checkpoint: CheckpointId,
        key_groups: Option<Range<u32>>,
        read: impl FnOnce(Entries<'_>) -> cofferdam_store::Result<T>,
    ) -> Result<T, FailureCause> {
        let store = lock(&self.store);
        store.declared_within(slot, checkpoint.0, key_groups).and_then(read).map_err(storage_cause)
    }

    fn send(&self, command: Command) {
        // The thread ends only after this sender; if it has panicked, its join tells.
        let _ = self.commands.send(command);
    }
}

impl StorageThread {
    /// Waits for the thread, whose handle must be gone, and gives the store back.
    pub(crate) fn join(self) -> Option<SnapshotStore> {
        self.thread.join().ok()?;
        Arc::into_inner(self.store)
            .map(|store| store.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

fn lock(store: &Mutex<SnapshotStore>) -> MutexGuard<'_, SnapshotStore> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(
    store: &Mutex<SnapshotStore>,
    mut commands: UnboundedReceiver<Command>,
    report: &impl Report,
) {
    let mut next = commands.blocking_recv();
    while let Some(command) = next.take() {
        let (mut snapshots, mut releases) = (Vec::new(), 0);
        match command {
            Command::Write(snapshot) => {
                snapshots.push(snapshot);
                loop {
                    match commands.try_recv() {
                        Ok(Command::Write(snapshot)) => snapshots.push(snapshot),
                        // Of what waits it says what may be written together.
                        Ok(Command::Release { needed_from }) => {
                            lock(store).release(needed_from.0);
                            releases += 1;
                        }
                        Ok(other) => {
                            next = Some(other);
                            break;
                        }
                        Err(_) => break,
                    }
                }
            }
            other => perform(&mut lock(store), other, report),
        }
        if !snapshots.is_empty() {
            write(&mut lock(store), snapshots, report);
            (0..releases).for_each(|_| report.event(Event::CheckpointCleaned));
        }
        if next.is_none() {
            next = commands.blocking_recv();
        }
    }
    // What was deleted last must not be there again for the next run.
    if let Err(error) = lock(store).flush() {
        report.warning(format!("make durable what was deleted: {error}"));
    }
}

fn write(store: &mut SnapshotStore, snapshots: Vec<Snapshot>, report: &impl Report) {
    let contents = snapshots
        .iter()
        .map(|snapshot| (snapshot.slot, snapshot.checkpoint.0, snapshot.content.clone()))
        .collect();
    let written = store.write(contents).map_err(storage_error);
    for (place, snapshot) in snapshots.iter().enumerate() {
        let Snapshot { task, attempt, checkpoint, .. } = *snapshot;
        match &written {
            Ok(bytes) => {
                report.written(checkpoint, bytes[place]);
                report.event(Event::SnapshotAcked { task, attempt, checkpoint });
            }
            Err(error) => {
                let error = error.clone();
                let reason = AbortReason::SnapshotNotStored { task: Some(task), error };
                report.event(Event::SnapshotDeclined { task, attempt, checkpoint, reason });
            }
        }
    }
}

fn perform(store: &mut SnapshotStore, command: Command, report: &impl Report) {
    match command {
        Command::Write(_) => {}
        Command::Inspect { checkpoint, answer } => {
            // The caller may have gone.
            let _ = answer.send(store.inspect(checkpoint.0).map_err(|error| error.to_string()));
        }
        Command::Begin { slots, restored_from } => {
            if let Err(error) = store.begin_attempt(&slots, restored_from.map(|id| id.0)) {
                let cause = FailureCause::Environment(storage_error(error));
                report.event(Event::TaskFailed { task: None, cause, lost: None });
            }
        }
        Command::Complete(checkpoint) => {
            report.event(match store.complete(checkpoint.0, now_ms()) {
                Ok(()) => Event::MetadataDurable { checkpoint },
                // To restart now would be to choose. The next run sees what is there.
                Err(error @ StorageError::InDoubt { .. }) => {
                    let obstacle = Obstacle::StoreInDoubt { os_error: error.os_error() };
                    let message = error.to_string();
                    let cause = FailureCause::Permanent { obstacle, message };
                    Event::TaskFailed { task: None, cause, lost: None }
                }
                Err(error) => Event::MetadataLost { checkpoint, error: storage_error(error) },
            });
        }
        Command::Export { checkpoint, dir } => {
            report.event(match savepoint::write(store, checkpoint.0, now_ms(), &dir) {
                Ok(()) => Event::SavepointDurable { checkpoint },
                Err(error) => Event::SavepointLost { checkpoint, error: storage_error(error) },
            });
        }
        Command::Subsume { checkpoint, newest, oldest_pending } => {
            if let Err(error) = store.subsume(checkpoint.0, newest.0, oldest_pending.map(|id| id.0))
            {
                report.warning(format!("reclaim the space of checkpoint {checkpoint}: {error}"));
            }
            report.event(Event::CheckpointCleaned);
        }
        Command::Release { needed_from } => {
            store.release(needed_from.0);
            report.event(Event::CheckpointCleaned);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use cofferdam_store::{memory::MemoryStorage, metadata::TaskIdentity};

    use super::*;

    struct Clumsy(mpsc::Sender<Event>);

    impl Report for Clumsy {
        fn event(&self, event: Event) {
            let _ = self.0.send(event);
        }

        fn written(&self, _: CheckpointId, _: u64) {
            panic!("it was to be expected");
        }

        fn warning(&self, _: String) {}
    }

    #[test]
    fn a_job_whose_storage_thread_has_panicked_fails() {
        let task = TaskId { node: cofferdam_core::ids::NodeId(0), index: 0 };
        let identity = TaskIdentity {
            operator: "count".to_owned(),
            uid: "count".to_owned(),
            index: 0,
            parallelism: 1,
            max_parallelism: 128,
            digest: Some([1; 16]),
            has_memory: true,
            has_declared: true,
            has_host_state: false,
            is_sink: false,
            connector: None,
            directories: None,
            config: 0,
            is_keyed: true,
            states: Vec::new(),
        };
        let store = SnapshotStore::open(Box::new(MemoryStorage::default()), "job", vec![identity]);
        let (sender, events) = mpsc::channel();
        let (handle, thread) =
            StorageHandle::start(store.expect("opens").0, Clumsy(sender)).expect("a thread");
        handle.write(0, task, Attempt(0), CheckpointId(1), Arc::default());
        let event = events.recv().expect("somebody says so");
        let is_told = matches!(
            event,
            Event::TaskFailed { task: None, cause: FailureCause::HostBug { .. }, .. }
        );
        assert!(is_told, "{event:?}");
        drop(handle);
        assert!(thread.join().is_some(), "the store comes back");
    }
}
