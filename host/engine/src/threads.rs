//! The threads on which guests run, and nothing else: whatever a guest makes the host do, drivers, timers, signals and
//! requests do not wait for it.
//!
//! There are as many as the machine has cores, for all jobs of the process, which share their time by weight
//! ([`FairQueue`]). A guest that computes leaves its thread as soon as another job has a better claim to it; a call of
//! the host, or a bulk instruction, ends first. Timers and I/O of the tasks have a thread of their own, so that they
//! do not depend on the runtime of the embedding program.

use std::{
    cell::Cell,
    convert::Infallible,
    future::{Future, poll_fn},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use async_task::{Builder, Runnable};
use cofferdam_core::share::{FairQueue, ShareId};
use cofferdam_sandbox::{Sandbox, processor_time};
use tokio::runtime::Runtime;

/// A future on these threads. It is cancelled when this is dropped.
pub(crate) type GuestTask<T> = async_task::Task<T>;

/// A job's claim to the threads.
pub(crate) struct Share {
    id: ShareId,
    threads: &'static Threads,
}

impl Share {
    /// A share for the guests of a sandbox.
    ///
    /// # Errors
    /// Where the system gives no threads.
    pub(crate) fn new(weight: u32, sandbox: Sandbox) -> io::Result<Arc<Self>> {
        let threads = Threads::of_process()?;
        let mut turns = threads.lock();
        let id = turns.queue.add(weight);
        turns.sandboxes.push((id, sandbox));
        Ok(Arc::new(Self { id, threads }))
    }

    /// Runs a future on the threads of guests.
    pub(crate) fn spawn<T: Send + 'static>(
        self: &Arc<Self>,
        future: impl Future<Output = T> + Send + 'static,
    ) -> GuestTask<T> {
        let share = self.clone();
        let schedule = move |task| share.threads.schedule(share.id, task);
        let future = Contained(Some(Box::pin(future)));
        let (runnable, task) = Builder::new().propagate_panic(true).spawn(|()| future, schedule);
        runnable.schedule();
        task
    }
}

/// A future whose destructor may panic: what runs tasks would end the process.
struct Contained<F>(Option<Pin<Box<F>>>);

impl<F: Future> Future for Contained<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        match &mut self.0 {
            Some(future) => future.as_mut().poll(context),
            None => Poll::Pending,
        }
    }
}

