//! Drives one operator behind the exports of its component. For the `#[operator]` attribute only.

use crate::{
    Decode, Format, Operator, Output, Port, Record,
    bindings::cofferdam::operator::types::{
        self, Batch, CheckpointRequest, Description, Emission, ErrorClass, OpenContext,
        OperatorError, StateChanges, StateDeclaration,
    },
    output::Ports,
    state::Changes,
};

/// One task: the operator and its outputs.
pub struct Task<O> {
    operator: O,
    ports: Ports,
    /// The latest event time of a record so far, or the first after the latest watermark.
    latest: Option<i64>,
}

impl<O: Operator> Default for Task<O> {
    fn default() -> Self {
        Self { operator: O::default(), ports: Ports::new(O::outputs()), latest: None }
    }
}

impl<O: Operator> Task<O> {
    /// What the operator is.
    #[must_use]
    pub fn describe(name: &str) -> Description {
        let states = O::default()
            .states()
            .into_iter()
            .map(|(name, field)| StateDeclaration {
                name: name.to_owned(),
                kind: field.kind(),
                schema: field.schema().to_owned(),
            })
            .collect();
        let ports = |ports: Vec<Port>| ports.into_iter().map(wit_port).collect();
        Description {
            name: name.to_owned(),
            inputs: ports(O::inputs()),
            outputs: ports(O::outputs()),
            states,
        }
    }

    /// Takes the handles of standard output and error, so that a later snapshot never holds one
    /// that a fresh instance lacks; then opens the operator.
    ///
    /// # Errors
    /// The operator's own.
    pub fn open(&mut self, context: OpenContext) -> Result<(), OperatorError> {
        #[cfg(target_arch = "wasm32")]
        take_standard_handles();
        if let Some(bytes) = context.state_cache {
            let states = self.operator.states();
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX) / states.len().max(1);
            for (state, (_, field)) in (0..).zip(states) {
                field.move_to_host(state, bytes);
            }
        }
        self.operator.open(&context.into()).map_err(|error| error.into_wit(None))?;
        match self.operator.states().iter().find(|(_, field)| field.is_changed()) {
            None => Ok(()),
            Some((name, _)) => Err(failed(format!(
                "state \"{name}\" was written in `open`: it is restored after that; write it in `process`"
            ))),
        }
    }

    /// Decodes and processes each record of a batch.
    ///
    /// # Errors
    /// The operator's own, or a record that cannot be decoded; names the record's place.
    pub fn process(&mut self, input: u32, batch: &Batch) -> Result<Vec<Emission>, OperatorError> {
        let mut start = (0, 0);
        for (place, &value_end) in batch.value_ends.iter().enumerate() {
            let key_end = batch.key_ends.get(place).copied().unwrap_or(0);
            let key_bytes = column(&batch.keys, start.0, key_end);
            let value_bytes = column(&batch.values, start.1, value_end);
            start = (key_end, value_end);
            let timestamp = batch.timestamps.get(place).copied();
            self.latest = self.latest.max(timestamp);
            let at = |error: crate::Error| error.into_wit(Some(place as u32));
            let record = Record {
                key: decode(key_bytes, "key").map_err(at)?,
                value: decode(value_bytes, "value").map_err(at)?,
                timestamp,
                input,
                key_bytes,
            };
            let mut output = Output::new(&mut self.ports, timestamp);
            self.operator.process(record, &mut output).map_err(at)?;
        }
        Ok(self.ports.take())
    }

    /// Event time moves on.
    ///
    /// # Errors
    /// The operator's own.
    pub fn advance(&mut self, watermark: i64) -> Result<Vec<Emission>, OperatorError> {
        // What is emitted at a watermark is not late behind it; and time has no end that a window
        // behind could reckon with.
        let timestamp = match watermark {
            i64::MAX => self.latest,
            watermark => Some(watermark),
        };
        self.latest = self.latest.max(timestamp.and_then(|at| at.checked_add(1)));
        let mut output = Output::new(&mut self.ports, timestamp);
        self.operator.advance(watermark, &mut output).map_err(|error| error.into_wit(None))?;
        Ok(self.ports.take())
    }

    /// Hands declared state over.
    pub fn checkpoint(&mut self, request: CheckpointRequest) -> StateChanges {
        let mut columns = empty_changes();
        for (state, (_, field)) in (0..).zip(self.operator.states()) {
            field.hand_over(request.full, &mut Changes { state, columns: &mut columns });
        }
        columns
    }

    /// Takes declared state back.
    ///
    /// # Errors
    /// Where an entry is not of this operator's state.
    pub fn restore(&mut self, changes: &StateChanges) -> Result<(), OperatorError> {
        let mut states = self.operator.states();
        for (state, key, value) in entries(changes) {
            let (name, field) = states
                .get_mut(state as usize)
                .ok_or_else(|| failed(format!("there is no state number {state}")))?;
            let taken = field.take_back(key, value);
            taken.map_err(|error| failed(format!("state \"{name}\": {error}")))?;
        }
        Ok(())
    }

    /// The inputs have ended.
    ///
    /// # Errors
    /// The operator's own.
    pub fn finish(&mut self) -> Result<Vec<Emission>, OperatorError> {
        let mut output = Output::new(&mut self.ports, self.latest);
        self.operator.finish(&mut output).map_err(|error| error.into_wit(None))?;
        Ok(self.ports.take())
    }
}

