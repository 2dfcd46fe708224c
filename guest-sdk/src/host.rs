//! What an operator can ask of its host: the log, metrics, the clock, randomness.
//!
//! Natively, in unit tests, the log goes to standard error, metrics go nowhere, the clock is the
//! machine's and the randomness a fixed sequence.

use crate::bindings::cofferdam::operator::types::StateChanges;

#[cfg(target_arch = "wasm32")]
use crate::bindings::cofferdam::operator as wit;
#[cfg(target_arch = "wasm32")]
pub use wit::logging::Level;

/// How much a message matters.
#[cfg(not(target_arch = "wasm32"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Everything that happens.
    Trace,
    /// What helps to find a mistake.
    Debug,
    /// What an operator of the job wants to know.
    Info,
    /// What looks wrong.
    Warn,
    /// What is wrong.
    Error,
}

/// Writes one message to the host's log.
pub fn log(level: Level, message: &str) {
    #[cfg(target_arch = "wasm32")]
    wit::logging::log(level, message);
    #[cfg(not(target_arch = "wasm32"))]
    eprintln!("{level:?}: {message}");
}

/// Adds to a counter of the operator: that of all its tasks together is in the summary of `cofferdam run`,
/// and with `--json` in each of its figures. What a restart repeats is counted again.
pub fn add_to_counter(name: &str, delta: u64) {
    #[cfg(target_arch = "wasm32")]
    wit::metrics::add(name, delta);
    #[cfg(not(target_arch = "wasm32"))]
    let _ = (name, delta);
}

/// Sets a gauge of the operator, which is shown like a counter: of what its tasks set the latest counts.
pub fn set_gauge(name: &str, value: f64) {
    #[cfg(target_arch = "wasm32")]
    wit::metrics::set(name, value);
    #[cfg(not(target_arch = "wasm32"))]
    let _ = (name, value);
}

/// Milliseconds since 1970-01-01 UTC.
#[must_use]
pub fn now_ms() -> u64 {
    #[cfg(target_arch = "wasm32")]
    return wit::clock::now();
    #[cfg(not(target_arch = "wasm32"))]
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// A secret that the manifest asks for (`grants.secrets` of the operator) and the host grants; `None`: it does not, or this
/// is a unit test. Once read, it is in the operator's memory, and with that in checkpoints: read it where it is
/// used, and do not keep it.
#[must_use]
pub fn secret(name: &str) -> Option<Vec<u8>> {
    #[cfg(target_arch = "wasm32")]
    return wit::secrets::get(name);
    #[cfg(not(target_arch = "wasm32"))]
    {
        let _ = name;
        None
    }
}

/// How often the task was restarted before; 0 in unit tests. For diagnostics: what an operator emits
/// must not depend on it.
#[must_use]
pub fn attempt() -> u32 {
    #[cfg(target_arch = "wasm32")]
    return wit::task::attempt();
    #[cfg(not(target_arch = "wasm32"))]
    0
}

/// 64 random bits.
#[must_use]
pub fn random() -> u64 {
    #[cfg(target_arch = "wasm32")]
    return wit::random::next();
    #[cfg(not(target_arch = "wasm32"))]
    {
        use std::sync::atomic::{AtomicU64, Ordering};
        static STATE: AtomicU64 = AtomicU64::new(1);
        let state = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        (state ^ (state >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb)
    }
}

/// The value of a key of a state that the host keeps.
pub(crate) fn state(state: u32, key: &[u8], namespace: u32) -> Option<Vec<u8>> {
    #[cfg(target_arch = "wasm32")]
    return wit::state::get(state, key, namespace);
    #[cfg(not(target_arch = "wasm32"))]
    KEPT.with_borrow(|kept| kept.get(&(state, namespace, key.to_vec())).cloned())
}

/// Sets and removes entries of states that the host keeps.
pub(crate) fn put_state(changes: &StateChanges) {
    #[cfg(target_arch = "wasm32")]
    wit::state::put(changes);
    #[cfg(not(target_arch = "wasm32"))]
    KEPT.with_borrow_mut(|kept| {
        for (state, key, value) in crate::changes::entries(changes) {
            use crate::key::Keyed;
            let namespace = key.namespace_bytes();
            let bytes = [key.key_bytes(), namespace].concat();
            let key = (state, namespace.len() as u32, bytes);
            match value {
                Some(value) => kept.insert(key, value.to_vec()),
                None => kept.remove(&key),
            };
        }
    });
}

/// Some entries of a state that the host keeps, after a key; none: there are no more.
pub(crate) fn scan_state(state: u32, after: Option<&(Vec<u8>, u32)>) -> StateChanges {
    #[cfg(target_arch = "wasm32")]
    return wit::state::scan(state, after.map(|(key, namespace)| (key.as_slice(), *namespace)));
    #[cfg(not(target_arch = "wasm32"))]
    KEPT.with_borrow(|kept| {
        let mut page = crate::changes::empty_changes();
        let follows = |namespace: u32, key: &Vec<u8>| {
            after.is_none_or(|(after, of)| (*of, after) < (namespace, key))
        };
        let entries = kept
            .iter()
            .filter(|((of, namespace, key), _)| *of == state && follows(*namespace, key));
        for ((_, namespace, key), value) in entries.take(7) {
            page.states.push(state);
            page.namespaces.push(*namespace);
            page.keys.extend_from_slice(key);
            page.key_ends.push(page.keys.len() as u32);
            page.values.extend_from_slice(value);
            page.value_ends.push(page.values.len() as u32);
            page.removed.push(false);
        }
        page
    })
}

#[cfg(not(target_arch = "wasm32"))]
type Kept = std::collections::BTreeMap<(u32, u32, Vec<u8>), Vec<u8>>;

// What a host would keep, for unit tests: of each thread its own.
#[cfg(not(target_arch = "wasm32"))]
std::thread_local! {
    static KEPT: std::cell::RefCell<Kept> = std::cell::RefCell::default();
}

/// Forgets what is kept for the tests of this thread.
#[cfg(test)]
pub(crate) fn clear_state() {
    KEPT.with_borrow_mut(Kept::clear);
}
