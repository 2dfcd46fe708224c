//! Decides which task takes which state of a checkpoint, and which records that were in flight.
//!
//! Declared state moves by key group, Flink's `StateAssignmentOperation`. Where the parallelism stays, each task
//! takes over all that its predecessor had.

use std::ops::Range;

use crate::{graph::Partitioner, key_group::key_groups_of};

/// What a task takes over of the tasks that its operator had at the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Takeover {
    /// Nothing: the checkpoint does not know the operator.
    Nothing,
    /// Everything that one task had: its memory, its position, its declared state, its records in flight.
    Task(usize),
    /// Its share of what all had.
    Share {
        /// The tasks whose declared state is read, by their number in the operator.
        from: Vec<usize>,
        /// The key groups that are taken of it; `None` where the operator has no key groups: nothing.
        key_groups: Option<Range<u32>>,
    },
}

/// What each of the tasks of an operator takes over. `are_drained` says of each task at the checkpoint whether
/// it had processed the end of its inputs; `max_parallelism` is the number of key groups, 0 where it has none.
///
/// ```
/// # use cofferdam_core::redistribute::{Takeover, takeovers};
/// let shares = takeovers(&[false, true], 3, 128);
/// assert_eq!(shares[0], Takeover::Share { from: vec![0], key_groups: Some(0..43) });
/// assert_eq!(takeovers(&[false, true], 2, 128), [Takeover::Task(0), Takeover::Task(1)]);
/// ```
#[must_use]
pub fn takeovers(are_drained: &[bool], parallelism: u32, max_parallelism: u32) -> Vec<Takeover> {
    if are_drained.is_empty() {
        return vec![Takeover::Nothing; parallelism as usize];
    }
    if are_drained.len() == parallelism as usize {
        return (0..are_drained.len()).map(Takeover::Task).collect();
    }
    // What a task that has finished had is finished: no record of its keys will come, and it must not finish
    // again. Where all have, their state is what is left of the operator.
    let all_are = are_drained.iter().all(|is_drained| *is_drained);
    let from = are_drained.iter().enumerate().filter(|(_, is_drained)| all_are || !**is_drained);
    let from: Vec<usize> = from.map(|(number, _)| number).collect();
    let share = |index| {
        let key_groups =
            (0 < max_parallelism).then(|| key_groups_of(index, parallelism, max_parallelism));
        Takeover::Share { from: from.clone(), key_groups }
    };
    (0..parallelism).map(share).collect()
}

/// Who takes records that were on their way to a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receiver {
    /// The task that owns the key group of each.
    OwnerOfKey,
    /// This task takes all of them.
    Task(u32),
    /// Every task would have to, and some have processed them already: they cannot be redistributed.
    Every,
}

/// Who takes the records that an unaligned checkpoint holds of one channel to the task `receiver`, now that there
/// are `parallelism` tasks. Events of a broadcast edge have no one receiver.
#[must_use]
pub fn receiver_in_flight(
    partitioner: Partitioner,
    have_keys: bool,
    receiver: u32,
    parallelism: u32,
) -> Receiver {
    match partitioner {
        Partitioner::Broadcast => Receiver::Every,
        Partitioner::Hash => Receiver::OwnerOfKey,
        // Behind a forward edge keys are where a hash before it has sent them, and so is state.
        Partitioner::Forward if have_keys => Receiver::OwnerOfKey,
        Partitioner::Global => Receiver::Task(0),
        Partitioner::Forward | Partitioner::Rebalance | Partitioner::Rescale => {
            Receiver::Task(receiver % parallelism.max(1))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key_group::task_index;

    /// All subsets of drained tasks, all parallelisms from 1 to 6, few and many key groups.
    fn each_rescale(check: impl Fn(&[bool], u32, u32)) {
        // Under miri a few of them.
        let most = if cfg!(miri) { 2 } else { 6 };
        for (old, new) in (1..=most).flat_map(|old| (1..=most).map(move |new| (old, new))) {
            for drained in 0..1u32 << old {
                let are_drained: Vec<bool> = (0..old).map(|at| drained >> at & 1 == 1).collect();
                for max in [6, 7, 128] {
                    check(&are_drained, new, max);
                }
            }
        }
    }

    #[test]
    fn each_key_of_a_task_that_has_not_ended_is_taken_once_and_by_its_owner() {
        each_rescale(|are_drained, new, max| {
            let shares = takeovers(are_drained, new, max);
            assert_eq!(shares.len(), new as usize);
            let old = are_drained.len() as u32;
            let all_are = are_drained.iter().all(|is_drained| *is_drained);
            for group in 0..max {
                let before = task_index(group, old, max) as usize;
                let takes = |share: &Takeover| match share {
                    Takeover::Nothing => false,
                    Takeover::Task(of) => *of == before,
                    Takeover::Share { from, key_groups } => {
                        from.contains(&before)
                            && key_groups.as_ref().is_some_and(|it| it.contains(&group))
                    }
                };
                let takers: Vec<u32> = (0..)
                    .zip(&shares)
                    .filter(|(_, share)| takes(share))
                    .map(|(at, _)| at)
                    .collect();
                let is_over = are_drained[before] && !all_are && old != new;
                let owner = vec![task_index(group, new, max)];
                let expected = if is_over { Vec::new() } else { owner };
                assert_eq!(takers, expected, "group {group} of {max}, {are_drained:?} to {new}");
            }
        });
    }

    #[test]
    fn what_has_no_key_groups_has_no_declared_state_to_share() {
        let none = Takeover::Share { from: vec![0], key_groups: None };
        assert_eq!(takeovers(&[false], 2, 0), [none.clone(), none]);
        assert_eq!(takeovers(&[], 2, 128), [Takeover::Nothing, Takeover::Nothing]);
    }

    #[test]
    fn records_in_flight_have_one_receiver_that_exists() {
        let rows = [
            (Partitioner::Hash, false, Receiver::OwnerOfKey),
            (Partitioner::Hash, true, Receiver::OwnerOfKey),
            (Partitioner::Forward, true, Receiver::OwnerOfKey),
            (Partitioner::Forward, false, Receiver::Task(1)),
            (Partitioner::Rebalance, true, Receiver::Task(1)),
            (Partitioner::Rescale, false, Receiver::Task(1)),
            (Partitioner::Global, true, Receiver::Task(0)),
            (Partitioner::Broadcast, false, Receiver::Every),
        ];
        for (partitioner, have_keys, expected) in rows {
            assert_eq!(
                receiver_in_flight(partitioner, have_keys, 4, 3),
                expected,
                "{partitioner:?}"
            );
        }
    }
}
