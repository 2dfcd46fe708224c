//! The laws of sources and sinks, held against connectors of the program and those that are built in.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_connector::{
    Catalog,
    catalog::{NodeContext, OutputContext, SinkPlan, SinkSpec, SourcePlan},
    identity::Lineage,
    testing::{SinkUnderTest, check_sink, check_sink_rescaled, check_source},
};
use cofferdam_settings::{Document, Section};

use super::{catalog, growing::Topic, ledger::Ledger};

/// A source of the catalog, prepared.
fn prepared(catalog: &Catalog, text: &str, base_dir: &Path) -> Arc<dyn SourcePlan> {
    let path = Path::new("source.toml");
    let document = Document::new(path, text);
    let table = document.parse(text, 0).expect("TOML");
    let section = Section::root(&document, &[(&table, 0)]);
    let name = text.lines().next().unwrap_or_default().trim_start_matches("# ");
    let connector = catalog.sources().iter().find(|it| it.name() == name).expect("a connector");
    let spec = connector.read(&section, base_dir).expect("settings");
    let grants = &cofferdam_files::Grants::default();
    spec.prepare(NodeContext { name: "s", base_dir, grants }).expect("something to read")
}

#[test]
fn sources_obey_the_laws() {
    let (topic, ledger) = (Arc::<Topic>::default(), Arc::<Ledger>::default());
    (0..100).for_each(|number| topic.add(number % 5, number as i64, number.to_string()));
    topic.close();
    let catalog = catalog(&topic, &ledger);
    let dir = tempfile::tempdir().expect("a directory");
    for file in 0..3 {
        let lines: String = (0..900).map(|line| format!("{line},{file}\n")).collect();
        fs::write(dir.path().join(format!("{file}.csv")), lines).expect("written");
    }
    let file = "# file\npath = \"*.csv\"\nformat = \"csv\"\nheader = false\nsplit-size = \"4KiB\"\nkey = \"1\"\n";
    let words = "# generator\ncount = 5000\ntimestamps = true\n";
    for text in ["# growing\nbatch-records = 2\n", file, words] {
        let plan = prepared(&catalog, text, dir.path());
        // Whatever blocks is waited for on this runtime's own threads.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let checked = runtime.expect("a runtime").block_on(check_source(&*plan));
        assert_eq!(checked, Ok(()), "{text}");
    }
}

/// Claims the sink of a manifest's text again and again.
struct Tested<V> {
    spec: Arc<dyn SinkSpec>,
    lineage: Lineage,
    record_dir: PathBuf,
    visible: V,
}

impl<V: FnMut() -> Vec<String>> SinkUnderTest for Tested<V> {
    fn claim(&mut self, restored: Option<(u64, Vec<Vec<u8>>)>) -> Box<dyn SinkPlan> {
        let states = restored.iter().flat_map(|(_, states)| states).map(Vec::as_slice).collect();
        let output = OutputContext {
            sink: "out",
            job: "job",
            lineage: &self.lineage,
            restored: restored.as_ref().map(|(checkpoint, _)| *checkpoint),
            states,
            record_dir: Some(self.record_dir.clone()),
            grants: &cofferdam_files::Grants::default(),
            conflicts: Default::default(),
            is_asking: false,
        };
        let mut plan = self.spec.claim(output).expect("it is this job's");
        plan.claim_elsewhere(&BTreeSet::new()).expect("it is elsewhere nowhere");
        plan
    }

    fn spec(&self) -> Arc<dyn SinkSpec> {
        self.spec.clone()
    }

    fn visible(&mut self) -> Vec<String> {
        (self.visible)()
    }
}

/// A sink of the catalog, by its settings.
fn sink(catalog: &Catalog, name: &str, text: &str, base_dir: &Path) -> Arc<dyn SinkSpec> {
    let document = Document::new(Path::new("sink.toml"), text);
    let table = document.parse(text, 0).expect("TOML");
    let section = Section::root(&document, &[(&table, 0)]);
    let connector = catalog.sinks().iter().find(|it| it.name() == name).expect("a connector");
    connector.read(&section, base_dir).expect("settings")
}

#[test]
fn sinks_obey_the_laws() {
    let dir = tempfile::tempdir().expect("a directory");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let topic = Arc::<Topic>::default();
    // Each law wants an output that is empty.
    for is_rescaled in [false, true] {
        let check = |test: &mut dyn SinkUnderTest| {
            runtime.block_on(async {
                if is_rescaled { check_sink_rescaled(test).await } else { check_sink(test).await }
            })
        };
        let ledger = Arc::<Ledger>::default();
        let catalog = catalog(&topic, &ledger);
        let name = format!("out-{is_rescaled}");
        let (out, lineage) = (dir.path().join(&name), Lineage::new());
        let record_dir = dir.path().join("record").join(&name);
        let mut file = Tested {
            spec: sink(&catalog, "file", &format!("path = \"{name}\"\n"), dir.path()),
            lineage: lineage.clone(),
            record_dir: record_dir.clone(),
            visible: || cofferdam_tests::job::committed(&out),
        };
        assert_eq!(check(&mut file), Ok(()), "file, {is_rescaled}");
        let mut book = Tested {
            spec: sink(&catalog, "ledger", "book = \"main\"\n", dir.path()),
            lineage,
            record_dir,
            visible: || ledger.records(),
        };
        assert_eq!(check(&mut book), Ok(()), "ledger, {is_rescaled}");
    }
}
