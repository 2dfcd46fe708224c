//! Declared state: what an operator keeps by key, at the speed of its own memory, and hands over
//! to the host as changes since the last checkpoint.

mod value;

use serde::Serialize;

use crate::{
    bindings::cofferdam::operator::types::{StateChanges, StateKind},
    short::append,
};

pub use self::value::ValueState;
pub use crate::key::{Keyed, OwnedStateKey, StateKey};

/// The declared states of an operator, found by the `#[operator]` attribute.
pub trait DeclaredState {
    /// Every field marked `#[state]`, in the order of the struct.
    fn states(&mut self) -> Vec<NamedState<'_>>;
}

/// A field with the name of its state.
pub struct NamedState<'a> {
    /// The name.
    pub name: &'static str,
    /// A name that it had before.
    pub renamed_from: Option<&'static str>,
    /// The field.
    pub field: &'a mut dyn StateField,
}

/// A field that can be marked `#[state]`.
pub trait StateField {
    /// Its shape.
    fn kind(&self) -> StateKind;
    /// What its values look like.
    fn schema(&self) -> String;
    /// Whether values that were written with another schema can be taken back.
    ///
    /// # Errors
    /// Why not.
    fn converts(&self, schema: &str) -> Result<(), String>;
    /// Whether only what has changed will be asked for.
    fn track(&mut self, is_tracking: bool);
    /// From now on the host keeps it, under this number; at most so many bytes of it are kept here.
    fn move_to_host(&mut self, state: u32, cache_bytes: usize);
    /// Whether it has no entries, and none was removed since the last hand-over.
    fn is_untouched(&self) -> bool;
    /// Begins to hand over what changed since the last time, or everything.
    fn begin_hand_over(&mut self, is_full: bool);
    /// Hands over until the columns are full; true if nothing is left.
    fn hand_over(&mut self, changes: &mut Changes<'_>) -> bool;
    /// Takes one entry back; no value removes it. `schema` is the one it was written with, if that is
    /// not this one.
    ///
    /// # Errors
    /// Where the bytes are not a value of this state.
    fn take_back(
        &mut self,
        key: StateKey<'_>,
        value: Option<&[u8]>,
        schema: Option<&str>,
    ) -> Result<(), String>;
}

/// What is being encoded, so that a panic can name it: its message alone says where in the code it was.
#[cfg_attr(
    not(target_arch = "wasm32"),
    allow(dead_code, reason = "only the panic hook of a component asks for it")
)]
pub(crate) mod encoding {
    use std::cell::Cell;

    /// How much of a key is kept.
    const KEY_BYTES: usize = 32;

    #[derive(Clone, Copy)]
    struct Key {
        bytes: [u8; KEY_BYTES],
        len: usize,
    }

    std::thread_local! {
        static STATE: Cell<Option<&'static str>> = const { Cell::new(None) };
        static KEY: Cell<Option<Key>> = const { Cell::new(None) };
    }

    /// The state that the next values are of, by its name.
    pub(crate) fn of_state(name: Option<&'static str>) {
        STATE.set(name);
    }

    #[inline]
    pub(super) fn begin(key: &[u8]) {
        let mut bytes = [0; KEY_BYTES];
        let len = key.len().min(KEY_BYTES);
        bytes[..len].copy_from_slice(&key[..len]);
        KEY.set(Some(Key { bytes, len }));
    }

    #[inline]
    pub(super) fn end() {
        KEY.set(None);
    }

    /// Names the value, if one is being encoded.
    pub(crate) fn words() -> Option<String> {
        let Key { bytes, len } = KEY.get()?;
        let state = STATE.get().map(|name| format!(" of state \"{name}\"")).unwrap_or_default();
        Some(format!("the value{state} under the key `{}`", bytes[..len].escape_ascii()))
    }
}

/// What is handed over at a time.
pub(crate) const PIECE_BYTES: usize = 1 << 20;

/// Where changes are written during a hand-over.
pub struct Changes<'a> {
    pub(crate) state: u32,
    pub(crate) columns: &'a mut StateChanges,
}

impl Changes<'_> {
    /// Whether a piece is as large as it should be.
    fn is_full(&self) -> bool {
        let columns = &*self.columns;
        PIECE_BYTES <= columns.keys.len() + columns.values.len() + 16 * columns.states.len()
    }

    fn push<V: Serialize>(&mut self, key: StateKey<'_>, value: Option<&V>) {
        let columns = &mut *self.columns;
        let namespace = key.namespace.len() as u32;
        if 0 < namespace || !columns.namespaces.is_empty() {
            // Until now none had one.
            columns.namespaces.resize(columns.states.len(), 0);
            columns.namespaces.push(namespace);
        }
        columns.states.push(self.state);
        append(&mut columns.keys, key.key);
        append(&mut columns.keys, key.namespace);
        columns.key_ends.push(columns.keys.len() as u32);
        if let Some(value) = value {
            encoding::begin(key.key);
            crate::Encode::encode(value, &mut columns.values);
            encoding::end();
        }
        columns.value_ends.push(columns.values.len() as u32);
        columns.removed.push(value.is_none());
    }
}
