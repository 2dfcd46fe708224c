//! Finds what a run resumes from, and makes that state fit: the newest whole checkpoint of the
//! state directory, or the one that was named; redistributed where parallelism has changed.
//!
//! Declared state moves by key group. Linear memory fits only the component and the parallelism
//! that wrote it. Positions of sources and transactions of sinks say themselves how they are
//! shared.

use std::path::{Path, PathBuf};

use cofferdam_connector::identity::Lineage;
use cofferdam_core::{
    ids::CheckpointId,
    job::Resume,
    origin::{Found, NoOrigin, Origin, origin},
};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::NodeSpec;
use cofferdam_store::{
    self, OpenedStore, SnapshotStore, StorageError, metadata::CheckpointMetadata,
    snapshot::TaskRestore,
};

use super::{
    fit::check_fit,
    redistribute::{TaskRestores, redistribute},
    target::{Failed, Tasks},
};
use crate::{job::state_dir::JobRecord, watch::progress::RestoreStep};

/// A checkpoint or savepoint to begin from, instead of the newest of the state directory.
#[derive(Debug, Clone)]
pub struct RestoreFrom {
    /// Its directory.
    pub dir: PathBuf,
    /// Flink's CLAIM: it belongs to this job from now on, which removes it once a checkpoint of its
    /// own is complete. Else it is never touched.
    pub claim: bool,
    /// State of operators that are not in the manifest is left behind. Else it is an error.
    pub ignore_unclaimed_state: bool,
}

/// What a run resumes from. Nothing has changed yet.
pub(crate) struct Chosen {
    /// Which course of events it is.
    pub(crate) lineage: Lineage,
    /// What every task takes over, by slot; nothing where the job begins.
    pub(crate) restores: TaskRestores,
    /// What people should hear.
    pub(crate) warnings: Vec<String>,
    /// The checkpoint; `None`: the job begins.
    pub(crate) metadata: Option<CheckpointMetadata>,
    /// The store that it lies in, if it is another one.
    other: Option<SnapshotStore>,
}

impl Chosen {
    /// The checkpoint; `None`: the job begins.
    pub(crate) fn checkpoint(&self) -> Option<u64> {
        self.metadata.as_ref().map(|metadata| metadata.checkpoint)
    }
}

/// Finds the state to resume from, and shares it out. Changes nothing.
pub(crate) fn choose(
    tasks: &Tasks<'_>,
    store: &SnapshotStore,
    found: &OpenedStore,
    from: Option<&RestoreFrom>,
    record: &JobRecord,
) -> Result<Chosen, Problem> {
    let own = found.checkpoints.last();
    let other = from.map(|from| open_named(&from.dir));
    let has_begun_from = |from: &RestoreFrom| match (own, &other) {
        (Some(own), Some(Ok((_, metadata)))) => {
            let (timeline, checkpoint) = (metadata.lineage.timeline, metadata.checkpoint);
            own.is_that_of(metadata) || own.lineage.comes_from(timeline, checkpoint)
        }
        // It was claimed, and is gone.
        _ => record.begun_from.as_deref() == absolute(&from.dir).as_deref(),
    };
    let origin = origin(Found {
        is_headless: found.is_headless,
        has_own: own.is_some(),
        named: from.map(has_begun_from),
    });
    match (origin, from, other) {
        (Ok(Origin::Named), Some(from), Some(other)) => begin_from(tasks, from, other?),
        (Ok(Origin::OwnAfterNamed), Some(from), _) => {
            let mut chosen = choose_newest(tasks, store, found, record)?;
            let id = chosen.checkpoint().unwrap_or_default();
            chosen.warnings.push(format!(
                "the job already started from {} earlier; it resumes from its own checkpoint {id}",
                from.dir.display()
            ));
            Ok(chosen)
        }
        (Err(NoOrigin::Occupied), Some(from), _) => Err(occupied(store, own, &from.dir)),
        (Err(_), ..) => Err(headless(store, found)),
        (Ok(_), ..) => choose_newest(tasks, store, found, record),
    }
}

fn headless(store: &SnapshotStore, found: &OpenedStore) -> Problem {
    let message = format!("the list of the checkpoints in {} is lost or damaged", store.location());
    let problem = Problem::new(Code::CheckpointsMissing, message);
    let problem = found.damaged.iter().fold(problem, Problem::detail);
    problem.hint("to resume from the checkpoints that were found: --from DIR --state-dir OTHER")
}

