//! Performs a job: exchanges, tasks, connectors, checkpoint storage, and the driver that steps the
//! core and does what it says. Decides nothing that a restart or a checkpoint depends on.

mod clock;
pub mod control;
mod driver;
mod exchange;
pub mod history;
pub mod identity;
pub mod job;
pub mod metrics;
pub mod progress;
mod read_out;
mod rehearsal;
pub mod restore;
pub mod schema;
mod sink;
mod source;
pub mod spec;
pub mod state_dir;
pub mod storage;
mod task;

pub use cofferdam_settings::problem;
pub use sink::Conflicts;
pub use source::generate;
