//! Brings records into a job, from a position that can be restored.

use std::task::{Context, Poll};

use cofferdam_contract::Batch;
use cofferdam_core::ids::CheckpointId;

use crate::{Answer, Result, ready};

/// The output of isolated and of bad records. A node that has one has it from the host.
pub const DEAD_LETTER: &str = "dead-letter";

/// The number of that output, of a source.
pub const DEAD_LETTER_OUTPUT: u32 = 1;

/// What a source gives.
#[derive(Debug)]
pub enum Step {
    /// Records, at most about one batch.
    Records {
        /// The good ones, in order.
        batch: Batch,
        /// The bad ones, for the output of dead letters.
        letters: Option<Box<Batch>>,
        /// How many records were bad, with a letter or without.
        bad: u64,
        /// Event time behind all of them: no record of this time or an earlier one will come.
        watermark: Option<i64>,
    },
    /// Event time has moved on without a record.
    Watermark(i64),
    /// No record will come for a while: until one does, this task does not hold event time back.
    Idle,
    /// The input has ended.
    End,
}

impl Step {
    /// Records without a bad one among them.
    #[must_use]
    pub fn records(batch: Batch, watermark: Option<i64>) -> Self {
        Self::Records { batch, letters: None, bad: 0, watermark }
    }
}

/// How far a source is behind what there is to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lag {
    /// Records that are there and were not given out yet; `None` where the source cannot know.
    pub records: Option<u64>,
    /// Whether it works off a backlog (Flink's FLIP-309): freshness matters less than speed meanwhile. `None`
    /// leaves it to the job, which can compare event time with the clock.
    pub is_backlog: Option<bool>,
}

/// One task of a source.
///
/// The task asks in turns: [`poll_next`](Self::poll_next) while there is credit downstream,
/// [`complete_step`](Self::complete_step) and [`position`](Self::position) at each barrier,
/// [`on_complete`](Self::on_complete) when a checkpoint is complete. A source that is dropped must leave
/// nothing behind that a later attempt cannot cope with.
pub trait Source: Send {
    /// The next step. `Pending` means that there is nothing at the moment, and that the task is woken when
    /// there is. Must not block; may be called again without having been woken.
    ///
    /// # Errors
    /// Where the outside fails, or what is there makes no sense.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Step>>;

    /// Whether nothing is under way: `Pending` then means that there is nothing at the moment, and what the task has
    /// collected goes out at once.
    fn is_between_steps(&self) -> bool {
        true
    }

    /// Ends what is under way before a position is asked for: a step that was begun and not given out. It is
    /// called until it gives `None`, and what it gives lies before the position.
    ///
    /// # Errors
    /// As [`poll_next`](Self::poll_next).
    fn complete_step(&mut self) -> Answer<'_, Option<Step>> {
        ready(Ok(None))
    }

    /// The position behind every step that was given out: a later attempt that opens here gives exactly what
    /// would have come next.
    ///
    /// # Errors
    /// Where what was read has changed, so that no attempt could continue from here.
    fn position(&mut self) -> Answer<'_, Vec<u8>>;

    /// A checkpoint is complete: what lies before its position will not be read again. The place to commit
    /// offsets and to acknowledge messages.
    ///
    /// # Errors
    /// Where the outside has to know and cannot be told. The task fails, and reads again from that position.
    fn on_complete(&mut self, checkpoint: CheckpointId) -> Answer<'_, ()> {
        let _ = checkpoint;
        ready(Ok(()))
    }

    /// How far it is behind. Asked after each step, so it must be cheap.
    fn lag(&self) -> Lag {
        Lag::default()
    }
}
