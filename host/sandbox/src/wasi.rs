//! The part of WASI that a guest gets: standard output and error as log messages, clocks,
//! randomness, and the files and the environment that it was granted. No network.
//!
//! A handle that a guest holds is an entry of its store's resource table, which no snapshot of its
//! memory contains. So handles may only be taken during `open`, in the same order each time, and
//! [`State::handle_count`] tells whether that was kept.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::TryRng;
use wasmtime::component::{Linker, ResourceTable};
use wasmtime_wasi::{
    HostMonotonicClock, HostWallClock, WasiCtx, WasiCtxView, WasiView,
    cli::{IsTerminal, StdoutStream, WasiCli, WasiCliView},
    clocks::{WasiClocks, WasiClocksView},
    p2::{
        OutputStream, Pollable, StreamResult,
        bindings::{cli, clocks, filesystem, random},
    },
    random::WasiRandom,
};

use cofferdam_contract::{
    StateChanges,
    text::{self, TEXT_BYTES_MAX},
};

use crate::{
    Capabilities, Host, Level, Limits,
    bindings::cofferdam::operator::{
        clock, logging, metrics, random as guest_random, secrets, state, task,
    },
    files::{Files, HasFiles, View},
    limits::Meter,
    types,
};

/// A line of output longer than this is cut into messages.
const LINE_BYTES_MAX: usize = TEXT_BYTES_MAX;

/// Random bytes that one call gives: it takes milliseconds, and cannot be interrupted.
const RANDOM_BYTES_MAX: u64 = 1 << 20;

/// What a message costs of the limit beside its text: its time, its level, its task.
const MESSAGE_BYTES: u64 = 128;

/// What a store carries for its guest.
pub(crate) struct State {
    wasi: WasiCtx,
    table: ResourceTable,
    pub(crate) meter: Meter,
    log: Arc<GuestLog>,
    monotonic: Monotonic,
    files: Files,
    secrets: Vec<(String, Vec<u8>)>,
    /// How many states it has declared.
    states: u32,
    /// The message of a panic, kept for the trap that follows it.
    pub(crate) last_words: Option<String>,
}

impl State {
    pub(crate) fn new(
        host: Arc<dyn Host>,
        limits: &Limits,
        mut capabilities: Capabilities,
        states: u32,
        seed: u64,
    ) -> Self {
        let files = Files::new(&mut capabilities, host.clone());
        let Capabilities { env, secrets, .. } = capabilities;
        let log = Arc::new(GuestLog::new(host, limits.log_bytes_per_second_max));
        let monotonic = Monotonic::default();
        let mut table = ResourceTable::new();
        table.set_max_capacity(limits.handles_max as usize);
        let wasi = WasiCtx::builder()
            .envs(&env)
            .allow_blocking_current_thread(true)
            .stdout(Lines::new(&log, Level::Info))
            .stderr(Lines::new(&log, Level::Warn))
            .insecure_random_seed(u128::from(seed) << 64 | u128::from(!seed))
            .secure_random(HostRandom(log.clone()))
            .insecure_random(HostRandom(log.clone()))
            .max_random_size(RANDOM_BYTES_MAX)
            .wall_clock(WallClock(log.clone()))
            .monotonic_clock(monotonic.clone())
            .build();
        let meter = Meter::new(limits);
        Self { wasi, table, meter, log, monotonic, files, secrets, states, last_words: None }
    }

    fn check_declared(&self, state: u32) -> wasmtime::Result<()> {
        match state < self.states {
            true => Ok(()),
            false => Err(wasmtime::Error::msg("it asks for a state that it has not declared")),
        }
    }