fn occupied(store: &SnapshotStore, own: Option<&CheckpointMetadata>, named: &Path) -> Problem {
    let id = own.map_or(0, |own| own.checkpoint);
    let named = named.display();
    let message = format!("{} already holds checkpoint {id} of this job", store.location());
    Problem::new(Code::StateMismatch, message)
        .detail(format!("that checkpoint does not descend from {named}, which --from names"))
        .hint("run without --from to resume, or choose another --state-dir to begin from there")
}

fn begin_from(
    tasks: &Tasks<'_>,
    from: &RestoreFrom,
    (other, metadata): (SnapshotStore, CheckpointMetadata),
) -> Result<Chosen, Problem> {
    let mut warnings = Vec::new();
    let restores = take_over(tasks, from, &other, &metadata, &mut warnings)?;
    let lineage = metadata.lineage.fork(metadata.checkpoint);
    Ok(Chosen { lineage, restores, warnings, metadata: Some(metadata), other: Some(other) })
}

/// The state of another store's checkpoint, shared out. Changes nothing.
fn take_over(
    tasks: &Tasks<'_>,
    from: &RestoreFrom,
    other: &SnapshotStore,
    metadata: &CheckpointMetadata,
    warnings: &mut Vec<String>,
) -> Result<TaskRestores, Problem> {
    let named = from.dir.display();
    check_fit(tasks, metadata, from.ignore_unclaimed_state).map_err(|problem| {
        problem.detail(format!("checkpoint {} in {named}", metadata.checkpoint))
    })?;
    redistribute(tasks, metadata, other, warnings).map_err(|failed| match failed {
        Failed::Problem(problem) => *problem,
        Failed::Storage(error) => Problem::new(Code::StoreDamaged, format!("{named} is damaged"))
            .because(&error)
            .hint("use another savepoint or checkpoint"),
    })
}

/// What a job would take over from a savepoint, or from the newest checkpoint of a state directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restorable {
    /// The checkpoint.
    pub checkpoint: u64,
    /// Each of the job's operators, sources and sinks by name, with what becomes of its state.
    pub nodes: Vec<(String, Takeover)>,
    /// What people should know.
    pub warnings: Vec<String>,
}

/// What becomes of the state of an operator, a source or a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takeover {
    /// The checkpoint does not have it: it begins without state.
    New,
    /// Its tasks take over what they had.
    Same,
    /// Its state is shared out among another number of tasks.
    Rescaled {
        /// How many tasks had it.
        from: u32,
        /// How many take it over.
        to: u32,
    },
}

/// What a run would take over from there, whatever its own state directory and its output are.
pub(crate) fn check_from(tasks: &Tasks<'_>, from: &RestoreFrom) -> Result<Restorable, Problem> {
    let (other, metadata) = open_named(&from.dir)?;
    let mut warnings = Vec::new();
    take_over(tasks, from, &other, &metadata, &mut warnings)?;
    Ok(restorable(tasks, &metadata, warnings))
}

/// What becomes of each node's state.
pub(crate) fn restorable(
    tasks: &Tasks<'_>,
    metadata: &CheckpointMetadata,
    warnings: Vec<String>,
) -> Restorable {
    let takeover = |node: &NodeSpec| {
        let known = metadata.tasks.iter().map(|task| &task.identity);
        let before = known.filter(|identity| identity.uid == node.uid).count();
        let now = tasks.identities.iter().filter(|it| it.operator == node.name).count();
        let count = |tasks: usize| u32::try_from(tasks).unwrap_or(u32::MAX);
        let takeover = match before {
            0 => Takeover::New,
            _ if before == now => Takeover::Same,
            _ => Takeover::Rescaled { from: count(before), to: count(now) },
        };
        (node.name.clone(), takeover)
    };
    let nodes = tasks.spec.nodes.iter().map(takeover).collect();
    Restorable { checkpoint: metadata.checkpoint, nodes, warnings }
}

