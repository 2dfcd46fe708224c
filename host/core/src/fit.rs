//! Whether the state that a checkpoint has of an operator can become the state of that operator as it is now.
//!
//! Declared state moves with the keys of records. Linear memory fits only the component, the state backend and
//! the parallelism that it was written with.

/// What a declared state is matched by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateName {
    /// Its name.
    pub name: String,
    /// A name that it had before.
    pub renamed_from: Option<String>,
}

/// Which of the known states is one of this name: the one with the name, or, if none has it, the one with the name
/// from before.
pub fn origin<S>(
    name: &str,
    renamed_from: Option<&str>,
    known: &[S],
    name_of: impl Fn(&S) -> &str,
) -> Option<usize> {
    let named = |wanted: &str| known.iter().position(|state| name_of(state) == wanted);
    named(name).or_else(|| named(renamed_from?))
}

/// An operator as far as its state goes: in a checkpoint, or now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperatorState {
    /// How many tasks it has.
    pub parallelism: u32,
    /// How many key groups it has; 0 for sources and sinks.
    pub max_parallelism: u32,
    /// Whether records come to its tasks by their key.
    pub is_keyed: bool,
    /// Whether checkpoints hold linear memory of it.
    pub has_memory: bool,
    /// Whether checkpoints hold declared state of it.
    pub has_declared: bool,
    /// Whether the host keeps its declared state, so that linear memory holds a cache of it.
    pub has_host_state: bool,
    /// The digest of its component; `None` for sources and sinks.
    pub component: Option<[u8; 16]>,
    /// The names of the directories that an instance finds, whose handles are in linear memory.
    pub directories: Option<String>,
    /// The connector of a source, whose position no other one can read; `None`: it is no source, or, in a checkpoint,
    /// that is not known.
    pub source: Option<String>,
    /// Its declared states.
    pub states: Vec<StateName>,
}

/// Why the state of a checkpoint cannot become the state of an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misfit {
    /// The checkpoint has the position of a source of another kind.
    OtherSource,
    /// Records came to the tasks by their key, and do not now, or the other way round: declared state would not lie
    /// where they go.
    KeysChanged,
    /// Declared state that does not lie with the keys of records stays with its task.
    StateWithoutKeys,
    /// The checkpoint has a declared state that the operator does not have.
    StateLeft {
        /// Its name in the checkpoint.
        name: String,
    },
    /// The number of key groups is that of the first checkpoint.
    MaxParallelism,
    /// The checkpoint has linear memory alone, and the operator takes none.
    MemoryLeft,
    /// The operator takes linear memory, and the checkpoint has none.
    NoMemory,
    /// Linear memory was written by another component.
    OtherComponent,
    /// Linear memory was written with another state backend.
    OtherBackend,
    /// Linear memory was written with other directories at hand.
    OtherDirectories,
    /// Linear memory cannot be distributed over another number of tasks.
    MemoryParallelism,
}

/// Whether what a checkpoint knows of an operator can become what it has now. With `may_leave_state`, state that
/// it does not take any more is left behind.
///
/// # Errors
/// The first reason why not.
pub fn fit(
    known: &OperatorState,
    now: &OperatorState,
    may_leave_state: bool,
) -> Result<(), Misfit> {
    if known.source.is_some() && known.source != now.source {
        return Err(Misfit::OtherSource);
    }
    let is_declared = known.has_declared && now.has_declared;
    if is_declared {
        if known.is_keyed != now.is_keyed {
            return Err(Misfit::KeysChanged);
        }
        if !now.is_keyed && known.parallelism != now.parallelism {
            return Err(Misfit::StateWithoutKeys);
        }
        if let Some(left) = state_left(known, now).filter(|_| !may_leave_state) {
            return Err(Misfit::StateLeft { name: left.name.clone() });
        }
    }
    if known.max_parallelism != now.max_parallelism {
        return Err(Misfit::MaxParallelism);
    }
    if !now.has_memory {
        let loses_memory = known.has_memory && !known.has_declared;
        return match loses_memory && !may_leave_state {
            true => Err(Misfit::MemoryLeft),
            false => Ok(()),
        };
    }
    if !known.has_memory {
        // What it has not declared was given up when the checkpoint was written.
        return if is_declared { Ok(()) } else { Err(Misfit::NoMemory) };
    }
    if known.component != now.component {
        return Err(Misfit::OtherComponent);
    }
    if known.has_host_state != now.has_host_state {
        return Err(Misfit::OtherBackend);
    }
    if known.directories != now.directories {
        return Err(Misfit::OtherDirectories);
    }
    if known.parallelism != now.parallelism {
        return Err(Misfit::MemoryParallelism);
    }
    Ok(())
}

