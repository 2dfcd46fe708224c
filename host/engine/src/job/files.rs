//! Where a job keeps what it needs: its storage, and the scratch directories of a run.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_core::{exchange::ExchangeType, ids::TaskId};
use cofferdam_spec::{JobSpec, NodeKind, StateBackend, StorageSpec};
use cofferdam_store::{
    SnapshotStore, Storage, StorageError, faulty::Faults, memory::MemoryStorage,
    metadata::TaskIdentity, sled::SledStorage, table::Tables,
};

use super::plan::own_keys;
use crate::{
    exchange::partition::Partitions,
    state::{
        keyed::{KeyedLimits, KeyedState},
        local::TaskLocal,
    },
};

/// In the state directory: tables of the state that the host keeps while the job runs.
const WORKING: &str = "working";

/// And the results of exchanges that are not pipelined.
const PARTITIONS: &str = "partitions";

/// And what file sinks have committed.
pub(super) const OUTPUTS: &str = "outputs";

/// A directory of this run alone, which it removes.
fn scratch_dir(state_dir: Option<&Path>, name: &str) -> io::Result<PathBuf> {
    match state_dir {
        Some(dir) => Ok(dir.join(name)),
        None => {
            let dir = tempfile::Builder::new().prefix("cofferdam-").tempdir()?;
            Ok(dir.keep())
        }
    }
}

/// Where the results of exchanges that are not pipelined lie.
pub(super) fn partitions(
    spec: &JobSpec,
    state_dir: Option<&Path>,
) -> io::Result<Option<Arc<Partitions>>> {
    if !spec.graph.has_exchange(ExchangeType::has_partition) {
        return Ok(None);
    }
    Ok(Some(Arc::new(Partitions::new(&scratch_dir(state_dir, PARTITIONS)?)?)))
}

/// What this process keeps of each task: nothing yet, and a place for state that the host keeps.
pub(super) fn locals(
    tasks: &[TaskId],
    identities: &[TaskIdentity],
    spec: &JobSpec,
    state_dir: Option<&Path>,
) -> Result<BTreeMap<TaskId, Arc<TaskLocal>>, StorageError> {
    let tables = match &spec.state_backend {
        StateBackend::Sled(backend) if identities.iter().any(|task| task.has_host_state) => {
            let dir = scratch_dir(state_dir, WORKING)
                .map_err(|error| StorageError::store("make room for state", error))?;
            Some((Tables::new(&dir, backend.cache_bytes)?, backend.write_buffer_bytes))
        }
        _ => None,
    };
    let local = |(task, identity): (&TaskId, &TaskIdentity)| {
        let operator = match &spec.node(task.node).kind {
            NodeKind::Operator(operator) if identity.has_host_state => Some(operator),
            _ => None,
        };
        let keyed = tables.as_ref().zip(operator);
        let keyed = keyed.map(|((tables, write_buffer_bytes), operator)| {
            let limits = KeyedLimits {
                bytes_max: operator.state_bytes_max,
                write_buffer_bytes: *write_buffer_bytes,
                max_parallelism: identity.max_parallelism,
                own_keys: own_keys(&spec.graph, *task, identity.is_keyed, identity.max_parallelism),
            };
            KeyedState::new(tables.clone(), limits).map(Arc::new)
        });
        Ok((*task, Arc::new(TaskLocal::new(keyed.transpose()?))))
    };
    tasks.iter().zip(identities).map(local).collect()
}

/// Whether a job has no storage yet: not even to look into it one is made.
pub(super) fn is_nothing_there(spec: &StorageSpec, state_dir: &Path) -> bool {
    match spec {
        StorageSpec::Objects { location, .. } => {
            let location = Path::new(location);
            !cofferdam_store::is_url(location) && !location.exists()
        }
        StorageSpec::Sled(_) | StorageSpec::Memory => !state_dir.exists(),
    }
}

/// The storage of a job, to look into it.
pub(super) fn storage_at(
    spec: &StorageSpec,
    state_dir: Option<&Path>,
) -> Result<Box<dyn Storage>, StorageError> {
    match (spec, state_dir) {
        (StorageSpec::Objects { location, .. }, _) => cofferdam_store::objects_at(location),
        (_, Some(dir)) => Ok(Box::new(SledStorage::new(dir.to_owned()))),
        (_, None) => Ok(Box::new(MemoryStorage::default())),
    }
}

/// The same, to write to it: what an earlier run was still removing goes.
pub(super) fn open_storage(
    spec: &StorageSpec,
    state_dir: Option<&Path>,
) -> Result<Box<dyn Storage>, StorageError> {
    if let (StorageSpec::Sled(_) | StorageSpec::Memory, Some(dir)) = (spec, state_dir) {
        SledStorage::new(dir.to_owned()).finish_removals()?;
    }
    storage_at(spec, state_dir)
}

/// The store of a job, to write to it. Where what is there is of a job that has ended, that is removed first.
pub(super) fn open_store(
    spec: &JobSpec,
    state_dir: Option<&Path>,
    identities: &[TaskIdentity],
    is_over: bool,
    faults: Option<&Faults>,
) -> Result<SnapshotStore, StorageError> {
    let mut storage = open_storage(&spec.storage, state_dir)?;
    if is_over {
        let (over, _) = SnapshotStore::open(storage, &spec.name, identities.to_vec())?;
        over.clear()?;
        storage = open_storage(&spec.storage, state_dir)?;
    }
    if let Some(faults) = faults {
        storage = faults.around(storage);
    }
    let (mut store, _) = SnapshotStore::open(storage, &spec.name, identities.to_vec())?;
    store.compress(spec.is_compressing);
    Ok(store)
}

pub(super) fn remove_claimed(place: &Path) -> Result<(), StorageError> {
    if cofferdam_store::is_url(place) {
        let (store, _) = cofferdam_store::open_at(place).and_then(SnapshotStore::open_existing)?;
        return store.clear();
    }
    fs::remove_dir_all(place).map_err(|error| StorageError::store("remove a directory", error))
}
