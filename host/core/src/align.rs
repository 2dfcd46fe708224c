//! Decides when a task's snapshot is due.
//!
//! A task with several input channels may take its snapshot for checkpoint `n` only after the
//! barrier of `n` has arrived on all of them (aligned Chandy-Lamport). Channels that are early
//! are blocked: a record behind a barrier must not change state that belongs before it.
//!
//! **Invariant:** at most one checkpoint is being aligned. A newer barrier aborts the older one.

use std::collections::BTreeSet;

use crate::ids::{ChannelId, CheckpointId};

/// What a task does about a barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlignStep {
    /// Take nothing more from this channel until the snapshot is taken.
    Block,
    /// Every channel has delivered the barrier: unblock all, take the snapshot, forward.
    SnapshotNow,
    /// The barrier belongs to a checkpoint that is over.
    Ignore,
    /// The barrier is of a newer checkpoint: unblock what `aborted` had blocked, then block this
    /// channel.
    Restart {
        /// The checkpoint that this task will never snapshot.
        aborted: CheckpointId,
    },
}

/// Tracks the barriers of one task.
///
/// ```
/// # use cofferdam_core::{align::{Aligner, AlignStep}, ids::{ChannelId, CheckpointId}};
/// let mut aligner = Aligner::new(2);
/// assert_eq!(aligner.on_barrier(ChannelId(0), CheckpointId(7)), AlignStep::Block);
/// assert_eq!(aligner.on_barrier(ChannelId(1), CheckpointId(7)), AlignStep::SnapshotNow);
/// ```
#[derive(Debug, Clone)]
pub struct Aligner {
    channel_count: u32,
    phase: Phase,
    /// The newest checkpoint whose alignment has ended, one way or the other.
    last: Option<CheckpointId>,
}

#[derive(Debug, Clone)]
enum Phase {
    Open,
    Aligning { checkpoint: CheckpointId, arrived: BTreeSet<ChannelId> },
}

impl Aligner {
    /// A task with this many input channels; none has delivered a barrier.
    #[must_use]
    pub fn new(channel_count: u32) -> Self {
        Self { channel_count, phase: Phase::Open, last: None }
    }

    /// A barrier has arrived on a channel.
    pub fn on_barrier(&mut self, channel: ChannelId, checkpoint: CheckpointId) -> AlignStep {
        if self.last.is_some_and(|last| checkpoint <= last) {
            return AlignStep::Ignore;
        }
        let aborted = match &mut self.phase {
            Phase::Aligning { checkpoint: current, arrived } if *current == checkpoint => {
                arrived.insert(channel);
                return self.step_when_complete(AlignStep::Block);
            }
            Phase::Aligning { checkpoint: current, .. } if checkpoint < *current => {
                return AlignStep::Ignore;
            }
            Phase::Aligning { checkpoint: current, .. } => Some(*current),
            Phase::Open => None,
        };
        self.phase = Phase::Aligning { checkpoint, arrived: BTreeSet::from([channel]) };
        self.step_when_complete(match aborted {
            Some(aborted) => AlignStep::Restart { aborted },
            None => AlignStep::Block,
        })
    }

    /// The coordinator gave up a checkpoint; true if channels are to be unblocked.
    pub fn on_abort(&mut self, checkpoint: CheckpointId) -> bool {
        let aligning = matches!(&self.phase, Phase::Aligning { checkpoint: current, .. } if *current <= checkpoint);
        if aligning {
            self.phase = Phase::Open;
        }
        self.last = self.last.max(Some(checkpoint));
        aligning
    }

    /// True while nothing may be taken from this channel.
    #[must_use]
    pub fn is_blocked(&self, channel: ChannelId) -> bool {
        matches!(&self.phase, Phase::Aligning { arrived, .. } if arrived.contains(&channel))
    }

    fn step_when_complete(&mut self, otherwise: AlignStep) -> AlignStep {
        let Phase::Aligning { checkpoint, arrived } = &self.phase else { return otherwise };
        if arrived.len() < self.channel_count as usize {
            return otherwise;
        }
        self.last = Some(*checkpoint);
        self.phase = Phase::Open;
        AlignStep::SnapshotNow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs lines like `barrier 1 #7` against a task of two channels; compares the answers.
    fn check(script: &str) {
        let mut aligner = Aligner::new(2);
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (input, expected) = line.split_once("->").expect("input -> answer");
            let words: Vec<&str> = input.split_whitespace().collect();
            let id = |word: &str| CheckpointId(word.trim_start_matches('#').parse().expect("id"));
            let answer = match words.as_slice() {
                ["barrier", channel, checkpoint] => {
                    let channel = ChannelId(channel.parse().expect("channel"));
                    match aligner.on_barrier(channel, id(checkpoint)) {
                        AlignStep::Block => "block".to_owned(),
                        AlignStep::SnapshotNow => "snapshot".to_owned(),
                        AlignStep::Ignore => "ignore".to_owned(),
                        AlignStep::Restart { aborted } => format!("abort #{aborted}"),
                    }
                }
                ["abort", checkpoint] => {
                    if aligner.on_abort(id(checkpoint)) { "unblock" } else { "nothing" }.to_owned()
                }
                ["blocked", channel] => {
                    aligner.is_blocked(ChannelId(channel.parse().expect("channel"))).to_string()
                }
                other => panic!("{other:?}"),
            };
            assert_eq!(answer, expected.trim(), "{line}");
        }
    }

    #[test]
    fn snapshot_waits_for_the_barrier_on_every_channel() {
        check(
            "barrier 0 #1 -> block
             blocked 0    -> true
             blocked 1    -> false
             barrier 1 #1 -> snapshot
             blocked 0    -> false",
        );
    }

    #[test]
    fn newer_barrier_aborts_the_older_alignment() {
        check(
            "barrier 0 #1 -> block
             barrier 1 #2 -> abort #1
             blocked 0    -> false
             blocked 1    -> true
             barrier 1 #1 -> ignore
             barrier 0 #2 -> snapshot",
        );
    }

    #[test]
    fn barrier_of_an_aborted_checkpoint_blocks_nothing() {
        check(
            "barrier 0 #1 -> block
             abort #1     -> unblock
             barrier 1 #1 -> ignore
             blocked 1    -> false
             abort #3     -> nothing
             barrier 0 #3 -> ignore
             barrier 0 #4 -> block",
        );
    }

    #[test]
    fn task_with_one_channel_never_blocks() {
        let mut aligner = Aligner::new(1);
        assert_eq!(aligner.on_barrier(ChannelId(0), CheckpointId(1)), AlignStep::SnapshotNow);
        assert_eq!(aligner.on_barrier(ChannelId(0), CheckpointId(1)), AlignStep::Ignore);
        assert_eq!(aligner.on_barrier(ChannelId(0), CheckpointId(5)), AlignStep::SnapshotNow);
    }
}
