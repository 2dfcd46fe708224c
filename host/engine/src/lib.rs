//! Performs a job: exchanges, tasks, connectors, checkpoint storage, and the driver that steps the
//! core and does what it says. Decides nothing that a restart or a checkpoint depends on.

mod clock;
mod engine;
mod exchange;
mod failure;
mod handle;
pub mod job;
pub mod location;
pub mod schema;
mod state;
mod storage;
mod task;
mod threads;
mod watch;

pub use self::{
    engine::{Engine, EngineOptions},
    handle::{JobHandle, JobStatus},
    job::{restore, state_dir},
    watch::{control, events, history, log, metrics, progress, socket},
};
pub use cofferdam_sandbox::compiler;
pub use cofferdam_settings::problem;
