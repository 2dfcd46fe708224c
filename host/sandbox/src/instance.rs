//! One running instance of an operator: call it, snapshot it, restore it.
#![allow(unsafe_code, reason = "reads and maps guest memory between calls; see each block")]

use std::{future::Future, io, pin::pin, sync::Arc};

use wasmtime::{Store, UpdateDeadline, component::TypedFunc};

use cofferdam_contract::{
    Batch, CheckpointRequest, Description, Emission, HandedOver, OpenContext, Processed,
    StateChanges, text,
};

use crate::{
    Capabilities, Component, Host, Limits,
    bindings::Operator,
    call::CallClock,
    component::AccessorIndices,
    limits::Limit,
    memory::{
        self, Region,
        image::{Image, MemoryDelta, MemorySnapshot},
        track::Baseline,
    },
    trap::GuestError,
    wasi::State,
};

/// The unit in which a guest's memory grows.
const WASM_PAGE_BYTES: u64 = 65_536;

/// What an instance needs from the program that embeds it.
pub struct InstanceSetup {
    /// Answers the guest's imports.
    pub host: Arc<dyn Host>,
    /// What the guest may use.
    pub limits: Limits,
    /// What the guest may reach. With files, calls have to run on a tokio runtime.
    pub capabilities: Capabilities,
    /// Seeds what the guest's standard library takes for random, such as hash seeds.
    pub seed: u64,
}

