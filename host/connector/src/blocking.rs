//! Connectors that can only block: their calls run on threads of their own, one at a time for each task.
//!
//! A file system, a pipe or a client library may hold a call up for as long as it likes. [`OffThread`] makes a
//! [`Source`] of something that reads so, and a [`Sink`] of something that writes so. The source reads one
//! step ahead, and the sink collects records before it writes them, so the change of threads costs little.
//!
//! A call that blocks cannot be taken back: it outlives the attempt that has begun it. [`Blocking`] knows when
//! the last one has ended, so the next attempt need not meet it.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use cofferdam_contract::Batch;
use cofferdam_core::{checkpoint::Purpose, failure::FailureCause, ids::CheckpointId};
use futures::FutureExt;
use tokio::{
    sync::mpsc,
    task::{JoinError, JoinHandle},
    time::Sleep,
};

use crate::{Answer, Result, Sink, Source, Step, sink::StateWriter};

/// Runs calls that block, on threads of the runtime that are made for it.
#[derive(Debug, Clone)]
pub struct Blocking(mpsc::Sender<Infallible>);

/// Waits until every call of a [`Blocking`] has ended.
#[derive(Debug)]
pub struct CallsEnded(mpsc::Receiver<Infallible>);

impl Blocking {
    /// A new one, and what waits for its calls.
    #[must_use]
    pub fn new() -> (Self, CallsEnded) {
        let (sender, receiver) = mpsc::channel(1);
        (Self(sender), CallsEnded(receiver))
    }

    /// Runs a call on a thread that may block. It runs to its end, also if nobody waits for it.
    pub fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let running = self.0.clone();
        tokio::task::spawn_blocking(move || {
            let result = call();
            drop(running);
            result
        })
    }

    /// Runs a call that blocks, and waits for its end.
    ///
    /// # Errors
    /// Its own, and a bug of the host where it panics.
    pub async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.run(call).await.map_err(|error| panicked(&error))?
    }
}

impl CallsEnded {
    /// Waits until every clone of the [`Blocking`] is gone, and each of its calls has ended.
    pub async fn wait(&mut self) {
        // Nothing is ever sent: the channel closes with the last sender.
        let _ = self.0.recv().await;
    }
}

/// What became of a call that did not return.
fn panicked(error: &JoinError) -> FailureCause {
    FailureCause::HostBug { message: format!("a call of a connector panicked: {error}") }
}

fn is_gone() -> FailureCause {
    FailureCause::HostBug { message: "a connector was called after it had failed".to_owned() }
}

/// What a source that blocks has read.
#[derive(Debug)]
pub enum ReadOutcome {
    /// A step.
    Step(Step),
    /// Nothing before this time has passed.
    Wait(Duration),
}

/// A source whose calls block.
pub trait BlockingSource: Send + 'static {
    /// Reads the next step.
    ///
    /// # Errors
    /// As [`Source::poll_next`].
    fn read(&mut self) -> Result<ReadOutcome>;

    /// As [`Source::position`].
    ///
    /// # Errors
    /// As [`Source::position`].
    fn position(&mut self) -> Result<Vec<u8>>;
}

/// A sink whose calls block.
pub trait BlockingSink: Send + 'static {
    /// As [`Sink::write`].
    ///
    /// # Errors
    /// As [`Sink::write`].
    fn write(&mut self, batch: &Batch) -> Result<()>;

    /// As [`Sink::pre_commit`].
    ///
    /// # Errors
    /// As [`Sink::pre_commit`].
    fn pre_commit(&mut self, checkpoint: CheckpointId, purpose: Purpose) -> Result<Vec<u8>>;

    /// As [`Sink::commit`].
    ///
    /// # Errors
    /// As [`Sink::commit`].
    fn commit(&mut self, checkpoint: CheckpointId) -> Result<()>;
}

