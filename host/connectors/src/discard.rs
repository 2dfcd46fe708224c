//! Takes records and keeps none.

use std::sync::Arc;

use cofferdam_connector::{
    Answer, Sink, TaskContext,
    catalog::{OutputContext, SinkPlan, SinkSpec},
    ready,
    sink::{Guarantee, StateWriter},
};
use cofferdam_contract::{Batch, Format};
use cofferdam_core::{checkpoint::Purpose, ids::CheckpointId};
use cofferdam_settings::Problem;

use crate::settings::BuiltIn;

/// Nowhere.
pub(crate) const DISCARD: BuiltIn<dyn SinkSpec> =
    BuiltIn { name: "discard", rows: &[], read: |_, _| Ok(Arc::new(DiscardSpec)) };

/// Nowhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DiscardSpec;

impl SinkSpec for DiscardSpec {
    fn guarantee(&self) -> Guarantee {
        Guarantee::ExactlyOnce
    }

    fn takes(&self, _: Format) -> bool {
        true
    }

    fn claim(&self, _: OutputContext<'_>) -> Result<Box<dyn SinkPlan>, Problem> {
        Ok(Box::new(*self))
    }
}

impl SinkPlan for DiscardSpec {
    fn open(&self, _: &TaskContext, _: Option<Vec<u8>>) -> Answer<'static, Box<dyn Sink>> {
        ready(Ok(Box::new(DiscardSink)))
    }
}

struct DiscardSink;

impl Sink for DiscardSink {
    fn write(&mut self, _: Batch) -> Answer<'_, ()> {
        ready(Ok(()))
    }

    fn pre_commit<'a>(
        &'a mut self,
        _: CheckpointId,
        _: Purpose,
        _: &'a mut StateWriter,
    ) -> Answer<'a, ()> {
        ready(Ok(()))
    }

    fn commit(&mut self, _: CheckpointId) -> Answer<'_, ()> {
        ready(Ok(()))
    }
}
