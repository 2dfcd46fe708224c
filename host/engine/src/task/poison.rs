//! Isolates poison records: what an operator does that has trapped and must not trap again.
//!
//! After a trap the job restarts, as after any. The operator that trapped is then *guarded* over the
//! records that follow: after each batch it keeps an image of its memory in this process, so a batch
//! that traps again can be taken back and halved, on copies of the instance, until the record is found.
//! What is found goes to the operator's output `dead-letter`.

use std::time::Instant;

use base64::{Engine, prelude::BASE64_STANDARD};
use cofferdam_contract::{Batch, Emission, Processed as Answer, RecordRef};
use cofferdam_core::{
    failure::{EnvironmentError, FailureCause},
    ids::micros,
    isolate::Isolation,
};
use cofferdam_sandbox::{GuestError, Image, MemorySnapshot};
use serde_json::{Map, Value, json};

use super::{
    guard::Guard,
    operator::{Context, OperatorTask},
};
use crate::{
    failure::{about_record, cause_of, host_bug, restore_cause, snapshot_cause, storage_cause},
    state::local::TaskLocal,
    watch::progress::Progress,
};

type Result<T> = std::result::Result<T, FailureCause>;

/// Records that are guarded at least, whatever the operator had processed when it trapped.
const GUARDED_RECORDS_MIN: u64 = 4096;

/// Snapshots that wait for a checkpoint before they are merged into one, so that they take no more
/// than a few times the memory.
const UNSAVED_MAX: usize = 16;

/// Whether another try without one of its records may help.
fn is_about_records(error: &GuestError) -> bool {
    matches!(
        error,
        GuestError::Trap { .. }
            | GuestError::Limit(_)
            | GuestError::Rejected { .. }
            | GuestError::Failed { .. }
    )
}

impl OperatorTask {
    /// How many records are to be guarded after a trap now.
    pub(crate) fn records_to_guard(&self) -> u64 {
        // Channels may deliver in another order the next time, so some more.
        (2 * self.processed.since_completed()).max(GUARDED_RECORDS_MIN)
    }

    /// Begins to guard `records` records. The instance stands where its checkpoint `base` left it.
    pub(crate) async fn begin_guard(
        &mut self,
        context: &Context<'_>,
        base: Option<Image>,
        records: u64,
    ) -> Result<()> {
        self.guard = Some(Guard { image: base.unwrap_or_default(), records_left: records });
        if let Some(keyed) = &context.local.keyed {
            keyed.guard();
        }
        self.commit_call(context.local, 0).await
    }

    fn end_guard(&mut self, local: &TaskLocal) -> Result<()> {
        self.guard = None;
        local.keyed.as_ref().map_or(Ok(()), |keyed| keyed.unguard()).map_err(storage_cause)
    }

    /// A call has ended well: what it has written is part of the image from now on.
    pub(crate) async fn commit_call(&mut self, local: &TaskLocal, records: usize) -> Result<()> {
        if self.guard.is_none() {
            return Ok(());
        }
        // Handles are no part of memory: while the guest holds some it cannot be guarded.
        if self.instance()?.check_handles().is_err() {
            return self.end_guard(local);
        }
        if let Some(keyed) = &local.keyed {
            keyed.commit_call().map_err(storage_cause)?;
        }
        let written = self.instance()?.snapshot().await.map_err(snapshot_cause)?;
        let Some(guard) = &mut self.guard else { return Ok(()) };
        guard.image.apply(&written).map_err(no_memory)?;
        guard.records_left = guard.records_left.saturating_sub(records as u64);
        let is_over = guard.records_left == 0;
        if self.spec.snapshot.has_memory() {
            // The next checkpoint has to hold it, and its own snapshot will not find it any more.
            self.unsaved.push(written);
            if UNSAVED_MAX <= self.unsaved.len() {
                self.unsaved = MemorySnapshot::merged(&self.unsaved).into_iter().collect();
            }
        }
        if is_over { self.end_guard(local) } else { Ok(()) }
    }

    /// A checkpoint's snapshot was taken: adds what was committed since the one before.
    pub(crate) fn complete_snapshot(&mut self, memory: MemorySnapshot) -> Result<MemorySnapshot> {
        if let Some(guard) = &mut self.guard {
            guard.image.apply(&memory).map_err(no_memory)?;
        }
        if self.unsaved.is_empty() {
            return Ok(memory);
        }
        let mut all = std::mem::take(&mut self.unsaved);
        all.push(memory);
        MemorySnapshot::merged(&all).ok_or_else(|| host_bug("a snapshot without memories"))
    }

