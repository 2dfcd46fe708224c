//! Decides which waiting request for a checkpoint runs next, and which is dropped.
//!
//! Flink's `CheckpointRequestDecider` (2.0): savepoints before checkpoints, forced before others,
//! what a user asked for before what the timer did, then by age.

use std::cmp::Reverse;

use super::Trigger;
use crate::ids::Millis;

/// Requests that may wait. Flink's limit.
pub const QUEUE_MAX: usize = 1_000;

/// Somebody wants a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What is wanted.
    pub trigger: Trigger,
    /// Runs although as many checkpoints are pending as may be.
    pub is_forced: bool,
    /// The timer asks, and not a user.
    pub is_periodic: bool,
    /// When it was made.
    pub at: Millis,
    /// Tells apart requests of one millisecond; ascends.
    pub number: u64,
}

impl Request {
    fn priority(&self) -> impl Ord + use<> {
        let is_savepoint = matches!(self.trigger, Trigger::Savepoint { .. });
        (Reverse(is_savepoint), Reverse(self.is_forced), self.is_periodic, self.at, self.number)
    }
}

/// What the decision depends on beside the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Checkpoints that are neither complete nor given up.
    pub pending: usize,
    /// Checkpoints whose data are being removed.
    pub cleaning: usize,
    /// When the last one completed.
    pub last_completed_at: Option<Millis>,
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Nothing may run now.
    Wait,
    /// This one.
    Run(Request),
    /// A periodic request came before the pause was over, and is dropped.
    TooEarly {
        /// The request.
        dropped: Request,
        /// When the timer may ask again.
        retry_at: Millis,
    },
}

/// Waiting requests, the next one first.
#[derive(Debug, Clone)]
pub struct RequestQueue {
    waiting: Vec<Request>,
    queue_max: usize,
    concurrent_max: usize,
    min_pause_ms: u64,
}

impl RequestQueue {
    /// Nothing waits.
    #[must_use]
    pub fn new(concurrent_max: usize, min_pause_ms: u64, queue_max: usize) -> Self {
        Self { waiting: Vec::new(), queue_max, concurrent_max, min_pause_ms }
    }

    /// Takes a request in. Gives the one that is dropped because too many wait, which may be the
    /// new one: [`AbortReason::TooManyRequests`](super::AbortReason::TooManyRequests).
    pub fn submit(&mut self, request: Request) -> Option<Request> {
        let is_full = self.queue_max <= self.waiting.len();
        // Users' requests are not dropped for the sake of another.
        if is_full && self.waiting.last().is_some_and(|last| !last.is_periodic) {
            return Some(request);
        }
        let place = self.waiting.partition_point(|waiting| waiting.priority() < request.priority());
        self.waiting.insert(place, request);
        if is_full { self.waiting.pop() } else { None }
    }

