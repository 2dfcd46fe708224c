//! A sink that keeps each epoch with the checkpoint until the other side has confirmed it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use cofferdam_connector::{
    Answer, Sink, TaskContext,
    catalog::{OutputContext, SinkConnector, SinkPlan, SinkSpec},
    ready,
    sink::{Guarantee, StateWriter},
    state::{decode_all, encode_all, unreadable},
};
use cofferdam_contract::Batch;
use cofferdam_core::{
    checkpoint::Purpose,
    failure::{EnvironmentError, FailureCause},
    ids::CheckpointId,
};
use cofferdam_settings::{AnySetting, Problem, Required, Section, table::Key};
use serde::{Deserialize, Serialize};

/// The other side of the sink: it takes each epoch once, whoever sends it and how often.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<LedgerState>);

#[derive(Debug, Default)]
pub(super) struct LedgerState {
    pub(super) epochs: BTreeMap<Epoch, Vec<String>>,
    /// It does not confirm anything while this is set.
    pub(super) is_away: bool,
    /// Writes that succeed before one fails.
    pub(super) fails_after: Option<usize>,
    pub(super) failures: usize,
    /// Epochs that came again.
    pub(super) repeated: usize,
    pub(super) aborted: BTreeSet<u64>,
}

impl Ledger {
    pub(super) fn lock(&self) -> MutexGuard<'_, LedgerState> {
        self.0.lock().expect("no panic while it is locked")
    }

    pub(super) fn records(&self) -> Vec<String> {
        let mut records: Vec<String> = self.lock().epochs.values().flatten().cloned().collect();
        records.sort();
        records
    }
}

/// What identifies an epoch: whoever sends it, whoever wrote it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Epoch {
    job: String,
    pub(super) timeline: String,
    sink: String,
    pub(super) task: u32,
    number: u64,
}

pub(super) struct LedgerConnector(pub(super) Arc<Ledger>);

pub(super) static BOOK: Required<String> =
    Key::text("book", "the name of the ledger").of_job().required("a name");

impl SinkConnector for LedgerConnector {
    fn name(&self) -> &'static str {
        "ledger"
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        static ROWS: &[&dyn AnySetting] = &[&BOOK];
        ROWS
    }

    fn read(&self, section: &Section<'_>, _: &Path) -> Result<Arc<dyn SinkSpec>, Problem> {
        section.require(&BOOK)?;
        Ok(Arc::new(LedgerSpec { ledger: self.0.clone() }))
    }
}

#[derive(Debug, Clone)]
pub(super) struct LedgerSpec {
    ledger: Arc<Ledger>,
}

/// An epoch that the other side has not confirmed.
pub(super) type Unconfirmed = (Epoch, u64, Vec<String>);

impl SinkSpec for LedgerSpec {
    fn guarantee(&self) -> Guarantee {
        Guarantee::EffectivelyOnce
    }

    fn claim(&self, output: OutputContext<'_>) -> Result<Box<dyn SinkPlan>, Problem> {
        let identity = Epoch {
            job: output.lineage.job.to_string(),
            timeline: output.lineage.timeline.to_string(),
            sink: output.sink.to_owned(),
            task: 0,
            number: 0,
        };
        Ok(Box::new(LedgerPlan { spec: self.clone(), identity }))
    }

    /// An epoch moves whole, to one task, which sends it under its old identity.
    fn redistribute<'a>(
        &'a self,
        states: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        let shared = decode_all::<Vec<Unconfirmed>>(states).and_then(|old| {
            let mut new = vec![Vec::<Unconfirmed>::new(); parallelism];
            for epoch in old.into_iter().flatten() {
                new[epoch.0.task as usize % parallelism].push(epoch);
            }
            encode_all(&new)
        });
        ready(shared.map_err(|message| FailureCause::HostBug { message }))
    }
}

pub(super) struct LedgerPlan {
    spec: LedgerSpec,
    identity: Epoch,
}

impl SinkPlan for LedgerPlan {
    fn open(&self, task: &TaskContext, state: Option<Vec<u8>>) -> Answer<'static, Box<dyn Sink>> {
        let unconfirmed: Vec<Unconfirmed> = match state.as_deref().map(postcard::from_bytes) {
            Some(Ok(unconfirmed)) => unconfirmed,
            Some(Err(error)) => return ready(Err(unreadable("state of a ledger", error))),
            None => Vec::new(),
        };
        let (spec, index) = (self.spec.clone(), task.index);
        let identity = Epoch { task: index, ..self.identity.clone() };
        Box::pin(async move {
            let mut sink = LedgerSink { spec, identity, open: Vec::new(), unconfirmed };
            // What the restored checkpoint holds comes before anything new.
            sink.send(u64::MAX);
            Ok(Box::new(sink) as Box<dyn Sink>)
        })
    }
}

pub(super) struct LedgerSink {
    spec: LedgerSpec,
    identity: Epoch,
    open: Vec<String>,
    unconfirmed: Vec<Unconfirmed>,
}

impl LedgerSink {
    /// Sends epochs up to a checkpoint; what is not confirmed stays.
    fn send(&mut self, checkpoint: u64) {
        let mut ledger = self.spec.ledger.lock();
        if ledger.is_away {
            return;
        }
        self.unconfirmed.retain(|(epoch, of, records)| {
            let is_due = *of <= checkpoint;
            if is_due && ledger.epochs.insert(epoch.clone(), records.clone()).is_some() {
                ledger.repeated += 1;
            }
            !is_due
        });
    }
}

impl Sink for LedgerSink {
    fn write(&mut self, batch: Batch) -> Answer<'_, ()> {
        Box::pin(async move {
            let mut ledger = self.spec.ledger.lock();
            if let Some(left) = &mut ledger.fails_after {
                match left.checked_sub(1) {
                    Some(fewer) => *left = fewer,
                    None => {
                        ledger.fails_after = None;
                        ledger.failures += 1;
                        let error = EnvironmentError::new("the ledger has dropped the connection");
                        return Err(FailureCause::Environment(error));
                    }
                }
            }
            drop(ledger);
            let values = batch.records().map(|it| String::from_utf8_lossy(it.value).into_owned());
            self.open.extend(values);
            Ok(())
        })
    }

    fn pre_commit<'a>(
        &'a mut self,
        checkpoint: CheckpointId,
        _: Purpose,
        state: &'a mut StateWriter,
    ) -> Answer<'a, ()> {
        if !self.open.is_empty() {
            let epoch = Epoch { number: checkpoint.0, ..self.identity.clone() };
            self.unconfirmed.push((epoch, checkpoint.0, std::mem::take(&mut self.open)));
        }
        let encoded = postcard::to_stdvec(&self.unconfirmed);
        ready(match encoded {
            Ok(bytes) => {
                bytes.chunks(4096).for_each(|chunk| state.write(chunk.to_vec()));
                Ok(())
            }
            Err(error) => Err(FailureCause::HostBug { message: error.to_string() }),
        })
    }

    fn commit(&mut self, checkpoint: CheckpointId) -> Answer<'_, ()> {
        self.send(checkpoint.0);
        ready(Ok(()))
    }

    fn abort(&mut self, checkpoint: CheckpointId) -> Answer<'_, ()> {
        self.spec.ledger.lock().aborted.insert(checkpoint.0);
        ready(Ok(()))
    }
}
