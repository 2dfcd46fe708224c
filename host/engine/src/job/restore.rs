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
    time::Duration,
};

use cofferdam_connector::{catalog::SourcePlan, identity::Lineage};
use cofferdam_core::{
    graph::Partitioner,
    ids::{CheckpointId, TaskId},
    job::Resume,
    key_group::key_groups_of,
};
use cofferdam_sandbox::{Component, GuestError, Image, Limits, MemorySnapshot, Sandbox};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{JobSpec, NodeKind, NodeSpec};
use cofferdam_store::{
    self, StorageError,
    declared::{DeclaredKey, Entries, Entry, OwnKeys, changes_of},
    in_flight::{ChannelState, InFlight},
    manifest::{Manifest, StateIdentity, TaskIdentity},
    run::{Run, RunBuilder},
    snapshot::{Found, LoadedTask, Share, SnapshotStore},
};
use futures::executor::block_on;

use crate::{
    failure::host_bug,
    job::{
        plan::limits_of,
        read_out::{OwnComponent, on_instance},
        state_dir::JobRecord,
    },
    state::local::TaskLocal,
    watch::progress::{Observer, Progress, RestoreStep},
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
    pub(crate) sources: &'a BTreeMap<String, Arc<dyn SourcePlan>>,
    pub(crate) components: &'a BTreeMap<String, Component>,
    /// Whoever waits is told of what takes long.
    pub(crate) observer: &'a dyn Observer,
}

impl Tasks<'_> {
    fn tell(&self, checkpoint: u64, step: RestoreStep) {
        self.observer.observe(Progress::Restoring { checkpoint, step });
    }
}

/// What a run goes on from. Nothing has changed yet.
pub(crate) struct Chosen {
    /// Which course of events it is.
    pub(crate) lineage: Lineage,
    /// What every task takes over, by slot; nothing where the job begins.
    pub(crate) shares: Shares,
    /// What people should hear.
    pub(crate) warnings: Vec<String>,
    /// The checkpoint; `None`: the job begins.
    pub(crate) manifest: Option<Manifest>,
    /// The store that it lies in, if it is another one.
    other: Option<SnapshotStore>,
}

impl Chosen {
    /// The checkpoint; `None`: the job begins.
    pub(crate) fn checkpoint(&self) -> Option<u64> {
        self.manifest.as_ref().map(|manifest| manifest.checkpoint)
    }
}

/// Finds the state to go on from, and shares it out. Changes nothing.
pub(crate) fn choose(
    tasks: &Tasks<'_>,
    store: &SnapshotStore,
    found: &Found,
    from: Option<&RestoreFrom>,
    record: &JobRecord,
) -> Result<Chosen, Problem> {
    if found.is_headless {
        let message = format!("nobody knows which checkpoints {} has had", store.location());
        let problem = Problem::new(Code::CheckpointsMissing, message);
        return Err(found.damaged.iter().fold(problem, Problem::detail).hint(
            "to go on from what is there, begin from it in another place: --from DIR --state-dir OTHER",
        ));
    }
    let Some(from) = from else { return choose_newest(tasks, store, found, record) };
    let named = from.dir.display().to_string();
    let other = open_named(&from.dir);
    if let Some(own) = found.manifests.last() {
        let is_descendant = match &other {
            Ok((_, manifest)) => {
                let (timeline, checkpoint) = (manifest.lineage.timeline, manifest.checkpoint);
                own.is_that_of(manifest) || own.lineage.comes_from(timeline, checkpoint)
            }
            // It was claimed, and is gone.
            Err(_) => record.begun_from.as_deref() == absolute(&from.dir).as_deref(),
        };
        if is_descendant {
            let mut chosen = choose_newest(tasks, store, found, record)?;
            let id = chosen.checkpoint().unwrap_or_default();
            chosen.warnings.push(format!(
                "the job has begun from {named} before, and resumes from its own checkpoint {id}"
            ));
            return Ok(chosen);
        }
        let message =
            format!("{} holds checkpoint {} of this job already", store.location(), own.checkpoint);
        return Err(Problem::new(Code::StateMismatch, message)
            .detail(format!("and it is to begin from {named}, from which it does not come"))
            .hint(
                "run without --from to resume, or choose another --state-dir to begin from there",
            ));
    }
    let (other, manifest) = other?;
    let mut warnings = Vec::new();
    let shares = take_over(tasks, from, &other, &manifest, &mut warnings)?;
    let lineage = manifest.lineage.fork(manifest.checkpoint);
    Ok(Chosen { lineage, shares, warnings, manifest: Some(manifest), other: Some(other) })
}

