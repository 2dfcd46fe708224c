//! What a chain gives out: from node to node, into exchanges, and event time with it.

use cofferdam_contract::{Batch, Emission};
use cofferdam_core::{ids::TaskId, job::Event, watermark::MAX_WATERMARK};

use super::{
    Result,
    node::Target,
    worker::{Worker, has_credit, wait_for_credit},
};
use crate::{
    exchange::{Element, writer::Writer},
    failure::TaskFailure,
};

/// Records on their way to a node of the chain; those before `from` are processed.
struct Delivery {
    node: usize,
    input: u32,
    batch: Batch,
    from: usize,
}

impl Worker {
    pub(super) fn announce(&mut self, element: impl Fn() -> Element) {
        for writer in &mut self.writers {
            writer.announce(&element);
        }
    }

    /// Every input has ended: event time is over, every operator finishes, and so on downstream.
    pub(super) async fn drain(&mut self) -> Result<()> {
        self.advance_all(MAX_WATERMARK).await?;
        for node in 0..self.nodes.len() {
            if self.nodes[node].is_drained {
                continue;
            }
            let finished = self.nodes[node].finish(&self.monitor).await;
            let task = self.nodes[node].task;
            let emissions = finished.map_err(|cause| TaskFailure { task, cause })?;
            self.route(node, emissions).await?;
        }
        self.announce_end().await
    }

    /// Tells what comes behind, and the driver, that nothing more will.
    pub(super) async fn announce_end(&mut self) -> Result<()> {
        // A task that is restored behind its end has never told how late it is.
        self.advance_all(MAX_WATERMARK).await?;
        self.announce(|| Element::EndOfInput);
        let last = self.nodes[self.nodes.len() - 1].task;
        for writer in &mut self.writers {
            writer.finish().map_err(|cause| TaskFailure { task: last, cause })?;
        }
        for node in &mut self.nodes {
            node.is_drained = true;
            if self.is_batch {
                // Its results are where others read them: nobody asks it for anything any more.
                let closed = node.close().await;
                closed.map_err(|cause| TaskFailure { task: node.task, cause })?;
            }
            self.monitor.report(Event::TaskDrained { task: node.task, attempt: self.attempt });
        }
        Ok(())
    }

    /// Event time at the head of the chain is said to be this. What moves the clock reaches every
    /// node, and what comes behind.
    pub(super) async fn advance_all(&mut self, watermark: i64) -> Result<()> {
        let Some(watermark) = self.clock.advance(watermark) else { return Ok(()) };
        for node in 0..self.nodes.len() {
            if self.nodes[node].is_drained {
                continue;
            }
            let advanced = self.nodes[node].advance(&self.monitor, watermark).await;
            let task = self.nodes[node].task;
            let emissions = advanced.map_err(|cause| TaskFailure { task, cause })?;
            self.route(node, emissions).await?;
        }
        self.announce(|| Element::Watermark(watermark));
        Ok(())
    }

    /// Processes a batch at a node, and what comes of it at the nodes behind.
    pub(super) async fn deliver(&mut self, node: usize, input: u32, batch: Batch) -> Result<()> {
        let mut waiting = vec![Delivery { node, input, batch, from: 0 }];
        while let Some(Delivery { node, input, batch, from }) = waiting.pop() {
            let processed = self.nodes[node].process(&self.monitor, input, batch, from).await;
            let task = self.nodes[node].task;
            let (emissions, rest) = processed.map_err(|cause| TaskFailure { task, cause })?;
            let is_whole = rest.is_none();
            // It comes after what the first part gives.
            waiting.extend(rest.map(|(batch, from)| Delivery { node, input, batch, from }));
            self.send(node, emissions, &mut waiting)?;
            // One call gives no more than its limit; all calls of a batch together may.
            if !is_whole && !has_credit(&self.writers) {
                wait_for_credit(&self.writers).await;
            }
        }
        Ok(())
    }

    /// Sends what a node has emitted to where it goes.
    pub(super) async fn route(&mut self, node: usize, emissions: Vec<Emission>) -> Result<()> {
        let mut waiting = Vec::new();
        self.send(node, emissions, &mut waiting)?;
        while let Some(Delivery { node, input, batch, .. }) = waiting.pop() {
            self.deliver(node, input, batch).await?;
        }
        Ok(())
    }

    /// Writes to exchanges at once, in order; what goes to chained nodes is put on the stack, the
    /// first on top.
    fn send(
        &mut self,
        node: usize,
        emissions: Vec<Emission>,
        waiting: &mut Vec<Delivery>,
    ) -> Result<()> {
        let first = waiting.len();
        for Emission { output, records } in emissions {
            self.nodes[node].count_out(&self.monitor, &records);
            if records.value_ends.is_empty() {
                continue;
            }
            let targets = self.nodes[node].targets(output, &records)?;
            let Some((last, others)) = targets.split_last() else {
                continue;
            };
            let (last, others) = (*last, others.to_vec());
            let task = self.nodes[node].task;
            for target in others {
                self.send_to(task, target, records.clone(), waiting)?;
            }
            self.send_to(task, last, records, waiting)?;
        }
        waiting[first..].reverse();
        Ok(())
    }

    fn send_to(
        &mut self,
        task: TaskId,
        target: Target,
        records: Batch,
        waiting: &mut Vec<Delivery>,
    ) -> Result<()> {
        match target {
            Target::Node { node, input } => {
                waiting.push(Delivery { node, input, batch: records, from: 0 });
                Ok(())
            }
            Target::Writer(writer) => {
                let written = self.writers[writer].write(records);
                written.map_err(|cause| TaskFailure { task, cause })
            }
        }
    }

    pub(super) fn flush(&mut self) {
        self.writers.iter_mut().for_each(Writer::flush);
    }
}