/// Something that blocks, run on other threads.
#[derive(Debug)]
pub struct OffThread<S, T> {
    blocking: Blocking,
    state: State<S, T>,
    /// Source: until when there is nothing to read.
    wait: Option<Pin<Box<Sleep>>>,
    /// Sink: what was not handed over yet.
    collected: Vec<Batch>,
    collected_bytes: usize,
}

#[derive(Debug)]
enum State<S, T> {
    /// Sink: it is being opened, and anyone who calls it first waits for that.
    Opening(JoinHandle<Result<S>>),
    Idle(S),
    Running(JoinHandle<(S, Result<T>)>),
    /// It was not opened, or a call has panicked, and the connector is gone with it.
    Gone,
}

impl<S: Send + 'static, T: Send + 'static> OffThread<S, T> {
    /// Runs the calls of `inner` by way of `blocking`.
    pub fn new(inner: S, blocking: Blocking) -> Self {
        Self::in_state(State::Idle(inner), blocking)
    }

    fn in_state(state: State<S, T>, blocking: Blocking) -> Self {
        Self { blocking, state, wait: None, collected: Vec::new(), collected_bytes: 0 }
    }

    /// Opens something that blocks, and runs its calls from then on.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub async fn open(
        blocking: Blocking,
        open: impl FnOnce() -> Result<S> + Send + 'static,
    ) -> Result<Self> {
        Ok(Self::new(blocking.call(open).await?, blocking))
    }

    /// Starts a call, which gives the connector back with its result.
    fn start<U: Send + 'static>(
        &self,
        mut inner: S,
        call: impl FnOnce(&mut S) -> Result<U> + Send + 'static,
    ) -> JoinHandle<(S, Result<U>)> {
        self.blocking.run(move || {
            let result = call(&mut inner);
            (inner, result)
        })
    }

    fn take(&mut self) -> State<S, T> {
        std::mem::replace(&mut self.state, State::Gone)
    }

    /// Begins a call.
    fn begin(&mut self, inner: S, call: impl FnOnce(&mut S) -> Result<T> + Send + 'static) {
        self.state = State::Running(self.start(inner, call));
    }

    /// Waits until it is open, and for the call that is running, if one is.
    async fn end(&mut self) -> Result<Option<T>> {
        if let State::Opening(opening) = &mut self.state {
            let opened = opening.await;
            self.state = State::Gone;
            self.state = State::Idle(opened.map_err(|error| panicked(&error))??);
        }
        let State::Running(running) = &mut self.state else { return Ok(None) };
        let ended = running.await;
        self.state = State::Gone;
        let (inner, result) = ended.map_err(|error| panicked(&error))?;
        self.state = State::Idle(inner);
        result.map(Some)
    }

    /// Runs a call of another result to its end. No other call may be running.
    async fn call<U: Send + 'static>(
        &mut self,
        call: impl FnOnce(&mut S) -> Result<U> + Send + 'static,
    ) -> Result<U> {
        let State::Idle(inner) = self.take() else { return Err(is_gone()) };
        let running = self.start(inner, call);
        let (inner, result) = running.await.map_err(|error| panicked(&error))?;
        self.state = State::Idle(inner);
        result
    }
}

impl<S: BlockingSource> Source for OffThread<S, ReadOutcome> {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Step>> {
        loop {
            if let Some(wait) = &mut self.wait {
                std::task::ready!(wait.poll_unpin(context));
                self.wait = None;
            }
            match self.take() {
                State::Idle(inner) => self.begin(inner, S::read),
                State::Running(mut running) => match running.poll_unpin(context) {
                    Poll::Pending => {
                        self.state = State::Running(running);
                        return Poll::Pending;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(panicked(&error))),
                    Poll::Ready(Ok((inner, Ok(ReadOutcome::Wait(duration))))) => {
                        self.state = State::Idle(inner);
                        self.wait = Some(Box::pin(tokio::time::sleep(duration)));
                    }
                    Poll::Ready(Ok((inner, Ok(ReadOutcome::Step(step))))) => {
                        match &step {
                            Step::End => self.state = State::Idle(inner),
                            // The next one is read while this one is processed.
                            _ => self.begin(inner, S::read),
                        }
                        return Poll::Ready(Ok(step));
                    }
                    Poll::Ready(Ok((inner, Err(cause)))) => {
                        self.state = State::Idle(inner);
                        return Poll::Ready(Err(cause));
                    }
                },
                State::Opening(_) | State::Gone => return Poll::Ready(Err(is_gone())),
            }
        }
    }

