//! Collects what an operator emits into batches.

use std::marker::PhantomData;

use crate::{
    Encode, Operator,
    bindings::cofferdam::operator::types::{Batch, Emission},
};

/// Where an operator puts its records. They leave together at the end of the call.
pub struct Output<'a, O: Operator> {
    ports: &'a mut Ports,
    timestamp: Option<i64>,
    operator: PhantomData<fn() -> O>,
}

impl<'a, O: Operator> Output<'a, O> {
    pub(crate) fn new(ports: &'a mut Ports, timestamp: Option<i64>) -> Self {
        Self { ports, timestamp, operator: PhantomData }
    }

    /// Sends a record to the first output, with the event time of the record being processed.
    #[inline]
    pub fn emit(&mut self, key: O::OutKey<'_>, value: O::Out<'_>) {
        self.emit_to(0, key, value);
    }

    /// Sends a record to an output by its place in [`Operator::outputs`].
    ///
    /// # Panics
    /// If there is no such output.
    #[inline]
    pub fn emit_to<K: Encode, V: Encode>(&mut self, output: usize, key: K, value: V) {
        let timestamp = self.timestamp;
        self.ports.batches[output].push(key, value, timestamp);
    }

    /// Sets the event time of the records emitted from here to the end of the call.
    pub fn set_timestamp(&mut self, timestamp: Option<i64>) {
        self.timestamp = timestamp;
    }
}

/// One growing batch for each output.
#[derive(Default)]
pub(crate) struct Ports {
    batches: Vec<Builder>,
}

#[derive(Default)]
struct Builder {
    keys: Vec<u8>,
    key_ends: Vec<u32>,
    values: Vec<u8>,
    value_ends: Vec<u32>,
    timestamps: Vec<i64>,
    /// The sizes of the last batch: the next one is about as large.
    expected: (usize, usize, usize),
}

impl Ports {
    pub(crate) fn new(outputs: usize) -> Self {
        Self { batches: (0..outputs).map(|_| Builder::default()).collect() }
    }

    pub(crate) fn take(&mut self) -> Vec<Emission> {
        let outputs = (0..).zip(&mut self.batches);
        outputs
            .filter(|(_, builder)| !builder.value_ends.is_empty())
            .map(|(output, builder)| Emission { output, records: builder.take() })
            .collect()
    }
}

impl Builder {
    #[inline]
    fn push<K: Encode, V: Encode>(&mut self, key: K, value: V, timestamp: Option<i64>) {
        if self.value_ends.is_empty() {
            self.reserve();
        }
        if K::FORMAT.is_some() {
            key.encode(&mut self.keys);
            self.key_ends.push(end_of(&self.keys));
        }
        value.encode(&mut self.values);
        self.value_ends.push(end_of(&self.values));
        if let Some(timestamp) = timestamp {
            self.timestamps.push(timestamp);
        }
    }

    fn reserve(&mut self) {
        let (keys, values, records) = self.expected;
        self.keys.reserve(keys);
        self.key_ends.reserve(if keys == 0 { 0 } else { records });
        self.values.reserve(values);
        self.value_ends.reserve(records);
    }

    fn take(&mut self) -> Batch {
        self.expected = (self.keys.len(), self.values.len(), self.value_ends.len());
        // A batch in which only some records have an event time has none: half a column would
        // give records the time of their neighbours.
        if self.timestamps.len() != self.value_ends.len() {
            self.timestamps.clear();
        }
        Batch {
            keys: std::mem::take(&mut self.keys),
            key_ends: std::mem::take(&mut self.key_ends),
            values: std::mem::take(&mut self.values),
            value_ends: std::mem::take(&mut self.value_ends),
            timestamps: std::mem::take(&mut self.timestamps),
        }
    }
}

/// The address space of a guest ends at 4 GiB, so an end always fits.
#[inline]
fn end_of(column: &[u8]) -> u32 {
    column.len() as u32
}
