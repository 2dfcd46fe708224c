//! Performs a job: exchanges, tasks, connectors, checkpoint storage, and the driver that steps the
//! core and does what it says. Decides nothing that a restart or a checkpoint depends on.

mod clock;
mod exchange;
mod failure;
pub mod job;
pub mod schema;
mod state;
mod storage;
mod task;
mod watch;

pub use self::{
    job::{restore, state_dir},
    watch::{control, history, metrics, progress},
};
pub use cofferdam_settings::problem;
