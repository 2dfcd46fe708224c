//! The connectors that are built in: sources from files and a generator; sinks to files, to standard output,
//! and to nowhere.
//!
//! Each has a module of its own, which holds its settings, what it looks at before a run, and what its tasks do. The
//! engine knows none of them: the program hands it a [`Catalog`], for example [`builtin`].

mod changed;
mod discard;
mod file_sink;
mod file_source;
mod generator;
mod line;
mod settings;
mod stdout;

use cofferdam_connector::Catalog;

pub use self::{
    file_sink::{FileSinkSpec, IfExists, Rolling},
    file_source::{FileSourceSpec, LineFormat, OnBadRecord, TimeFormat},
    generator::{GeneratorContent, GeneratorSpec, generate},
    line::LineContent,
};

/// The connectors that are built in: `file` and `generator`, and `file`, `stdout` and `discard`.
#[must_use]
pub fn builtin() -> Catalog {
    Catalog::default()
        .source(file_source::FILE_SOURCE)
        .source(generator::GENERATOR)
        .sink(file_sink::FileSinkConnector)
        .sink(stdout::STDOUT)
        .sink(discard::DISCARD)
}
