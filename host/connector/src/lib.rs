//! The seam between a job and the outside: what a source and a sink must be able to do.
//!
//! A [`Source`] gives records and the position behind them; a [`Sink`] takes records into a transaction that is
//! held from one barrier to the commit of its checkpoint. Both are asynchronous: a call that waits for the
//! outside gives its thread back, so it holds up neither the checkpoint of another task, nor another job, nor a
//! request to stop. What can only block is run by [`blocking`] on threads of its own.
//!
//! A [`Catalog`] has the connectors that a program hands to the engine. Nothing here knows a job's graph, a store
//! or a sandbox.

pub mod blocking;
pub mod catalog;
pub mod identity;
pub mod pace;
pub mod sink;
pub mod source;
pub mod state;
pub mod testing;

pub use catalog::Catalog;
pub use sink::Sink;
pub use source::{DEAD_LETTER, Source, Step};

use cofferdam_core::failure::FailureCause;

/// The result of a call of a connector.
pub type Result<T> = std::result::Result<T, FailureCause>;

/// The answer of a call that may have to wait for the outside.
pub type Answer<'a, T> = futures::future::BoxFuture<'a, Result<T>>;

/// An answer that is there already.
pub fn ready<'a, T: Send + 'a>(result: Result<T>) -> Answer<'a, T> {
    Box::pin(std::future::ready(result))
}

/// Where a task of a connector stands in its job, and how it blocks.
#[derive(Debug, Clone)]
pub struct TaskContext {
    /// Which of the node's tasks this is, from 0.
    pub index: u32,
    /// How many tasks the node has.
    pub parallelism: u32,
    /// Runs calls that block.
    pub blocking: blocking::Blocking,
}
