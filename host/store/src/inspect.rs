//! What a checkpoint consists of, for people.

use crate::{
    Result,
    metadata::SnapshotStats,
    store::SnapshotStore,
    unpack::{is_in_image, read_header},
};

/// One task's part of a checkpoint, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskReport {
    /// `operator/index`.
    pub name: String,
    /// How many snapshots its state is the sum of: a full one and increments.
    pub snapshots: usize,
    /// The size of its linear memory.
    pub memory_bytes: u64,
    /// Pages in all of its snapshots.
    pub stored_pages: u64,
    /// Pages in the newest of them.
    pub increment_pages: u64,
    /// Entries of declared state; `None`: it has none, or it is in the image of its memory alone.
    pub declared_entries: Option<usize>,
    /// Whether it has declared state, and that is in the image of its memory alone.
    pub is_in_image: bool,
    /// A source's position, or a sink's transactions.
    pub state_bytes: u64,
    /// The task had processed the end of its inputs.
    pub is_drained: bool,
    /// What its newest snapshot has cost.
    pub stats: SnapshotStats,
}

impl SnapshotStore {
    /// What a completed checkpoint consists of, task by task. Reads headers, no pages.
    ///
    /// # Errors
    /// Where it is missing or damaged.
    pub fn inspect(&self, checkpoint: u64) -> Result<Vec<TaskReport>> {
        let opened = self.generation_of(checkpoint)?;
        let metadata = self.metadata(checkpoint)?;
        let reports = metadata.tasks.iter().enumerate().map(|(task, entry)| {
            let identity = &entry.identity;
            let mut report = TaskReport {
                name: format!("{}/{}", identity.operator, identity.index),
                snapshots: entry.chain.len(),
                stats: entry.stats,
                ..TaskReport::default()
            };
            for id in &entry.chain {
                let header = read_header(&*opened.generation, task, *id)?;
                report.memory_bytes = header.memories.iter().map(|(size, _)| size).sum();
                report.increment_pages = header.memories.iter().map(|(_, pages)| pages).sum();
                report.stored_pages += report.increment_pages;
                report.state_bytes = header.state_bytes();
                report.is_drained = header.is_drained;
            }
            if identity.has_declared {
                report.declared_entries =
                    match is_in_image(&*opened.generation, task, &entry.chain)? {
                        true => None,
                        false => Some(self.check_declared(task, checkpoint)?),
                    };
                report.is_in_image = report.declared_entries.is_none();
            }
            Ok(report)
        });
        reports.collect()
    }
}
