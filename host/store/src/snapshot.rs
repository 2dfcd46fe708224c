//! What a task hands over at a barrier, and what a task takes over from a checkpoint.

use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Instant};

use cofferdam_connector::state::ConnectorState;
use cofferdam_sandbox::{Image, MemorySnapshot};

use crate::{changes::Changes, in_flight::ChannelState, metadata::SnapshotStats, run::Run};

/// What one task hands over at a barrier.
#[derive(Debug, Default)]
pub struct TaskSnapshot {
    /// A source's position, a sink's transactions: always whole.
    pub state: ConnectorState,
    /// The task has processed the end of its inputs.
    pub is_drained: bool,
    /// The pages that changed.
    pub memory: Option<Arc<MemorySnapshot>>,
    /// The entries of declared state that changed. `None`: it is in the memory alone, where there is any.
    pub declared: Option<Arc<Changes>>,
    /// They are all there are: those of earlier snapshots count no more.
    pub is_declared_whole: bool,
    /// Records that the barrier has overtaken: always whole.
    pub in_flight: Arc<Vec<ChannelState>>,
    /// What it has cost so far.
    pub stats: SnapshotStats,
    /// When the task went on.
    pub taken_at: Option<Instant>,
}

impl TaskSnapshot {
    /// How much memory it takes up.
    pub fn bytes(&self) -> u64 {
        let pages = self.memory.as_ref().map_or(0, |memory| memory.changed_bytes());
        let declared = self.declared.as_ref().map_or(0, |declared| declared.bytes());
        pages + declared + self.state.len() as u64
    }

    /// The same with other pages.
    pub(crate) fn with_memory(&self, memory: Option<Arc<MemorySnapshot>>) -> Self {
        Self {
            state: self.state.clone(),
            is_drained: self.is_drained,
            memory,
            declared: self.declared.clone(),
            is_declared_whole: self.is_declared_whole,
            in_flight: self.in_flight.clone(),
            stats: self.stats,
            taken_at: self.taken_at,
        }
    }

    /// One that says what several say that follow each other; `None` where they cannot be made one.
    pub fn as_one(apart: &[&Self], max_parallelism: u32) -> Option<Self> {
        let last = apart.last()?;
        let memories: Vec<&MemorySnapshot> =
            apart.iter().filter_map(|it| it.memory.as_deref()).collect();
        let declared: Vec<&Changes> =
            apart.iter().filter_map(|it| it.declared.as_deref()).collect();
        let all_or_none = [0, apart.len()];
        if !all_or_none.contains(&memories.len()) || !all_or_none.contains(&declared.len()) {
            return None;
        }
        // Those before are none of it any more.
        let first = apart.iter().rposition(|it| it.is_declared_whole);
        let counting = declared.get(first.unwrap_or(0)..).unwrap_or_default();
        let declared = match declared.is_empty() {
            true => None,
            false => Some(Arc::new(Changes::as_one(counting, max_parallelism)?)),
        };
        Some(Self {
            state: last.state.clone(),
            is_drained: last.is_drained,
            memory: MemorySnapshot::merged(memories).map(Arc::new),
            declared,
            is_declared_whole: first.is_some(),
            in_flight: last.in_flight.clone(),
            stats: last.stats,
            taken_at: last.taken_at,
        })
    }
}

/// A task's state, read back; its declared state is read by [`SnapshotStore::declared`](crate::SnapshotStore::declared).
#[derive(Debug, Default)]
pub struct LoadedTask {
    /// See [`TaskSnapshot::state`].
    pub state: Vec<u8>,
    /// See [`TaskSnapshot::is_drained`].
    pub is_drained: bool,
    /// Snapshots of the memory, in the order they are applied to an image.
    pub memory: Vec<MemorySnapshot>,
    /// See [`TaskSnapshot::in_flight`].
    pub in_flight: Arc<Vec<ChannelState>>,
    /// What was read, in bytes.
    pub bytes: u64,
}

/// What a task begins with: state that was read, and whose declared state.
#[derive(Debug, Default)]
pub struct TaskRestore {
    /// Everything but declared state.
    pub state: LoadedTask,
    /// The tasks of the checkpoint whose declared state it takes over.
    pub declared_from: Vec<usize>,
    /// Of these key groups; `None`: all of it.
    pub key_groups: Option<Range<u32>>,
    /// The number that each of the states of the checkpoint has now; `None`: it is left behind. Empty:
    /// as they were.
    pub states: Vec<Option<u32>>,
    /// The declared state itself, where it had to be converted to the schemas of now.
    pub converted: Option<Run>,
    /// The declared state of tasks whose checkpoint holds it in the image of their memory alone: it was read
    /// out of that.
    pub read_out: BTreeMap<usize, Arc<Run>>,
    /// It takes over the image, with the declared state that is in it and nowhere else.
    pub is_in_image: bool,
}

/// Reads declared state out of the memory that it lies in.
pub trait ReadOut: Send + Sync {
    /// The declared state of a task in an image of its memory.
    ///
    /// # Errors
    /// What the component makes of it.
    fn read(&self, task: usize, image: &Image) -> Result<Run, String>;
}
