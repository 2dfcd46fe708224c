//! What an entry of state belongs to: a key of records, and a namespace within it.

use smallvec::SmallVec;

/// What an entry of state belongs to: the key of a [`Record`](crate::Record), and within that a
/// namespace, such as the window that the entry is for. Entries go where the records of their key go,
/// also to another parallelism; so a key is always that of a record.
pub trait Keyed {
    /// The key of the records that the entry belongs to.
    fn key_bytes(&self) -> &[u8];

    /// What tells the entry from others of that key; empty unless somebody says otherwise.
    fn namespace_bytes(&self) -> &[u8] {
        &[]
    }
}

/// The key of an entry with its namespace.
///
/// ```
/// use cofferdam_sdk::state::{Keyed, StateKey, ValueState};
///
/// let mut windows = ValueState::<u64>::default();
/// let key = StateKey::new(b"JFK").with(b"2013-01-01");
/// windows.set(&key, 7);
/// let mut ended = Vec::new();
/// windows.for_each(|key, count| ended.push((key.to_owned(), *count)));
/// assert_eq!(ended[0].0.namespace_bytes(), b"2013-01-01");
/// assert_eq!(windows.remove(&ended[0].0), Some(7));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StateKey<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) namespace: &'a [u8],
}

impl<'a> StateKey<'a> {
    /// The bytes of a record's key.
    #[must_use]
    pub fn new(key: &'a [u8]) -> Self {
        Self { key, namespace: &[] }
    }

    /// The same key with a namespace.
    #[must_use]
    pub fn with(self, namespace: &'a (impl AsRef<[u8]> + ?Sized)) -> Self {
        Self { key: self.key, namespace: namespace.as_ref() }
    }

    /// A copy that outlives the state.
    #[must_use]
    pub fn to_owned(&self) -> OwnedStateKey {
        OwnedStateKey {
            bytes: SmallVec::from_iter(self.key.iter().chain(self.namespace).copied()),
            namespace: self.namespace.len(),
        }
    }
}

impl Keyed for StateKey<'_> {
    fn key_bytes(&self) -> &[u8] {
        self.key
    }

    fn namespace_bytes(&self) -> &[u8] {
        self.namespace
    }
}

/// A [`StateKey`] that owns its bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnedStateKey {
    bytes: SmallVec<[u8; 16]>,
    pub(crate) namespace: usize,
}

impl Keyed for OwnedStateKey {
    fn key_bytes(&self) -> &[u8] {
        &self.bytes[..self.bytes.len() - self.namespace]
    }

    fn namespace_bytes(&self) -> &[u8] {
        &self.bytes[self.bytes.len() - self.namespace..]
    }
}

#[cfg(test)]
impl Keyed for [u8] {
    fn key_bytes(&self) -> &[u8] {
        self
    }
}

/// A key and its namespace in one, and the length of the namespace.
#[derive(Clone, Copy)]
pub(crate) struct Joined<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) namespace: u32,
}

/// Puts both together where there is a namespace; most keys have none, and are used as they are.
macro_rules! joined {
    ($name:ident, $key:expr) => {
        let (key, namespace) = ($key.key_bytes(), $key.namespace_bytes());
        let both: SmallVec<[u8; 64]>;
        let $name = match namespace {
            [] => Joined { bytes: key, namespace: 0 },
            namespace => {
                both = key.iter().chain(namespace).copied().collect();
                Joined { bytes: &both, namespace: namespace.len() as u32 }
            }
        };
    };
}
pub(crate) use joined;
