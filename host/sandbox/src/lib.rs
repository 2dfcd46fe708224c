//! Runs an operator component in a sandbox that can be snapshotted and restored.
//!
//! Bytes of a component go in ([`Sandbox::load`]), an [`Instance`] comes out that can process
//! batches, hand over what changed in its memory, and be put back into an earlier state in a time
//! that does not depend on the size of that state. The crate knows nothing of jobs: another engine can embed it. Its
//! futures run on any executor whose threads have entered a tokio runtime with a timer, which ends a call that waits
//! for too long.
//!
//! **Invariant:** this is the only crate that calls wasmtime; `cofferdam-contract` derives its traits for the data that
//! crosses into a guest.

mod cache;
mod call;
pub mod compiler;
mod component;
mod config;
mod engine;
mod files;
mod host;
mod instance;
mod instrument;
mod limits;
pub mod memory;
mod rewrite;
mod trap;
#[doc(hidden)]
pub mod types;
mod validate;
mod wasi;

#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    unsafe_code,
    clippy::all,
    reason = "generated from wit/operator.wit, which is documented"
)]
mod bindings {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "operator",
        imports: { "cofferdam:operator/state@0.2.0": trappable },
        exports: { default: async },
        ownership: Borrowing { duplicate_if_necessary: false },
        with: { "cofferdam:operator/types@0.2.0": crate::types },
    });
}

pub use bindings::cofferdam::operator::logging::Level;
pub use call::processor_time;
pub use component::{Component, Digest};
pub use engine::{Sandbox, SandboxError, SandboxOptions, TrackingChoice};
pub use files::SCRATCH;
pub use host::{Capabilities, Host, Need, QuietHost, StateError};
pub use instance::{Instance, InstanceSetup, RestoreError, SnapshotError};
pub use instrument::INVENTORY;
pub use limits::{Limit, Limits};
pub use memory::{
    image::{Image, MemoryDelta, MemorySnapshot},
    track::Tracking,
};
pub use rewrite::{ComponentError, rewrite};
pub use trap::GuestError;
