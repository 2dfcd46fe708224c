//! What crosses the boundary between a host and an operator, as the host has it.
//!
//! The types of `wit/operator.wit`, with what every reader of them needs. Records travel through the whole
//! host as a [`Batch`], declared state as [`StateChanges`]; a connector, a store and a sandbox agree on both
//! without knowing each other.
//!
//! The order of fields and variants is that of the WIT file: with the feature `lift` the types are passed
//! into and out of components as they are.

mod batch;
mod changes;
mod description;
pub mod text;

pub use batch::{Batch, RecordRef, append_range};
pub use changes::{StateChanges, StateEntry};
pub use description::{
    CheckpointRequest, Description, Emission, ErrorClass, Format, HandedOver, OpenContext,
    OperatorError, Port, Processed, Rejection, StateDeclaration, StateKind,
};

/// How many records a batch should have: more of them cost no less each.
pub const BATCH_RECORDS_MAX: usize = 1024;
/// How many bytes a batch should have.
pub const BATCH_BYTES_MAX: usize = 64 << 10;

/// Whether the ends of a column ascend to the column's length.
fn check_column(ends: &[u32], len: usize) -> Result<(), &'static str> {
    if !ends.is_sorted() {
        return Err("ends that do not ascend");
    }
    if ends.last().map_or(0, |end| *end as usize) != len {
        return Err("a last end that is not the column's end");
    }
    Ok(())
}