/// Why no snapshot could be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The guest holds handles that a fresh instance would not have.
    #[error(
        "the guest holds {now} handles to host resources, {after_open} after `open`; \
         a snapshot of its memory would not contain them"
    )]
    HandlesHeld {
        /// How many after `open`.
        after_open: usize,
        /// How many now.
        now: usize,
    },
    /// The guest is in the middle of a file or of a list of files, and a fresh instance would be at its beginning.
    #[error(
        "the guest holds a file or a directory in the middle of reading or writing it; a snapshot of its memory \
         would not contain the place (open it again for each use; only appending keeps no place)"
    )]
    PlaceHeld,
    /// The guest trapped in one of the accessors, which only a host bug can cause.
    #[error("read the globals")]
    Guest(#[source] GuestError),
    /// The pages could not be found.
    #[error("find the written pages")]
    Scan(#[source] io::Error),
}

/// Why an instance could not be put back into an earlier state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The image is of another component.
    #[error(
        "the snapshot has {image_memories} memories and {image_globals} globals, \
         the component {memories} and {globals}"
    )]
    OtherShape {
        /// Memories in the image.
        image_memories: usize,
        /// Globals in the image.
        image_globals: usize,
        /// Memories of the component.
        memories: usize,
        /// Globals of the component.
        globals: usize,
    },
    /// `open` made a memory larger than the snapshot is.
    #[error("after `open` a memory has {now} bytes, in the snapshot {image} bytes")]
    LargerThanSnapshot {
        /// Its size now.
        now: u64,
        /// Its size in the snapshot.
        image: u64,
    },
    /// The guest may not have as much memory as the snapshot has.
    #[error("grow to the size of the snapshot: {0}")]
    Limit(Limit),
    /// The guest trapped in one of the accessors.
    #[error("write the globals")]
    Guest(#[source] GuestError),
    /// The image could not be mapped.
    #[error("map the image")]
    Map(#[source] io::Error),
}

/// One instance of an operator in a store of its own.
///
/// **Invariant:** no guest code runs between two calls of methods, because each takes `&mut self`
/// and ends only when the guest has returned. Dropping the future of a call leaves the instance
/// poisoned, and every later call gives an error.
pub struct Instance {
    store: Store<State>,
    operator: Operator,
    accessors: Accessors,
    regions: Vec<Arc<Region>>,
    baselines: Vec<Baseline>,
    component: Component,
    limits: Limits,
    clock: Arc<CallClock>,
    handles_after_open: usize,
    is_poisoned: bool,
}

struct Accessors {
    get: Vec<TypedFunc<(), (i64,)>>,
    set: Vec<TypedFunc<(i64,), ()>>,
    grow: Vec<TypedFunc<(i64,), (i64,)>>,
}

impl Component {
    /// Makes a fresh instance. Takes some tens of microseconds.
    ///
    /// # Errors
    /// Where the guest's start function traps or needs more than the limits allow.
    pub async fn instantiate(&self, setup: InstanceSetup) -> Result<Instance, GuestError> {
        let InstanceSetup { host, limits, capabilities, seed } = setup;
        let sandbox = &self.inner.sandbox;
        let states = self.states();
        let state = State::new(host, &limits, capabilities, states, seed);
        let mut store = Store::new(&sandbox.engine, state);
        store.limiter(|state| &mut state.meter);
        store.set_hostcall_fuel(usize::try_from(limits.output_bytes_max).unwrap_or(usize::MAX));
        let (clock, call_max) = (Arc::<CallClock>::default(), limits.call_max);
        let own = clock.clone();
        store.epoch_deadline_callback(move |_| {
            if call_max < own.ran() {
                return Err(Limit::Call { max: call_max }.into());
            }
            own.yields();
            Ok(UpdateDeadline::Yield(1))
        });
        store.set_epoch_deadline(1);
        let mut regions = Vec::new();
        let instance = {
            let mut instantiation = pin!(self.inner.pre.instantiate_async(&mut store));
            // The creator of memories is not told for whom it works, so it is watched in each
            // poll: an instantiation may continue on another thread.
            let watched = std::future::poll_fn(|context| {
                memory::collecting(&mut regions, || instantiation.as_mut().poll(context))
            });
            clock.time(&limits, watched).await
        };
        let instance = instance.map_err(|error| classify(&error, &mut store, &limits))?;
        let loaded =
            self.inner.operator.load(&mut store, &instance).and_then(|operator| {
                Ok((operator, self.inner.accessors.load(&mut store, &instance)?))
            });
        let (operator, accessors) =
            loaded.map_err(|error| GuestError::Host(format!("{error:#}")))?;
        if regions.len() != accessors.grow.len() || accessors.get.len() != accessors.set.len() {
            let message = format!("{} memories, {} expected", regions.len(), accessors.grow.len());
            return Err(GuestError::Host(message));
        }
        let baselines = regions.iter().map(|_| Baseline::default()).collect();
        Ok(Instance {
            store,
            operator,
            accessors,
            regions,
            baselines,
            component: self.clone(),
            limits,
            clock,
            handles_after_open: 0,
            is_poisoned: false,
        })
    }

    /// What the operator says it is, from an instance of its own.
    ///
    /// # Errors
    /// Where `describe` traps or needs more than the limits allow.
    pub async fn describe(&self, setup: InstanceSetup) -> Result<Description, GuestError> {
        let mut instance = self.instantiate(setup).await?;
        instance.begin()?;
        let guest = instance.operator.cofferdam_operator_guest();
        let call = guest.call_describe(&mut instance.store);
        let result = instance.clock.time(&instance.limits, call).await;
        let description = instance.end(result)?;
        let states = u32::try_from(description.states.len()).unwrap_or(u32::MAX);
        // The first answer counts.
        self.inner.states.get_or_init(|| states);
        Ok(description)
    }

    /// How many states it has declared; all, if it was not asked yet.
    fn states(&self) -> u32 {
        self.inner.states.get().copied().unwrap_or(u32::MAX)
    }
}

impl AccessorIndices {
    fn load(
        &self,
        store: &mut Store<State>,
        instance: &wasmtime::component::Instance,
    ) -> wasmtime::Result<Accessors> {
        let mut accessors = Accessors { get: Vec::new(), set: Vec::new(), grow: Vec::new() };
        for index in &self.get {
            accessors.get.push(instance.get_typed_func(&mut *store, index)?);
        }
        for index in &self.set {
            accessors.set.push(instance.get_typed_func(&mut *store, index)?);
        }
        for index in &self.grow {
            accessors.grow.push(instance.get_typed_func(&mut *store, index)?);
        }
        Ok(accessors)
    }
}

/// Starts and ends a call around the given one.
macro_rules! call {
    ($self:ident, $method:ident ( $($argument:expr),* )) => {{
        $self.begin()?;
        let guest = $self.operator.cofferdam_operator_guest();
        let call = guest.$method(&mut $self.store, $($argument),*);
        let result = $self.clock.time(&$self.limits, call).await;
        $self.end(result)
    }};
}

impl Instance {
    /// Prepares the task.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn open(&mut self, context: OpenContext<'_>) -> Result<(), GuestError> {
        let opened = call!(self, call_open(context))?;
        self.handles_after_open = self.store.data_mut().handle_count();
        Ok(opened?)
    }

    /// Processes the records of one input.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn process(&mut self, input: u32, records: &Batch) -> Result<Processed, GuestError> {
        let Processed { emissions, mut rejected } = call!(self, call_process(input, records))??;
        for rejection in &mut rejected {
            rejection.message = text::message(&rejection.message).into_owned();
        }
        let emissions = check_emissions(emissions)?;
        let count = records.value_ends.len();
        let is_ascending = rejected.is_sorted_by(|left, right| left.record < right.record);
        if !is_ascending || rejected.last().is_some_and(|last| count <= last.record as usize) {
            let message = "it rejected records that it was not given".to_owned();
            return Err(GuestError::Trap { message, backtrace: Vec::new() });
        }
        Ok(Processed { emissions, rejected })
    }

    /// Event time moves on.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn advance(&mut self, watermark: i64) -> Result<Vec<Emission>, GuestError> {
        check_emissions(call!(self, call_advance(watermark))??)
    }

    /// Every input has ended.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn finish(&mut self) -> Result<Vec<Emission>, GuestError> {
        check_emissions(call!(self, call_finish())??)
    }

    /// The guest hands its declared state over, piece by piece: what changed since the last time, or all
    /// of it. Each piece is a call of its own, within the limits of one.
    ///
    /// # Errors
    /// See [`GuestError`]; and where it hands over more than `bytes_max`.
    pub async fn hand_over(
        &mut self,
        id: u64,
        full: bool,
        bytes_max: u64,
    ) -> Result<Vec<StateChanges>, GuestError> {
        let mut pieces = Vec::new();
        let take = |piece| {
            pieces.push(piece);
            Ok(())
        };
        self.hand_over_to(id, full, bytes_max, take).await?;
        Ok(pieces)
    }

    /// The same, to somebody who takes each piece as it comes.
    ///
    /// # Errors
    /// See [`hand_over`](Self::hand_over), and that of `take`, which ends it.
    pub async fn hand_over_to(
        &mut self,
        id: u64,
        full: bool,
        bytes_max: u64,
        mut take: impl FnMut(StateChanges) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        let (mut bytes, mut continued) = (0, false);
        loop {
            let request = CheckpointRequest { id, full, continued };
            let HandedOver { changes, is_last } = call!(self, call_checkpoint(request))??;
            let malformed = |message| GuestError::Trap { message, backtrace: Vec::new() };
            let states = self.component.states();
            changes.check().and_then(|()| changes.check_states(states)).map_err(|message| {
                malformed(format!("it handed over malformed state: {message}"))
            })?;
            if changes.states.is_empty() && !is_last {
                let message = "it handed over an empty piece that was not the last".to_owned();
                return Err(malformed(message));
            }
            bytes += changes.byte_count();
            if bytes_max < bytes {
                return Err(GuestError::Limit(Limit::State { wanted_bytes: bytes, bytes_max }));
            }
            if !changes.states.is_empty() {
                take(changes)?;
            }
            if is_last {
                return Ok(());
            }
            continued = true;
        }
    }

    /// The guest takes declared state back. `schemas` are those that states were written with, where
    /// they are not those of this component.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn take_back(
        &mut self,
        changes: &StateChanges,
        schemas: &[(u32, &str)],
    ) -> Result<(), GuestError> {
        Ok(call!(self, call_restore(changes, schemas))??)
    }

    /// Whether the guest can take values of a state back that were written with another schema; if not,
    /// why.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn converts(
        &mut self,
        state: u32,
        schema: &str,
    ) -> Result<Result<(), String>, GuestError> {
        call!(self, call_converts(state, schema))
    }

    /// The task ends in good order.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn close(mut self) -> Result<(), GuestError> {
        call!(self, call_close())
    }

    /// Whether a snapshot would hold the whole state: no handle but those taken in `open`.
    ///
    /// # Errors
    /// [`SnapshotError::HandlesHeld`], [`SnapshotError::PlaceHeld`].
    pub fn check_handles(&mut self) -> Result<(), SnapshotError> {
        if self.store.data().has_places() {
            return Err(SnapshotError::PlaceHeld);
        }
        let (now, after_open) = (self.store.data_mut().handle_count(), self.handles_after_open);
        if now == after_open { Ok(()) } else { Err(SnapshotError::HandlesHeld { after_open, now }) }
    }

    /// Copies the pages that the guest has written since the last snapshot, or since it was
    /// instantiated or restored. Pauses the guest for the scan and the copy, nothing else.
    ///
    /// # Errors
    /// Where a snapshot would not be the whole state. The pages found are then lost to the next
    /// snapshot, so the instance must not be snapshotted again.
    pub async fn snapshot(&mut self) -> Result<MemorySnapshot, SnapshotError> {
        self.check_handles()?;
        // What a failed call has left is no state.
        if self.is_poisoned {
            let message = "a snapshot of an instance that has failed".to_owned();
            return Err(SnapshotError::Guest(GuestError::Host(message)));
        }
        let globals = self.globals().await.map_err(SnapshotError::Guest)?;
        let tracking = self.component.inner.sandbox.tracking.clone();
        let mut memories = Vec::with_capacity(self.regions.len());
        for (region, baseline) in self.regions.iter().zip(&mut self.baselines) {
            // SAFETY: `&mut self`: no guest code runs, see the invariant of `Instance`.
            let delta = unsafe {
                let written = baseline.written_pages(&tracking, region);
                MemoryDelta::copy(region, &written.map_err(SnapshotError::Scan)?)
            };
            region.is_copied();
            memories.push(delta);
        }
        Ok(MemorySnapshot { memories, globals, monotonic_ns: self.store.data().monotonic_ns() })
    }

    /// Snapshots will be taken of this instance: buffers for what its memory grows by are made beforehand.
    pub fn expect_snapshots(&self) {
        self.regions.iter().for_each(|region| region.expect_snapshots());
    }

    /// Puts a freshly opened instance into the state of an image. Takes microseconds, whatever the
    /// size: pages are copied when the guest writes to them.
    ///
    /// # Errors
    /// Where the image is not of this component, or larger than the limits allow. The instance is
    /// then of no use any more.
    pub async fn restore(&mut self, image: &Image) -> Result<(), RestoreError> {
        let (memories, globals) = (self.regions.len(), self.accessors.set.len());
        let (image_memories, image_globals) = (image.memories.len(), image.globals.len());
        if (memories, globals) != (image_memories, image_globals) {
            return Err(RestoreError::OtherShape {
                image_memories,
                image_globals,
                memories,
                globals,
            });
        }
        for (index, memory) in image.memories.iter().enumerate() {
            self.grow_to(index, memory.size_bytes).await?;
        }
        let tracking = self.component.inner.sandbox.tracking.clone();
        let regions = self.regions.iter().zip(&mut self.baselines);
        for ((region, baseline), memory) in regions.zip(&image.memories) {
            // SAFETY: `&mut self`: no guest code runs and no reference into the region lives.
            unsafe {
                region.map_privately(&memory.file, &tracking).map_err(RestoreError::Map)?;
                baseline.reset(&tracking, region);
            }
        }
        for (index, value) in image.globals.iter().enumerate() {
            self.begin().map_err(RestoreError::Guest)?;
            let call = self.accessors.set[index].call_async(&mut self.store, (*value,));
            let result = self.clock.time(&self.limits, call).await;
            self.end(result).map_err(RestoreError::Guest)?;
        }
        self.store.data().set_monotonic_ns(image.monotonic_ns);
        Ok(())
    }

    /// The size of all memories.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.size_bytes() as u64).sum()
    }

    async fn globals(&mut self) -> Result<Vec<i64>, GuestError> {
        let mut globals = Vec::with_capacity(self.accessors.get.len());
        for index in 0..self.accessors.get.len() {
            self.begin()?;
            let call = self.accessors.get[index].call_async(&mut self.store, ());
            let result = self.clock.time(&self.limits, call).await;
            globals.push(self.end(result)?.0);
        }
        Ok(globals)
    }

    async fn grow_to(&mut self, index: usize, image: u64) -> Result<(), RestoreError> {
        let now = self.regions[index].size_bytes() as u64;
        let Some(missing) = image.checked_sub(now) else {
            return Err(RestoreError::LargerThanSnapshot { now, image });
        };
        if missing == 0 {
            return Ok(());
        }
        self.begin().map_err(RestoreError::Guest)?;
        let pages = (missing / WASM_PAGE_BYTES) as i64;
        let call = self.accessors.grow[index].call_async(&mut self.store, (pages,));
        let result = self.clock.time(&self.limits, call).await;
        let (before,) = self.end(result).map_err(RestoreError::Guest)?;
        let grown = self.regions[index].size_bytes() as u64;
        if 0 <= before && grown == image {
            return Ok(());
        }
        if 0 <= before {
            let message = format!("a memory grew to {grown} bytes where {image} were asked for");
            return Err(RestoreError::Guest(GuestError::Host(message)));
        }
        let bytes_max = self.limits.memory_bytes_max;
        let refused = self.store.data().meter.refused();
        Err(RestoreError::Limit(
            refused.unwrap_or(Limit::Memory { wanted_bytes: image, bytes_max }),
        ))
    }

    fn begin(&mut self) -> Result<(), GuestError> {
        if std::mem::replace(&mut self.is_poisoned, true) {
            return Err(GuestError::Host("an instance was called after it had failed".to_owned()));
        }
        self.store.set_epoch_deadline(1);
        self.store.data_mut().meter.begin_call();
        Ok(())
    }

    fn end<T>(&mut self, result: wasmtime::Result<T>) -> Result<T, GuestError> {
        match result {
            Ok(value) => {
                self.is_poisoned = false;
                Ok(value)
            }
            Err(error) => Err(classify(&error, &mut self.store, &self.limits)),
        }
    }
}

fn classify(error: &wasmtime::Error, store: &mut Store<State>, limits: &Limits) -> GuestError {
    let state = store.data_mut();
    let refused = state.meter.refused();
    let last_words = state.last_words.take();
    GuestError::classify(error, refused, last_words, limits)
}

/// A guest's columns are a guest's claim: ends must ascend and lie within their column.
fn check_emissions(emissions: Vec<Emission>) -> Result<Vec<Emission>, GuestError> {
    for Emission { output, records } in &emissions {
        records.check().map_err(|message| GuestError::Trap {
            message: format!("it gave a malformed batch to output {output}: {message}"),
            backtrace: Vec::new(),
        })?;
    }
    Ok(emissions)
}
