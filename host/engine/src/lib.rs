//! Performs a job: exchanges, tasks, connectors, checkpoint storage, and the driver that steps the
//! core and does what it says. Decides nothing that a restart or a checkpoint depends on.

mod clock;
pub mod control;
mod driver;
mod exchange;
pub mod history;
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

pub use cofferdam_connector::{catalog::Conflicts, identity};
pub use cofferdam_settings::problem;
pub use source::generate;

/// The connectors that are built in: `file` and `generator`, and `file`, `stdout` and `discard`.
#[must_use]
pub fn builtin() -> cofferdam_connector::Catalog {
    use spec::connectors;
    cofferdam_connector::Catalog::default()
        .source(connectors::FILE_SOURCE)
        .source(connectors::GENERATOR)
        .sink(connectors::FILE_SINK)
        .sink(connectors::STDOUT)
        .sink(connectors::DISCARD)
}
