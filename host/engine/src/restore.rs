//! Decides what a run goes on from, and makes that state fit: the newest whole checkpoint of the
//! state directory, or the one that was named; shared out anew where parallelism has changed.
//!
//! Declared state moves by key group. Linear memory fits only the component and the parallelism
//! that wrote it. Positions of sources and transactions of sinks say themselves how they are
//! shared.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_core::{
    graph::Partitioner,
    ids::{CheckpointId, TaskId},
    job::Resume,
    key_group::key_groups_of,
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    problem::{Code, Problem},
    sink, source,
    spec::{JobSpec, NodeKind, NodeSpec, SinkSpec},
    storage::{
        self, StorageError,
        in_flight::{ChannelState, InFlight},
        manifest::{Manifest, TaskIdentity},
        snapshot::{Found, LoadedTask, Share, SnapshotStore},
    },
    task::local::TaskLocal,
};

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

/// The tasks of a job, in the order of their slots, with what they keep in this process.
pub(crate) struct Tasks<'a> {
    pub(crate) spec: &'a JobSpec,
    pub(crate) identities: &'a [TaskIdentity],
    pub(crate) locals: &'a BTreeMap<TaskId, Arc<TaskLocal>>,
    pub(crate) sources: &'a BTreeMap<String, source::Prepared>,
}

/// What was decided, and what people should hear of it.
pub(crate) struct Restored {
    pub(crate) resume: Resume,
    pub(crate) warnings: Vec<String>,
}

/// Finds the state to go on from and puts it into the tasks' local copies.
pub(crate) fn restore(
    tasks: &Tasks<'_>,
    store: &mut SnapshotStore,
    found: Found,
    from: Option<&RestoreFrom>,
) -> Result<Restored, Problem> {
    let mut warnings = found.damaged.clone();
    let chosen = match from {
        None => restore_newest(tasks, store, &found, &mut warnings)?,
        Some(from) => Some(restore_named(tasks, store, &found, from)?),
    };
    let resume = Resume {
        completed: match chosen {
            Some(_) => store.checkpoints().into_iter().map(CheckpointId).collect(),
            None => Vec::new(),
        },
        next_id: CheckpointId(store.next_id()),
    };
    Ok(Restored { resume, warnings })
}

/// From the newest to the oldest, until one is whole.
fn restore_newest(
    tasks: &Tasks<'_>,
    store: &mut SnapshotStore,
    found: &Found,
    warnings: &mut Vec<String>,
) -> Result<Option<u64>, Problem> {
    let mut damaged = found.damaged.clone();
    for manifest in found.manifests.iter().rev() {
        let id = manifest.checkpoint;
        let at =
            |problem: Problem| problem.detail(format!("checkpoint {id} in {}", store.location()));
        check_fit(tasks, manifest, false).map_err(at)?;
        match redistribute(tasks, manifest, store) {
            Ok(shares) => {
                adopt(tasks, store, manifest, None, &shares)
                    .map_err(|error| unusable(store, &error))?;
                return Ok(Some(id));
            }
            Err(Failed::Problem(problem)) => return Err(*problem),
            Err(Failed::Storage(
                error @ (StorageError::Store { .. } | StorageError::Unreachable { .. }),
            )) => {
                return Err(unusable(store, &error));
            }
            Err(Failed::Storage(error)) => {
                warnings.push(format!("checkpoint {id} is left out: {error}"));
                damaged.push(format!("checkpoint {id}: {error}"));
                store.delete(id).map_err(|error| unusable(store, &error))?;
            }
        }
    }
    if damaged.is_empty() {
        return Ok(None);
    }
    let problem =
        Problem::new(Code::StoreDamaged, format!("no checkpoint in {} is whole", store.location()));
    let problem = damaged.iter().fold(problem, Problem::detail);
    Err(problem.hint("to begin anew, move the directory away; what sinks have committed stays"))
}

fn restore_named(
    tasks: &Tasks<'_>,
    store: &mut SnapshotStore,
    found: &Found,
    from: &RestoreFrom,
) -> Result<u64, Problem> {
    let named = from.dir.display();
    if let Some(own) = found.manifests.last() {
        let message =
            format!("{} holds checkpoint {} of this job already", store.location(), own.checkpoint);
        return Err(Problem::new(Code::StateMismatch, message)
            .detail(format!("and it is to begin from {named}"))
            .hint(
                "run without --from to go on, or choose another --state-dir to begin from there",
            ));
    }
    let (other, manifest) = open_named(&from.dir)?;
    check_fit(tasks, &manifest, from.ignore_unclaimed_state).map_err(|problem| {
        problem.detail(format!("checkpoint {} in {named}", manifest.checkpoint))
    })?;
    let shares = redistribute(tasks, &manifest, &other).map_err(|failed| match failed {
        Failed::Problem(problem) => *problem,
        Failed::Storage(error) => Problem::new(Code::StoreDamaged, format!("{named} is not whole"))
            .detail(error)
            .hint("use another savepoint or checkpoint"),
    })?;
    adopt(tasks, store, &manifest, Some(&other), &shares)
        .map_err(|error| unusable(store, &error))?;
    Ok(manifest.checkpoint)
}