    fn is_between_steps(&self) -> bool {
        !matches!(self.state, State::Running(_))
    }

    fn complete_step(&mut self) -> Answer<'_, Option<Step>> {
        Box::pin(async {
            match self.end().await? {
                Some(ReadOutcome::Step(step)) => Ok(Some(step)),
                Some(ReadOutcome::Wait(duration)) => {
                    self.wait = Some(Box::pin(tokio::time::sleep(duration)));
                    Ok(None)
                }
                None => Ok(None),
            }
        })
    }

    fn position(&mut self) -> Answer<'_, Vec<u8>> {
        Box::pin(self.call(S::position))
    }
}

/// A sink hands records over when it has this many bytes of them.
const COLLECTED_BYTES: usize = 256 << 10;

impl<S: BlockingSink> OffThread<S, ()> {
    /// A sink that is being opened, while its task starts already and collects the first records for it. What
    /// opening it fails by is the failure of the first call that needs it, at the latest of the first barrier.
    #[must_use]
    pub fn opening(blocking: Blocking, open: impl FnOnce() -> Result<S> + Send + 'static) -> Self {
        Self::in_state(State::Opening(blocking.run(open)), blocking)
    }

    /// What was collected, as a call that writes it.
    fn write_collected(&mut self) -> impl FnOnce(&mut S) -> Result<()> + Send + 'static {
        let batches = std::mem::take(&mut self.collected);
        self.collected_bytes = 0;
        move |sink: &mut S| batches.iter().try_for_each(|batch| sink.write(batch))
    }
}

