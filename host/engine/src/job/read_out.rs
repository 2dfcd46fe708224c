//! Reads declared state out of the image of a task's memory: the component that wrote it is put on the
//! image, and hands everything over, piece by piece.
//!
//! `open` is not called: what it was given is not stored, and it may act. Whatever the guest says or
//! counts meanwhile goes nowhere.

use std::{sync::Arc, time::Duration};

use cofferdam_contract::StateChanges;
use cofferdam_sandbox::{
    Component, GuestError, Image, Instance, InstanceSetup, Limits, MemorySnapshot, QuietHost,
    RestoreError, Sandbox, memory::PAGE_BYTES,
};
use cofferdam_settings::{Code, Problem};
use cofferdam_store::{
    self, SnapshotStore, StorageError,
    declared::{DeclaredKey, Entries, OwnKeys},
    metadata::{CheckpointMetadata, TaskIdentity},
    run::{Run, RunBuilder},
    snapshot::ReadOut,
};

use super::target::Failed;

/// Memory that a component may take on top of the image while it hands over.
const HEADROOM_BYTES: u64 = 64 << 20;

/// Asks an instance of a component that was not opened.
pub(crate) fn on_instance<T: Send>(
    component: &Component,
    limits: Limits,
    ask: impl AsyncFnOnce(&mut Instance) -> Result<T, GuestError> + Send,
) -> Result<T, GuestError> {
    let setup = InstanceSetup {
        host: Arc::new(QuietHost),
        limits,
        capabilities: Default::default(),
        seed: 0,
    };
    // On a thread of its own: this one may be an executor's.
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            alone(async {
                let mut instance = component.instantiate(setup).await?;
                ask(&mut instance).await
            })
        });
        asked.join()
    });
    answer
        .unwrap_or_else(|_| Err(GuestError::Host("the call to the component panicked".to_owned())))
}

/// Runs a call of a guest on this thread, with the timer that ends it where it waits for too long.
pub(super) fn alone<T>(call: impl Future<Output = Result<T, GuestError>>) -> Result<T, GuestError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.map_err(|error| GuestError::Unavailable {
        message: format!("make a timer for a guest: {error}"),
        os_error: error.raw_os_error(),
    })?;
    runtime.block_on(call)
}

/// Whose memory an image is of.
#[derive(Clone)]
pub(crate) struct OwnComponent {
    pub(crate) component: Component,
    pub(crate) max_parallelism: u32,
    pub(crate) own_keys: Option<OwnKeys>,
    pub(crate) limits: Limits,
}

impl OwnComponent {
    /// The declared state in an image of the component's memory.
    ///
    /// # Errors
    /// What the component makes of it; where it has state under a key that is not `own_keys`'; where it
    /// hands an entry over twice.
    pub(crate) fn read_out(&self, image: &Image) -> Result<Run, GuestError> {
        let (mut builder, mut handed_over) = (RunBuilder::new(self.max_parallelism), 0);
        self.each_piece(image, |piece| {
            handed_over += piece.states.len();
            builder.push(piece).map_err(|error| GuestError::Host(error.to_string()))
        })?;
        let run = builder.finish().map_err(|error| GuestError::Host(error.to_string()))?;
        if run.len() == handed_over {
            return Ok(run);
        }
        let message = format!(
            "it returned {handed_over} entries, but only {} of them have distinct keys",
            run.len()
        );
        Err(GuestError::Trap { message, backtrace: Vec::new() })
    }

    /// Hands the declared state in an image over and keeps nothing of it, to know that it can be; until
    /// `go_on` says no.
    ///
    /// # Errors
    /// See [`read_out`](Self::read_out).
    pub(crate) fn rehearse(
        &self,
        image: &Image,
        go_on: impl Fn() -> bool + Sync,
    ) -> Result<(), GuestError> {
        self.each_piece(image, |_| match go_on() {
            true => Ok(()),
            false => Err(GuestError::Unavailable {
                message: "the job has ended".to_owned(),
                os_error: None,
            }),
        })
    }