/// Opens a savepoint or the state directory of a job for reading; gives its newest checkpoint.
///
/// # Errors
/// Where there is none.
pub fn open_named(dir: &Path) -> Result<(SnapshotStore, Manifest), Problem> {
    let missing = |detail: String| {
        Problem::new(
            Code::StateUnusable,
            format!("{} is neither a savepoint nor a state directory", dir.display()),
        )
        .detail(detail)
        .hint("name the directory that `cofferdam savepoint` wrote, or a job's state directory")
    };
    let (store, found) = storage::open_at(dir)
        .and_then(SnapshotStore::open_existing)
        .map_err(|error| missing(error.to_string()))?;
    match found.manifests.into_iter().next_back() {
        Some(manifest) => Ok((store, manifest)),
        None => Err(missing(found.damaged.join("; "))),
    }
}

fn unusable(store: &SnapshotStore, error: &StorageError) -> Problem {
    let message = format!("the state directory {} cannot be used", store.location());
    Problem::new(Code::StateUnusable, message).detail(error)
}

/// What every task takes over, by slot.
type Shares = Vec<Share>;

enum Failed {
    Problem(Box<Problem>),
    Storage(StorageError),
}

impl From<StorageError> for Failed {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

/// Makes the state the store's newest and the tasks' own.
fn adopt(
    tasks: &Tasks<'_>,
    store: &mut SnapshotStore,
    manifest: &Manifest,
    other: Option<&SnapshotStore>,
    shares: &[Share],
) -> Result<(), StorageError> {
    let id = manifest.checkpoint;
    let is_as_it_was = store.is_current(id)
        && manifest.tasks.iter().map(|task| &task.identity).eq(tasks.identities);
    if !is_as_it_was {
        store.import(id, manifest.written_at_ms, other, shares)?;
    }
    for (local, share) in tasks.locals.values().zip(shares) {
        let mut local = local.lock();
        if let Some(turn) = local.rewind(id) {
            local
                .load(turn, id, &share.state)
                .map_err(|error| StorageError::store("make the image of a task", error))?;
        }
    }
    Ok(())
}

/// Loads every old task, and shares its state out among the new ones. Declared state is only read
/// through: it may be larger than the memory.
fn redistribute(
    tasks: &Tasks<'_>,
    manifest: &Manifest,
    store: &SnapshotStore,
) -> Result<Shares, Failed> {
    let mut shares: Shares = Vec::with_capacity(tasks.identities.len());
    for node in &tasks.spec.nodes {
        let new: Vec<&TaskIdentity> =
            tasks.identities.iter().filter(|identity| identity.operator == node.name).collect();
        let old = manifest.tasks.iter().enumerate();
        let old: Vec<usize> = old
            .filter(|(_, task)| task.identity.operator == node.name)
            .map(|(slot, _)| slot)
            .collect();
        let load = |slot: &usize| {
            store.check_declared(*slot, manifest.checkpoint)?;
            store.load(*slot, manifest.checkpoint)
        };
        let mut loaded = old.iter().map(load).collect::<Result<Vec<_>, _>>()?;
        if let NodeKind::Operator(operator) = &node.kind
            && !operator.snapshot.has_memory()
        {
            loaded.iter_mut().for_each(|task| task.memory.clear());
        }
        for task in &mut loaded {
            forget_watermarks(tasks, manifest, task);
        }
        if loaded.is_empty() {
            shares.extend(new.iter().map(|_| Share::default()));
        } else if loaded.len() == new.len() {
            shares.extend(loaded.into_iter().zip(old).map(|(state, slot)| Share {
                state,
                declared_from: vec![slot],
                key_groups: None,
            }));
        } else {
            let states = share(tasks, node, loaded, &new);
            let states = states.map_err(|problem| Failed::Problem(Box::new(problem)))?;
            shares.extend(states.into_iter().zip(&new).map(|(state, identity)| {
                let TaskIdentity { index, parallelism, max_parallelism, .. } = **identity;
                let has_groups = 0 < max_parallelism;
                let key_groups =
                    has_groups.then(|| key_groups_of(index, parallelism, max_parallelism));
                Share { state, declared_from: old.clone(), key_groups }
            }));
        }
        let in_flight = shares[shares.len() - new.len()..].iter();
        let in_flight = in_flight.flat_map(|share| &*share.state.in_flight);
        check_in_flight(tasks, node, in_flight)
            .map_err(|problem| Failed::Problem(Box::new(problem)))?;
    }
    Ok(shares)
}

/// Event time in flight counts for one producing task; where there are others now, they tell it
/// again.
fn forget_watermarks(tasks: &Tasks<'_>, manifest: &Manifest, task: &mut LoadedTask) {
    let parallelism = |identity: &TaskIdentity| identity.parallelism;
    let is_other = |channel: &ChannelState| {
        let before = manifest.tasks.iter().map(|task| &task.identity);
        let before = before.filter(|it| it.operator == channel.from).map(parallelism).next();
        let now = tasks.identities.iter().filter(|it| it.operator == channel.from);
        before != now.map(parallelism).next()
    };
    if task.in_flight.iter().any(is_other) {
        let mut channels = task.in_flight.to_vec();
        for channel in channels.iter_mut().filter(|channel| is_other(channel)) {
            channel.elements.retain(|element| matches!(element, InFlight::Records(_)));
        }
        task.in_flight = Arc::new(channels);
    }
}

/// Records in flight belong to an edge: it must still be there.
fn check_in_flight<'a>(
    tasks: &Tasks<'_>,
    node: &NodeSpec,
    mut in_flight: impl Iterator<Item = &'a ChannelState>,
) -> Result<(), Problem> {
    let fits = |channel: &ChannelState| {
        let input = node.inputs.get(channel.place as usize);
        input.is_some_and(|input| tasks.spec.node(input.from).name == channel.from)
    };
    let Some(channel) = in_flight.find(|channel| !fits(channel)) else { return Ok(()) };
    let message = format!(
        "the checkpoint holds records on their way from \"{}\" to input {} of \"{}\"",
        channel.from, channel.place, node.name
    );
    Err(Problem::new(Code::StateMismatch, message)
        .detail("the manifest has no such edge any more")
        .hint("put the edge back, or change it with a savepoint, which holds no records in flight"))
}

