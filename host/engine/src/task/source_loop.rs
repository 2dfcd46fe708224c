//! The loop of a chain that begins with a source.

use std::{
    future::poll_fn,
    task::Poll,
    time::{Duration, Instant},
};

use cofferdam_connector::{Step, source::DEAD_LETTER_OUTPUT};
use cofferdam_contract::Emission;
use cofferdam_core::{job::Event, watermark::Watermarks};

use super::{
    Control, Result,
    worker::{Flow, Intake, Worker, has_credit, until, wait_for_credit},
};
use crate::{clock::now_ms, exchange::Element, failure::TaskFailure};

/// A step that is under way for this long holds nothing back any more: what was collected goes out.
const FLUSH_AFTER: Duration = Duration::from_millis(2);

/// How long a source has given nothing, and what came of it.
struct Quiet {
    since: Instant,
    /// What was collected has gone out.
    is_flushed: bool,
    /// It does not hold event time back.
    is_idle: bool,
}

impl Quiet {
    fn new() -> Self {
        Self { since: Instant::now(), is_flushed: false, is_idle: false }
    }

    /// When the next thing comes of it, if it stays quiet until then.
    fn ends_at(&self, idle_after: Option<Duration>) -> Option<Instant> {
        match (self.is_flushed, self.is_idle) {
            (false, _) => Some(self.since + FLUSH_AFTER),
            (true, false) => idle_after.map(|after| self.since + after),
            (true, true) => None,
        }
    }
}

/// Why the task of a source has stopped waiting.
enum Woken {
    Step(Step),
    /// `None`: the driver is gone.
    Control(Option<Control>),
    Quiet,
}

impl Worker {
    pub(super) async fn run_source(&mut self, was_drained: bool) -> Result<()> {
        let mut intake = Intake::Open;
        let mut quiet = Quiet::new();
        self.replay_in_flight(&[], &mut Watermarks::new(0)).await?;
        if was_drained {
            self.announce_end().await?;
            intake = Intake::Drained;
        } else if self.nodes[0].is_drained {
            self.drain().await?;
            intake = Intake::Drained;
        }
        loop {
            while let Ok(control) = self.control.try_recv() {
                if self.on_source_control(control, &mut intake, &mut quiet).await? == Flow::Done {
                    return Ok(());
                }
            }
            let is_sending = matches!(intake, Intake::Open | Intake::Ending);
            if !is_sending || !has_credit(&self.writers) {
                let control = tokio::select! {
                    biased;
                    control = self.control.recv() => Some(control),
                    () = wait_for_credit(&self.writers), if is_sending => None,
                };
                // Without credit nothing was asked for, so nothing says that the source is quiet.
                quiet.since = Instant::now();
                if let Some(control) = control {
                    let Some(control) = control else { return Ok(()) };
                    if self.on_source_control(control, &mut intake, &mut quiet).await? == Flow::Done
                    {
                        return Ok(());
                    }
                }
                continue;
            }
            if intake == Intake::Ending {
                self.drain().await?;
                intake = Intake::Drained;
                continue;
            }
            match self.next_step(&mut quiet).await? {
                Woken::Step(step) => {
                    self.take_step(step, &mut intake, &mut quiet).await?;
                    // A chain without channels never waits by itself.
                    tokio::task::consume_budget().await;
                }
                Woken::Control(None) => return Ok(()),
                Woken::Control(Some(control)) => {
                    if self.on_source_control(control, &mut intake, &mut quiet).await? == Flow::Done
                    {
                        return Ok(());
                    }
                }
                Woken::Quiet if quiet.is_flushed => {
                    quiet.is_idle = true;
                    self.announce(|| Element::Idle);
                }
                Woken::Quiet => {
                    quiet.is_flushed = true;
                    self.flush();
                }
            }
        }
    }

