//! Distributes the state of a checkpoint over the tasks of now.
//!
//! Declared state moves by key group. Linear memory fits only the component and the parallelism that wrote it.
//! Positions of sources and transactions of sinks say themselves how they are distributed.

use std::{collections::BTreeMap, sync::Arc};

use cofferdam_connector::catalog::Uncommitted;
use cofferdam_core::{
    graph::Partitioner,
    redistribute::{Takeover, takeovers},
};
use cofferdam_sandbox::{Component, GuestError, Limits, MemorySnapshot};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{NodeKind, NodeSpec};
use cofferdam_store::{
    self, SnapshotStore,
    declared::{Entry, changes_of},
    in_flight::{ChannelState, InFlight},
    metadata::{CheckpointMetadata, StateIdentity, TaskIdentity},
    run::{Run, RunBuilder},
    snapshot::{LoadedTask, TaskRestore},
};
use futures::executor::block_on;

use super::{
    fit::HOW_TO_GROW,
    read_out::read_out_task,
    target::{Failed, Tasks},
};
use crate::{failure::host_bug, job::read_out::on_instance, watch::progress::RestoreStep};

/// What every task takes over, by slot.
pub(crate) type TaskRestores = Vec<TaskRestore>;

/// Converts declared state whose schema has changed: the component of now reads it, and hands it over.
fn convert(
    tasks: &Tasks<'_>,
    from: &SnapshotStore,
    metadata: &CheckpointMetadata,
    restores: &mut TaskRestores,
) -> Result<(), Failed> {
    let known = |uid: &str| metadata.tasks.iter().find(|task| task.identity.uid == uid);
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
        let limits = node.map_or_else(Limits::default, |node| node.kind.limits());
        tasks.tell(metadata.checkpoint, RestoreStep::Convert { task: task.name() });
        let mut entries = restores[slot].entries(from, metadata.checkpoint)?;
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
                instance.hand_over_to(metadata.checkpoint, true, u64::MAX, take).await
            });
            converted.map_err(|what| {
                let message =
                    format!("the declared state of \"{}\" cannot be converted", task.operator);
                let problem = Problem::new(Code::SchemaMismatch, message)
                    .with_os_error(what.os_error())
                    .detail(what);
                Failed::Problem(Box::new(problem.hint(HOW_TO_GROW)))
            })?;
        }
        drop(entries);
        restores[slot].converted = Some(builder.finish()?);
    }
    Ok(())
}

/// Entries that a guest takes in one call.
const CONVERTED_AT_ONCE: usize = 4096;

/// Entries that one instance converts.
const CONVERTED_BY_ONE: usize = 16 * CONVERTED_AT_ONCE;

/// Loads every old task, and distributes its state over the new ones. Declared state is only read
/// through: it may be larger than the memory.
pub(super) fn redistribute(
    tasks: &Tasks<'_>,
    metadata: &CheckpointMetadata,
    store: &SnapshotStore,
    warnings: &mut Vec<String>,
) -> Result<TaskRestores, Failed> {
    let refused = |problem| Failed::Problem(Box::new(problem));
    check_left_behind(tasks, metadata, store)?;
    let mut restores: TaskRestores = Vec::with_capacity(tasks.identities.len());
    for node in &tasks.spec.nodes {
        let new: Vec<&TaskIdentity> =
            tasks.identities.iter().filter(|identity| identity.operator == node.name).collect();
        let uid = new.first().map_or(node.name.as_str(), |identity| &identity.uid);
        let old = metadata.tasks.iter().enumerate();
        let old: Vec<usize> =
            old.filter(|(_, task)| task.identity.uid == uid).map(|(slot, _)| slot).collect();
        check_config(metadata, old.first().copied(), &new, warnings);
        let loaded = Loaded::of(tasks, metadata, store, node, old)?;
        let own = loaded.share(tasks, metadata, node, &new).map_err(refused)?;
        if let Some(source) = tasks.sources.get(&node.name) {
            let positions: Vec<&[u8]> = own
                .iter()
                .map(|restore| &*restore.state.state)
                .filter(|it| !it.is_empty())
                .collect();
            let checked = match positions.is_empty() {
                true => source.check_fresh().map(|()| Vec::new()),
                false => source.check_positions(&positions),
            };
            warnings.extend(checked.map_err(refused)?);
        }
        let in_flight = own.iter().flat_map(|restore| &*restore.state.in_flight);
        check_in_flight(tasks, node, in_flight).map_err(refused)?;
        restores.extend(own);
    }
    convert(tasks, store, metadata, &mut restores)?;
    let is_over = !restores.is_empty() && restores.iter().all(|restore| restore.state.is_drained);
    if is_over {
        warnings.push(
            "every task had already reached the end of its inputs (`stop --drain`, or the last checkpoint): \
             no more records are read"
                .to_owned(),
        );
    }
    Ok(restores)
}