fn share(
    tasks: &Tasks<'_>,
    node: &NodeSpec,
    old: Vec<LoadedTask>,
    new: &[&TaskIdentity],
) -> Result<Vec<LoadedTask>, Problem> {
    let NodeSpec { name, kind, .. } = node;
    let parallelism = new.len();
    let is_drained = old.iter().all(|task| task.is_drained);
    let positions = || old.iter().map(|task| task.state.as_slice()).collect::<Vec<_>>();
    let shares = match kind {
        NodeKind::Source(_) => match tasks.sources.get(name) {
            Some(source) => source.share(&positions(), parallelism),
            None => Err(format!("source \"{name}\" was not prepared")),
        },
        NodeKind::Sink(SinkSpec::File { .. }) => sink::share(&positions(), parallelism),
        NodeKind::Sink(_) | NodeKind::Operator(_) => Ok(vec![Vec::new(); parallelism]),
    };
    let shares = shares.map_err(|error| {
        Problem::new(Code::StateMismatch, format!("the state of \"{name}\" cannot be shared out"))
            .detail(error)
    })?;
    let mut states: Vec<LoadedTask> = shares
        .into_iter()
        .map(|state| LoadedTask { state, is_drained, ..LoadedTask::default() })
        .collect();
    let in_flight = share_in_flight(node, &old, new)?;
    for (state, in_flight) in states.iter_mut().zip(in_flight) {
        state.in_flight = Arc::new(in_flight);
    }
    Ok(states)
}

fn share_in_flight(
    node: &NodeSpec,
    old: &[LoadedTask],
    new: &[&TaskIdentity],
) -> Result<Vec<Vec<ChannelState>>, Problem> {
    let mut shared: Vec<Vec<ChannelState>> = vec![Vec::new(); new.len()];
    let parallelism = u32::try_from(new.len()).unwrap_or(u32::MAX);
    // A sink has no key groups: whichever task takes a record, it is written once.
    let groups = new.first().map_or(1, |task| task.max_parallelism).max(parallelism);
    for (receiver, task) in (0..).zip(old) {
        for channel in task.in_flight.iter() {
            let input = node.inputs.get(channel.place as usize);
            let partitioner = input.map_or(Partitioner::Rebalance, |input| input.partitioner);
            let shares = channel.clone().share(receiver, partitioner, parallelism, groups);
            let shares = shares.ok_or_else(|| {
                let message = format!(
                    "the checkpoint holds records on their way from \"{}\" to every task of \"{}\"",
                    channel.from, node.name
                );
                Problem::new(Code::StateMismatch, message)
                    .detail("some of its tasks have processed them, and others have not")
                    .hint(
                        "set the parallelism back, or change it with a savepoint, which holds no \
                         records in flight",
                    )
            })?;
            shares.into_iter().for_each(|(task, share)| shared[task as usize].push(share));
        }
    }
    Ok(shared)
}