fn failed(message: String) -> OperatorError {
    OperatorError { class: ErrorClass::Failed, message, record: None }
}

fn wit_port(port: Port) -> types::Port {
    types::Port {
        name: port.name.to_owned(),
        key: port.key,
        value: port.value.unwrap_or(Format::Bytes),
    }
}

fn decode<'a, T: Decode<'a>>(bytes: &'a [u8], what: &str) -> Result<T, crate::Error> {
    T::decode(bytes).map_err(|error| crate::Error::rejected(format!("{what} is {error}")))
}

/// The host guarantees that ends ascend and lie within their column.
#[inline]
fn column(bytes: &[u8], start: u32, end: u32) -> &[u8] {
    &bytes[start as usize..end as usize]
}

pub(crate) fn empty_changes() -> StateChanges {
    StateChanges {
        states: Vec::new(),
        keys: Vec::new(),
        key_ends: Vec::new(),
        values: Vec::new(),
        value_ends: Vec::new(),
        removed: Vec::new(),
    }
}

/// State, key and value of each change; no value where the entry was removed.
pub(crate) fn entries(changes: &StateChanges) -> impl Iterator<Item = (u32, &[u8], Option<&[u8]>)> {
    let mut start = (0, 0);
    changes.states.iter().enumerate().map(move |(place, &state)| {
        let (key_end, value_end) = (changes.key_ends[place], changes.value_ends[place]);
        let key = column(&changes.keys, start.0, key_end);
        let value = column(&changes.values, start.1, value_end);
        start = (key_end, value_end);
        (state, key, (!changes.removed[place]).then_some(value))
    })
}

/// An empty write makes wasi-libc look its handle up and keep it; a panic sends its message to
/// the host before the trap.
#[cfg(target_arch = "wasm32")]
fn take_standard_handles() {
    use std::{fs::File, io::Write, mem::ManuallyDrop, os::fd::FromRawFd};
    for descriptor in [1, 2] {
        // SAFETY: standard output and error are open for the whole life of the instance, and the
        // file is never dropped, so the descriptor stays open.
        let mut stream = ManuallyDrop::new(unsafe { File::from_raw_fd(descriptor) });
        // A host without these streams gives an error, and then there is no handle to take.
        let _ = stream.write(&[]);
    }
    std::panic::set_hook(Box::new(|panic| {
        crate::bindings::cofferdam::operator::logging::panicked(&panic.to_string());
    }));
}
