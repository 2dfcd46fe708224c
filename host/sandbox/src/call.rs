//! How long a call runs and waits: both are limited, whatever the guest makes the host do meanwhile.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::Poll,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};
use tokio::time::{Sleep, sleep};

use crate::{Limits, limits::Limit};

/// What the calling thread has used of the processor. Time in which another program has the processor is not its.
#[must_use]
pub fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The time of the current call. Its future is polled on one thread at a time, so no two changes meet.
#[derive(Debug, Default)]
pub(crate) struct CallClock {
    /// What it ran in the polls that have ended.
    ran_ns: AtomicU64,
    /// What its thread had used when the current poll began.
    began_ns: AtomicU64,
    /// It gave up its thread for others, and waits for nothing.
    has_yielded: AtomicBool,
}

impl CallClock {
    /// How long the call has run, asked from within it.
    pub(crate) fn ran(&self) -> Duration {
        let began = Duration::from_nanos(self.began_ns.load(Ordering::Relaxed));
        let ran_before = Duration::from_nanos(self.ran_ns.load(Ordering::Relaxed));
        ran_before.saturating_add(processor_time().saturating_sub(began))
    }

    /// The call gives up its thread, and can go on at once.
    pub(crate) fn yields(&self) {
        self.has_yielded.store(true, Ordering::Relaxed);
    }

    /// Runs a call within its limits.
    pub(crate) async fn time<T>(
        &self,
        limits: &Limits,
        call: impl Future<Output = wasmtime::Result<T>>,
    ) -> wasmtime::Result<T> {
        let (call_max, wait_max) = (limits.call_max, limits.wait_max);
        let mut call = pin!(call);
        let (mut waited, mut waits_since) = (Duration::ZERO, None::<Instant>);
        // Wakes the task when it has waited for too long.
        let mut alarm: Option<Pin<Box<Sleep>>> = None;
        self.ran_ns.store(0, Ordering::Relaxed);
        poll_fn(|context| {
            waited += waits_since.take().map_or(Duration::ZERO, |since| since.elapsed());
            let began = Instant::now();
            self.began_ns.store(nanos(processor_time()), Ordering::Relaxed);
            self.has_yielded.store(false, Ordering::Relaxed);
            let polled = call.as_mut().poll(context);
            // No call runs for longer than it takes: as long as that is within the limit, the kernel is not asked.
            let ran_before = Duration::from_nanos(self.ran_ns.load(Ordering::Relaxed));
            if polled.is_ready() && ran_before + began.elapsed() <= call_max {
                return polled;
            }
            let ran = self.ran();
            self.ran_ns.store(nanos(ran), Ordering::Relaxed);
            // Within a call of the host, or one instruction that takes long, the guest is not interrupted.
            if call_max < ran {
                return Poll::Ready(match polled {
                    Poll::Ready(Err(error)) => Err(error),
                    _ => Err(Limit::Call { max: call_max }.into()),
                });
            }
            if polled.is_ready() || self.has_yielded.load(Ordering::Relaxed) {
                return polled;
            }
            let left = wait_max.saturating_sub(waited);
            waits_since = Some(Instant::now());
            let over = alarm.insert(Box::pin(sleep(left)));
            if left.is_zero() || over.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(Limit::Wait { max: wait_max }.into()));
            }
            Poll::Pending
        })
        .await
    }
}
