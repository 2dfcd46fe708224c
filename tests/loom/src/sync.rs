//! What the gate shares between threads, as loom has it.

use std::task::{Poll, Waker};

pub(crate) use loom::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

/// A notification as tokio's, for one waiter at a time: it is kept for who waits next.
#[derive(Debug)]
pub(crate) struct Notify {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    is_notified: bool,
    waiter: Option<Waker>,
}

impl Default for Notify {
    fn default() -> Self {
        Self::new()
    }
}

impl Notify {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State::default()) }
    }

    pub(crate) fn notify_one(&self) {
        let waiter = {
            let mut state = self.state.lock().expect("no panic");
            state.is_notified = true;
            state.waiter.take()
        };
        if let Some(waiter) = waiter {
            waiter.wake();
        }
    }

    pub(crate) async fn notified(&self) {
        std::future::poll_fn(|context| {
            let mut state = self.state.lock().expect("no panic");
            if std::mem::take(&mut state.is_notified) {
                return Poll::Ready(());
            }
            state.waiter = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
