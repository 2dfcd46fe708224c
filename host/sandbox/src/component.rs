//! From the bytes of a component to code that runs: from the cache, or from the compiler.
#![allow(unsafe_code, reason = "loads compiled code that this program has written")]

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use wasmtime::component::{Component as Compiled, ComponentExportIndex, InstancePre};

use crate::{
    bindings::OperatorIndices,
    cache::Cache,
    compiler,
    engine::{Sandbox, Shared},
    host::Need,
    instrument::Access,
    rewrite::ComponentError,
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
    needs: Vec<(Need, String)>,
    /// How many states it has declared, once it was asked.
    pub(crate) states: OnceLock<u32>,
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

    /// What it has to be granted, each with the first import that needs it.
    #[must_use]
    pub fn needs(&self) -> &[(Need, String)] {
        &self.inner.needs
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
        let sandbox = self.shared.clone();
        let imports = compiled.component_type();
        let mut needs: Vec<(Need, String)> = imports
            .imports(&sandbox.engine)
            .filter_map(|(name, _)| Some((Need::of_import(name)?, name.to_owned())))
            .collect();
        needs.sort();
        needs.dedup_by_key(|(need, _)| *need);
        let bytes = bytes.into();
        let inner = Inner {
            digest,
            bytes,
            sandbox,
            pre,
            operator,
            accessors,
            needs,
            states: OnceLock::new(),
        };
        Ok(Component { inner: Arc::new(inner) })
    }

    /// Compiled code of the component that has this content.
    fn compile(&self, bytes: &[u8], digest: Digest) -> Result<Compiled, ComponentError> {
        let Shared { compiler, engine, without_signals, .. } = &*self.shared;
        let code = compiler::compile(compiler, engine, *without_signals, bytes)?;
        if let Some((cache, name)) = self.cache_file(digest)
            && let Err(error) = cache.write(&name, &code)
        {
            tracing::warn!(%error, "keep the compiled component: it will be compiled again");
        }
        self.deserialize(&code)
            .map_err(|error| ComponentError::Compile(error.into_boxed_dyn_error()))
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
        let loaded = self.deserialize(&code);
        loaded.inspect_err(|error| tracing::warn!(name, %error, "compile again")).ok()
    }

    /// Code that the compiler of this program has given, now or before.
    fn deserialize(&self, code: &[u8]) -> wasmtime::Result<Compiled> {
        // SAFETY: the code comes from `compiler::compile`, or from the cache. There it carries a hash under a key
        // that only this user can read, over its name and all of its bytes, so `compile` has written it; and its name
        // holds the digest of the component, and the versions of wasmtime, of the checks and of all settings.
        unsafe { Compiled::deserialize(&self.shared.engine, code) }
    }
}
