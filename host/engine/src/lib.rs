//! Performs a job: exchanges, tasks, connectors, checkpoint storage, and the driver that steps the
//! core and does what it says. Decides nothing that a restart or a checkpoint depends on.

mod clock;
pub mod control;
mod driver;
mod exchange;
mod failure;
pub mod history;
pub mod job;
pub mod metrics;
pub mod progress;
mod read_out;
mod rehearsal;
pub mod restore;
pub mod schema;
mod state;
pub mod state_dir;
mod storage;
mod task;

pub use cofferdam_settings::problem;