    fn each_piece(
        &self,
        image: &Image,
        mut take: impl FnMut(StateChanges) -> Result<(), GuestError> + Send,
    ) -> Result<(), GuestError> {
        if image.is_empty() {
            return Ok(());
        }
        let memory_bytes_max =
            self.limits.memory_bytes_max.max(image.size_bytes() + HEADROOM_BYTES);
        let limits = Limits { memory_bytes_max, ..self.limits.clone() };
        // Entries are smaller on their way than they are in memory, but for what the host counts of each.
        let bytes_max = 4 * image.size_bytes() + PAGE_BYTES as u64;
        on_instance(&self.component, limits, async |instance| {
            let restored = instance.restore(image).await;
            restored.map_err(|error| match error {
                RestoreError::Guest(error) => error,
                error => GuestError::Host(format!("put the component on the image: {error}")),
            })?;
            let take = |piece: StateChanges| {
                if let Some(own) = &self.own_keys {
                    own.check(&piece).map_err(GuestError::ForeignKey)?;
                }
                take(piece)
            };
            instance.hand_over_to(0, true, bytes_max, take).await
        })
    }
}

/// How the tasks of a job are read out, by slot.
pub(crate) struct OwnComponents {
    pub(crate) tasks: Vec<Option<OwnComponent>>,
}

impl ReadOut for OwnComponents {
    fn read(&self, task: usize, image: &Image) -> Result<Run, String> {
        match self.tasks.get(task) {
            Some(Some(own)) => own.read_out(image).map_err(|error| error.to_string()),
            _ => Err("it has no component".to_owned()),
        }
    }
}

/// Gives every entry of a task's declared state as of a checkpoint, in the order of its keys, until `give`
/// says that it has seen enough. What lies in the image of the memory alone is read out of it.
///
/// # Errors
/// Where it cannot be read.
pub fn each_declared(
    sandbox: &Sandbox,
    store: &SnapshotStore,
    metadata: &CheckpointMetadata,
    slot: usize,
    mut give: impl FnMut(&DeclaredKey, &[u8]) -> bool,
) -> Result<(), Problem> {
    let checkpoint = metadata.checkpoint;
    let damaged = |error: StorageError| {
        let message = format!("checkpoint {checkpoint} in {} is damaged", store.location());
        Problem::new(Code::StoreDamaged, message).because(&error)
    };
    let mut each = |entries: Entries<'_>| {
        for entry in entries {
            let (key, value) = entry.map_err(damaged)?;
            if value.is_some_and(|value| !give(&key, &value)) {
                break;
            }
        }
        Ok(())
    };
    if store.is_in_image(slot, checkpoint).map_err(damaged)? {
        let task = store.load(slot, checkpoint).map_err(damaged)?;
        // Nobody waits for it.
        let limits = Limits {
            call_max: Duration::from_secs(600),
            output_bytes_max: 2 << 30,
            ..Limits::default()
        };
        let run = read_out_task(Some(sandbox), limits, metadata, store, slot, task.memory);
        let run = run.map_err(|failed| match failed {
            Failed::Problem(problem) => *problem,
            Failed::Storage(error) => damaged(error),
        })?;
        return each(run.into_entries());
    }
    each(store.declared(slot, checkpoint).map_err(damaged)?)
}

/// Reads the declared state of a task of the checkpoint out of its memory, with the component that it ran.
pub(super) fn read_out_task(
    sandbox: Option<&Sandbox>,
    limits: Limits,
    metadata: &CheckpointMetadata,
    store: &SnapshotStore,
    slot: usize,
    memory: Vec<MemorySnapshot>,
) -> Result<Run, Failed> {
    let identity = &metadata.tasks[slot].identity;
    let refused = |what: String| {
        let message = format!("the declared state of {} cannot be read", identity.name());
        let problem = Problem::new(Code::StateMismatch, message)
            .detail(what)
            .detail("it is in the task's memory image, and only the component that wrote it can read it")
            .hint("resume with that component, the same parallelism and snapshot = \"both\"");
        Failed::Problem(Box::new(problem))
    };
    let bytes = store.component(slot, metadata.checkpoint).map_err(|error| match error {
        StorageError::Damaged { .. } => refused(error.to_string()),
        error => Failed::Storage(error),
    })?;
    let Some(sandbox) = sandbox else {
        return Err(refused("the job no longer has any operator".to_owned()));
    };
    let component = sandbox.load(&bytes);
    let component = component
        .map_err(|error| refused(format!("this version refuses the component: {error}")))?;
    let TaskIdentity { index, parallelism, max_parallelism, is_keyed, .. } = *identity;
    let own_keys = OwnKeys { index, parallelism, max_parallelism }.if_any(is_keyed);
    let image = Image::of(memory)
        .map_err(|error| StorageError::store("make the image of a memory", error))?;
    let own = OwnComponent { component, max_parallelism, own_keys, limits };
    own.read_out(&image)
        .map_err(|error| refused(format!("the component {}: {error}", own.component.digest())))
}