/// The state of another store's checkpoint, shared out. Changes nothing.
fn take_over(
    tasks: &Tasks<'_>,
    from: &RestoreFrom,
    other: &SnapshotStore,
    manifest: &Manifest,
    warnings: &mut Vec<String>,
) -> Result<Shares, Problem> {
    let named = from.dir.display();
    check_fit(tasks, manifest, from.ignore_unclaimed_state).map_err(|problem| {
        problem.detail(format!("checkpoint {} in {named}", manifest.checkpoint))
    })?;
    redistribute(tasks, manifest, other, warnings).map_err(|failed| match failed {
        Failed::Problem(problem) => *problem,
        Failed::Storage(error) => Problem::new(Code::StoreDamaged, format!("{named} is not whole"))
            .detail(error)
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
    let (other, manifest) = open_named(&from.dir)?;
    let mut warnings = Vec::new();
    take_over(tasks, from, &other, &manifest, &mut warnings)?;
    Ok(restorable(tasks, &manifest, warnings))
}

/// What becomes of each node's state.
pub(crate) fn restorable(
    tasks: &Tasks<'_>,
    manifest: &Manifest,
    warnings: Vec<String>,
) -> Restorable {
    let takeover = |node: &NodeSpec| {
        let known = manifest.tasks.iter().map(|task| &task.identity);
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
    Restorable { checkpoint: manifest.checkpoint, nodes, warnings }
}

/// From the newest to the oldest, until one is whole.
fn choose_newest(
    tasks: &Tasks<'_>,
    store: &SnapshotStore,
    found: &Found,
    record: &JobRecord,
) -> Result<Chosen, Problem> {
    let (mut damaged, mut warnings) = (found.damaged.clone(), found.damaged.clone());
    for manifest in found.manifests.iter().rev() {
        let id = manifest.checkpoint;
        let at =
            |problem: Problem| problem.detail(format!("checkpoint {id} in {}", store.location()));
        check_fit(tasks, manifest, false).map_err(at)?;
        match redistribute(tasks, manifest, store, &mut warnings) {
            Ok(shares) => {
                let is_newest = store.newest_known() == Some(id);
                if !is_newest {
                    warnings.push(format!("resuming from checkpoint {id}, which is older"));
                }
                let lineage = match is_newest {
                    true => manifest.lineage.clone(),
                    false => manifest.lineage.fork(id),
                };
                let manifest = Some(manifest.clone());
                return Ok(Chosen { lineage, shares, warnings, manifest, other: None });
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
            }
        }
    }
    if damaged.is_empty() {
        let lineage = Lineage { job: record.job, ..Lineage::new() };
        let shares = tasks.identities.iter().map(|_| Share::default()).collect();
        return Ok(Chosen { lineage, shares, warnings, manifest: None, other: None });
    }
    let problem =
        Problem::new(Code::StoreDamaged, format!("no checkpoint in {} is whole", store.location()));
    let problem = damaged.iter().fold(problem, Problem::detail);
    Err(problem.hint("to begin anew, move the directory away; what sinks have committed stays"))
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
    let Some(manifest) = chosen.manifest.clone() else {
        return Ok(Resume { completed: Vec::new(), next_id: CheckpointId(store.next_id()) });
    };
    let adopted = adopt_state(tasks, store, &manifest, chosen);
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
pub fn open_named(dir: &Path) -> Result<(SnapshotStore, Manifest), Problem> {
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
pub(crate) type Shares = Vec<Share>;

enum Failed {
    Problem(Box<Problem>),
    Storage(StorageError),
}

impl From<StorageError> for Failed {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

fn adopt_state(
    tasks: &Tasks<'_>,
    store: &mut SnapshotStore,
    manifest: &Manifest,
    chosen: &Chosen,
) -> Result<(), StorageError> {
    let id = manifest.checkpoint;
    let is_as_it_was = store.is_current(id)
        && manifest.lineage == chosen.lineage
        && manifest.tasks.iter().map(|task| &task.identity).eq(tasks.identities);
    if !is_as_it_was {
        tasks.tell(id, RestoreStep::Write { tasks: tasks.identities.len() });
        store.import(id, manifest.written_at_ms, chosen.other.as_ref(), &chosen.shares)?;
    }
    // Only now, when what is gone on from is safe in a generation of its own.
    if chosen.other.is_none() {
        store.leave_behind(id)?;
    }
    for (local, share) in tasks.locals.values().zip(&chosen.shares) {
        let mut local = local.lock();
        if let Some(turn) = local.rewind(id) {
            local
                .load(turn, id, &share.state)
                .map_err(|error| StorageError::store("make the image of a task", error))?;
        }
    }
    Ok(())
}

/// Converts declared state whose schema has changed: the component of now reads it, and hands it over.
fn convert(
    tasks: &Tasks<'_>,
    from: &SnapshotStore,
    manifest: &Manifest,
    shares: &mut Shares,
) -> Result<(), Failed> {
    let known = |uid: &str| manifest.tasks.iter().find(|task| task.identity.uid == uid);
    for (slot, task) in tasks.identities.iter().enumerate() {
        let Some(known) = known(&task.uid).filter(|_| task.has_declared) else { continue };
        let before = |state: &StateIdentity| state.find(&known.identity.states).cloned();
        let numbered = (0..).zip(&task.states).filter_map(|(number, state)| {
            let before = before(state)?;
            (before.schema != state.schema).then_some((number, before.schema))
        });
        let schemas: Vec<(u32, String)> = numbered.collect();
        let Some(component) = tasks.components.get(&task.operator) else { continue };
        if schemas.is_empty() {
            continue;
        }
        let schemas: Vec<(u32, &str)> =
            schemas.iter().map(|(number, schema)| (*number, schema.as_str())).collect();
        let node = tasks.spec.nodes.iter().find(|node| node.name == task.operator);
        let limits = node.map_or_else(Limits::default, |node| limits_of(&node.kind));
        tasks.tell(manifest.checkpoint, RestoreStep::Convert { task: task.name() });
        let mut entries = shares[slot].entries(from, manifest.checkpoint)?;
        let mut builder = RunBuilder::new(task.max_parallelism);
        // An instance holds a part at a time: state that the host keeps may be larger than its memory.
        loop {
            let part: Vec<Entry> =
                entries.by_ref().take(CONVERTED_BY_ONE).collect::<Result<_, _>>()?;
            if part.is_empty() {
                break;
            }
            let converted = on_instance(component, limits.clone(), async |instance| {
                for part in part.chunks(CONVERTED_AT_ONCE) {
                    instance.take_back(&changes_of(part.iter()), &schemas).await?;
                }
                let take = |piece| {
                    builder.push(piece).map_err(|error| GuestError::Host(error.to_string()))
                };
                instance.hand_over_to(manifest.checkpoint, true, u64::MAX, take).await
            });
            converted.map_err(|what| {
                let message =
                    format!("the declared state of \"{}\" cannot be converted", task.operator);
                let problem = Problem::new(Code::SchemaMismatch, message).detail(what);
                Failed::Problem(Box::new(problem.hint(HOW_TO_GROW)))
            })?;
        }
        drop(entries);
        shares[slot].converted = Some(builder.finish()?);
    }
    Ok(())
}

/// What to do with a type that does not fit.
const HOW_TO_GROW: &str = "keep the type, or let it grow: a new field has #[serde(default)], an integer may \
                           become wider; or give a state of another type another name";

/// Entries that a guest takes in one call.
const CONVERTED_AT_ONCE: usize = 4096;
/// Entries that one instance converts.
const CONVERTED_BY_ONE: usize = 16 * CONVERTED_AT_ONCE;

/// Loads every old task, and shares its state out among the new ones. Declared state is only read
/// through: it may be larger than the memory.
fn redistribute(
    tasks: &Tasks<'_>,
    manifest: &Manifest,
    store: &SnapshotStore,
    warnings: &mut Vec<String>,
) -> Result<Shares, Failed> {
    let mut shares: Shares = Vec::with_capacity(tasks.identities.len());
    for node in &tasks.spec.nodes {
        let new: Vec<&TaskIdentity> =
            tasks.identities.iter().filter(|identity| identity.operator == node.name).collect();
        let uid = new.first().map_or(node.name.as_str(), |identity| &identity.uid);
        let old = manifest.tasks.iter().enumerate();
        let old: Vec<usize> =
            old.filter(|(_, task)| task.identity.uid == uid).map(|(slot, _)| slot).collect();
        let takes_memory = match &node.kind {
            NodeKind::Operator(operator) => operator.snapshot.has_memory(),
            _ => true,
        };
        let old_first = old.first().copied();
        let mut loaded = Vec::with_capacity(old.len());
        let mut read_outs = BTreeMap::new();
        let mut is_in_image = false;
        for slot in &old {
            let mut task = store.load(*slot, manifest.checkpoint)?;
            let is_image_alone = store.is_in_image(*slot, manifest.checkpoint)?;
            if !is_image_alone {
                store.check_declared(*slot, manifest.checkpoint)?;
            } else if takes_memory {
                is_in_image = true;
            } else {
                let sandbox = tasks.components.values().next().map(Component::sandbox);
                let limits = limits_of(&node.kind);
                let memory = std::mem::take(&mut task.memory);
                let bytes = memory.last().map_or(0, MemorySnapshot::size_bytes);
                let name = manifest.tasks[*slot].identity.name();
                tasks.tell(manifest.checkpoint, RestoreStep::ReadOut { task: name, bytes });
                let run = read_out_task(sandbox.as_ref(), limits, manifest, store, *slot, memory)?;
                read_outs.insert(*slot, Arc::new(run));
            }
            if !takes_memory {
                task.memory.clear();
            }
            loaded.push(task);
        }
        for task in &mut loaded {
            forget_watermarks(tasks, manifest, task);
        }
        if loaded.is_empty() {
            shares.extend(new.iter().map(|_| Share::default()));
        } else if loaded.len() == new.len() {
            let states = state_numbers(manifest, old.first(), new.first());
            shares.extend(loaded.into_iter().zip(old).map(|(state, slot)| Share {
                state,
                declared_from: vec![slot],
                key_groups: None,
                states: states.clone(),
                converted: None,
                read_out: read_outs.clone(),
                is_in_image,
            }));
        } else {
            let numbers = state_numbers(manifest, old.first(), new.first());
            // What a task that has finished had is finished: no record of its keys will come, and it must
            // not finish again. Where all have, their state is what is left of the operator.
            let has_finished = |(_, task): &(&usize, &LoadedTask)| task.is_drained;
            let all_have = loaded.iter().all(|task| task.is_drained);
            let old: Vec<usize> = old
                .iter()
                .zip(&loaded)
                .filter(|pair| all_have || !has_finished(pair))
                .map(|(slot, _)| *slot)
                .collect();
            let states = share(tasks, node, loaded, &new);
            let states = states.map_err(|problem| Failed::Problem(Box::new(problem)))?;
            shares.extend(states.into_iter().zip(&new).map(|(state, identity)| {
                let TaskIdentity { index, parallelism, max_parallelism, .. } = **identity;
                let has_groups = 0 < max_parallelism;
                let key_groups =
                    has_groups.then(|| key_groups_of(index, parallelism, max_parallelism));
                let (declared_from, states) = (old.clone(), numbers.clone());
                let (read_out, converted) = (read_outs.clone(), None);
                Share { state, declared_from, key_groups, states, converted, read_out, is_in_image }
            }));
        }
        let own = &shares[shares.len() - new.len()..];
        check_config(manifest, old_first, &new, warnings);
        if let Some(source) = tasks.sources.get(&node.name) {
            let positions: Vec<&[u8]> =
                own.iter().map(|share| &*share.state.state).filter(|it| !it.is_empty()).collect();
            let checked = match positions.is_empty() {
                true => source.check_fresh().map(|()| Vec::new()),
                false => source.check_positions(&positions),
            };
            warnings.extend(checked.map_err(|problem| Failed::Problem(Box::new(problem)))?);
        }
        let in_flight = own.iter();
        let in_flight = in_flight.flat_map(|share| &*share.state.in_flight);
        check_in_flight(tasks, node, in_flight)
            .map_err(|problem| Failed::Problem(Box::new(problem)))?;
    }
    check_left_behind(tasks, manifest, store)?;
    convert(tasks, store, manifest, &mut shares)?;
    let is_over = !shares.is_empty() && shares.iter().all(|share| share.state.is_drained);
    if is_over {
        warnings.push(
            "every task had processed the end of its inputs (`stop --drain`, or the last checkpoint): \
             nothing more is read"
                .to_owned(),
        );
    }
    Ok(shares)
}

/// Gives every entry of a task's declared state as of a checkpoint, in the order of its keys, until `give`
/// says that it has seen enough. What lies in the image of the memory alone is read out of it.
///
/// # Errors
/// Where it cannot be read.
pub fn each_declared(
    sandbox: &Sandbox,
    store: &SnapshotStore,
    manifest: &Manifest,
    slot: usize,
    mut give: impl FnMut(&DeclaredKey, &[u8]) -> bool,
) -> Result<(), Problem> {
    let checkpoint = manifest.checkpoint;
    let damaged = |error: StorageError| {
        let message = format!("checkpoint {checkpoint} in {} is damaged", store.location());
        Problem::new(Code::StoreDamaged, message).detail(error)
    };
    let mut each = |entries: Entries<'_>| {
        for entry in entries {
            let (key, value) = entry.map_err(damaged)?;
            if value.is_some_and(|value| !give(&key, &value)) {
                break;
            }
        }
        Ok(())
    };
    if store.is_in_image(slot, checkpoint).map_err(damaged)? {
        let task = store.load(slot, checkpoint).map_err(damaged)?;
        // Nobody waits for it.
        let limits = Limits {
            call_max: Duration::from_secs(600),
            output_bytes_max: 2 << 30,
            ..Limits::default()
        };
        let run = read_out_task(Some(sandbox), limits, manifest, store, slot, task.memory);
        let run = run.map_err(|failed| match failed {
            Failed::Problem(problem) => *problem,
            Failed::Storage(error) => damaged(error),
        })?;
        return each(run.into_entries());
    }
    each(store.declared(slot, checkpoint).map_err(damaged)?)
}

/// Reads the declared state of a task of the checkpoint out of its memory, with the component that it ran.
fn read_out_task(
    sandbox: Option<&Sandbox>,
    limits: Limits,
    manifest: &Manifest,
    store: &SnapshotStore,
    slot: usize,
    memory: Vec<MemorySnapshot>,
) -> Result<Run, Failed> {
    let identity = &manifest.tasks[slot].identity;
    let refused = |what: String| {
        let message = format!("the declared state of {} cannot be read", identity.name());
        let problem = Problem::new(Code::StateMismatch, message)
            .detail(what)
            .detail("it lies in the image of the task's memory, and the component that it ran reads it out")
            .hint("resume with that component, the same parallelism and snapshot = \"both\"");
        Failed::Problem(Box::new(problem))
    };
    let bytes = store.component(slot, manifest.checkpoint).map_err(|error| match error {
        StorageError::Damaged { .. } => refused(error.to_string()),
        error => Failed::Storage(error),
    })?;
    let Some(sandbox) = sandbox else {
        return Err(refused("the job has no operator any more".to_owned()));
    };
    let component = sandbox.load(&bytes);
    let component = component
        .map_err(|error| refused(format!("this version refuses the component: {error}")))?;
    let TaskIdentity { index, parallelism, max_parallelism, is_keyed, .. } = *identity;
    let own_keys = OwnKeys { index, parallelism, max_parallelism }.if_any(is_keyed);
    let image = Image::of(memory)
        .map_err(|error| StorageError::store("make the image of a memory", error))?;
    let own = OwnComponent { component, max_parallelism, own_keys, limits };
    own.read_out(&image)
        .map_err(|error| refused(format!("the component {}: {error}", own.component.digest())))
}

/// Parts that no sink commits any more would be lost.
fn check_left_behind(
    tasks: &Tasks<'_>,
    manifest: &Manifest,
    store: &SnapshotStore,
) -> Result<(), Failed> {
    let is_file_sink = |uid: &str| {
        let mut nodes = tasks.spec.nodes.iter();
        nodes.any(|node| match &node.kind {
            NodeKind::Sink(sink) => node.uid == uid && sink.directory().is_some(),
            NodeKind::Source(_) | NodeKind::Operator(_) => false,
        })
    };
    for (slot, task) in manifest.tasks.iter().enumerate() {
        let TaskIdentity { operator, uid, is_sink, .. } = &task.identity;
        if !is_sink || is_file_sink(uid) {
            continue;
        }
        let state = store.load(slot, manifest.checkpoint)?.state;
        let uncommitted = Some(&*state).filter(|state| !state.is_empty());
        if let Some(example) = uncommitted.and_then(|state| tasks.spec.catalog.uncommitted(state)) {
            let message =
                format!("sink \"{operator}\" is no more, and what it has written is not committed");
            let problem = Problem::new(Code::OutputTaken, message)
                .detail(format!("for example {example}"))
                .hint(format!("put it back; or say which sink it is now, with uid = \"{uid}\""));
            return Err(Failed::Problem(Box::new(problem)));
        }
    }
    Ok(())
}

/// What `open` was given is part of linear memory: a changed `config` has no effect on it.
fn check_config(
    manifest: &Manifest,
    old: Option<usize>,
    new: &[&TaskIdentity],
    warnings: &mut Vec<String>,
) {
    let (Some(old), Some(new)) = (old, new.first()) else { return };
    let old = &manifest.tasks[old].identity;
    if new.has_memory && old.has_memory && old.config != new.config {
        warnings.push(format!(
            "operator \"{}\" has another config than its checkpoint, and its linear memory is restored, \
             with what it has read of the old one; snapshot = \"declared\" restores the declared state \
             alone",
            new.operator
        ));
    }
}

/// The number that each of the old declared states has now; `None`: it is there no more.
fn state_numbers(
    manifest: &Manifest,
    old: Option<&usize>,
    new: Option<&&TaskIdentity>,
) -> Vec<Option<u32>> {
    let old = old.and_then(|slot| manifest.tasks.get(*slot));
    let old = old.map_or(&[][..], |task| &task.identity.states);
    let number = |state: &StateIdentity| {
        let new = new.into_iter().flat_map(|identity| &identity.states);
        let is_it = |it: &StateIdentity| it.find(old).is_some_and(|found| found.name == state.name);
        (0..).zip(new).find(|(_, it)| is_it(it)).map(|(number, _)| number)
    };
    old.iter().map(number).collect()
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
            Some(source) => block_on(source.redistribute(&positions(), parallelism)),
            None => Err(host_bug(&format!("source \"{name}\" was not prepared"))),
        },
        NodeKind::Sink(sink) => block_on(sink.redistribute(&positions(), parallelism)),
        NodeKind::Operator(_) => Ok(vec![Vec::new(); parallelism]),
    };
    let shares = shares.map_err(|cause| {
        Problem::new(Code::StateMismatch, format!("the state of \"{name}\" cannot be shared out"))
            .detail(cause.message())
    })?;
    if shares.len() != parallelism {
        let message = format!("the connector of \"{name}\" has shared its state out wrongly");
        return Err(Problem::new(Code::HostBug, message)
            .detail(format!("it gave {} states for {parallelism} tasks", shares.len())));
    }
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
        if let Some(known) = stored().find(|known| known.uid == task.uid) {
            check_operator(tasks, known, task, ignore_unclaimed_state)?;
        }
    }
    let is_known = |known: &TaskIdentity| tasks.identities.iter().any(|task| task.uid == known.uid);
    match stored().find(|known| !is_known(known)) {
        Some(extra) if !ignore_unclaimed_state => mismatch(
            format!(
                "the checkpoint has state of \"{}\", which is not in the manifest",
                extra.operator
            ),
            &format!(
                "put it back; or say which node it is now, with uid = \"{}\"; or leave its state behind \
                 with --from DIR --ignore-unclaimed-state",
                extra.uid
            ),
        ),
        _ => Ok(()),
    }
}

fn check_operator(
    tasks: &Tasks<'_>,
    known: &TaskIdentity,
    task: &TaskIdentity,
    ignore_unclaimed_state: bool,
) -> Result<(), Problem> {
    let name = &task.operator;
    let mismatch =
        |what: String, hint: &str| Err(Problem::new(Code::StateMismatch, what).hint(hint));
    if known.has_declared && task.has_declared {
        check_states(tasks, known, task)?;
        let is_taken = |before: &StateIdentity| {
            let found = task.states.iter().filter_map(|state| state.find(&known.states));
            found.into_iter().any(|found| found.name == before.name)
        };
        if let Some(left) = known.states.iter().find(|before| !is_taken(before))
            && !ignore_unclaimed_state
        {
            let what = format!(
                "the checkpoint has state \"{}\" of \"{name}\", which its component does not have",
                left.name
            );
            let hint = format!(
                "if it has another name now, say so: #[state(renamed_from = \"{}\")]; or leave it behind \
                 with --from DIR --ignore-unclaimed-state",
                left.name
            );
            return mismatch(what, &hint);
        }
    }
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
        return match loses_memory && !ignore_unclaimed_state {
            false => Ok(()),
            true => mismatch(
                format!("the checkpoint of \"{name}\" holds linear memory and no declared state"),
                "set snapshot back, with the component that wrote it and its parallelism; or, if the operator \
                 keeps nothing in its memory that counts, leave that behind with --from DIR \
                 --ignore-unclaimed-state",
            ),
        };
    }
    let by_declared_state = match known.has_declared {
        true => "; or set snapshot = \"declared\" to go on from its declared state alone",
        false => {
            "; or, if the operator keeps nothing in its memory that counts, set snapshot = \"declared\" and \
             leave the memory behind with --from DIR --ignore-unclaimed-state"
        }
    };
    // What it has not declared was given up when that was written.
    if !known.has_memory && known.has_declared && task.has_declared {
        return Ok(());
    }
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

/// How a schema names a type that says nothing of what its values look like.
const OPAQUE: &str = "opaque ";

/// Declared state is matched by name, and must look as it did, or be convertible.
fn check_states(
    tasks: &Tasks<'_>,
    known: &TaskIdentity,
    task: &TaskIdentity,
) -> Result<(), Problem> {
    let name = &task.operator;
    for (number, state) in (0..).zip(&task.states) {
        let Some(before) = state.find(&known.states) else { continue };
        // What nobody can look into is the same only in the same component.
        let is_known = !before.schema.contains(OPAQUE) || known.digest == task.digest;
        if before.schema == state.schema && is_known {
            continue;
        }
        let mismatch = |what: String| {
            let message = format!("state \"{}\" of \"{name}\" has another schema", state.name);
            Problem::new(Code::SchemaMismatch, message)
                .detail(format!("in the checkpoint: {}", before.schema))
                .detail(format!("in the component:  {}", state.schema))
                .detail(what)
                .hint(HOW_TO_GROW)
        };
        if !is_known {
            let what =
                "serde does not tell what values of it look like, and the component is another";
            return Err(mismatch(what.to_owned()));
        }
        let Some(component) = tasks.components.get(name) else { continue };
        let answer = on_instance(component, Limits::default(), async |instance| {
            instance.converts(number, &before.schema).await
        });
        match answer {
            Ok(Ok(())) => {}
            Ok(Err(what)) => return Err(mismatch(what)),
            Err(error) => return Err(mismatch(error.to_string())),
        }
    }
    let by = |is_keyed: bool| if is_keyed { "by their key" } else { "not by their key" };
    let without_keys = |message: String| {
        Problem::new(Code::StateWithoutKeys, message)
            .detail("state that does not lie with the keys of its records stays with its task")
    };
    if known.is_keyed != task.is_keyed {
        let message = format!(
            "records came to \"{name}\" {} when its declared state was written, and come {} now",
            by(known.is_keyed),
            by(task.is_keyed)
        );
        return Err(without_keys(message).hint("set the partition of its inputs back"));
    }
    if !task.is_keyed && known.parallelism != task.parallelism {
        let message = format!(
            "\"{name}\" has declared state, its records come not by their key, and its parallelism \
             was {} and is {}",
            known.parallelism, task.parallelism
        );
        return Err(without_keys(message)
            .hint(
                "set the parallelism back; to change it, begin anew with partition = \"hash\" in another \
                 state directory",
            ));
    }
    Ok(())
}

fn digest_text(digest: Option<[u8; 16]>) -> String {
    digest.map_or("none".to_owned(), |digest| {
        cofferdam_sandbox::Digest(digest).to_string()[..12].to_owned()
    })
}
