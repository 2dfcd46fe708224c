//! Collects what an operator emits into batches.

use std::marker::PhantomData;

use crate::{
    Encode, Format, Operator, Port,
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
    /// If there is no such output, or if it has other types.
    #[inline]
    pub fn emit_to<K: Encode, V: Encode>(&mut self, output: usize, key: K, value: V) {
        let timestamp = self.timestamp;
        self.ports.push(output, key, value, timestamp);
    }

    /// Sets the event time of the records emitted from here to the end of the call. Without it they
    /// have the time of the record that is processed; in `advance` that of the watermark; and at the
    /// end of the input a time after everything that was seen.
    pub fn set_timestamp(&mut self, timestamp: Option<i64>) {
        self.timestamp = timestamp;
    }
}

/// One growing batch for each output.
#[derive(Default)]
pub(crate) struct Ports {
    batches: Vec<Builder>,
    /// Batches that were ended because records of another shape follow.
    ended: Vec<Emission>,
    /// How many of them there were, and how much every batch had, before the record in hand.
    marks: (usize, Vec<Mark>),
}

/// The lengths of a batch's columns.
#[derive(Clone, Copy, Default)]
struct Mark {
    keys: usize,
    key_ends: usize,
    values: usize,
    value_ends: usize,
    timestamps: usize,
}

#[derive(Default)]
struct Builder {
    name: &'static str,
    /// How keys and values are described; no format of a value: it may have any.
    key: Option<Format>,
    value: Option<Format>,
    keys: Vec<u8>,
    key_ends: Vec<u32>,
    values: Vec<u8>,
    value_ends: Vec<u32>,
    timestamps: Vec<i64>,
    /// The sizes of the last batch: the next one is about as large.
    expected: (usize, usize, usize),
}

impl Ports {
    pub(crate) fn new(outputs: Vec<Port>) -> Self {
        let builder = |port: Port| Builder {
            name: port.name,
            key: port.key,
            value: port.value,
            ..Builder::default()
        };
        let batches: Vec<Builder> = outputs.into_iter().map(builder).collect();
        let marks = (0, vec![Mark::default(); batches.len()]);
        Self { batches, ended: Vec::new(), marks }
    }

    /// A record begins: whatever it emits may have to be taken back.
    #[inline]
    pub(crate) fn mark(&mut self) {
        self.marks.0 = self.ended.len();
        for (mark, builder) in self.marks.1.iter_mut().zip(&self.batches) {
            *mark = Mark {
                keys: builder.keys.len(),
                key_ends: builder.key_ends.len(),
                values: builder.values.len(),
                value_ends: builder.value_ends.len(),
                timestamps: builder.timestamps.len(),
            };
        }
    }

    /// Takes back what the record has emitted.
    pub(crate) fn back_to_mark(&mut self) {
        // The last of them is the newest: what an output had at the mark is in its first.
        while self.marks.0 < self.ended.len()
            && let Some(Emission { output, records }) = self.ended.pop()
        {
            let builder = &mut self.batches[output as usize];
            (builder.keys, builder.key_ends) = (records.keys, records.key_ends);
            (builder.values, builder.value_ends) = (records.values, records.value_ends);
            builder.timestamps = records.timestamps;
        }
        for (mark, builder) in self.marks.1.iter().zip(&mut self.batches) {
            builder.keys.truncate(mark.keys);
            builder.key_ends.truncate(mark.key_ends);
            builder.values.truncate(mark.values);
            builder.value_ends.truncate(mark.value_ends);
            builder.timestamps.truncate(mark.timestamps);
        }
    }

    #[inline]
    fn push<K: Encode, V: Encode>(
        &mut self,
        output: usize,
        key: K,
        value: V,
        timestamp: Option<i64>,
    ) {
        let builder = &mut self.batches[output];
        builder.check::<K, V>();
        // Half a column would give records the times of their neighbours.
        if !builder.value_ends.is_empty() && builder.timestamps.is_empty() == timestamp.is_some() {
            let records = builder.take();
            self.ended.push(Emission { output: output as u32, records });
        }
        self.batches[output].push(key, value, timestamp);
    }

    pub(crate) fn take(&mut self) -> Vec<Emission> {
        let mut emissions = std::mem::take(&mut self.ended);
        let outputs = (0..).zip(&mut self.batches);
        let filled = outputs.filter(|(_, builder)| !builder.value_ends.is_empty());
        emissions
            .extend(filled.map(|(output, builder)| Emission { output, records: builder.take() }));
        emissions
    }
}

impl Builder {
    /// Anyone who reads an output trusts its description.
    #[inline]
    fn check<K: Encode, V: Encode>(&self) {
        let is_open = matches!(self.value, None | Some(Format::Bytes));
        if K::FORMAT != self.key || !(V::FORMAT == self.value || is_open) {
            self.mismatch(K::FORMAT, V::FORMAT);
        }
    }

    #[cold]
    fn mismatch(&self, key: Option<Format>, value: Option<Format>) -> ! {
        panic!(
            "output \"{}\" is described with keys {:?} and values {:?}, and was given keys {key:?} \
             and values {value:?}",
            self.name, self.key, self.value
        );
    }

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
