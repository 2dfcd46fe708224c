//! Entries of declared state, as columns.

use crate::check_column;

/// Entries of declared state, as columns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "lift",
    derive(
        wasmtime::component::ComponentType,
        wasmtime::component::Lift,
        wasmtime::component::Lower
    )
)]
#[cfg_attr(feature = "lift", component(record))]
pub struct StateChanges {
    /// Which state, one a change.
    pub states: Vec<u32>,
    /// The keys, one after the other.
    pub keys: Vec<u8>,
    /// Where each key ends: one end a change.
    #[cfg_attr(feature = "lift", component(name = "key-ends"))]
    pub key_ends: Vec<u32>,
    /// How many bytes at the end of each key are its namespace, one a change; empty: no key has one. The
    /// bytes before it are the key of the records that the entry belongs to.
    pub namespaces: Vec<u32>,
    /// The values, one after the other; a removed entry adds nothing.
    pub values: Vec<u8>,
    /// Where each value ends: one end a change.
    #[cfg_attr(feature = "lift", component(name = "value-ends"))]
    pub value_ends: Vec<u32>,
    /// Whether the entry was removed, one a change.
    pub removed: Vec<bool>,
}

/// One entry of declared state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateEntry<'a> {
    /// The index of its state in the operator's description.
    pub state: u32,
    /// Its key, with the namespace behind it.
    pub key: &'a [u8],
    /// How many bytes of the key are its namespace.
    pub namespace: u32,
    /// `None`: the entry was removed.
    pub value: Option<&'a [u8]>,
}

impl StateChanges {
    /// Adds an entry.
    pub fn push(&mut self, entry: StateEntry<'_>) {
        self.states.push(entry.state);
        self.keys.extend_from_slice(entry.key);
        self.key_ends.push(self.keys.len() as u32);
        self.namespaces.push(entry.namespace);
        self.values.extend_from_slice(entry.value.unwrap_or_default());
        self.value_ends.push(self.values.len() as u32);
        self.removed.push(entry.value.is_none());
    }

    /// Every entry, in order.
    pub fn entries(&self) -> impl Iterator<Item = StateEntry<'_>> {
        let (mut key_start, mut value_start) = (0, 0);
        self.states.iter().enumerate().map(move |(index, &state)| {
            let (key_end, value_end) = (self.key_ends[index], self.value_ends[index]);
            let key = &self.keys[key_start as usize..key_end as usize];
            let value = &self.values[value_start as usize..value_end as usize];
            (key_start, value_start) = (key_end, value_end);
            let namespace = self.namespaces.get(index).copied().unwrap_or(0);
            StateEntry { state, key, namespace, value: (!self.removed[index]).then_some(value) }
        })
    }

    /// How much memory they take: keys, values, and what is counted for each entry beside these.
    #[must_use]
    pub fn byte_count(&self) -> u64 {
        (self.keys.len() + self.values.len() + 16 * self.states.len()) as u64
    }

    /// Whether the columns fit together.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self) -> Result<(), &'static str> {
        let count = self.states.len();
        let is_complete = self.key_ends.len() == count
            && self.value_ends.len() == count
            && (self.namespaces.is_empty() || self.namespaces.len() == count)
            && self.removed.len() == count;
        if !is_complete {
            return Err("columns of different length");
        }
        check_column(&self.key_ends, self.keys.len())?;
        check_column(&self.value_ends, self.values.len())?;
        self.check_namespaces()
    }

    /// Whether all is of the first so many declared states.
    ///
    /// # Errors
    /// That it is not.
    pub fn check_states(&self, declared: u32) -> Result<(), &'static str> {
        match self.states.iter().all(|state| *state < declared) {
            true => Ok(()),
            false => Err("a state that it has not declared"),
        }
    }

    /// A namespace is a part of its key.
    fn check_namespaces(&self) -> Result<(), &'static str> {
        let mut start = 0;
        for (end, namespace) in self.key_ends.iter().zip(&self.namespaces) {
            if end - start < *namespace {
                return Err("a namespace that is longer than its key");
            }
            start = *end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_out_as_they_went_in() {
        let entries = [
            StateEntry { state: 0, key: b"user", namespace: 0, value: Some(b"1") },
            StateEntry { state: 2, key: b"user/7", namespace: 2, value: None },
            StateEntry { state: 1, key: b"", namespace: 0, value: Some(b"") },
        ];
        let mut changes = StateChanges::default();
        entries.into_iter().for_each(|entry| changes.push(entry));
        assert_eq!(changes.check(), Ok(()));
        assert_eq!(changes.check_states(3), Ok(()));
        assert!(changes.check_states(2).is_err());
        assert!(changes.entries().eq(entries));
    }

    #[test]
    fn columns_that_do_not_fit_together_are_found() {
        let mut good = StateChanges::default();
        good.push(StateEntry { state: 0, key: b"ab", namespace: 1, value: Some(b"x") });
        good.push(StateEntry { state: 0, key: b"c", namespace: 0, value: None });
        let says = |change: &dyn Fn(&mut StateChanges)| {
            let mut changes = good.clone();
            change(&mut changes);
            changes.check().expect_err("it does not fit")
        };
        assert!(says(&|it| it.removed.truncate(1)).contains("different length"));
        assert!(says(&|it| it.namespaces.truncate(1)).contains("different length"));
        assert!(says(&|it| it.key_ends.reverse()).contains("ascend"));
        assert!(says(&|it| it.values.push(0)).contains("end"));
        assert!(says(&|it| it.namespaces[1] = 2).contains("namespace"));
    }
}
