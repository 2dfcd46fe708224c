//! Decides when a task's snapshot is due.
//!
//! A task with several input channels may take its snapshot for checkpoint `n` only after the
//! barrier of `n` has arrived on all of them (aligned Chandy-Lamport). Channels that are early
//! are blocked: a record behind a barrier must not change state that belongs before it.
//!
//! **Invariant:** at most one checkpoint is being aligned. A newer barrier aborts the older one.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{ChannelId, CheckpointId};

/// Aborted checkpoints that a task remembers at once. Flink's bound is 500 as well.
const ABORTED_MAX: usize = 500;

/// The checkpoints that are over for a task: everything up to the newest one it has snapshotted, and
/// each that the coordinator has aborted. An abort concerns its own checkpoint and no other: of
/// several concurrent checkpoints, an older one may still complete.
#[derive(Debug, Clone, Default)]
struct Over {
    last: Option<CheckpointId>,
    /// Aborted checkpoints after `last`.
    aborted: BTreeSet<CheckpointId>,
}

impl Over {
    fn contains(&self, checkpoint: CheckpointId) -> bool {
        self.last.is_some_and(|last| checkpoint <= last) || self.aborted.contains(&checkpoint)
    }

    /// Every checkpoint up to this one is over.
    fn up_to(&mut self, checkpoint: CheckpointId) {
        self.last = self.last.max(Some(checkpoint));
        self.aborted.retain(|aborted| self.last < Some(*aborted));
    }

    fn abort(&mut self, checkpoint: CheckpointId) {
        if !self.contains(checkpoint) {
            self.aborted.insert(checkpoint);
        }
        if ABORTED_MAX < self.aborted.len() {
            self.aborted.pop_first();
        }
    }
}

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
    over: Over,
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
        Self { channel_count, phase: Phase::Open, over: Over::default() }
    }

    /// A barrier has arrived on a channel.
    pub fn on_barrier(&mut self, channel: ChannelId, checkpoint: CheckpointId) -> AlignStep {
        if self.over.contains(checkpoint) {
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

    /// The coordinator has aborted this checkpoint; true if channels are to be unblocked.
    pub fn on_abort(&mut self, checkpoint: CheckpointId) -> bool {
        let aligning = matches!(&self.phase, Phase::Aligning { checkpoint: current, .. } if *current == checkpoint);
        if aligning {
            self.phase = Phase::Open;
        }
        self.over.abort(checkpoint);
        aligning
    }

    /// The barrier overtakes what lies before it: the snapshot is to be taken now, and every channel
    /// unblocked. Gives the channels whose barrier had been taken by then; `None` where the
    /// checkpoint is over for this task.
    pub fn overtake(&mut self, checkpoint: CheckpointId) -> Option<BTreeSet<ChannelId>> {
        if self.over.contains(checkpoint) {
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
        self.over.up_to(checkpoint);
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
        self.over.up_to(*checkpoint);
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
    over: Over,
}

impl Tracker {
    /// A task with this many input channels; none has delivered a barrier.
    #[must_use]
    pub fn new(channel_count: u32) -> Self {
        Self { channel_count, pending: BTreeMap::new(), over: Over::default() }
    }

    /// A barrier has arrived on a channel.
    pub fn on_barrier(&mut self, channel: ChannelId, checkpoint: CheckpointId) -> AlignStep {
        if self.over.contains(checkpoint) {
            return AlignStep::Ignore;
        }
        let arrived = self.pending.entry(checkpoint).or_default();
        arrived.insert(channel);
        if arrived.len() == self.channel_count as usize {
            // A snapshot subsumes those of the checkpoints before it.
            self.pending = self.pending.split_off(&checkpoint.next());
            self.over.up_to(checkpoint);
            return AlignStep::SnapshotNow;
        }
        if TRACKED_MAX < self.pending.len() {
            self.pending.pop_first();
        }
        AlignStep::Ignore
    }

    /// The coordinator has aborted this checkpoint.
    pub fn on_abort(&mut self, checkpoint: CheckpointId) {
        self.pending.remove(&checkpoint);
        self.over.abort(checkpoint);
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

    /// The task begins after this checkpoint: it and all before are over.
    pub fn begin_after(&mut self, checkpoint: CheckpointId) {
        match self {
            Self::Aligned(aligner) => aligner.over.up_to(checkpoint),
            Self::Tracked(tracker) => tracker.over.up_to(checkpoint),
        }
    }

    /// The coordinator has aborted this checkpoint; true if channels are to be unblocked.
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

    /// Two concurrent checkpoints: giving up the newer one used to end the older one's alignment, which
    /// then waited for its timeout.
    #[test]
    fn an_abort_ends_its_own_checkpoint_and_no_other() {
        check(
            "barrier 0 #5 -> block
             abort #6     -> nothing
             blocked 0    -> true
             barrier 1 #5 -> snapshot
             barrier 0 #6 -> ignore
             barrier 1 #6 -> ignore
             barrier 0 #7 -> block
             abort #5     -> nothing
             barrier 1 #7 -> snapshot
             abort #9     -> nothing
             barrier 0 #8 -> block
             overtake #9  -> nothing
             barrier 1 #8 -> snapshot",
        );
        let mut tracker = Tracker::new(2);
        let (left, right) = (ChannelId(0), ChannelId(1));
        tracker.on_barrier(left, CheckpointId(5));
        tracker.on_abort(CheckpointId(6));
        assert_eq!(tracker.on_barrier(right, CheckpointId(5)), AlignStep::SnapshotNow);
        tracker.on_barrier(left, CheckpointId(6));
        assert_eq!(tracker.on_barrier(right, CheckpointId(6)), AlignStep::Ignore);
    }

    #[test]
    fn aborts_are_remembered_within_a_bound() {
        let mut aligner = Aligner::new(1);
        (1..1_000).for_each(|id| assert!(!aligner.on_abort(CheckpointId(id))));
        assert!(aligner.over.aborted.len() <= ABORTED_MAX);
        assert_eq!(aligner.on_barrier(ChannelId(0), CheckpointId(999)), AlignStep::Ignore);
        assert_eq!(aligner.on_barrier(ChannelId(0), CheckpointId(1_000)), AlignStep::SnapshotNow);
        assert!(aligner.over.aborted.is_empty());
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
