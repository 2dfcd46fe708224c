//! The tasks that the state of a checkpoint is to become.

use std::{collections::BTreeMap, sync::Arc};

use cofferdam_connector::catalog::SourcePlan;
use cofferdam_core::ids::TaskId;
use cofferdam_sandbox::Component;
use cofferdam_settings::Problem;
use cofferdam_spec::JobSpec;
use cofferdam_store::{self, StorageError, metadata::TaskIdentity};

use crate::{
    state::local::TaskLocal,
    watch::progress::{Observer, Progress, RestoreStep},
};

/// The tasks of a job, in the order of their slots, with what they keep in this process.
pub(crate) struct Tasks<'a> {
    pub(crate) spec: &'a JobSpec,
    pub(crate) identities: &'a [TaskIdentity],
    pub(crate) locals: &'a BTreeMap<TaskId, Arc<TaskLocal>>,
    pub(crate) sources: &'a BTreeMap<String, Arc<dyn SourcePlan>>,
    pub(crate) components: &'a BTreeMap<String, Component>,
    /// The caller is told of what takes long.
    pub(crate) observer: &'a dyn Observer,
}

impl Tasks<'_> {
    pub(super) fn tell(&self, checkpoint: u64, step: RestoreStep) {
        self.observer.observe(Progress::Restoring { checkpoint, step });
    }
}

pub(super) enum Failed {
    Problem(Box<Problem>),
    Storage(StorageError),
}

impl From<StorageError> for Failed {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}