    /// What came of a batch. Rejected records go to the dead letters at once, if somebody takes these: no
    /// restart is needed, and none is counted. Else the first of them ends the attempt.
    pub(crate) fn accept(
        &self,
        context: &Context<'_>,
        input: u32,
        batch: &Batch,
        answer: Answer,
    ) -> Result<Vec<Emission>> {
        let Answer { mut emissions, rejected } = answer;
        let Some(first) = rejected.first() else { return Ok(emissions) };
        if self.spec.dead_letter_after.is_none() {
            let message = about_record(&first.message, batch, first.record);
            return Err(FailureCause::Rejected { message });
        }
        let mut letters = Batch::empty();
        let mut waiting = rejected.iter().peekable();
        for (place, record) in (0..).zip(batch.records()) {
            let Some(rejection) = waiting.next_if(|it| it.record == place) else { continue };
            let cause = FailureCause::Rejected { message: rejection.message.clone() };
            let value = self.dead_letter(context, input, Some(record), &cause, 0);
            letters.push(RecordRef { key: None, value: value.as_bytes(), timestamp: None });
        }
        let metrics = &context.monitor.metrics.operators[context.task.node.0 as usize];
        metrics.change_custom("rejected-records", |count| *count += rejected.len() as f64);
        emissions.push(Emission { output: self.dead_letter_output, records: letters });
        Ok(emissions)
    }

    /// Processes a batch that has trapped just now without its poison records.
    pub(crate) async fn isolate(
        &mut self,
        context: &Context<'_>,
        input: u32,
        batch: &Batch,
        mut error: GuestError,
    ) -> Result<Vec<Emission>> {
        let began = Instant::now();
        let traps = self.spec.dead_letter_after.unwrap_or(1);
        // The failure that led to the restart was the first.
        let mut search =
            Isolation::new(u32::try_from(batch.record_count()).unwrap_or(u32::MAX), traps - 1);
        let mut emissions = Vec::new();
        loop {
            if !is_about_records(&error) || self.guard.is_none() {
                return Err(cause_of(error));
            }
            self.rewind(context).await?;
            if let Some(place) = search.on_trap() {
                let cause = cause_of(error);
                let record = batch.records().nth(place as usize);
                let value = self.dead_letter(context, input, record, &cause, traps);
                let mut letter = Batch::empty();
                letter.push(RecordRef { key: None, value: value.as_bytes(), timestamp: None });
                emissions.push(Emission { output: self.dead_letter_output, records: letter });
                let task = context.name(&self.name);
                let isolation_us = micros(began.elapsed());
                context.monitor.observe(Progress::dead_letter(task, &cause, traps, isolation_us));
            }
            error = loop {
                let Some(part) = search.next_part() else { return Ok(emissions) };
                let part = batch.part(part.start as usize..part.end as usize);
                match self.instance()?.process(input, &part).await {
                    Ok(processed) => {
                        search.on_success();
                        self.processed.add(part.record_count());
                        self.commit_call(context.local, part.record_count()).await?;
                        emissions.extend(self.accept(context, input, &part, processed)?);
                    }
                    Err(error) => break error,
                }
            };
        }
    }

    /// Replaces the instance by a copy of what it was before the call that has trapped.
    async fn rewind(&mut self, context: &Context<'_>) -> Result<()> {
        if let Some(trapped) = self.instance.take() {
            context.local.retire(trapped);
        }
        if let Some(keyed) = &context.local.keyed {
            keyed.discard();
        }
        let mut instance = self.open(context).await?;
        let guard = self.guard.as_ref().ok_or_else(|| host_bug("nothing to rewind to"))?;
        instance.restore(&guard.image).await.map_err(restore_cause)?;
        self.instance = Some(instance);
        Ok(())
    }

    /// All that is known of a poison record, as one JSON document.
    fn dead_letter(
        &self,
        context: &Context<'_>,
        input: u32,
        record: Option<RecordRef<'_>>,
        cause: &FailureCause,
        traps: u32,
    ) -> String {
        let mut letter = Map::new();
        let mut bytes = |name: &str, bytes: &[u8]| match std::str::from_utf8(bytes) {
            Ok(text) => letter.insert(name.to_owned(), text.into()),
            Err(_) => letter.insert(format!("{name}_base64"), BASE64_STANDARD.encode(bytes).into()),
        };
        if let Some(key) = record.and_then(|record| record.key) {
            bytes("key", key);
        }
        if let Some(record) = record {
            bytes("value", record.value);
        }
        let timestamp = record.and_then(|record| record.timestamp);
        letter.extend([
            ("timestamp".to_owned(), json!(timestamp)),
            ("task".to_owned(), Value::from(context.name(&self.name))),
            ("input".to_owned(), Value::from(input)),
            ("class".to_owned(), Value::from(cause.class())),
            ("message".to_owned(), Value::from(cause.message())),
            ("backtrace".to_owned(), json!(cause.backtrace())),
            ("traps".to_owned(), Value::from(traps)),
        ]);
        Value::Object(letter).to_string()
    }
}

fn no_memory(error: std::io::Error) -> FailureCause {
    FailureCause::Environment(EnvironmentError::of("keep the image of a guarded task", error))
}