/// The states of all tasks of a source or a sink.
pub(crate) fn decode_states<T: DeserializeOwned>(states: &[&[u8]]) -> Result<Vec<T>, String> {
    let decode = |state: &&[u8]| postcard::from_bytes(state).map_err(|error| error.to_string());
    states.iter().map(decode).collect()
}

/// The shares of the tasks that there are now.
pub(crate) fn encode_states<T: Serialize>(shares: &[T]) -> Result<Vec<Vec<u8>>, String> {
    let encode = |share: &T| postcard::to_stdvec(share).map_err(|error| error.to_string());
    shares.iter().map(encode).collect()
}

/// Whether a checkpoint's state can become the state of these tasks.
fn check_fit(
    tasks: &Tasks<'_>,
    manifest: &Manifest,
    ignore_unclaimed_state: bool,
) -> Result<(), Problem> {
    let mismatch =
        |what: String, hint: &str| Err(Problem::new(Code::StateMismatch, what).hint(hint));
    if manifest.job != tasks.spec.name {
        return mismatch(
            format!(
                "the checkpoint is of job \"{}\", not of \"{}\"",
                manifest.job, tasks.spec.name
            ),
            "to begin anew, move the state directory away or choose another with --state-dir",
        );
    }
    let stored = || manifest.tasks.iter().map(|task| &task.identity);
    for task in tasks.identities {
        if let Some(known) = stored().find(|known| known.operator == task.operator) {
            check_operator(known, task)?;
        }
    }
    let is_known =
        |known: &TaskIdentity| tasks.identities.iter().any(|task| task.operator == known.operator);
    match stored().find(|known| !is_known(known)) {
        Some(extra) if !ignore_unclaimed_state => mismatch(
            format!(
                "the checkpoint has state of \"{}\", which is not in the manifest",
                extra.operator
            ),
            "put it back, or leave its state behind with --from DIR --ignore-unclaimed-state",
        ),
        _ => Ok(()),
    }
}

fn check_operator(known: &TaskIdentity, task: &TaskIdentity) -> Result<(), Problem> {
    let name = &task.operator;
    let mismatch =
        |what: String, hint: &str| Err(Problem::new(Code::StateMismatch, what).hint(hint));
    if known.max_parallelism != task.max_parallelism {
        let what = format!(
            "the checkpoint has \"{name}\" with max-parallelism {}, the manifest with {}",
            known.max_parallelism, task.max_parallelism
        );
        let hint = format!(
            "its key groups are those of the checkpoint for ever: set max-parallelism = {}",
            known.max_parallelism
        );
        return mismatch(what, &hint);
    }
    if !task.has_memory {
        let loses_memory = known.has_memory && !known.has_declared;
        return match loses_memory {
            false => Ok(()),
            true => mismatch(
                format!("the checkpoint of \"{name}\" holds linear memory and no declared state"),
                "set snapshot = \"memory\" again, with the component that wrote it",
            ),
        };
    }
    let by_declared_state = match known.has_declared {
        true => "; or set snapshot = \"declared\" to go on from its declared state alone",
        false => "",
    };
    if !known.has_memory {
        return mismatch(
            format!("the checkpoint of \"{name}\" holds no linear memory"),
            "set snapshot = \"declared\", as it was when the checkpoint was taken",
        );
    }
    let backend = |is_host: bool| if is_host { "sled" } else { "hashmap" };
    let foreign = if known.digest != task.digest {
        let (then, now) = (digest_text(known.digest), digest_text(task.digest));
        let what = format!("was written by another component ({then} then, {now} now)");
        Some((what, "component that wrote it: put that one back"))
    } else if known.has_host_state != task.has_host_state {
        let (then, now) = (backend(known.has_host_state), backend(task.has_host_state));
        let what =
            format!("was taken with state.backend.type = \"{then}\", the manifest has \"{now}\"");
        Some((what, "state backend that it was written with: set that one back"))
    } else {
        None
    };
    if let Some((what, fits)) = foreign {
        let hint = format!("linear memory fits only the {fits}{by_declared_state}");
        return mismatch(format!("the checkpoint of \"{name}\" {what}"), &hint);
    }
    if known.parallelism != task.parallelism {
        let what = format!(
            "the checkpoint has \"{name}\" with parallelism {}, the manifest with {}",
            known.parallelism, task.parallelism
        );
        let hint = format!(
            "linear memory cannot be shared out: set the parallelism back{by_declared_state}"
        );
        return mismatch(what, &hint);
    }
    Ok(())
}

fn digest_text(digest: Option<[u8; 16]>) -> String {
    digest.map_or("none".to_owned(), |digest| {
        cofferdam_sandbox::Digest(digest).to_string()[..12].to_owned()
    })
}
