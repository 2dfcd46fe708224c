//! What a job shows of itself: progress, figures, the history of its failures; and the way to it while it runs.

pub mod control;
pub mod history;
pub mod metrics;
pub(crate) mod monitor;
pub mod progress;
