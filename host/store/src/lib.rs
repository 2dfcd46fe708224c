//! Keeps checkpoints: a row of generations, each a key-value store in a directory of its own.
//!
//! To use another store, implement [`Storage`] and [`Generation`]; everything above them
//! (packs, metadata, their order of commit) is in `write.rs` and beside it, and does not know which
//! store it writes to. A generation holds a full image of every task and the increments since; it
//! is never repaired: it is replaced by a new one and removed as a directory.

pub mod changes;
mod compact;
pub mod declared;
pub mod faulty;
mod generations;
pub mod head;
pub mod in_flight;
pub mod inspect;
mod key;
mod log;
pub mod memory;
mod merge;
pub mod metadata;
#[cfg(feature = "objects")]
pub mod objects;
mod open;
mod pack;
pub mod run;
pub mod savepoint;
pub mod sled;
pub mod snapshot;
mod storage;
mod store;
pub mod table;
mod unpack;
mod unwritten;
mod write;

#[cfg(test)]
mod tests;

pub use self::{
    generations::OpenedStore,
    open::{is_url, objects_at, open_at},
    storage::{Cause, Generation, Result, Storage, StorageError},
    store::SnapshotStore,
};
