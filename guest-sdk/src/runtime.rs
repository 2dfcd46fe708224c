//! Drives one operator behind the exports of its component. For the `#[operator]` attribute only.

use crate::{
    Decode, Format, Operator, Output, Port, Record,
    bindings::cofferdam::operator::types::{
        self, Batch, CheckpointRequest, Description, Emission, ErrorClass, HandedOver, OpenContext,
        OperatorError, Processed, Rejection, StateChanges, StateDeclaration,
    },
    changes::{column, empty_changes, entries},
    output::Ports,
    state::{Changes, NamedState, encoding},
};

/// One task: the operator and its outputs.
pub struct Task<O> {
    operator: O,
    ports: Ports,
    /// The latest event time of a record so far, or the first after the latest watermark.
    latest: Option<i64>,
    /// The state that is being handed over.
    handing: usize,
}

impl<O: Operator> Default for Task<O> {
    fn default() -> Self {
        Self { operator: O::default(), ports: Ports::new(O::outputs()), latest: None, handing: 0 }
    }
}

impl<O: Operator> Task<O> {
    /// What the operator is.
    #[must_use]
    pub fn describe(name: &str) -> Description {
        let states = O::default()
            .states()
            .into_iter()
            .map(|state| StateDeclaration {
                name: state.name.to_owned(),
                renamed_from: state.renamed_from.map(str::to_owned),
                kind: state.field.kind(),
                schema: state.field.schema(),
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
            for (number, state) in (0..).zip(states) {
                state.field.move_to_host(number, bytes);
            }
        }
        for state in self.operator.states() {
            state.field.track(context.tracks_changes);
        }
        self.operator.open(&context.into()).map_err(|error| error.into_wit(None))?;
        match self.operator.states().iter().find(|state| !state.field.is_untouched()) {
            None => Ok(()),
            Some(NamedState { name, .. }) => Err(failed(format!(
                "state \"{name}\" was written in `open`: it is restored after that; write it in `process`"
            ))),
        }
    }

    /// Decodes and processes each record of a batch. One that is rejected, or cannot be decoded, leaves
    /// nothing behind, and the others are as if it had not been there.
    ///
    /// # Errors
    /// The operator's own; names the record's place.
    pub fn process(&mut self, input: u32, batch: &Batch) -> Result<Processed, OperatorError> {
        let mut rejected = Vec::new();
        let mut start = (0, 0);
        for (place, &value_end) in batch.value_ends.iter().enumerate() {
            let key_end = batch.key_ends.get(place).copied().unwrap_or(0);
            let key_bytes = column(&batch.keys, start.0, key_end);
            let value_bytes = column(&batch.values, start.1, value_end);
            start = (key_end, value_end);
            let timestamp = batch.timestamps.get(place).copied();
            self.latest = self.latest.max(timestamp);
            self.ports.mark();
            let key = match decode(key_bytes, "key") {
                Ok(key) => key,
                Err(error) => {
                    rejected.push(rejection(place, error));
                    continue;
                }
            };
            let value = match decode(value_bytes, "value") {
                Ok(value) => value,
                Err(error) => {
                    rejected.push(rejection(place, error));
                    continue;
                }
            };
            let record = Record { key, value, timestamp, input, key_bytes };
            let mut output = Output::new(&mut self.ports, timestamp);
            match self.operator.process(record, &mut output) {
                Ok(()) => {}
                Err(error) if error.class == ErrorClass::Rejected => {
                    self.ports.back_to_mark();
                    rejected.push(rejection(place, error));
                }
                Err(error) => return Err(error.into_wit(Some(place as u32))),
            }
        }
        Ok(Processed { emissions: self.ports.take(), rejected })
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

    /// Hands declared state over, a piece at a time.
    pub fn checkpoint(&mut self, request: CheckpointRequest) -> HandedOver {
        let mut states = self.operator.states();
        if !request.continued {
            states.iter_mut().for_each(|state| state.field.begin_hand_over(request.full));
            self.handing = 0;
        }
        let mut changes = empty_changes();
        for (number, state) in (0..).zip(&mut states).skip(self.handing) {
            self.handing = number as usize;
            encoding::of_state(Some(state.name));
            if !state.field.hand_over(&mut Changes { state: number, columns: &mut changes }) {
                return HandedOver { changes, is_last: false };
            }
        }
        encoding::of_state(None);
        HandedOver { changes, is_last: true }
    }

    /// Whether values of a state that were written with another schema can be taken back.
    ///
    /// # Errors
    /// Why not.
    pub fn converts(&mut self, state: u32, schema: &str) -> Result<(), String> {
        let states = self.operator.states();
        let state = states.get(state as usize);
        state.ok_or_else(|| "there is no such state".to_owned())?.field.converts(schema)
    }

    /// Takes declared state back.
    ///
    /// # Errors
    /// Where an entry is not of this operator's state.
    pub fn restore(
        &mut self,
        changes: &StateChanges,
        schemas: &[(u32, String)],
    ) -> Result<(), OperatorError> {
        let mut states = self.operator.states();
        for (number, key, value) in entries(changes) {
            let state = states
                .get_mut(number as usize)
                .ok_or_else(|| failed(format!("there is no state number {number}")))?;
            let schema = schemas.iter().find(|(state, _)| *state == number);
            let taken = state.field.take_back(key, value, schema.map(|(_, schema)| &**schema));
            taken.map_err(|error| failed(format!("state \"{}\": {error}", state.name)))?;
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

fn rejection(place: usize, error: crate::Error) -> Rejection {
    Rejection { record: place as u32, message: error.message }
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
        let message = match encoding::words() {
            Some(value) => format!("{panic}\nwhile it encoded {value}"),
            None => panic.to_string(),
        };
        crate::bindings::cofferdam::operator::logging::panicked(&message);
    }));
}
