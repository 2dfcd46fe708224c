//! Keeps checkpoints: a row of generations, each a key-value store in a directory of its own.
//!
//! Whoever wants another store implements [`Storage`] and [`Generation`]; everything above them
//! (packs, chains, metadata, their order of commit) is in [`snapshot`], and does not know which
//! store it writes to. A generation holds a full image of every task and the increments since; it
//! is never repaired: it is replaced by a new one and removed as a directory.

mod chain;
pub mod changes;
pub mod declared;
pub mod faulty;
pub mod head;
pub mod in_flight;
mod log;
pub mod manifest;
pub mod memory;
#[cfg(feature = "objects")]
pub mod objects;
mod open;
pub mod run;
pub mod savepoint;
pub mod sled;
pub mod snapshot;
mod storage;
pub mod table;

pub use self::{
    chain::are_worth_merging,
    open::{is_url, objects_at, open_at},
    storage::{Generation, Result, Storage, StorageError},
};