    /// The next request to run, if one may.
    pub fn choose(&mut self, now: Millis, load: Load) -> Choice {
        let Some(first) = self.waiting.first().copied() else { return Choice::Wait };
        if self.concurrent_max < load.cleaning {
            return Choice::Wait;
        }
        if self.concurrent_max <= load.pending && !first.is_forced {
            return Choice::Wait;
        }
        let pause_over = load.last_completed_at.map(|at| at.after(self.min_pause_ms));
        if let Some(retry_at) = pause_over.filter(|at| now < *at)
            && first.is_periodic
            && !first.is_forced
        {
            self.waiting.remove(0);
            return Choice::TooEarly { dropped: first, retry_at };
        }
        self.waiting.remove(0);
        Choice::Run(first)
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// True where nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Drops what the timer has asked for.
    pub fn drop_periodic(&mut self) -> Vec<Request> {
        let (dropped, kept) =
            std::mem::take(&mut self.waiting).into_iter().partition(|request| request.is_periodic);
        self.waiting = kept;
        dropped
    }

    /// Drops everything that waits: [`AbortReason::CoordinatorSuspend`](super::AbortReason::CoordinatorSuspend).
    pub fn clear(&mut self) -> Vec<Request> {
        std::mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    //! `CheckpointRequestDeciderTest`, row by row.

    use super::*;
    use crate::checkpoint::SavepointPurpose;

    const IDLE: Load = Load { pending: 0, cleaning: 0, last_completed_at: None };
    const BUSY: Load = Load { pending: 1, ..IDLE };

    fn queue() -> RequestQueue {
        RequestQueue::new(1, 10, 10)
    }

    /// A request as `user checkpoint`, `periodic forced savepoint`.
    fn request(number: u64, text: &str) -> Request {
        let ticket = number;
        let trigger = match text.contains("savepoint") {
            true => Trigger::Savepoint { ticket, purpose: SavepointPurpose::Keep },
            false => Trigger::Checkpoint,
        };
        Request {
            trigger,
            is_forced: text.contains("forced"),
            is_periodic: text.contains("periodic"),
            at: Millis(number),
            number,
        }
    }

    fn number_of(choice: Choice) -> Option<u64> {
        match choice {
            Choice::Run(request) => Some(request.number),
            Choice::Wait | Choice::TooEarly { .. } => None,
        }
    }

    #[test]
    fn forced_request_runs_although_the_maximum_is_pending() {
        let mut queue = queue();
        queue.submit(request(1, "user forced savepoint"));
        assert_eq!(number_of(queue.choose(Millis(0), BUSY)), Some(1));
    }

    /// Flink: `EnqueuedOnTooManyPendingAndRunsOnceItDrops`.
    #[test]
    fn a_request_waits_while_as_many_are_pending_as_may_be() {
        for text in ["periodic checkpoint", "user checkpoint", "user savepoint"] {
            let mut queue = queue();
            queue.submit(request(1, text));
            assert_eq!(queue.choose(Millis(0), BUSY), Choice::Wait, "{text}");
            assert_eq!(number_of(queue.choose(Millis(0), IDLE)), Some(1), "{text}");
        }
    }

    #[test]
    fn slow_cleaning_makes_requests_wait() {
        let mut queue = queue();
        queue.submit(request(1, "user checkpoint"));
        assert_eq!(queue.choose(Millis(0), Load { cleaning: 2, ..IDLE }), Choice::Wait);
        assert_eq!(number_of(queue.choose(Millis(0), Load { cleaning: 1, ..IDLE })), Some(1));
    }

    /// Flink: `UserSubmittedPrioritized`.
    #[test]
    fn what_a_user_asks_for_comes_first() {
        for kind in ["savepoint", "forced savepoint"] {
            let mut queue = queue();
            queue.submit(request(1, &format!("periodic {kind}")));
            queue.submit(request(2, &format!("user {kind}")));
            assert_eq!(number_of(queue.choose(Millis(0), IDLE)), Some(2), "{kind}");
            assert_eq!(number_of(queue.choose(Millis(0), IDLE)), Some(1), "{kind}");
        }
    }

    /// Flink: `SavepointPrioritized`.
    #[test]
    fn savepoints_come_before_checkpoints() {
        for forced in ["", "forced "] {
            let mut queue = queue();
            queue.submit(request(1, &format!("user {forced}checkpoint")));
            queue.submit(request(2, &format!("user {forced}savepoint")));
            assert_eq!(number_of(queue.choose(Millis(0), IDLE)), Some(2), "{forced}");
        }
    }

    #[test]
    fn savepoint_comes_before_a_forced_checkpoint() {
        let mut queue = queue();
        queue.submit(request(1, "user forced checkpoint"));
        queue.submit(request(2, "user savepoint"));
        assert_eq!(number_of(queue.choose(Millis(0), IDLE)), Some(2));
    }

    /// Flink: `QueueSizeLimit`.
    #[test]
    fn a_full_queue_drops_the_youngest_of_the_timers_requests() {
        let mut queue = queue();
        let dropped: Vec<_> =
            (1..=13).filter_map(|n| queue.submit(request(n, "periodic checkpoint"))).collect();
        assert_eq!(dropped.iter().map(|request| request.number).collect::<Vec<_>>(), [11, 12, 13]);
        // A user's request pushes the youngest of the timer's out, never another user's.
        let dropped = queue.submit(request(14, "user checkpoint")).expect("one too many");
        assert_eq!(dropped.number, 10);
        for n in 20..29 {
            assert!(queue.submit(request(n, "user checkpoint")).is_some_and(|r| r.is_periodic));
        }
        let dropped = queue.submit(request(30, "user savepoint")).expect("one too many");
        assert_eq!(dropped.number, 30);
    }

    /// Flink: `MinPauseBetweenCheckpoints`.
    #[test]
    fn periodic_requests_alone_wait_for_the_pause() {
        let just_completed = Load { last_completed_at: Some(Millis(100)), ..IDLE };
        for text in [
            "user savepoint",
            "user forced savepoint",
            "periodic forced savepoint",
            "user checkpoint",
        ] {
            let mut queue = queue();
            queue.submit(request(1, text));
            assert_eq!(number_of(queue.choose(Millis(100), just_completed)), Some(1), "{text}");
        }
        let mut queue = queue();
        queue.submit(request(1, "periodic checkpoint"));
        let early = queue.choose(Millis(104), just_completed);
        let dropped = request(1, "periodic checkpoint");
        assert_eq!(early, Choice::TooEarly { dropped, retry_at: Millis(110) });
        assert!(queue.is_empty());
        queue.submit(request(2, "periodic checkpoint"));
        assert_eq!(number_of(queue.choose(Millis(110), just_completed)), Some(2));
    }
}
