//! What a job shows of itself: progress, figures, the history of its failures; and the way to it while it runs.

pub mod control;
pub mod events;
pub mod history;
pub mod log;
pub mod metrics;
pub(crate) mod monitor;
pub mod progress;
pub mod socket;
