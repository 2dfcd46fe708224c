//! What a process keeps of a job's tasks between their attempts, and of declared state while the job runs.

mod as_of;
pub(crate) mod keyed;
pub(crate) mod local;
