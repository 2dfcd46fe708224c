//! How a connector that is built in reads its settings.

use std::{path::Path, sync::Arc};

use cofferdam_connector::catalog::{SinkConnector, SinkSpec, SourceConnector, SourceSpec};
use cofferdam_settings::{AnySetting, Optional, Problem, Section, table::Key};

pub(crate) type Result<T> = std::result::Result<T, Problem>;

pub(crate) static RATE: Optional<f64> =
    Key::number("rate", "records a second, of all tasks together; above 0")
        .of_job()
        .unless(|rate| (*rate <= 0.0).then_some("it must be above 0 records a second"))
        .or_none("as fast as they are taken");

/// A connector that is built in: its name, its settings, and what reads them.
pub(crate) struct BuiltIn<S: ?Sized> {
    pub(crate) name: &'static str,
    pub(crate) rows: &'static [&'static dyn AnySetting],
    pub(crate) read: fn(&Section<'_>, &Path) -> Result<Arc<S>>,
}

impl SourceConnector for BuiltIn<dyn SourceSpec> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        self.rows
    }

    fn read(&self, section: &Section<'_>, base_dir: &Path) -> Result<Arc<dyn SourceSpec>> {
        (self.read)(section, base_dir)
    }
}

impl SinkConnector for BuiltIn<dyn SinkSpec> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        self.rows
    }

    fn read(&self, section: &Section<'_>, base_dir: &Path) -> Result<Arc<dyn SinkSpec>> {
        (self.read)(section, base_dir)
    }

    /// Those that are read this way write at once, and have no state.
    fn uncommitted(&self, _: &[u8]) -> Option<String> {
        None
    }
}
