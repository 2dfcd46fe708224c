//! What the gate shares between threads. `tests/loom` has a module of the same names, of which it knows every
//! interleaving.

pub(super) use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

pub(super) use tokio::sync::Notify;