impl<S: BlockingSink> Sink for OffThread<S, ()> {
    fn write(&mut self, batch: Batch) -> Answer<'_, ()> {
        self.collected_bytes += batch.byte_count();
        self.collected.push(batch);
        if self.collected_bytes < COLLECTED_BYTES {
            return crate::ready(Ok(()));
        }
        Box::pin(async {
            self.end().await?;
            let write = self.write_collected();
            let State::Idle(inner) = self.take() else { return Err(is_gone()) };
            self.begin(inner, write);
            Ok(())
        })
    }

    fn pre_commit<'a>(
        &'a mut self,
        checkpoint: CheckpointId,
        purpose: Purpose,
        state: &'a mut StateWriter,
    ) -> Answer<'a, ()> {
        Box::pin(async move {
            self.end().await?;
            let write = self.write_collected();
            let call = move |sink: &mut S| {
                write(sink)?;
                sink.pre_commit(checkpoint, purpose)
            };
            state.write(self.call(call).await?);
            Ok(())
        })
    }

    fn commit(&mut self, checkpoint: CheckpointId) -> Answer<'_, ()> {
        Box::pin(async move {
            self.end().await?;
            self.call(move |sink| sink.commit(checkpoint)).await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::mpsc::{Receiver, SyncSender, sync_channel},
    };

    use cofferdam_contract::RecordRef;

    use super::*;

    fn batch(value: &str) -> Batch {
        let mut batch = Batch::empty();
        batch.push(RecordRef { key: None, value: value.as_bytes(), timestamp: None });
        batch
    }

    /// Reads numbers, each once it is allowed to.
    struct Numbers {
        next: u8,
        allowed: Receiver<()>,
    }

    impl BlockingSource for Numbers {
        fn read(&mut self) -> Result<ReadOutcome> {
            if self.allowed.recv().is_err() {
                return Ok(ReadOutcome::Step(Step::End));
            }
            self.next += 1;
            Ok(ReadOutcome::Step(Step::records(batch(&self.next.to_string()), None)))
        }

        fn position(&mut self) -> Result<Vec<u8>> {
            Ok(vec![self.next])
        }
    }

    fn numbers() -> (OffThread<Numbers, ReadOutcome>, SyncSender<()>, CallsEnded) {
        let (sender, allowed) = sync_channel(10);
        let (blocking, ended) = Blocking::new();
        (OffThread::new(Numbers { next: 0, allowed }, blocking), sender, ended)
    }

    fn value(step: &Step) -> Option<String> {
        let Step::Records { batch, .. } = step else { return None };
        Some(String::from_utf8_lossy(&batch.values).into_owned())
    }

    #[tokio::test]
    async fn a_source_that_blocks_does_not_block_its_task() {
        let (mut source, allow, _) = numbers();
        let first = poll_fn(|context| Poll::Ready(source.poll_next(context))).await;
        assert!(first.is_pending(), "it was not allowed to read");
        allow.send(()).expect("it reads");
        let step = poll_fn(|context| source.poll_next(context)).await.expect("a step");
        assert_eq!(value(&step).as_deref(), Some("1"));
    }

    /// It reads one step ahead, and a position must not skip that.
    #[tokio::test]
    async fn what_was_read_ahead_lies_before_the_position() {
        let (mut source, allow, _) = numbers();
        allow.send(()).expect("it reads");
        allow.send(()).expect("it reads");
        let step = poll_fn(|context| source.poll_next(context)).await.expect("a step");
        assert_eq!(value(&step).as_deref(), Some("1"));
        let ahead =
            source.complete_step().await.expect("it reads").expect("one step was under way");
        assert_eq!(value(&ahead).as_deref(), Some("2"));
        assert!(source.complete_step().await.expect("nothing is under way").is_none());
        assert_eq!(source.position().await.expect("a position"), [2]);
        drop(allow);
        let end = poll_fn(|context| source.poll_next(context)).await.expect("a step");
        assert!(matches!(end, Step::End));
    }

    #[tokio::test]
    async fn a_call_outlives_its_task_and_is_waited_for() {
        let (mut source, allow, mut ended) = numbers();
        let first = poll_fn(|context| Poll::Ready(source.poll_next(context))).await;
        assert!(first.is_pending());
        drop(source);
        assert!(ended.wait().now_or_never().is_none(), "the call is still running");
        drop(allow);
        ended.wait().await;
    }

    /// Keeps what it is given; a transaction at a time.
    #[derive(Default)]
    struct Kept(Vec<String>);

    impl BlockingSink for Kept {
        fn write(&mut self, batch: &Batch) -> Result<()> {
            self.0.push(String::from_utf8_lossy(&batch.values).into_owned());
            Ok(())
        }

        fn pre_commit(&mut self, _: CheckpointId, _: Purpose) -> Result<Vec<u8>> {
            Ok(self.0.join(",").into_bytes())
        }

        fn commit(&mut self, checkpoint: CheckpointId) -> Result<()> {
            match checkpoint.0 {
                3 => panic!("a bug"),
                _ => Ok(()),
            }
        }
    }

    #[tokio::test]
    async fn a_transaction_has_everything_in_order_however_it_was_collected() {
        let (blocking, _ended) = Blocking::new();
        let mut sink = OffThread::new(Kept::default(), blocking);
        let large = "x".repeat(COLLECTED_BYTES);
        for value in ["a", &large, "b", "c"] {
            sink.write(batch(value)).await.expect("written");
        }
        let mut state = StateWriter::default();
        sink.pre_commit(CheckpointId(1), Purpose::Periodic, &mut state).await.expect("durable");
        assert_eq!(state.into_state().to_vec(), format!("a,{large},b,c").into_bytes());
        sink.commit(CheckpointId(1)).await.expect("committed");
        let panicked = sink.commit(CheckpointId(3)).await.expect_err("it panics");
        assert!(matches!(panicked, FailureCause::HostBug { .. }));
        assert!(sink.commit(CheckpointId(4)).await.is_err(), "it is gone");
    }
}
