//! What an operator says of itself, what it is told, and what it answers.

use crate::{Batch, StateChanges};

#[cfg(feature = "lift")]
use wasmtime::component::{ComponentType, Lift, Lower};

/// Records for one output.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct Emission {
    /// Which of the outputs of the description.
    pub output: u32,
    /// The records, in order.
    pub records: Batch,
}

/// A record that the operator has no use for. It is as it was before that record.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct Rejection {
    /// The index of the record in its batch. Ascending.
    pub record: u32,
    /// For people: lower case, no final dot.
    pub message: String,
}

/// The answer to a batch: what its good records lead to, and the bad ones.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct Processed {
    /// What the good records lead to.
    pub emissions: Vec<Emission>,
    /// The others.
    pub rejected: Vec<Rejection>,
}

/// What an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(enum))]
#[repr(u8)]
pub enum ErrorClass {
    /// The input is bad; the operator is as it was before it.
    #[cfg_attr(feature = "lift", component(name = "rejected"))]
    Rejected,
    /// The operator cannot continue.
    #[cfg_attr(feature = "lift", component(name = "failed"))]
    Failed,
}

/// An operator's own verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct OperatorError {
    /// Whose fault it is.
    pub class: ErrorClass,
    /// For people: lower case, no final dot.
    pub message: String,
    /// The index in the batch of the record it is about.
    pub record: Option<u32>,
}

/// How bytes are to be read. The host compares the two ends of an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(enum))]
#[repr(u8)]
pub enum Format {
    /// The operator's own business.
    #[cfg_attr(feature = "lift", component(name = "bytes"))]
    Bytes,
    /// UTF-8.
    #[cfg_attr(feature = "lift", component(name = "text"))]
    Text,
    /// One JSON document.
    #[cfg_attr(feature = "lift", component(name = "json"))]
    Json,
    /// Postcard, the compact encoding between operators.
    #[cfg_attr(feature = "lift", component(name = "postcard"))]
    Postcard,
}

/// An input or an output.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct Port {
    /// Unique among the inputs or the outputs.
    pub name: String,
    /// How keys are encoded; `None` where records have no key.
    pub key: Option<Format>,
    /// How values are encoded.
    pub value: Format,
}

/// The shape of a declared state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(enum))]
#[repr(u8)]
pub enum StateKind {
    /// One value for each key.
    #[cfg_attr(feature = "lift", component(name = "value"))]
    Value,
}

/// A state that the operator hands over on request, and can take back from another version of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct StateDeclaration {
    /// Unique in the operator; later versions are matched by it.
    pub name: String,
    /// A name that it had before.
    #[cfg_attr(feature = "lift", component(name = "renamed-from"))]
    pub renamed_from: Option<String>,
    /// Its shape.
    pub kind: StateKind,
    /// What the values look like. Two states with equal schemas can read each other's values; whether others
    /// can, `converts` says.
    pub schema: String,
}

/// What an operator is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct Description {
    /// For people.
    pub name: String,
    /// In the order of the `input` of `process`.
    pub inputs: Vec<Port>,
    /// In the order of the `output` of an emission.
    pub outputs: Vec<Port>,
    /// In the order of the `state` of a change.
    pub states: Vec<StateDeclaration>,
}

/// Where a task stands in its job.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct OpenContext<'a> {
    /// The operator's name in the manifest.
    pub operator: &'a str,
    /// Which of its tasks this is, from 0.
    #[cfg_attr(feature = "lift", component(name = "task-index"))]
    pub task_index: u32,
    /// How many tasks there are.
    pub parallelism: u32,
    /// How many key groups there are.
    #[cfg_attr(feature = "lift", component(name = "max-parallelism"))]
    pub max_parallelism: u32,
    /// The operator's `config` table of the manifest, nested keys joined by dots.
    pub config: &'a [(&'a str, &'a str)],
    /// `None`: the operator keeps its declared state in its own memory. Otherwise the host keeps it, and the
    /// operator caches at most this many bytes of it.
    #[cfg_attr(feature = "lift", component(name = "state-cache"))]
    pub state_cache: Option<u64>,
    /// Whether only what has changed will be asked for. If not, the operator need not remember what has.
    #[cfg_attr(feature = "lift", component(name = "tracks-changes"))]
    pub tracks_changes: bool,
}

/// What the host wants handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct CheckpointRequest {
    /// Ascends over the life of a job.
    pub id: u64,
    /// True: all of the declared state. False: what changed since the last hand-over.
    pub full: bool,
    /// True: the next piece of the hand-over that the last call has begun.
    pub continued: bool,
}

/// A piece of a hand-over: about a mebibyte, or one entry that is larger.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "lift", derive(ComponentType, Lift, Lower))]
#[cfg_attr(feature = "lift", component(record))]
pub struct HandedOver {
    /// The entries.
    pub changes: StateChanges,
    /// Whether this is the last piece.
    #[cfg_attr(feature = "lift", component(name = "is-last"))]
    pub is_last: bool,
}
