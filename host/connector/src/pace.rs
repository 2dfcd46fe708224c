//! Holds a source to a number of records a second.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::FutureExt;
use tokio::time::Sleep;

/// The share of a second's records that is given out at a time.
const SLICE: f64 = 0.01;

/// One task's share of its source's rate.
#[derive(Debug)]
pub struct Pace {
    /// Records a second; as fast as they are taken if `None`.
    rate: Option<f64>,
    /// How many were given out since the task began.
    given: u64,
    began: Option<Instant>,
    wait: Option<Pin<Box<Sleep>>>,
}

impl Pace {
    /// The share of one of `parallelism` tasks.
    #[must_use]
    pub fn new(rate: Option<f64>, parallelism: u32) -> Self {
        let rate = rate.map(|rate| rate / f64::from(parallelism));
        Self { rate, given: 0, began: None, wait: None }
    }

    /// How many may be given out now, once any may.
    pub fn poll_allowance(&mut self, context: &mut Context<'_>) -> Poll<u64> {
        loop {
            if let Some(wait) = &mut self.wait {
                std::task::ready!(wait.poll_unpin(context));
                self.wait = None;
            }
            match self.allowance() {
                Ok(allowed) => return Poll::Ready(allowed),
                Err(wait) => self.wait = Some(Box::pin(tokio::time::sleep(wait))),
            }
        }
    }

    /// How many may be given out now.
    ///
    /// # Errors
    /// The time to wait where none may.
    pub fn allowance(&mut self) -> Result<u64, Duration> {
        let Some(rate) = self.rate else { return Ok(u64::MAX) };
        let elapsed = self.began.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
        // The first slice is due at once, so that a restart does not begin with a wait.
        let due = ((elapsed + SLICE) * rate) as u64;
        match due.checked_sub(self.given) {
            Some(0) | None => {
                let missing = ((self.given + 1) as f64 / rate - elapsed).max(SLICE);
                Err(Duration::from_secs_f64(missing.min(1.0)))
            }
            Some(allowed) => Ok(allowed),
        }
    }

    /// So many were given out.
    pub fn give(&mut self, records: usize) {
        self.given += records as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_slice_is_due_at_once_and_then_there_is_a_wait() {
        let mut pace = Pace::new(Some(1_000.0), 2);
        let allowed = pace.allowance().expect("a slice of 500 a second");
        assert!((5..500).contains(&allowed), "{allowed}");
        pace.give(400);
        let wait = pace.allowance().expect_err("that was too much");
        assert!(Duration::from_millis(10) <= wait && wait <= Duration::from_secs(1), "{wait:?}");
        assert_eq!(Pace::new(None, 2).allowance(), Ok(u64::MAX));
    }
}
