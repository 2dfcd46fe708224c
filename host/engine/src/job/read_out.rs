//! Reads declared state out of the image of a task's memory: the component that wrote it is put on the
//! image, and hands everything over, piece by piece.
//!
//! `open` is not called: what it was given is not stored, and it may act. Whatever the guest says or
//! counts meanwhile goes nowhere.

use std::sync::Arc;

use cofferdam_contract::StateChanges;
use cofferdam_sandbox::{
    Component, GuestError, Image, Instance, InstanceSetup, Limits, QuietHost, RestoreError,
    memory::PAGE_BYTES,
};
use cofferdam_store::{
    declared::OwnKeys,
    run::{Run, RunBuilder},
    snapshot::ReadOut,
};

/// Memory that a component may take on top of the image while it hands over.
const HEADROOM_BYTES: u64 = 64 << 20;

/// Asks an instance of a component that was not opened.
pub(crate) fn on_instance<T: Send>(
    component: &Component,
    limits: Limits,
    ask: impl AsyncFnOnce(&mut Instance) -> Result<T, GuestError> + Send,
) -> Result<T, GuestError> {
    let setup = InstanceSetup { host: Arc::new(QuietHost), limits, seed: 0 };
    // On a thread of its own: this one may be an executor's.
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            futures::executor::block_on(async {
                let mut instance = component.instantiate(setup).await?;
                ask(&mut instance).await
            })
        });
        asked.join()
    });
    answer.unwrap_or_else(|_| {
        Err(GuestError::Host("the question to the component panicked".to_owned()))
    })
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
            "it has handed over {handed_over} entries, and only {} of them have keys of their own",
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
            false => Err(GuestError::Unavailable("the job has ended".to_owned())),
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
