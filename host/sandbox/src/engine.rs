//! The sandbox itself: one wasmtime engine with the settings that make snapshots sound, the host
//! functions, and the cache of compiled components.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::PathBuf,
    sync::Arc,
};

use wasmtime::{Engine, component::Linker};

use crate::{
    cache::Cache,
    compiler::Compiler,
    config::engine_config,
    limits::TICK,
    memory::{image, track::Tracking},
    validate,
    wasi::{self, State},
};

/// What can be chosen about a sandbox.
#[derive(Debug, Clone, Default)]
pub struct SandboxOptions {
    /// Where compiled components are kept. Its files are trusted like the program itself, so it
    /// must be writable for nobody else. Default: none are kept.
    pub cache_dir: Option<PathBuf>,
    /// How written pages are found. Default: the best way that works here.
    pub tracking: TrackingChoice,
    /// Bounds checks in the guests' code instead of signal handlers, for hosts that want their
    /// signals for themselves; 8 to 20 % slower. Default: false.
    pub without_signals: bool,
    /// Where components are compiled. Default: in this process.
    pub compiler: Compiler,
}

/// How written pages are to be found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TrackingChoice {
    /// By the kernel's write protection where it works, else by comparing.
    #[default]
    Best,
    /// By comparing with a copy: works everywhere, costs a pass over the memory per snapshot.
    Compare,
}

/// Why a sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The settings do not work on this machine.
    #[error("set up the wasm engine: {0}")]
    Engine(wasmtime::Error),
    /// The cache directory cannot be used.
    #[error("the cache of compiled components at {path} cannot be used")]
    Cache {
        /// The directory.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Without the thread that interrupts guests no call would have a limit.
    #[error("start the thread that interrupts guests: {0}")]
    Ticker(#[source] io::Error),
}

/// Loads components and runs their instances. Cheap to clone: all clones are the same sandbox.
#[derive(Clone)]
pub struct Sandbox {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) linker: Linker<State>,
    pub(crate) tracking: Arc<Tracking>,
    pub(crate) cache: Option<Cache>,
    /// Tells compiled code apart by everything that it depends on beside the component.
    pub(crate) compatibility: u64,
    pub(crate) compiler: Compiler,
    pub(crate) without_signals: bool,
}

impl Sandbox {
    /// Sets up the engine and starts the thread that interrupts guests.
    ///
    /// # Errors
    /// Where the engine does not work on this machine, or the cache directory cannot be made.
    pub fn new(options: SandboxOptions) -> Result<Self, SandboxError> {
        let (tracking, why_not) = match options.tracking {
            TrackingChoice::Best => Tracking::probe(),
            TrackingChoice::Compare => (Tracking::compare(), None),
        };
        match why_not {
            Some(error) => tracing::warn!(
                %error,
                "written pages are found by {}: the kernel's way does not work here",
                tracking.name()
            ),
            None => tracing::debug!("written pages are found by {}", tracking.name()),
        }
        let tracking = Arc::new(tracking);
        let config = engine_config(options.without_signals, tracking.clone());
        let engine = Engine::new(&config).map_err(SandboxError::Engine)?;
        let mut linker = Linker::new(&engine);
        wasi::link(&mut linker).map_err(SandboxError::Engine)?;
        let open = |path: &PathBuf| {
            Cache::open(path).map_err(|source| SandboxError::Cache { path: path.clone(), source })
        };
        let cache = options.cache_dir.as_ref().map(open).transpose()?;
        let mut hasher = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        validate::VERSION.hash(&mut hasher);
        env!("CARGO_PKG_VERSION").hash(&mut hasher);
        start_ticker(&engine).map_err(SandboxError::Ticker)?;
        let compatibility = hasher.finish();
        let SandboxOptions { compiler, without_signals, .. } = options;
        let shared =
            Shared { engine, linker, tracking, cache, compatibility, compiler, without_signals };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Makes every guest that runs give up its thread at its next branch or call: its future is polled again later.
    /// Costs an atomic addition.
    pub fn interrupt(&self) {
        self.shared.engine.increment_epoch();
    }

    /// How written pages are found here.
    #[must_use]
    pub fn tracking(&self) -> &Tracking {
        &self.shared.tracking
    }
}

/// Advances the epoch every tick, and makes buffers for snapshots, until the engine is gone.
fn start_ticker(engine: &Engine) -> io::Result<()> {
    let engine = engine.weak();
    let ticker = std::thread::Builder::new().name("cofferdam-epoch".to_owned());
    ticker.spawn(move || {
        let mut tick = 0;
        while let Some(engine) = engine.upgrade() {
            engine.increment_epoch();
            drop(engine);
            image::prepare(tick);
            tick += 1;
            std::thread::sleep(TICK);
        }
    })?;
    Ok(())
}
