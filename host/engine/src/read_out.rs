//! Reads declared state out of the image of a task's memory: the component that wrote it is put on the
//! image, and hands everything over, piece by piece.
//!
//! `open` is not called: what it was given is not stored, and it may act. Whatever the guest says or
//! counts meanwhile goes nowhere.

use std::sync::Arc;

use cofferdam_sandbox::{
    Component, GuestError, Image, Instance, InstanceSetup, Limits, MemorySnapshot, RestoreError,
    memory::PAGE_BYTES,
};

use crate::{
    job::QuietHost,
    storage::{
        declared::{Changes, Entry, OwnKeys},
        snapshot::ReadOut,
    },
};

/// Memory that a component may take on top of the image while it hands over.
const HEADROOM_BYTES: u64 = 64 << 20;

/// Asks an instance of a component that was not opened.
pub(crate) fn on_instance<T: Send>(
    component: &Component,
    limits: Limits,
    ask: impl AsyncFnOnce(&mut Instance) -> Result<T, GuestError> + Send,
) -> Result<T, String> {
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
    match answer {
        Ok(answer) => answer.map_err(|error: GuestError| error.to_string()),
        Err(_) => Err("the question to the component panicked".to_owned()),
    }
}

/// The declared state in an image of a component's memory, in the order of its keys.
///
/// # Errors
/// What the component makes of it; where it has state under a key that is not `own_keys`'; where it
/// hands an entry over twice.
pub(crate) fn read_out(
    component: &Component,
    memory: &[MemorySnapshot],
    max_parallelism: u32,
    own_keys: Option<OwnKeys>,
    limits: Limits,
) -> Result<Vec<Entry>, String> {
    let mut image = Image::new();
    for snapshot in memory {
        image.apply(snapshot).map_err(|error| format!("make the image of the memory: {error}"))?;
    }
    if image.is_empty() {
        return Ok(Vec::new());
    }
    let memory_bytes_max = limits.memory_bytes_max.max(image.size_bytes() + HEADROOM_BYTES);
    let limits = Limits { memory_bytes_max, ..limits };
    // Entries are smaller on their way than they are in memory, but for what the host counts of each.
    let bytes_max = 4 * image.size_bytes() + PAGE_BYTES as u64;
    let pieces = on_instance(component, limits, async |instance| {
        let restored = instance.restore(&image).await;
        restored.map_err(|error| match error {
            RestoreError::Guest(error) => error,
            error => GuestError::Host(format!("put the component on the image: {error}")),
        })?;
        instance.hand_over(0, true, bytes_max).await
    })?;
    if let Some(own) = own_keys {
        pieces.iter().try_for_each(|piece| own.check(piece))?;
    }
    let handed_over: usize = pieces.iter().map(|piece| piece.states.len()).sum();
    let changes = Changes::Guest(pieces);
    let entries: Result<Vec<Entry>, _> = changes.run(max_parallelism).collect();
    let entries = entries.map_err(|error| error.to_string())?;
    match entries.len() == handed_over {
        true => Ok(entries),
        false => Err(format!(
            "it has handed over {handed_over} entries, and only {} of them have keys of their own",
            entries.len()
        )),
    }
}

/// How the tasks of a job are read out, by slot.
pub(crate) struct OwnComponents {
    pub(crate) tasks: Vec<Option<OwnComponent>>,
}

/// The component of a task.
pub(crate) struct OwnComponent {
    pub(crate) component: Component,
    pub(crate) max_parallelism: u32,
    pub(crate) own_keys: Option<OwnKeys>,
    pub(crate) limits: Limits,
}

impl ReadOut for OwnComponents {
    fn read(&self, task: usize, memory: &[MemorySnapshot]) -> Result<Vec<Entry>, String> {
        let Some(Some(own)) = self.tasks.get(task) else {
            return Err("it has no component".to_owned());
        };
        let limits = own.limits.clone();
        read_out(&own.component, memory, own.max_parallelism, own.own_keys, limits)
    }
}
