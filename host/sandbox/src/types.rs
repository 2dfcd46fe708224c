//! The interface `types` of the contract, in the shape that generated bindings expect: it has no functions.

use wasmtime::component::{HasData, Linker};

pub use cofferdam_contract::*;

/// Answers the interface's functions: there are none.
pub trait Host {}

impl<T: ?Sized> Host for T {}

/// The same, for functions that want the store.
pub trait HostWithStore<T> {}

impl<T, D: HasData> HostWithStore<T> for D {}

/// Makes the interface known to a linker: components import it for its types.
///
/// # Errors
/// Where the linker has an interface of this name.
pub fn add_to_linker<T: 'static, D: HasData>(
    linker: &mut Linker<T>,
    _: fn(&mut T) -> D::Data<'_>,
) -> wasmtime::Result<()> {
    linker.instance("cofferdam:operator/types@0.2.0").map(drop)
}