    fn files(&mut self) -> View<'_> {
        let wasi = self.wasi.filesystem();
        View { wasi, files: &mut self.files, table: &mut self.table }
    }

    /// How many handles the guest holds.
    pub(crate) fn handle_count(&mut self) -> usize {
        self.table.iter_mut().count()
    }

    /// Whether a handle knows a place in a file or in a list of files.
    pub(crate) fn has_places(&self) -> bool {
        self.files.has_places()
    }

    /// The guest's monotonic clock, in nanoseconds.
    pub(crate) fn monotonic_ns(&self) -> u64 {
        self.monotonic.now()
    }

    /// Puts the monotonic clock where a snapshot left it.
    pub(crate) fn set_monotonic_ns(&self, now_ns: u64) {
        self.monotonic.set(now_ns);
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

/// Links what a guest may import.
pub(crate) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    use wasmtime_wasi_io::bindings::wasi::io;
    let l = linker;
    io::error::add_to_linker::<State, Table>(l, |state| &mut state.table)?;
    io::poll::add_to_linker::<State, Table>(l, |state| &mut state.table)?;
    io::streams::add_to_linker::<State, Table>(l, |state| &mut state.table)?;
    clocks::wall_clock::add_to_linker::<State, WasiClocks>(l, State::clocks)?;
    clocks::monotonic_clock::add_to_linker::<State, WasiClocks>(l, State::clocks)?;
    random::random::add_to_linker::<State, WasiRandom>(l, |state| state.wasi.random())?;
    random::insecure::add_to_linker::<State, WasiRandom>(l, |state| state.wasi.random())?;
    random::insecure_seed::add_to_linker::<State, WasiRandom>(l, |state| state.wasi.random())?;
    cli::environment::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::exit::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::stdin::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::stdout::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::stderr::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::terminal_input::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::terminal_output::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::terminal_stdin::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::terminal_stdout::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::terminal_stderr::add_to_linker::<State, WasiCli>(l, State::cli)?;
    filesystem::types::add_to_linker::<State, HasFiles>(l, State::files)?;
    filesystem::preopens::add_to_linker::<State, HasFiles>(l, State::files)?;
    secrets::add_to_linker::<State, Itself>(l, |state| state)?;
    logging::add_to_linker::<State, Itself>(l, |state| state)?;
    metrics::add_to_linker::<State, Itself>(l, |state| state)?;
    clock::add_to_linker::<State, Itself>(l, |state| state)?;
    guest_random::add_to_linker::<State, Itself>(l, |state| state)?;
    state::add_to_linker::<State, Itself>(l, |state| state)?;
    task::add_to_linker::<State, Itself>(l, |state| state)?;
    types::add_to_linker::<State, Itself>(l, |state| state)
}

struct Table;

impl wasmtime::component::HasData for Table {
    type Data<'a> = &'a mut ResourceTable;
}

struct Itself;

impl wasmtime::component::HasData for Itself {
    type Data<'a> = &'a mut State;
}

impl logging::Host for State {
    fn log(&mut self, level: Level, message: String) {
        self.log.write(level, &message);
    }

    fn panicked(&mut self, message: String) {
        // The trap that follows carries it, to the code that decides what the failure means.
        self.log.write(Level::Debug, &message);
        self.last_words = Some(text::message(&message).into_owned());
    }
}

impl metrics::Host for State {
    fn add(&mut self, counter: String, delta: u64) {
        self.log.host.add_to_counter(&text::name(&counter), delta);
    }

    fn set(&mut self, gauge: String, value: f64) {
        self.log.host.set_gauge(&text::name(&gauge), value);
    }
}

impl clock::Host for State {
    fn now(&mut self) -> u64 {
        self.log.host.now_ms()
    }
}

impl guest_random::Host for State {
    fn next(&mut self) -> u64 {
        self.log.host.random()
    }
}

impl state::Host for State {
    fn get(
        &mut self,
        state: u32,
        key: Vec<u8>,
        namespace: u32,
    ) -> wasmtime::Result<Option<Vec<u8>>> {
        if key.len() < namespace as usize {
            return Err(wasmtime::Error::msg("a namespace that is longer than its key"));
        }
        // That the host keeps no state of it at all is said before.
        let value = self.log.host.state(state, &key, namespace)?;
        self.check_declared(state)?;
        Ok(value)
    }

    fn put(&mut self, changes: StateChanges) -> wasmtime::Result<()> {
        let malformed =
            |message| wasmtime::Error::msg(format!("it handed over malformed state: {message}"));
        changes.check().map_err(malformed)?;
        changes.check_states(self.states).map_err(malformed)?;
        Ok(self.log.host.put_state(&changes)?)
    }

    fn scan(
        &mut self,
        state: u32,
        after: Option<(Vec<u8>, u32)>,
    ) -> wasmtime::Result<StateChanges> {
        if after.as_ref().is_some_and(|(key, namespace)| key.len() < *namespace as usize) {
            return Err(wasmtime::Error::msg("a namespace that is longer than its key"));
        }
        let after = after.as_ref().map(|(key, namespace)| (key.as_slice(), *namespace));
        let entries = self.log.host.scan_state(state, after)?;
        self.check_declared(state)?;
        Ok(entries)
    }
}

impl secrets::Host for State {
    fn get(&mut self, name: String) -> Option<Vec<u8>> {
        let known = self.secrets.iter().find(|(known, _)| *known == name);
        known.map(|(_, secret)| secret.clone())
    }
}

impl task::Host for State {
    fn attempt(&mut self) -> u32 {
        self.log.host.attempt()
    }
}

