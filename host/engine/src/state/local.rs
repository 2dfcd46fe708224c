//! What this process keeps of a task between its attempts: the image of the last completed
//! checkpoint, and the snapshots taken since.
//!
//! **Invariant:** the image is brought forward only by snapshots of completed checkpoints, so a
//! restart always finds the state of one.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use cofferdam_connector::state::ConnectorState;
use cofferdam_core::ids::CheckpointId;
use cofferdam_sandbox::{Image, Instance};
use cofferdam_store::{
    in_flight::ChannelState,
    snapshot::{LoadedTask, TaskSnapshot},
};
use tokio::runtime::Handle;

use crate::state::{
    as_of::AsOf,
    keyed::{KeyedState, LoadToken},
};

/// Snapshots that wait for their checkpoints may take so much memory, or as much as the state.
const FOLD_BYTES_MIN: u64 = 16 << 20;
/// Or where they are more than this.
const FOLD_COUNT_MIN: usize = 256;

/// One task's local copy of its state.
#[derive(Default)]
pub(crate) struct TaskLocal {
    inner: Mutex<Inner>,
    /// Declared state that the host keeps.
    pub(crate) keyed: Option<Arc<KeyedState>>,
    /// The instance of the attempt before, whose memory is still mapped.
    retired: Mutex<Option<Instance>>,
    /// Whether there is one: asked once a batch.
    has_retired: AtomicBool,
    /// How many records the next attempt guards, because the operator has trapped; 0: none.
    records_to_guard: AtomicU64,
    /// How many records come to the next attempt one at a time, because a call with several has failed at a limit.
    records_alone: AtomicU64,
}

/// The image of a task while a guest maps it. Goes back when it is dropped, also where the attempt is
/// aborted in between.
pub(crate) struct Lent<'a> {
    local: &'a TaskLocal,
    token: LoadToken,
    at: AsOf,
    pub(crate) image: Image,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut inner = self.local.lock();
        if inner.token == self.token {
            (inner.image, inner.at) = (std::mem::take(&mut self.image), self.at);
        }
    }
}

/// The state of a task as of a completed checkpoint.
#[derive(Debug, Default)]
pub(crate) struct Inner {
    /// That of the newest attempt.
    token: LoadToken,
    /// What everything below is of.
    at: AsOf,
    image: Image,
    pub(crate) state: ConnectorState,
    pub(crate) is_drained: bool,
    pub(crate) in_flight: Arc<Vec<ChannelState>>,
    /// Snapshots of checkpoints that are not known to be complete, oldest first.
    pending: VecDeque<(CheckpointId, Arc<TaskSnapshot>)>,
}