/// The old tasks of a node.
struct Loaded {
    /// Their numbers in the checkpoint.
    slots: Vec<usize>,
    /// What they had, beside declared state that is only read through.
    tasks: Vec<LoadedTask>,
    /// Declared state that was read out of the image of a memory, by number.
    read_outs: BTreeMap<usize, Arc<Run>>,
    /// Declared state is in the images of memories, and stays there.
    is_in_image: bool,
}

impl Loaded {
    fn of(
        tasks: &Tasks<'_>,
        metadata: &CheckpointMetadata,
        store: &SnapshotStore,
        node: &NodeSpec,
        slots: Vec<usize>,
    ) -> Result<Self, Failed> {
        let takes_memory = match &node.kind {
            NodeKind::Operator(operator) => operator.snapshot.has_memory(),
            NodeKind::Source(_) | NodeKind::Sink(_) => true,
        };
        let mut loaded =
            Self { slots, tasks: Vec::new(), read_outs: BTreeMap::new(), is_in_image: false };
        for slot in &loaded.slots {
            let mut task = store.load(*slot, metadata.checkpoint)?;
            let is_image_alone = store.is_in_image(*slot, metadata.checkpoint)?;
            if !is_image_alone {
                store.check_declared(*slot, metadata.checkpoint)?;
            } else if takes_memory {
                loaded.is_in_image = true;
            } else {
                let sandbox = tasks.components.values().next().map(Component::sandbox);
                let limits = node.kind.limits();
                let memory = std::mem::take(&mut task.memory);
                let bytes = memory.last().map_or(0, MemorySnapshot::size_bytes);
                let name = metadata.tasks[*slot].identity.name();
                tasks.tell(metadata.checkpoint, RestoreStep::ReadOut { task: name, bytes });
                let run = read_out_task(sandbox.as_ref(), limits, metadata, store, *slot, memory)?;
                loaded.read_outs.insert(*slot, Arc::new(run));
            }
            if !takes_memory {
                task.memory.clear();
            }
            // Only the connector that wrote it can read it. Whether it is needed was asked before.
            let is_sink = matches!(node.kind, NodeKind::Sink(_));
            if metadata.tasks[*slot].identity.is_of_another_kind(node.connector, is_sink) {
                task.state.clear();
            }
            forget_watermarks(tasks, metadata, &mut task);
            loaded.tasks.push(task);
        }
        Ok(loaded)
    }

    /// What each of the new tasks takes over.
    fn share(
        self,
        tasks: &Tasks<'_>,
        metadata: &CheckpointMetadata,
        node: &NodeSpec,
        new: &[&TaskIdentity],
    ) -> Result<Vec<TaskRestore>, Problem> {
        let Self { slots, tasks: loaded, read_outs, is_in_image } = self;
        let states = state_numbers(metadata, slots.first(), new.first());
        let are_drained: Vec<bool> = loaded.iter().map(|task| task.is_drained).collect();
        let max_parallelism = new.first().map_or(0, |identity| identity.max_parallelism);
        let parallelism = u32::try_from(new.len()).unwrap_or(u32::MAX);
        let takeovers = takeovers(&are_drained, parallelism, max_parallelism);
        let states_of_now = match takeovers.first() {
            Some(Takeover::Share { .. }) => distribute(tasks, node, loaded, new)?,
            // Each task takes over what its predecessor had, or there is nothing.
            _ => loaded,
        };
        let mut states_of_now = states_of_now.into_iter();
        let share = |takeover| {
            let (declared_from, key_groups) = match takeover {
                Takeover::Nothing => return TaskRestore::default(),
                Takeover::Task(number) => (vec![slots[number]], None),
                Takeover::Share { from, key_groups } => {
                    (from.into_iter().map(|number| slots[number]).collect(), key_groups)
                }
            };
            TaskRestore {
                state: states_of_now.next().unwrap_or_default(),
                declared_from,
                key_groups,
                states: states.clone(),
                converted: None,
                read_out: read_outs.clone(),
                is_in_image,
            }
        };
        Ok(takeovers.into_iter().map(share).collect())
    }
}

