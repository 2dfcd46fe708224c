//! Snapshots that could not be written yet: they are folded, so that they take no more memory than the state.

use std::sync::Arc;

use cofferdam_sandbox::MemorySnapshot;

use crate::{metadata::TaskIdentity, snapshot::TaskSnapshot};

/// A snapshot that is to be written: its task, and the checkpoint that it is for.
pub(crate) type Unwritten = (usize, u64, Arc<TaskSnapshot>);

/// Snapshots that could not be written are made one where they are larger than this.
pub(crate) const FOLD_BYTES_MIN: u64 = 64 << 20;

/// Snapshots that could not be written, those of one task as one where they take up much: a disk may fail
/// for long. Their checkpoints have been given up, so that what is between them is asked for no more.
pub(crate) fn kept_for_later(pending: Vec<Unwritten>, tasks: &[TaskIdentity]) -> Vec<Unwritten> {
    let is_few = pending.iter().map(|(.., it)| it.bytes()).sum::<u64>() <= FOLD_BYTES_MIN;
    if is_few { pending } else { folded(pending, tasks, |_| true).0 }
}

/// Snapshots that only count together with the next one of their task are made one with that; and where
/// each is among the others then.
pub(crate) fn folded(
    pending: Vec<Unwritten>,
    tasks: &[TaskIdentity],
    counts_with_next: impl Fn(&Unwritten) -> bool,
) -> (Vec<Unwritten>, Vec<usize>) {
    // Those that are to be one, by their numbers.
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (number, (task, ..)) in pending.iter().enumerate() {
        let last = |group: &Vec<usize>| group.last().map(|last| &pending[*last]);
        let of_task =
            groups.iter_mut().rev().find(|group| last(group).is_some_and(|it| it.0 == *task));
        match of_task.filter(|group| last(group).is_some_and(&counts_with_next)) {
            Some(group) => group.push(number),
            None => groups.push(vec![number]),
        }
    }
    let (mut folded, mut places) = (Vec::<Unwritten>::new(), vec![0; pending.len()]);
    for group in groups {
        let (task, id, _) = pending[group[group.len() - 1]];
        let max_parallelism = tasks.get(task).map_or(1, |task| task.max_parallelism);
        let apart: Vec<&TaskSnapshot> = group.iter().map(|number| &*pending[*number].2).collect();
        let one =
            (1 < apart.len()).then(|| TaskSnapshot::as_one(&apart, max_parallelism)).flatten();
        if let Some(one) = one {
            group.into_iter().for_each(|number| places[number] = folded.len());
            folded.push((task, id, Arc::new(one)));
            continue;
        }
        // What the host keeps lies on its disk. The pages alone are made one, in the last.
        let memories: Vec<&MemorySnapshot> =
            apart.iter().filter_map(|it| it.memory.as_deref()).collect();
        let merged =
            (1 < memories.len()).then(|| MemorySnapshot::merged(memories)).flatten().map(Arc::new);
        for number in group {
            places[number] = folded.len();
            let (_, of, snapshot) = &pending[number];
            let memory = if *of == id { merged.clone() } else { None };
            folded.push((
                task,
                *of,
                match &merged {
                    Some(_) => Arc::new(snapshot.with_memory(memory)),
                    None => snapshot.clone(),
                },
            ));
        }
    }
    (folded, places)
}
