//! Decides when a task's snapshot is due.
//!
//! A task with several input channels may take its snapshot for checkpoint `n` only after the
//! barrier of `n` has arrived on all of them (aligned Chandy-Lamport). Channels that are early
//! are blocked: a record behind a barrier must not change state that belongs before it.
//!
//! **Invariant:** at most one checkpoint is being aligned. A newer barrier aborts the older one.

use std::collections::{BTreeMap, BTreeSet};

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

    /// The barrier overtakes what lies before it: the snapshot is to be taken now, and every channel
    /// unblocked. Gives the channels whose barrier had been taken by then; `None` where the
    /// checkpoint is over for this task.
    pub fn overtake(&mut self, checkpoint: CheckpointId) -> Option<BTreeSet<ChannelId>> {
        if self.last.is_some_and(|last| checkpoint <= last) {
            return None;
        }
        let arrived = match &mut self.phase {
            Phase::Aligning { checkpoint: current, .. } if checkpoint < *current => return None,
            Phase::Aligning { checkpoint: current, arrived } if *current == checkpoint => {
                std::mem::take(arrived)
            }
            Phase::Aligning { .. } | Phase::Open => BTreeSet::new(),
        };
        self.phase = Phase::Open;
        self.last = Some(checkpoint);
        Some(arrived)
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

/// Checkpoints whose barriers a tracker waits for at once; older ones are given up.
const TRACKED_MAX: usize = 50;

/// Counts the barriers of one task without blocking a channel: the task's records may count for
/// both sides of a barrier, which is at least once. Flink's `CheckpointBarrierTracker`.
#[derive(Debug, Clone)]
pub struct Tracker {
    channel_count: u32,
    pending: BTreeMap<CheckpointId, BTreeSet<ChannelId>>,
    last: Option<CheckpointId>,
}

impl Tracker {
    /// A task with this many input channels; none has delivered a barrier.
    #[must_use]
    pub fn new(channel_count: u32) -> Self {
        Self { channel_count, pending: BTreeMap::new(), last: None }
    }

    /// A barrier has arrived on a channel.
    pub fn on_barrier(&mut self, channel: ChannelId, checkpoint: CheckpointId) -> AlignStep {
        if self.last.is_some_and(|last| checkpoint <= last) {
            return AlignStep::Ignore;
        }
        let arrived = self.pending.entry(checkpoint).or_default();
        arrived.insert(channel);
        if arrived.len() == self.channel_count as usize {
            self.on_abort(checkpoint);
            return AlignStep::SnapshotNow;
        }
        if TRACKED_MAX < self.pending.len() {
            self.pending.pop_first();
        }
        AlignStep::Ignore
    }

    /// The coordinator gave up a checkpoint, and with it those before.
    pub fn on_abort(&mut self, checkpoint: CheckpointId) {
        self.pending = self.pending.split_off(&checkpoint.next());
        self.last = self.last.max(Some(checkpoint));
    }
}

/// How a task treats barriers: by the job's checkpointing mode.
#[derive(Debug, Clone)]
pub enum Barriers {
    /// Exactly once.
    Aligned(Aligner),
    /// At least once.
    Tracked(Tracker),
}

impl Barriers {
    /// A barrier has arrived on a channel.
    pub fn on_barrier(&mut self, channel: ChannelId, checkpoint: CheckpointId) -> AlignStep {
        match self {
            Self::Aligned(aligner) => aligner.on_barrier(channel, checkpoint),
            Self::Tracked(tracker) => tracker.on_barrier(channel, checkpoint),
        }
    }

    /// See [`Aligner::overtake`]. Where nothing is blocked, nothing needs to be overtaken.
    pub fn overtake(&mut self, checkpoint: CheckpointId) -> Option<BTreeSet<ChannelId>> {
        match self {
            Self::Aligned(aligner) => aligner.overtake(checkpoint),
            Self::Tracked(_) => None,
        }
    }

    /// The coordinator gave up a checkpoint; true if channels are to be unblocked.
    pub fn on_abort(&mut self, checkpoint: CheckpointId) -> bool {
        match self {
            Self::Aligned(aligner) => aligner.on_abort(checkpoint),
            Self::Tracked(tracker) => {
                tracker.on_abort(checkpoint);
                false
            }
        }
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
                ["overtake", checkpoint] => match aligner.overtake(id(checkpoint)) {
                    Some(arrived) => format!("snapshot, {} arrived", arrived.len()),
                    None => "nothing".to_owned(),
                },
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
    fn barrier_that_overtakes_ends_the_alignment_and_comes_again_in_vain() {
        check(
            "overtake #1  -> snapshot, 0 arrived
             barrier 0 #1 -> ignore
             barrier 0 #2 -> block
             overtake #2  -> snapshot, 1 arrived
             blocked 0    -> false
             barrier 1 #2 -> ignore
             overtake #2  -> nothing
             barrier 0 #3 -> block
             barrier 1 #4 -> abort #3
             overtake #3  -> nothing
             overtake #5  -> snapshot, 0 arrived
             barrier 0 #4 -> ignore
             abort #6     -> nothing
             overtake #6  -> nothing",
        );
    }

    #[test]
    fn tracker_blocks_nothing_and_snapshots_on_the_last_barrier() {
        let mut tracker = Tracker::new(2);
        let mut arrive = |channel, id| tracker.on_barrier(ChannelId(channel), CheckpointId(id));
        assert_eq!(arrive(0, 1), AlignStep::Ignore);
        assert_eq!(arrive(0, 2), AlignStep::Ignore);
        assert_eq!(arrive(1, 2), AlignStep::SnapshotNow);
        assert_eq!(arrive(1, 1), AlignStep::Ignore, "an older one is over with it");
        assert_eq!(arrive(0, 3), AlignStep::Ignore);
        tracker.on_abort(CheckpointId(3));
        assert_eq!(tracker.on_barrier(ChannelId(1), CheckpointId(3)), AlignStep::Ignore);
        for id in 10..10 + 2 * TRACKED_MAX as u64 {
            tracker.on_barrier(ChannelId(0), CheckpointId(id));
        }
        assert!(tracker.pending.len() <= TRACKED_MAX);
    }

    #[test]
    fn task_with_one_channel_never_blocks() {
        let mut aligner = Aligner::new(1);
        assert_eq!(aligner.on_barrier(ChannelId(0), CheckpointId(1)), AlignStep::SnapshotNow);
        assert_eq!(aligner.on_barrier(ChannelId(0), CheckpointId(1)), AlignStep::Ignore);
        assert_eq!(aligner.on_barrier(ChannelId(0), CheckpointId(5)), AlignStep::SnapshotNow);
    }
}