/// The guest's way to the log, with a limit on its volume.
struct GuestLog {
    host: Arc<dyn Host>,
    bytes_per_second_max: u64,
    budget: Mutex<Budget>,
}

struct Budget {
    second_began: Instant,
    bytes_left: u64,
    dropped: u64,
}

impl GuestLog {
    fn new(host: Arc<dyn Host>, bytes_per_second_max: u64) -> Self {
        let budget =
            Budget { second_began: Instant::now(), bytes_left: bytes_per_second_max, dropped: 0 };
        Self { host, bytes_per_second_max, budget: Mutex::new(budget) }
    }

    fn write(&self, level: Level, message: &str) {
        let message = text::message(message);
        let (is_allowed, dropped_before) = self.spend(MESSAGE_BYTES + message.len() as u64);
        self.report(dropped_before);
        if is_allowed {
            self.host.log(level, &message);
        }
    }

    fn report(&self, dropped: u64) {
        if 0 < dropped {
            let text = format!("{dropped} messages dropped: more than it may log a second");
            self.host.log(Level::Warn, &text);
        }
    }

    /// Whether a message may pass, and how many did not in the second that has just ended.
    fn spend(&self, bytes: u64) -> (bool, u64) {
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        let mut dropped_before = 0;
        if Duration::from_secs(1) <= budget.second_began.elapsed() {
            dropped_before = budget.dropped;
            *budget = Budget {
                second_began: Instant::now(),
                bytes_left: self.bytes_per_second_max,
                dropped: 0,
            };
        }
        match budget.bytes_left.checked_sub(bytes) {
            Some(left) => {
                budget.bytes_left = left;
                (true, dropped_before)
            }
            None => {
                budget.dropped += 1;
                (false, dropped_before)
            }
        }
    }
}

impl Drop for GuestLog {
    /// What was dropped in the last second was not reported yet.
    fn drop(&mut self) {
        let budget = self.budget.get_mut().unwrap_or_else(PoisonError::into_inner);
        let dropped = std::mem::take(&mut budget.dropped);
        self.report(dropped);
    }
}

/// A standard stream that makes a log message of each line.
#[derive(Clone)]
struct Lines {
    log: Arc<GuestLog>,
    level: Level,
    /// The beginning of a line whose end was not written yet. Not part of a snapshot: after a
    /// restore half a line may be missing from the log.
    partial: Arc<Mutex<Vec<u8>>>,
}

impl Lines {
    fn new(log: &Arc<GuestLog>, level: Level) -> Self {
        Self { log: log.clone(), level, partial: Arc::default() }
    }

    fn take(&self, bytes: &[u8]) {
        let mut partial = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            partial.extend_from_slice(piece);
            if partial.last() == Some(&b'\n') || LINE_BYTES_MAX <= partial.len() {
                self.log.write(self.level, String::from_utf8_lossy(&partial).trim_end());
                partial.clear();
            }
        }
    }
}

impl IsTerminal for Lines {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Lines {
    /// For a version of WASI that is not linked.
    fn async_stream(&self) -> Box<dyn tokio::io::AsyncWrite + Send + Sync> {
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

impl OutputStream for Lines {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.take(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(LINE_BYTES_MAX)
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Lines {
    async fn ready(&mut self) {}
}

struct WallClock(Arc<GuestLog>);

impl HostWallClock for WallClock {
    fn resolution(&self) -> Duration {
        Duration::from_millis(1)
    }

    fn now(&self) -> Duration {
        Duration::from_millis(self.0.host.now_ms())
    }
}

/// A monotonic clock that can be put where a snapshot left it, so that it never runs backwards.
#[derive(Clone)]
struct Monotonic {
    origin: Instant,
    offset_ns: Arc<AtomicU64>,
}

impl Default for Monotonic {
    fn default() -> Self {
        Self { origin: Instant::now(), offset_ns: Arc::default() }
    }
}

impl Monotonic {
    fn elapsed_ns(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn set(&self, now_ns: u64) {
        self.offset_ns.store(now_ns.saturating_sub(self.elapsed_ns()), Ordering::Relaxed);
    }
}

impl HostMonotonicClock for Monotonic {
    fn resolution(&self) -> u64 {
        1
    }

    fn now(&self) -> u64 {
        self.elapsed_ns().saturating_add(self.offset_ns.load(Ordering::Relaxed))
    }
}

/// The host's randomness behind WASI's.
struct HostRandom(Arc<GuestLog>);

impl TryRng for HostRandom {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.0.host.random() as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(self.0.host.random())
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        for piece in bytes.chunks_mut(8) {
            piece.copy_from_slice(&self.0.host.random().to_le_bytes()[..piece.len()]);
        }
        Ok(())
    }
}
