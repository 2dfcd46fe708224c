//! Which connector a node names, and what that makes of its settings.

use std::{path::Path, sync::Arc};

use cofferdam_connector::{
    Catalog,
    catalog::{SinkSpec, SourceSpec},
};
use cofferdam_settings::{AnySetting, Located, Required, Section, table::Key};

use crate::Result;

static CONNECTOR: Required<String> = Key::text("connector", "where its records come from, or go")
    .of_job()
    .required("name a connector");

pub(crate) static ROWS: &[&dyn AnySetting] = &[&CONNECTOR];

/// The connector of a node, among those that there are.
fn chosen<'c, C: ?Sized>(
    section: &Section<'_>,
    connectors: &'c [Arc<C>],
    name: impl Fn(&C) -> &'static str,
) -> Result<&'c C> {
    let names: Vec<&str> = connectors.iter().map(|it| name(it)).collect();
    let wanted = format!("choose one of {}", names.join(", "));
    let Some(Located { value, span }) = section.try_require(&CONNECTOR) else {
        return Err(section.missing(CONNECTOR.row().key, &wanted));
    };
    let found = connectors.iter().find(|it| name(it).eq_ignore_ascii_case(&value));
    found
        .map(|found| &**found)
        .ok_or_else(|| section.not_one_of(CONNECTOR.row().key, &span, &value, &names))
}

pub(crate) fn read_source(
    section: &Section<'_>,
    base_dir: &Path,
    catalog: &Catalog,
) -> Result<(&'static str, Arc<dyn SourceSpec>)> {
    let connector = chosen(section, catalog.sources(), |it| it.name())?;
    section.know(connector.settings());
    Ok((connector.name(), connector.read(section, base_dir)?))
}

pub(crate) fn read_sink(
    section: &Section<'_>,
    base_dir: &Path,
    catalog: &Catalog,
) -> Result<(&'static str, Arc<dyn SinkSpec>)> {
    let connector = chosen(section, catalog.sinks(), |it| it.name())?;
    section.know(connector.settings());
    Ok((connector.name(), connector.read(section, base_dir)?))
}
