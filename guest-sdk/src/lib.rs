//! What the author of a Cofferdam operator imports: a struct, a trait and one attribute.
//!
//! ```
//! use cofferdam_sdk::prelude::*;
//!
//! /// Counts how often each word has been seen.
//! #[operator]
//! #[derive(Default)]
//! struct Count {
//!     #[state]
//!     counts: ValueState<u64>,
//! }
//!
//! impl Operator for Count {
//!     type Key<'a> = Text<'a>;
//!     type In<'a> = ();
//!     type OutKey<'a> = Text<'a>;
//!     type Out<'a> = u64;
//!
//!     fn process(&mut self, word: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
//!         let count = self.counts.get_or_default(&word);
//!         *count += 1;
//!         out.emit(word.key, *count);
//!         Ok(())
//!     }
//! }
//!
//! // An operator runs natively in unit tests, without wasm.
//! let mut task = cofferdam_sdk::testing::TestTask::<Count>::open(&[]).unwrap();
//! task.process(Text("to"), ()).unwrap();
//! task.process(Text("be"), ()).unwrap();
//! task.process(Text("to"), ()).unwrap();
//! let last = task.take_output().pop().unwrap();
//! assert_eq!((last.key(), last.value()), (Text("to"), 2u64));
//! ```
//!
//! Two kinds of state need no code of their own. Whatever a struct keeps in its fields is part of
//! the snapshot of the guest's memory, and comes back after a trap. What it keeps in a
//! [`ValueState`](state::ValueState) is *also* handed to the host by key, so that it outlives a
//! new version of the operator and another parallelism.

mod changes;
mod codec;
pub mod host;
mod index;
mod key;
mod operator;
mod output;
#[doc(hidden)]
pub mod runtime;
mod schema;
mod short;
pub mod state;
pub mod testing;

#[doc(hidden)]
#[allow(missing_docs, reason = "generated from wit/operator.wit, which is documented")]
pub mod bindings {
    wit_bindgen::generate!({
        path: "../wit",
        world: "operator",
        pub_export_macro: true,
        default_bindings_module: "::cofferdam_sdk::bindings",
    });
}

pub use codec::{Decode, Encode, Format, Json, Raw, Text};
pub use cofferdam_sdk_macros::operator;
pub use operator::{Config, Context, Error, Operator, Port, Record, Result};
pub use output::Output;

/// Everything an operator usually needs.
pub mod prelude {
    pub use crate::{
        Config, Context, Decode, Encode, Error, Format, Json, Operator, Output, Port, Raw, Record,
        Result, Text, host, operator,
        state::{Keyed, StateKey, ValueState},
    };
}
