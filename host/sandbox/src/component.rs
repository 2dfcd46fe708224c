//! From the bytes of a component to compiled code: parse, check, instrument, compile, cache.
#![allow(unsafe_code, reason = "loads compiled code that this program has written")]

use std::{fmt, sync::Arc};

use wasmtime::component::{Component as Compiled, ComponentExportIndex, InstancePre};

use crate::{
    bindings::OperatorIndices,
    cache::Cache,
    engine::{Sandbox, Shared},
    instrument::{self, Access},
    validate::{self, Unsound, ValidateError},
    wasi::State,
};

/// Names a component by its content: the first 128 bits of its BLAKE3 hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 16]);

impl Digest {
    /// The digest of a component's bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut digest = [0; 16];
        digest.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
        Self(digest)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why bytes cannot be run as an operator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ComponentError {
    /// Not WebAssembly.
    #[error("it is not a WebAssembly file (it begins with {begins_with:?})")]
    NotWasm {
        /// The first bytes.
        begins_with: String,
    },
    /// A core module, not a component.
    #[error("it is a core WebAssembly module, not a component")]
    CoreModule,
    /// WebAssembly that breaks off or makes no sense.
    #[error("it is malformed: {message}")]
    Malformed {
        /// What, and at which byte.
        message: String,
    },
    /// A component whose state a snapshot of its memory would miss.
    #[error("it cannot be checkpointed: {0}")]
    Unsound(Unsound),
    /// A component that imports what operators do not get.
    #[error("it imports what an operator does not get: {message}")]
    Import {
        /// Which import.
        message: String,
    },
    /// A component that is not an operator.
    #[error("it does not export `cofferdam:operator/guest@0.2.0`: {message}")]
    OtherWorld {
        /// What is missing.
        message: String,
    },
    /// The compiler refused what the checks had accepted.
    #[error("compile it")]
    Compile(
        /// The compiler's words, or what the system did not give it.
        #[source]
        Box<dyn std::error::Error + Send + Sync>,
    ),
}

/// A component that is checked, compiled and linked. Cheap to clone.
#[derive(Clone)]
pub struct Component {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) digest: Digest,
    /// As it was given.
    pub(crate) bytes: Box<[u8]>,
    pub(crate) sandbox: Arc<Shared>,
    pub(crate) pre: InstancePre<State>,
    pub(crate) operator: OperatorIndices,
    pub(crate) accessors: AccessorIndices,
}

/// Where the functions of the accessor module are among the component's exports.
pub(crate) struct AccessorIndices {
    pub(crate) get: Vec<ComponentExportIndex>,
    pub(crate) set: Vec<ComponentExportIndex>,
    pub(crate) grow: Vec<ComponentExportIndex>,
}

impl AccessorIndices {
    fn new(compiled: &Compiled) -> Self {
        let all = |access: Access| {
            let index = |number: usize| compiled.get_export_index(None, access.name(number));
            (0..).map_while(index).collect()
        };
        Self { get: all(Access::Get), set: all(Access::Set), grow: all(Access::Grow) }
    }
}

impl Component {
    /// The content's name.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.inner.digest
    }

    /// The component as it was given, to be loaded again by a later run.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.inner.bytes
    }

    /// The sandbox that it was loaded into.
    #[must_use]
    pub fn sandbox(&self) -> Sandbox {
        Sandbox { shared: self.inner.sandbox.clone() }
    }
}

impl Sandbox {
    /// Checks and compiles a component. Takes tens to hundreds of milliseconds the first time, and
    /// a fraction of one when the cache has it.
    ///
    /// # Errors
    /// [`ComponentError`] says what is wrong with the bytes.
    pub fn load(&self, bytes: &[u8]) -> Result<Component, ComponentError> {
        let digest = Digest::of(bytes);
        let compiled = match self.cached(digest) {
            Some(compiled) => compiled,
            None => self.compile(bytes, digest)?,
        };
        let import =
            |error: wasmtime::Error| ComponentError::Import { message: format!("{error:#}") };
        let pre = self.shared.linker.instantiate_pre(&compiled).map_err(import)?;
        let operator = OperatorIndices::new(&pre)
            .map_err(|error| ComponentError::OtherWorld { message: format!("{error:#}") })?;
        let accessors = AccessorIndices::new(&compiled);
        let bytes = bytes.into();
        let inner = Inner { digest, bytes, sandbox: self.shared.clone(), pre, operator, accessors };
        Ok(Component { inner: Arc::new(inner) })
    }

    fn compile(&self, bytes: &[u8], digest: Digest) -> Result<Compiled, ComponentError> {
        let instrumented = rewrite(bytes)?;
        let compile =
            |error: wasmtime::Error| ComponentError::Compile(error.into_boxed_dyn_error());
        let compiled =
            Compiled::from_binary(&self.shared.engine, &instrumented).map_err(compile)?;
        if let Err(error) = self.store(&compiled, digest) {
            tracing::warn!(%error, "keep the compiled component: it will be compiled again");
        }
        Ok(compiled)
    }

    fn cache_file(&self, digest: Digest) -> Option<(&Cache, String)> {
        let name = format!("{digest}-{:016x}.cwasm", self.shared.compatibility);
        Some((self.shared.cache.as_ref()?, name))
    }

    fn cached(&self, digest: Digest) -> Option<Compiled> {
        let (cache, name) = self.cache_file(digest)?;
        let code = match cache.read(&name) {
            Ok(code) => code?,
            Err(error) => {
                tracing::warn!(%error, name, "a compiled component cannot be used: compile it again");
                return None;
            }
        };
        // SAFETY: the code carries a hash under a key that only this user can read, over its name and all
        // of its bytes, so it was written by `store` below; its name holds the digest of the component,
        // and the versions of wasmtime, of the checks and of all settings.
        let loaded = unsafe { Compiled::deserialize(&self.shared.engine, &code) };
        loaded.inspect_err(|error| tracing::warn!(name, %error, "compile again")).ok()
    }

    fn store(&self, compiled: &Compiled, digest: Digest) -> Result<(), wasmtime::Error> {
        let Some((cache, name)) = self.cache_file(digest) else { return Ok(()) };
        cache.write(&name, &compiled.serialize()?)?;
        Ok(())
    }
}

/// The component that is compiled in place of this one: the same, with accesses to the state that no export
/// gives.
///
/// # Errors
/// Where the bytes are no component, or one that cannot be checkpointed.
pub fn rewrite(bytes: &[u8]) -> Result<Vec<u8>, ComponentError> {
    check_kind(bytes)?;
    validate::check(bytes)?;
    // The rewriting relies on what validation guarantees, so validate what was given first.
    wasmparser::Validator::new_with_features(validate::features())
        .validate_all(bytes)
        .map_err(ValidateError::from)?;
    Ok(instrument::instrument(bytes)?)
}

impl From<ValidateError> for ComponentError {
    fn from(error: ValidateError) -> Self {
        match error {
            ValidateError::Malformed(message) => Self::Malformed { message },
            ValidateError::Unsound(unsound) => Self::Unsound(unsound),
        }
    }
}

fn check_kind(bytes: &[u8]) -> Result<(), ComponentError> {
    if !bytes.starts_with(b"\0asm") {
        let begins_with = String::from_utf8_lossy(&bytes[..bytes.len().min(8)]).into_owned();
        return Err(ComponentError::NotWasm { begins_with });
    }
    if wasmparser::Parser::is_core_wasm(bytes) {
        return Err(ComponentError::CoreModule);
    }
    Ok(())
}