/// From the newest to the oldest, until one is whole.
fn choose_newest(
    tasks: &Tasks<'_>,
    store: &SnapshotStore,
    found: &OpenedStore,
    record: &JobRecord,
) -> Result<Chosen, Problem> {
    let (mut damaged, mut warnings) = (found.damaged.clone(), found.damaged.clone());
    for metadata in found.checkpoints.iter().rev() {
        let id = metadata.checkpoint;
        let at =
            |problem: Problem| problem.detail(format!("checkpoint {id} in {}", store.location()));
        check_fit(tasks, metadata, false).map_err(at)?;
        match redistribute(tasks, metadata, store, &mut warnings) {
            Ok(restores) => {
                let is_newest = store.newest_known() == Some(id);
                if !is_newest {
                    warnings.push(format!("resuming from checkpoint {id}, which is older"));
                }
                let lineage = match is_newest {
                    true => metadata.lineage.clone(),
                    false => metadata.lineage.fork(id),
                };
                let metadata = Some(metadata.clone());
                return Ok(Chosen { lineage, restores, warnings, metadata, other: None });
            }
            Err(Failed::Problem(problem)) => return Err(*problem),
            Err(Failed::Storage(
                error @ (StorageError::Store { .. } | StorageError::Unreachable { .. }),
            )) => {
                return Err(unusable(store, &error));
            }
            Err(Failed::Storage(error)) => {
                warnings.push(format!("checkpoint {id} is skipped: {error}"));
                damaged.push(format!("checkpoint {id}: {error}"));
            }
        }
    }
    if damaged.is_empty() {
        let lineage = Lineage { job: record.job, ..Lineage::new() };
        let restores = tasks.identities.iter().map(|_| TaskRestore::default()).collect();
        return Ok(Chosen { lineage, restores, warnings, metadata: None, other: None });
    }
    let problem = Problem::new(
        Code::StoreDamaged,
        format!("no checkpoint in {} is intact", store.location()),
    );
    let problem = damaged.iter().fold(problem, Problem::detail);
    Err(problem
        .hint("to start from the beginning, move the directory away; committed output stays"))
}

/// A path as it is found again from another directory.
pub(crate) fn absolute(dir: &Path) -> Option<PathBuf> {
    match cofferdam_store::is_url(dir) {
        true => Some(dir.to_owned()),
        false => std::path::absolute(dir).ok(),
    }
}

/// Makes what was chosen the store's newest and the tasks' own.
pub(crate) fn adopt(
    tasks: &Tasks<'_>,
    store: &mut SnapshotStore,
    chosen: &Chosen,
) -> Result<Resume, Problem> {
    store.set_lineage(chosen.lineage.clone());
    let Some(metadata) = chosen.metadata.clone() else {
        return Ok(Resume { completed: Vec::new(), next_id: CheckpointId(store.next_id()) });
    };
    let adopted = adopt_state(tasks, store, &metadata, chosen);
    adopted.map_err(|error| unusable(store, &error))?;
    Ok(Resume {
        completed: store.checkpoints().into_iter().map(CheckpointId).collect(),
        next_id: CheckpointId(store.next_id()),
    })
}

/// Opens a savepoint or the state directory of a job for reading; gives its newest checkpoint.
///
/// # Errors
/// Where there is none.
pub fn open_named(dir: &Path) -> Result<(SnapshotStore, CheckpointMetadata), Problem> {
    let missing = |detail: String| {
        Problem::new(
            Code::StateUnusable,
            format!("{} is neither a savepoint nor a state directory", dir.display()),
        )
        .detail(detail)
        .hint("name the directory that `cofferdam savepoint` wrote, or a job's state directory")
    };
    let (store, found) = cofferdam_store::open_at(dir)
        .and_then(SnapshotStore::open_existing)
        .map_err(|error| missing(error.to_string()).with_os_error(error.os_error()))?;
    match found.checkpoints.into_iter().next_back() {
        Some(metadata) => Ok((store, metadata)),
        None => Err(missing(found.damaged.join("; "))),
    }
}

fn unusable(store: &SnapshotStore, error: &StorageError) -> Problem {
    let message = format!("the state directory {} cannot be used", store.location());
    Problem::new(Code::StateUnusable, message).because(error)
}

fn adopt_state(
    tasks: &Tasks<'_>,
    store: &mut SnapshotStore,
    metadata: &CheckpointMetadata,
    chosen: &Chosen,
) -> Result<(), StorageError> {
    let id = metadata.checkpoint;
    let is_as_it_was = store.is_current(id)
        && metadata.lineage == chosen.lineage
        && metadata.tasks.iter().map(|task| &task.identity).eq(tasks.identities);
    if !is_as_it_was {
        tasks.tell(id, RestoreStep::Write { tasks: tasks.identities.len() });
        store.import(id, metadata.written_at_ms, chosen.other.as_ref(), &chosen.restores)?;
    }
    // Only now, when what is gone on from is safe in a generation of its own.
    if chosen.other.is_none() {
        store.leave_behind(id)?;
    }
    for (local, restore) in tasks.locals.values().zip(&chosen.restores) {
        let mut local = local.lock();
        if let Some(token) = local.rewind(Some(CheckpointId(id))) {
            local
                .load(token, CheckpointId(id), &restore.state)
                .map_err(|error| StorageError::store("make the image of a task", error))?;
        }
    }
    Ok(())
}