impl TaskLocal {
    /// Nothing yet, of a task whose declared state the host may keep.
    pub(crate) fn new(keyed: Option<Arc<KeyedState>>) -> Self {
        Self { keyed, ..Self::default() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the image out, so that no lock is held over an await. Nothing is here meanwhile.
    pub(crate) fn lend_image(&self) -> Lent<'_> {
        let mut inner = self.lock();
        let image = std::mem::take(&mut inner.image);
        Lent { local: self, token: inner.token, at: std::mem::take(&mut inner.at), image }
    }

    /// A copy of the image.
    ///
    /// # Errors
    /// Where there is no memory left.
    pub(crate) fn copy_image(&self) -> io::Result<Image> {
        self.lock().image.copy()
    }

    /// The operator has trapped, and the record that made it will be among the next so many.
    pub(crate) fn guard_next(&self, records: u64) {
        self.records_to_guard.store(records, Ordering::Relaxed);
    }

    /// How many records are to be guarded.
    pub(crate) fn records_to_guard(&self) -> u64 {
        self.records_to_guard.load(Ordering::Relaxed)
    }

    /// A call with several records has failed at a limit: they will be among the next so many.
    pub(crate) fn call_alone(&self, records: u64) {
        self.records_alone.store(records, Ordering::Relaxed);
    }

    /// How many records come alone.
    pub(crate) fn records_alone(&self) -> u64 {
        self.records_alone.load(Ordering::Relaxed)
    }

    /// Keeps an instance that has ended until its successor runs.
    pub(crate) fn retire(&self, instance: Instance) {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        let before = retired.replace(instance);
        self.has_retired.store(true, Ordering::Relaxed);
        drop(retired);
        unmap(before);
    }

    /// The successor runs: now there is time to unmap.
    pub(crate) fn drop_retired(&self) {
        if self.has_retired.load(Ordering::Relaxed) {
            self.has_retired.store(false, Ordering::Relaxed);
            unmap(self.retired.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }
}

fn unmap(instance: Option<Instance>) {
    if let (Some(instance), Ok(runtime)) = (instance, Handle::try_current()) {
        runtime.spawn_blocking(move || drop(instance));
    }
}

impl Inner {
    /// Keeps a snapshot until its checkpoint's fate is known; but for what was handed over, which the store
    /// alone needs.
    pub(crate) fn push(&mut self, checkpoint: CheckpointId, snapshot: Arc<TaskSnapshot>) {
        let kept = match snapshot.declared {
            None => snapshot,
            Some(_) => Arc::new(TaskSnapshot {
                state: snapshot.state.clone(),
                is_drained: snapshot.is_drained,
                memory: snapshot.memory.clone(),
                in_flight: snapshot.in_flight.clone(),
                ..TaskSnapshot::default()
            }),
        };
        self.pending.push_back((checkpoint, kept));
    }

    /// No checkpoint before this one will complete any more: snapshots for them count only as part of the
    /// next, and where those that wait have become more than the state they are merged. Costs a copy of
    /// them, so not to be called where a guest waits.
    pub(crate) fn fold(&mut self, completed: Option<CheckpointId>, needed_from: CheckpointId) {
        // What is complete and not applied yet is not to be made part of anything.
        if self.pending.front().is_some_and(|(id, _)| Some(*id) <= completed) {
            return;
        }
        let waiting: u64 = self.pending.iter().map(|(_, snapshot)| snapshot.bytes()).sum();
        let is_few = self.pending.len() <= FOLD_COUNT_MIN;
        if is_few && waiting <= FOLD_BYTES_MIN.max(self.image.size_bytes()) {
            return;
        }
        let apart = self.pending.partition_point(|(id, _)| *id < needed_from);
        let snapshots: Vec<&TaskSnapshot> =
            self.pending.range(..apart).map(|(_, snapshot)| &**snapshot).collect();
        // Nothing is kept here that was handed over, so it does not matter how that is dealt out.
        let Some(whole) = TaskSnapshot::as_one(&snapshots, 1) else { return };
        let id = self.pending[apart - 1].0;
        self.pending.drain(..apart);
        self.pending.push_front((id, Arc::new(whole)));
    }

    /// A checkpoint is complete: brings the image forward to it. Costs a copy of the changed
    /// pages, so not to be called where a guest waits.
    ///
    /// # Errors
    /// Where there is no memory left; nothing is here then until an attempt has loaded it.
    pub(crate) fn apply_completed(&mut self, checkpoint: CheckpointId) -> io::Result<()> {
        while let Some((taken_for, snapshot)) =
            self.pending.pop_front_if(|(id, _)| *id <= checkpoint)
        {
            // An increment is nothing without what it stands on.
            if self.at == AsOf::Unknown {
                continue;
            }
            if let Some(memory) = &snapshot.memory
                && let Err(error) = self.image.apply(memory)
            {
                self.clear();
                return Err(error);
            }
            self.state.clone_from(&snapshot.state);
            self.is_drained = snapshot.is_drained;
            self.in_flight = snapshot.in_flight.clone();
            self.at = AsOf::Checkpoint(taken_for);
        }
        Ok(())
    }

    /// An attempt begins at a checkpoint; `None`: at the beginning. The state may not be here, and must be
    /// [loaded](Self::load) with the token that is returned.
    pub(crate) fn rewind(&mut self, checkpoint: Option<CheckpointId>) -> Option<LoadToken> {
        self.token.renew();
        let Some(checkpoint) = checkpoint else {
            self.clear();
            self.at = AsOf::Beginning;
            return None;
        };
        if let Err(error) = self.apply_completed(checkpoint) {
            tracing::warn!(%error, "the local image is lost: it is read from the storage");
        }
        self.pending.clear();
        (self.at != AsOf::Checkpoint(checkpoint)).then_some(self.token)
    }

    /// Takes over what was loaded from the storage. Does nothing if another attempt has begun
    /// meanwhile.
    ///
    /// # Errors
    /// Where there is no memory left.
    pub(crate) fn load(
        &mut self,
        token: LoadToken,
        checkpoint: CheckpointId,
        loaded: &LoadedTask,
    ) -> io::Result<()> {
        if self.token != token {
            return Ok(());
        }
        self.clear();
        self.image = Image::of(&loaded.memory)?;
        self.state = loaded.state.clone().into();
        self.is_drained = loaded.is_drained;
        self.in_flight = loaded.in_flight.clone();
        self.at = AsOf::Checkpoint(checkpoint);
        Ok(())
    }

    fn clear(&mut self) {
        *self = Self { token: self.token, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_sandbox::{MemoryDelta, MemorySnapshot, memory::PAGE_BYTES};
    use cofferdam_store::{
        changes::Changes,
        declared::{DeclaredKey, changes_of},
    };

    use super::*;

    fn id(number: u64) -> CheckpointId {
        CheckpointId(number)
    }

    fn snapshot(state: u8) -> Arc<TaskSnapshot> {
        Arc::new(TaskSnapshot { state: vec![state].into(), ..TaskSnapshot::default() })
    }

    #[test]
    fn only_completed_checkpoints_are_restored() {
        let local = TaskLocal::default();
        let mut inner = local.lock();
        inner.rewind(None);
        (1..=3).for_each(|number| inner.push(id(number), snapshot(number as u8)));
        inner.apply_completed(id(1)).expect("memory");
        assert_eq!(inner.state.to_vec(), [1]);
        assert_eq!(inner.rewind(Some(id(2))), None, "2 completed unnoticed");
        assert_eq!(inner.state.to_vec(), [2]);
        inner.apply_completed(id(3)).expect("memory");
        assert_eq!(inner.state.to_vec(), [2], "3 was taken by the attempt before");
        assert!(inner.rewind(Some(id(9))).is_some(), "9 is not here");
        assert_eq!(inner.rewind(None), None);
        assert!(inner.state.is_empty());
    }

    #[test]
    fn what_an_aborted_attempt_still_loads_is_not_what_the_next_one_finds() {
        let local = TaskLocal::default();
        let mut inner = local.lock();
        let loaded = |state: u8| LoadedTask { state: vec![state], ..LoadedTask::default() };
        let aborted = inner.rewind(Some(id(4))).expect("nothing is here");
        let next = inner.rewind(Some(id(5))).expect("nothing is here");
        inner.load(next, id(5), &loaded(5)).expect("memory");
        inner.load(aborted, id(4), &loaded(4)).expect("memory");
        assert_eq!(inner.rewind(Some(id(5))), None);
        assert_eq!(inner.state.to_vec(), [5]);
    }

    #[test]
    fn an_increment_does_not_stand_for_an_image_that_was_lost() {
        let local = TaskLocal::default();
        let mut inner = local.lock();
        inner.rewind(None);
        inner.push(id(1), snapshot(1));
        inner.apply_completed(id(1)).expect("memory");
        // As it is when there was no memory for the next one.
        inner.clear();
        inner.push(id(2), snapshot(2));
        inner.apply_completed(id(2)).expect("memory");
        assert!(inner.rewind(Some(id(2))).is_some(), "it must be loaded");
        assert!(inner.state.is_empty());
    }

    #[test]
    fn an_image_that_is_lent_comes_back_but_not_to_another_attempt() {
        let local = TaskLocal::default();
        let is_here = |number| local.lock().rewind(Some(id(number))).is_none();
        {
            let mut inner = local.lock();
            inner.rewind(None);
            inner.push(id(1), snapshot(1));
            assert_eq!(inner.rewind(Some(id(1))), None);
        }
        drop(local.lend_image());
        assert!(is_here(1));
        let lent = local.lend_image();
        assert!(!is_here(1), "somebody else has its image");
        drop(lent);
        assert!(!is_here(1), "the attempt after it has not waited");
    }

    #[test]
    fn snapshots_of_checkpoints_that_never_complete_take_the_space_of_one_state() {
        let delta = |from: u32, byte: u8| {
            let mut delta = MemoryDelta::new(64 << 20);
            for page in from..from + 3_000 {
                delta.push(page, &[byte; PAGE_BYTES]);
            }
            let memory = MemorySnapshot {
                memories: vec![delta],
                globals: vec![byte.into()],
                monotonic_ns: 0,
            };
            // What was handed over is the store's, and is not needed here.
            let key = DeclaredKey::new(0, b"key", 0, 128);
            let entry = (key, Some(vec![byte; 4 << 20]));
            Arc::new(TaskSnapshot {
                state: vec![byte].into(),
                memory: Some(Arc::new(memory)),
                declared: Some(Arc::new(Changes::Guest(vec![changes_of([&entry].into_iter())]))),
                ..TaskSnapshot::default()
            })
        };
        let mut inner = Inner { at: AsOf::Beginning, ..Inner::default() };
        for number in 1..=40u8 {
            let checkpoint = id(number.into());
            inner.push(checkpoint, delta(u32::from(number) * 10, number));
            inner.fold(None, checkpoint.next());
            let pages = |it: &TaskSnapshot| {
                it.memory.as_ref().map_or(0, |memory| memory.memories[0].page_count())
            };
            let waiting: usize = inner.pending.iter().map(|(_, snapshot)| pages(snapshot)).sum();
            assert!(waiting <= 8_000, "{waiting} pages after {number}");
            let bytes: u64 = inner.pending.iter().map(|(_, snapshot)| snapshot.bytes()).sum();
            assert!(bytes <= FOLD_BYTES_MIN + (20 << 20), "{bytes} bytes after {number}");
        }
        inner.apply_completed(id(40)).expect("there is memory");
        assert_eq!((inner.at, &inner.state.to_vec()[..]), (AsOf::Checkpoint(id(40)), &[40][..]));
        assert_eq!(inner.image.size_bytes(), 64 << 20);
    }
}