impl<F> Drop for Contained<F> {
    fn drop(&mut self) {
        let future = self.0.take();
        if catch_unwind(AssertUnwindSafe(|| drop(future))).is_err() {
            tracing::error!("a task panicked while it was ended: a bug of the host");
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut turns = self.threads.lock();
        // Nothing waits: a task keeps its share.
        let waiting = turns.queue.remove(self.id);
        let place = turns.sandboxes.iter().position(|(id, _)| *id == self.id);
        let sandbox = place.map(|place| turns.sandboxes.swap_remove(place));
        drop(turns);
        drop((waiting, sandbox));
    }
}

thread_local! {
    /// Set on threads of guests.
    static OWN: Cell<Option<(&'static Threads, usize)>> = const { Cell::new(None) };
}

/// So many more threads are there at most while others wait for a disk.
const WAITING_MAX: usize = 64;

/// Does what waits for a disk within a call of a guest. Where this is a thread of guests, another one runs meanwhile.
pub(crate) fn wait_for_disk<T>(work: impl FnOnce() -> T) -> T {
    /// Ends the wait also where the work panics.
    struct Waiting(&'static Threads, usize, Instant, Duration);
    impl Drop for Waiting {
        fn drop(&mut self) {
            let Self(threads, place, began, ran) = self;
            let mut turns = threads.lock();
            turns.waiting_for_disk -= 1;
            if let Some(turn) = &mut turns.running[*place] {
                // Another one had the processor meanwhile, but for what the wait itself took of it.
                let ran = processor_time().saturating_sub(*ran);
                turn.since += began.elapsed().saturating_sub(ran);
                turn.cannot_leave = false;
            }
        }
    }
    let _waiting = OWN.get().map(|(threads, place)| {
        threads.begin_waiting(place);
        Waiting(threads, place, Instant::now(), processor_time())
    });
    work()
}

struct Threads {
    turns: Mutex<Turns>,
    /// Its timers and its I/O are those of the tasks.
    runtime: Runtime,
}

/// What a thread runs.
#[derive(Clone, Copy)]
struct Turn {
    share: ShareId,
    since: Instant,
    /// It was interrupted, and leaves as soon as it can; or it waits for a disk.
    cannot_leave: bool,
}

struct Turns {
    queue: FairQueue<Runnable>,
    /// How many threads run guests at a time.
    cores: usize,
    /// How many threads wait for a disk instead, each of which lets another one run.
    waiting_for_disk: usize,
    /// What each thread runs.
    running: Vec<Option<Turn>>,
    /// Threads that wait for a task.
    idle: Vec<(usize, Waker)>,
    /// How many threads do not: they run one, wait for a disk, or are about to look for one.
    awake: usize,
    sandboxes: Vec<(ShareId, Sandbox)>,
}

impl Turns {
    /// How many threads may be awake.
    fn awake_max(&self) -> usize {
        self.cores + self.waiting_for_disk
    }

    /// Makes a thread look for a task, if one may.
    fn call_thread(&mut self) -> Call {
        if self.awake_max() <= self.awake {
            return Call::Nobody;
        }
        let call = match self.idle.pop() {
            Some((_, thread)) => Call::Idle(thread),
            None if self.running.len() < self.cores + WAITING_MAX => Call::New,
            None => return Call::Nobody,
        };
        self.awake += 1;
        call
    }

    /// No thread is free for a task that can continue: those that have a lesser claim are interrupted.
    fn interrupt_for(&mut self, id: ShareId) {
        let now = Instant::now();
        let Self { running, queue, sandboxes, .. } = self;
        for turn in running.iter_mut().flatten().filter(|turn| !turn.cannot_leave) {
            if queue.outranks(id, turn.share, nanos(now.saturating_duration_since(turn.since)))
                && let Some((_, sandbox)) = sandboxes.iter().find(|(id, _)| *id == turn.share)
            {
                // Once a turn: a guest in a call of the host would not hear it sooner, and all others would each time.
                turn.cannot_leave = true;
                sandbox.interrupt();
            }
        }
    }
}

/// The thread that is to look for a task.
enum Call {
    Nobody,
    Idle(Waker),
    New,
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Threads {
    /// Those of this process, which are started by the first job.
    fn of_process() -> io::Result<&'static Self> {
        static THREADS: OnceLock<Threads> = OnceLock::new();
        static STARTING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let threads = match THREADS.get() {
            Some(threads) => threads,
            None => {
                let threads = Self::new()?;
                THREADS.get_or_init(|| threads)
            }
        };
        let (started, cores) = {
            let turns = threads.lock();
            (turns.running.len(), turns.cores)
        };
        for place in started..cores {
            threads.lock().awake += 1;
            match threads.start() {
                Ok(()) => {}
                Err(error) if place == 0 => return Err(error),
                // All is slower, and nothing is wrong.
                Err(error) => tracing::warn!(%error, "only {place} threads for guests"),
            }
        }
        Ok(threads)
    }

    /// Without any thread.
    fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("cofferdam-io")
            .enable_all()
            .build()?;
        let turns = Turns {
            queue: FairQueue::default(),
            cores: thread::available_parallelism().map_or(1, usize::from),
            waiting_for_disk: 0,
            running: Vec::new(),
            idle: Vec::new(),
            awake: 0,
            sandboxes: Vec::new(),
        };
        Ok(Self { turns: Mutex::new(turns), runtime })
    }

    /// Starts one more thread, which counts as awake already.
    fn start(&'static self) -> io::Result<()> {
        let mut turns = self.lock();
        let place = turns.running.len();
        let thread = thread::Builder::new().name(format!("cofferdam-guest-{place}"));
        match thread.spawn(move || self.run(place)) {
            Ok(_) => turns.running.push(None),
            Err(error) => {
                turns.awake -= 1;
                return Err(error);
            }
        }
        Ok(())
    }

    fn call(&'static self, call: Call) {
        match call {
            Call::Nobody => {}
            Call::Idle(thread) => thread.wake(),
            Call::New => {
                if let Err(error) = self.start() {
                    tracing::debug!(%error, "no thread in the place of one that waits for a disk");
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn schedule(&'static self, id: ShareId, task: Runnable) {
        let mut turns = self.lock();
        let ended = turns.queue.push(id, task);
        let call = turns.call_thread();
        if matches!(call, Call::Nobody) {
            turns.interrupt_for(id);
        }
        drop(turns);
        drop(ended);
        self.call(call);
    }

    /// This thread waits for a disk: another one takes its place, as soon as a task needs one.
    fn begin_waiting(&'static self, place: usize) {
        let mut turns = self.lock();
        turns.waiting_for_disk += 1;
        if let Some(turn) = &mut turns.running[place] {
            turn.cannot_leave = true;
        }
        let call = if turns.queue.is_empty() { Call::Nobody } else { turns.call_thread() };
        drop(turns);
        self.call(call);
    }

    fn run(&'static self, place: usize) -> ! {
        OWN.set(Some((self, place)));
        match self.runtime.block_on(poll_fn(|context| self.turn(place, context))) {}
    }

    /// One turn of one task. Each has the budget of a task of tokio's, which a task that always finds something to do
    /// exhausts.
    fn turn(&self, place: usize, context: &Context<'_>) -> Poll<Infallible> {
        let mut turns = self.lock();
        let now = Instant::now();
        if let Some(Turn { share, since, .. }) = turns.running[place].take() {
            turns.queue.ran(share, nanos(now.saturating_duration_since(since)));
        }
        if let Some(idle) = turns.idle.iter().position(|(idle, _)| *idle == place) {
            // Nobody has called it.
            turns.idle.swap_remove(idle);
            turns.awake += 1;
        }
        let may_run = turns.awake <= turns.awake_max();
        let next = if may_run { turns.queue.pop() } else { None };
        match next {
            Some((id, task)) => {
                turns.running[place] = Some(Turn { share: id, since: now, cannot_leave: false });
                drop(turns);
                task.run();
                context.waker().wake_by_ref();
            }
            None => {
                turns.awake -= 1;
                turns.idle.push((place, context.waker().clone()));
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share() -> Arc<Share> {
        let sandbox = Sandbox::new(cofferdam_sandbox::SandboxOptions::default());
        Share::new(100, sandbox.expect("a sandbox")).expect("threads")
    }

    #[test]
    fn a_future_runs_on_the_threads_of_guests_with_timers() {
        let task = share().spawn(async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let blocking = tokio::task::spawn_blocking(|| 3).await.expect("runs");
            let thread = thread::current();
            (thread.name().unwrap_or_default().to_owned(), blocking)
        });
        let (name, three) = futures::executor::block_on(task);
        assert!(name.starts_with("cofferdam-guest-"), "{name}");
        assert_eq!(three, 3);
    }

    /// A task that never waits gives its thread up all the same, if it asks tokio for its budget.
    #[test]
    fn a_task_without_waits_lets_others_run() {
        let share = share();
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let busy: Vec<_> = (0..cores)
            .map(|_| {
                share.spawn(async {
                    loop {
                        tokio::task::consume_budget().await;
                    }
                })
            })
            .collect();
        let other = share.spawn(async { 7 });
        assert_eq!(futures::executor::block_on(other), 7);
        let cancelled = busy.into_iter().map(async_task::Task::<()>::cancel);
        assert_eq!(
            futures::executor::block_on(futures::future::join_all(cancelled)),
            vec![None; cores]
        );
    }

    /// More tasks wait for a disk than there are threads.
    #[test]
    fn tasks_that_wait_for_a_disk_let_others_run() {
        let share = share();
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let gate = Arc::new(std::sync::Barrier::new(3 * cores + 1));
        let waiting: Vec<_> = (0..3 * cores)
            .map(|_| {
                let gate = gate.clone();
                share.spawn(async move { wait_for_disk(|| gate.wait().is_leader()) })
            })
            .collect();
        assert_eq!(futures::executor::block_on(share.spawn(async { 7 })), 7);
        gate.wait();
        futures::executor::block_on(futures::future::join_all(waiting));
        let threads = share.threads;
        assert_eq!(threads.lock().waiting_for_disk, 0);
    }

    #[test]
    fn a_cancelled_task_is_dropped_and_a_panic_stays_with_its_own() {
        let share = share();
        let held = Arc::new(());
        let also = held.clone();
        let task = share.spawn(async move {
            let _held = also;
            std::future::pending::<()>().await;
        });
        assert_eq!(futures::executor::block_on(task.cancel()), None);
        assert_eq!(Arc::strong_count(&held), 1);
        let task = share.spawn(async { panic!("on purpose") });
        let waits = AssertUnwindSafe(task);
        let panicked = catch_unwind(|| futures::executor::block_on({ waits }.0));
        assert!(panicked.is_err());
        struct Panics;
        impl Drop for Panics {
            fn drop(&mut self) {
                panic!("on purpose");
            }
        }
        let task = share.spawn(async {
            let _held = Panics;
            std::future::pending::<()>().await;
        });
        assert_eq!(futures::executor::block_on(task.cancel()), None);
        assert_eq!(futures::executor::block_on(share.spawn(async { 7 })), 7);
    }
}
