//! Reads documents setting by setting, each from one row of a table, and says what is wrong where.
//!
//! A [`Setting`] is everything that is known about one key: its type, its range, its default, its older names and
//! what it means. Reading a document, the list of what counts (`check --effective`), the reference
//! (`docs/settings.md`), the schema for editors and the hints of error messages all come from it.
//!
//! Nothing here knows a job.

mod document;
pub mod problem;
pub mod schema;
pub mod section;
pub mod table;
pub mod value;
mod words;

pub use document::{Document, Effective};
pub use problem::{Code, Problem};
pub use section::{Located, Section};
pub use table::{AnySetting, Optional, Required, Setting, Table};
pub use words::closest;
