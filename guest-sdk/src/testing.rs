//! Runs an operator natively, so that its logic can be unit-tested without wasm.

use crate::{
    Decode, Encode, Error, Operator,
    bindings::cofferdam::operator::types::{Batch, Emission, OpenContext, OperatorError},
    runtime::Task,
};

/// One task of an operator, alone: index 0 of 1.
pub struct TestTask<O: Operator> {
    task: Task<O>,
    emitted: Vec<Emission>,
}

impl<O: Operator> TestTask<O> {
    /// Opens the operator with these settings.
    ///
    /// # Errors
    /// The operator's own.
    pub fn open(config: &[(&str, &str)]) -> Result<Self, Error> {
        let mut task = Task::default();
        let config = config.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        task.open(OpenContext {
            operator: "test".to_owned(),
            task_index: 0,
            parallelism: 1,
            max_parallelism: 128,
            config: config.collect(),
            state_cache: None,
            tracks_changes: true,
        })
        .map_err(own_error)?;
        Ok(Self { task, emitted: Vec::new() })
    }

    /// Processes one record on the first input.
    ///
    /// # Errors
    /// The operator's own.
    pub fn process(&mut self, key: impl Encode, value: impl Encode) -> Result<(), Error> {
        self.process_on(0, key, value, None)
    }

    /// Processes one record on an input, with an event time.
    ///
    /// # Errors
    /// The operator's own.
    pub fn process_on(
        &mut self,
        input: u32,
        key: impl Encode,
        value: impl Encode,
        timestamp: Option<i64>,
    ) -> Result<(), Error> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        key.encode(&mut keys);
        value.encode(&mut values);
        let batch = Batch {
            key_ends: vec![keys.len() as u32],
            value_ends: vec![values.len() as u32],
            keys,
            values,
            timestamps: timestamp.into_iter().collect(),
        };
        let processed = self.task.process(input, &batch).map_err(own_error)?;
        self.emitted.extend(processed.emissions);
        match processed.rejected.into_iter().next() {
            Some(rejection) => Err(Error::rejected(rejection.message)),
            None => Ok(()),
        }
    }

    /// Moves event time on.
    ///
    /// # Errors
    /// The operator's own.
    pub fn advance(&mut self, watermark: i64) -> Result<(), Error> {
        let emitted = self.task.advance(watermark).map_err(own_error)?;
        self.emitted.extend(emitted);
        Ok(())
    }

    /// Ends the input.
    ///
    /// # Errors
    /// The operator's own.
    pub fn finish(&mut self) -> Result<(), Error> {
        let emitted = self.task.finish().map_err(own_error)?;
        self.emitted.extend(emitted);
        Ok(())
    }

    /// Takes every record that came out so far.
    pub fn take_output(&mut self) -> Vec<OutputRecord> {
        self.emitted.drain(..).flat_map(records).collect()
    }
}

/// A record that an operator under test has emitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputRecord {
    /// The output's place in [`Operator::outputs`].
    pub output: u32,
    /// Event time, if the record has one.
    pub timestamp: Option<i64>,
    key: Vec<u8>,
    value: Vec<u8>,
}

impl OutputRecord {
    /// The key, decoded.
    ///
    /// # Panics
    /// If it is not of this type.
    pub fn key<'a, T: Decode<'a>>(&'a self) -> T {
        T::decode(&self.key).expect("a key of this type")
    }

    /// The value, decoded.
    ///
    /// # Panics
    /// If it is not of this type.
    pub fn value<'a, T: Decode<'a>>(&'a self) -> T {
        T::decode(&self.value).expect("a value of this type")
    }
}

fn records(emission: Emission) -> Vec<OutputRecord> {
    let batch = emission.records;
    let mut start = (0, 0);
    let ends = batch.value_ends.iter().enumerate();
    ends.map(|(place, &value_end)| {
        let key_end = batch.key_ends.get(place).copied().unwrap_or(0);
        let key = batch.keys[start.0 as usize..key_end as usize].to_vec();
        let value = batch.values[start.1 as usize..value_end as usize].to_vec();
        start = (key_end, value_end);
        let timestamp = batch.timestamps.get(place).copied();
        OutputRecord { output: emission.output, timestamp, key, value }
    })
    .collect()
}

fn own_error(error: OperatorError) -> Error {
    Error { class: error.class, message: error.message }
}