    /// Waits for the source's next step, for news from the driver, or until the source counts as quiet.
    async fn next_step(&mut self, quiet: &mut Quiet) -> Result<Woken> {
        let task = self.nodes[0].task;
        let failure = |cause| TaskFailure { task, cause };
        let source = self.nodes[0].source().map_err(failure)?;
        if let Poll::Ready(step) = poll_fn(|context| Poll::Ready(source.poll_next(context))).await {
            return step.map(Woken::Step).map_err(failure);
        }
        // A step that is under way may well be there before what was collected is worth sending.
        if !quiet.is_flushed && source.is_between_steps() {
            quiet.is_flushed = true;
            self.flush();
        }
        let quiet_at = quiet.ends_at(self.idle_after);
        let (node, control) = (&mut self.nodes[0], &mut self.control);
        let step = poll_fn(|context| match node.source() {
            Ok(source) => source.poll_next(context),
            Err(cause) => Poll::Ready(Err(cause)),
        });
        tokio::select! {
            biased;
            control = control.recv() => Ok(Woken::Control(control)),
            step = step => {
                step.map(Woken::Step).map_err(|cause| TaskFailure { task, cause })
            }
            () = until(quiet_at) => Ok(Woken::Quiet),
        }
    }

    /// Processes what the source has given.
    async fn take_step(
        &mut self,
        step: Step,
        intake: &mut Intake,
        quiet: &mut Quiet,
    ) -> Result<()> {
        quiet.since = Instant::now();
        quiet.is_flushed = false;
        match step {
            Step::Records { batch, letters, bad, watermark } => {
                self.end_idleness(quiet);
                self.nodes[0].count_bad(&self.monitor, bad);
                let letters = letters.map(|letters| (DEAD_LETTER_OUTPUT, *letters));
                let emissions = [(0, batch)].into_iter().chain(letters);
                let emissions = emissions.map(|(output, records)| Emission { output, records });
                self.route(0, emissions.collect()).await?;
                self.note_lag(watermark)?;
                if let Some(watermark) = watermark {
                    self.advance_all(watermark).await?;
                }
            }
            Step::Watermark(watermark) => {
                self.end_idleness(quiet);
                self.note_lag(Some(watermark))?;
                self.advance_all(watermark).await?;
            }
            Step::Idle if quiet.is_idle => {}
            Step::Idle => {
                quiet.is_idle = true;
                self.flush();
                self.announce(|| Element::Idle);
            }
            Step::End => *intake = Intake::Ending,
        }
        Ok(())
    }

    /// A source that was idle counts again, from where it was.
    fn end_idleness(&mut self, quiet: &mut Quiet) {
        if std::mem::take(&mut quiet.is_idle) {
            let now = self.clock.now();
            self.announce(|| Element::Watermark(now));
        }
    }

    /// Processes what the source has begun and not given yet: it lies before the position that is asked for
    /// next.
    async fn complete_steps(&mut self, intake: &mut Intake, quiet: &mut Quiet) -> Result<()> {
        while *intake == Intake::Open {
            let node = &mut self.nodes[0];
            let task = node.task;
            let failure = |cause| TaskFailure { task, cause };
            let step = node.source().map_err(failure)?.complete_step().await;
            match step.map_err(failure)? {
                Some(step) => self.take_step(step, intake, quiet).await?,
                None => break,
            }
        }
        Ok(())
    }

    async fn on_source_control(
        &mut self,
        control: Control,
        intake: &mut Intake,
        quiet: &mut Quiet,
    ) -> Result<Flow> {
        if matches!(control, Control::Barrier(..) | Control::EndInput) {
            self.complete_steps(intake, quiet).await?;
        }
        self.on_control(control, intake).await
    }

    /// Reports how far the source is behind, and where it begins or ceases to work off a backlog. Where it
    /// does not say, event time that lags behind the clock does.
    fn note_lag(&mut self, watermark: Option<i64>) -> Result<()> {
        let (task, attempt) = (self.nodes[0].task, self.attempt);
        let lag = self.nodes[0].source().map_err(|cause| TaskFailure { task, cause })?.lag();
        self.nodes[0].set_records_behind(&self.monitor, lag.records);
        let lags = |(lag_ms, watermark): (u64, i64)| {
            let now = i64::try_from(now_ms()).unwrap_or(i64::MAX);
            i64::try_from(lag_ms).unwrap_or(i64::MAX) < now.saturating_sub(watermark)
        };
        let by_clock = || self.backlog_lag_ms.zip(watermark).map(lags);
        let Some(is_backlog) = lag.is_backlog.or_else(by_clock) else { return Ok(()) };
        if is_backlog != std::mem::replace(&mut self.is_backlog, is_backlog) {
            self.monitor.report(Event::BacklogChanged { task, attempt, is_backlog });
        }
        Ok(())
    }
}