/// Output that no sink commits any more would be lost.
fn check_left_behind(
    tasks: &Tasks<'_>,
    metadata: &CheckpointMetadata,
    store: &SnapshotStore,
) -> Result<(), Failed> {
    // A sink of another kind would not even look at it.
    let is_there = |uid: &str, connector: &str| {
        let mut nodes = tasks.spec.nodes.iter();
        nodes.any(|node| {
            matches!(node.kind, NodeKind::Sink(_))
                && node.uid == uid
                && node.connector == Some(connector)
        })
    };
    for (slot, task) in metadata.tasks.iter().enumerate() {
        let TaskIdentity { uid, is_sink, connector, .. } = &task.identity;
        if !is_sink || connector.as_ref().is_some_and(|connector| is_there(uid, connector)) {
            continue;
        }
        let state = store.load(slot, metadata.checkpoint)?.state;
        if state.is_empty() {
            continue;
        }
        match tasks.spec.catalog.uncommitted(connector.as_deref(), &state) {
            Uncommitted::Nothing => {}
            Uncommitted::Output { connector, .. } if is_there(uid, connector) => {}
            Uncommitted::Output { example, .. } => {
                let problem = left_behind(&task.identity).detail(format!("for example {example}"));
                return Err(Failed::Problem(Box::new(problem)));
            }
            Uncommitted::Unknown { connector } => {
                let detail = format!(
                    "only the connector `{connector}`, which this program does not have, knows"
                );
                let problem = left_behind(&task.identity).detail(detail);
                return Err(Failed::Problem(Box::new(problem)));
            }
        }
    }
    Ok(())
}

fn left_behind(sink: &TaskIdentity) -> Problem {
    let TaskIdentity { operator, uid, connector, .. } = sink;
    let kind = connector.as_ref().map_or(String::new(), |it| format!(" with connector = \"{it}\""));
    let message =
        format!("sink \"{operator}\"{kind} no longer exists, but its output is not committed");
    Problem::new(Code::OutputTaken, message)
        .hint(format!("put it back; or, if it was renamed, give the new sink uid = \"{uid}\""))
}

/// What `open` was given is part of linear memory: a changed `config` has no effect on it.
fn check_config(
    metadata: &CheckpointMetadata,
    old: Option<usize>,
    new: &[&TaskIdentity],
    warnings: &mut Vec<String>,
) {
    let (Some(old), Some(new)) = (old, new.first()) else { return };
    let old = &metadata.tasks[old].identity;
    if new.has_memory && old.has_memory && old.config != new.config {
        warnings.push(format!(
            "the config of operator \"{}\" has changed since the checkpoint, but its restored linear memory \
             may still hold values from the old config; snapshot = \"declared\" restores only the declared \
             state",
            new.operator
        ));
    }
}

/// The number that each of the old declared states has now; `None`: it is there no more.
fn state_numbers(
    metadata: &CheckpointMetadata,
    old: Option<&usize>,
    new: Option<&&TaskIdentity>,
) -> Vec<Option<u32>> {
    let old = old.and_then(|slot| metadata.tasks.get(*slot));
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
fn forget_watermarks(tasks: &Tasks<'_>, metadata: &CheckpointMetadata, task: &mut LoadedTask) {
    let parallelism = |identity: &TaskIdentity| identity.parallelism;
    let is_other = |channel: &ChannelState| {
        let before = metadata.tasks.iter().map(|task| &task.identity);
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
        "the checkpoint holds in-flight records from \"{}\" to input {} of \"{}\"",
        channel.from, channel.place, node.name
    );
    Err(Problem::new(Code::StateMismatch, message)
        .detail("the manifest no longer has this edge")
        .hint("put the edge back, or change it with a savepoint, which holds no records in flight"))
}

/// Distributes what the connector of a node, and the channels to it, had.
fn distribute(
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
        // A real state is never empty.
        _ if old.iter().all(|task| task.state.is_empty()) => Ok(vec![Vec::new(); parallelism]),
        NodeKind::Source(_) => match tasks.sources.get(name) {
            Some(source) => block_on(source.redistribute(&positions(), parallelism)),
            None => Err(host_bug(&format!("source \"{name}\" was not prepared"))),
        },
        NodeKind::Sink(sink) => block_on(sink.redistribute(&positions(), parallelism)),
        NodeKind::Operator(_) => Ok(vec![Vec::new(); parallelism]),
    };
    let shares = shares.map_err(|cause| {
        Problem::new(
            Code::StateMismatch,
            format!("the state of \"{name}\" cannot be redistributed"),
        )
        .with_os_error(cause.os_error())
        .detail(cause.message())
    })?;
    if shares.len() != parallelism {
        let message = format!("the connector of \"{name}\" redistributed its state incorrectly");
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
                    "the checkpoint holds in-flight records from \"{}\" to every task of \"{}\"",
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