/// A state of the checkpoint that none of the operator's states takes over.
fn state_left<'k>(known: &'k OperatorState, now: &OperatorState) -> Option<&'k StateName> {
    let taken: Vec<usize> = now
        .states
        .iter()
        .filter_map(|state| {
            origin(&state.name, state.renamed_from.as_deref(), &known.states, |it| &it.name)
        })
        .collect();
    (0..).zip(&known.states).find(|(place, _)| !taken.contains(place)).map(|(_, state)| state)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An operator with both kinds of state.
    fn operator() -> OperatorState {
        OperatorState {
            parallelism: 2,
            max_parallelism: 128,
            is_keyed: true,
            has_memory: true,
            has_declared: true,
            has_host_state: false,
            component: Some([1; 16]),
            directories: None,
            source: None,
            states: vec![state("counts", None)],
        }
    }

    fn state(name: &str, renamed_from: Option<&str>) -> StateName {
        StateName { name: name.to_owned(), renamed_from: renamed_from.map(str::to_owned) }
    }

    type Change = fn(&mut OperatorState);

    /// What becomes of a change of the operator since its checkpoint, and of the same where state may be left.
    fn row(known: Change, now: Change) -> [Option<Misfit>; 2] {
        let (mut before, mut after) = (operator(), operator());
        known(&mut before);
        now(&mut after);
        [false, true].map(|may_leave_state| fit(&before, &after, may_leave_state).err())
    }

    #[test]
    fn each_change_of_an_operator_is_taken_or_refused() {
        let same: Change = |_| {};
        let memory_alone: Change = |it| it.has_declared = false;
        let declared_alone: Change = |it| it.has_memory = false;
        let both = |misfit: Misfit| [Some(misfit.clone()), Some(misfit)];
        let left = |name: &str| [Some(Misfit::StateLeft { name: name.to_owned() }), None];
        let with_scratch: Change = |it| it.directories = Some("/scratch".to_owned());
        let rows: [(Change, Change, [Option<Misfit>; 2]); 18] = [
            (same, same, [None, None]),
            // Declared state moves to another parallelism and another component; memory does not.
            (same, |it| it.parallelism = 3, both(Misfit::MemoryParallelism)),
            (same, |it| (it.parallelism, it.has_memory) = (3, false), [None, None]),
            (same, |it| it.component = Some([2; 16]), both(Misfit::OtherComponent)),
            (same, |it| (it.component, it.has_memory) = (None, false), [None, None]),
            (same, |it| it.has_host_state = true, both(Misfit::OtherBackend)),
            // A handle that memory knows would be that of another directory.
            (same, with_scratch, both(Misfit::OtherDirectories)),
            (with_scratch, same, both(Misfit::OtherDirectories)),
            (with_scratch, |it| it.has_memory = false, [None, None]),
            (same, |it| it.max_parallelism = 64, both(Misfit::MaxParallelism)),
            (same, |it| it.is_keyed = false, both(Misfit::KeysChanged)),
            (same, |it| it.states = vec![state("sums", None)], left("counts")),
            (same, |it| it.states = vec![state("sums", Some("counts"))], [None, None]),
            // What was held before is not asked for, or is missed.
            (memory_alone, declared_alone, [Some(Misfit::MemoryLeft), None]),
            (declared_alone, memory_alone, both(Misfit::NoMemory)),
            (declared_alone, same, [None, None]),
            (memory_alone, same, [None, None]),
            (same, memory_alone, [None, None]),
        ];
        for (place, (known, now, expected)) in rows.into_iter().enumerate() {
            assert_eq!(row(known, now), expected, "row {place}");
        }
    }

    #[test]
    fn a_position_is_for_a_source_of_its_kind() {
        let (none, file): (Change, Change) = (|_| {}, |it| it.source = Some("file".to_owned()));
        let other = [Some(Misfit::OtherSource), Some(Misfit::OtherSource)];
        assert_eq!(row(file, file), [None, None]);
        assert_eq!(row(none, file), [None, None], "of a format that does not name it");
        assert_eq!(row(file, |it| it.source = Some("generator".to_owned())), other);
        assert_eq!(row(file, none), other, "it is an operator now, or a sink");
    }

    #[test]
    fn state_without_keys_stays_with_its_task() {
        let unkeyed: Change = |it| (it.is_keyed, it.has_memory) = (false, false);
        let wider: Change = |it| (it.is_keyed, it.has_memory, it.parallelism) = (false, false, 3);
        assert_eq!(row(unkeyed, unkeyed), [None, None]);
        assert_eq!(row(unkeyed, wider)[0], Some(Misfit::StateWithoutKeys));
    }

    #[test]
    fn a_name_counts_before_one_that_a_state_had() {
        let known = [state("old", None), state("new", None)];
        let find = |name, before| origin(name, before, &known, |it| &it.name);
        assert_eq!(find("new", Some("old")), Some(1));
        assert_eq!(find("newest", Some("old")), Some(0));
        assert_eq!(find("newest", None), None);
    }
}
