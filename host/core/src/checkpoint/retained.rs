//! Decides which completed checkpoints are kept.
//!
//! Flink's `DefaultCompletedCheckpointStore` with `CheckpointSubsumeHelper` (2.0).

use crate::ids::CheckpointId;

/// What a completed checkpoint was taken for, as far as keeping it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// By the timer, by a user, or as the last one of a job.
    Checkpoint,
    /// A savepoint while the job continues.
    Savepoint,
    /// The savepoint that a job was stopped with.
    StopSavepoint,
}

/// Completed checkpoints, oldest first.
#[derive(Debug, Clone)]
pub struct Retained {
    completed: Vec<(CheckpointId, Kind)>,
    retained_max: usize,
}

impl Retained {
    /// Keeps this many; at least one.
    #[must_use]
    pub fn new(retained_max: usize, completed: &[CheckpointId]) -> Self {
        let completed = completed.iter().map(|id| (*id, Kind::Checkpoint)).collect();
        Self { completed, retained_max: retained_max.max(1) }
    }

    /// The newest.
    #[must_use]
    pub fn latest(&self) -> Option<CheckpointId> {
        self.completed.last().map(|(id, _)| *id)
    }

    /// All that are kept, oldest first.
    pub fn ids(&self) -> impl Iterator<Item = CheckpointId> {
        self.completed.iter().map(|(id, _)| *id)
    }

    /// A checkpoint is complete. Gives those that are not kept any more, oldest first. Savepoints
    /// among them leave this list, but are never removed.
    pub fn add(&mut self, checkpoint: CheckpointId, kind: Kind) -> Vec<(CheckpointId, Kind)> {
        let place = self.completed.partition_point(|(id, _)| *id < checkpoint);
        self.completed.insert(place, (checkpoint, kind));
        let Some(&(latest, latest_kind)) = self.completed.last() else { return Vec::new() };
        let newest_checkpoint =
            self.completed.iter().rev().find(|(_, kind)| *kind == Kind::Checkpoint).map(|c| c.0);
        let mut excess = self.completed.len().saturating_sub(self.retained_max);
        let mut subsumed = Vec::new();
        self.completed.retain(|&(id, kind)| {
            let can_go = id != latest
                && match kind {
                    Kind::StopSavepoint => false,
                    Kind::Savepoint => true,
                    // The latest real checkpoint stays, unless the job was stopped after it.
                    Kind::Checkpoint => {
                        Some(id) != newest_checkpoint || latest_kind == Kind::StopSavepoint
                    }
                };
            if excess == 0 || !can_go {
                return true;
            }
            excess -= 1;
            subsumed.push((id, kind));
            false
        });
        subsumed
    }
}

#[cfg(test)]
mod tests {
    //! `DefaultCompletedCheckpointStoreTest`, row by row.

    use super::*;

    /// Adds `cp1 sp2 stop3`; gives what is kept.
    fn kept(retained_max: usize, sequence: &str) -> String {
        let mut retained = Retained::new(retained_max, &[]);
        let mut names = std::collections::BTreeMap::new();
        for name in sequence.split_whitespace() {
            let (kind, id) = name.split_at(name.len() - 1);
            let id = CheckpointId(id.parse().expect("a digit"));
            names.insert(id, name);
            let kind = match kind {
                "cp" => Kind::Checkpoint,
                "sp" => Kind::Savepoint,
                _ => Kind::StopSavepoint,
            };
            retained.add(id, kind);
        }
        retained.ids().map(|id| names[&id]).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn latest_checkpoint_stays_among_savepoints() {
        assert_eq!(kept(1, "cp1 cp2 sp3 sp4 sp5"), "cp2 sp5");
    }

    #[test]
    fn checkpoint_subsumes_savepoint() {
        assert_eq!(kept(1, "cp1 sp2 cp3"), "cp3");
    }

    #[test]
    fn stop_with_savepoint_subsumes_all() {
        assert_eq!(kept(1, "cp1 sp2 stop3"), "stop3");
    }

    #[test]
    fn all_are_kept_up_to_the_number() {
        assert_eq!(kept(3, "cp1 cp2 cp3"), "cp1 cp2 cp3");
        assert_eq!(kept(3, "cp1 sp2 cp3"), "cp1 sp2 cp3");
        assert_eq!(kept(3, "cp1 sp2 stop3"), "cp1 sp2 stop3");
        assert_eq!(kept(2, "cp1 cp2 cp3 cp4"), "cp3 cp4");
    }
}
