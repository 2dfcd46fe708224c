//! Every user mistake: a manifest in `tests/ui` and, beside it, what the user is told.
//!
//! `BLESS=1` writes what is told into the `.err` files.

use std::{fs, path::Path, sync::Arc};

use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    job::{CheckedJob, Job, JobOptions},
    problem::{Code, Problem},
};
use cofferdam_spec::JobSpec;
use cofferdam_tests::{
    guest,
    job::{Harness, sandbox},
};

fn prepare(manifest: &Path, options: &JobOptions) -> Result<Job, Problem> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let checked = runtime.block_on(CheckedJob::new(
        JobSpec::read_with(manifest, None, &cofferdam_connectors::builtin())?,
        sandbox(),
    ))?;
    Job::prepare(checked, options, Arc::new(()))
}

fn told(manifest: &Path) -> String {
    let state = tempfile::tempdir().expect("a directory");
    let options =
        JobOptions { state_dir: Some(state.path().join("state")), ..JobOptions::default() };
    match prepare(manifest, &options) {
        Ok(_) => "no problem\n".to_owned(),
        Err(problem) => {
            assert_eq!(problem.code.exit_code(), 2, "{problem}");
            format!("{problem}\n")
        }
    }
}

/// Files that are not operators, each in its own way.
fn write_components() {
    let dir = guest::root().join("tests/guests/target/ui");
    fs::create_dir_all(&dir).expect("a directory");
    let wat = |text: &str| wat::parse_str(text).expect("wat");
    let shared =
        "(component (core module $m (memory 1 1 shared)) (core instance (instantiate $m)))";
    for (name, bytes) in [
        ("script.wasm", b"#!/bin/sh\n".to_vec()),
        ("core.wasm", wat("(module)")),
        ("other-world.wasm", wat("(component)")),
        ("shared-memory.wasm", wat(shared)),
    ] {
        fs::write(dir.join(name), bytes).expect("written");
    }
}

#[test]
fn every_mistake_is_told_with_its_place_and_remedy() {
    let _ = guest::probe();
    write_components();
    let mut manifests: Vec<_> = fs::read_dir("ui")
        .expect("tests/ui")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    manifests.sort();
    assert!(20 < manifests.len());
    let is_blessed = std::env::var_os("BLESS").is_some();
    let mut wrong = Vec::new();
    for manifest in manifests {
        let (told, expected) = (told(&manifest), manifest.with_extension("err"));
        if is_blessed {
            fs::write(&expected, &told).expect("written");
        }
        let expected = fs::read_to_string(&expected).unwrap_or_default();
        if told != expected {
            wrong.push(format!("{}:\n{told}--- expected:\n{expected}", manifest.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_code_is_documented_and_nothing_else_is() {
    let text = fs::read_to_string(guest::root().join("docs/errors.md")).expect("docs/errors.md");
    let sections: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("## C")).collect();
    assert_eq!(sections.len(), Code::ALL.len());
    for (code, section) in Code::ALL.iter().zip(sections) {
        let number = code.number();
        assert_eq!(format!("C{section}"), format!("{number}: {}", code.title()));
    }
}

#[test]
fn state_directory_belongs_to_one_run() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = Harness::default().write(dir.path());
    let running = prepare(&manifest, &JobOptions::default())
        .map_err(|problem| problem.to_string())
        .expect("the first");
    let problem = prepare(&manifest, &JobOptions::default()).err().expect("the second");
    assert_eq!(problem.code, Code::StateInUse);
    drop(running);
    assert!(prepare(&manifest, &JobOptions::default()).is_ok());
}

#[test]
fn state_and_output_directories_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("file"), "").expect("written");
    let manifest = Harness::default().write(dir.path());
    let options =
        JobOptions { state_dir: Some(dir.path().join("file/state")), ..JobOptions::default() };
    assert_eq!(
        prepare(&manifest, &options).err().map(|problem| problem.code),
        Some(Code::StateUnusable)
    );
    let text = fs::read_to_string(&manifest)
        .expect("read")
        .replace("path = \"output\"", "path = \"file/output\"");
    fs::write(&manifest, text).expect("written");
    let problem = prepare(&manifest, &JobOptions::default()).err().expect("unwritable");
    assert_eq!(problem.code, Code::OutputUnwritable);
}

/// Stops a job half-way, changes something, and gives what the next run is told.
fn resumed_with(
    before: &Harness,
    after: &Harness,
    component: Option<&Path>,
) -> Result<Outcome, Problem> {
    let dir = tempfile::tempdir().expect("a directory");
    let failing =
        Harness { config: r#"do = "trap", at = 5000"#.to_owned(), attempts: 0, ..before.clone() };
    assert!(failing.run_in(dir.path()).outcome.is_err(), "it leaves a checkpoint");
    let manifest = after.write(dir.path());
    if let Some(component) = component {
        let text = fs::read_to_string(&manifest).expect("read");
        let probe = format!("{:?}", guest::probe());
        fs::write(&manifest, text.replace(&probe, &format!("{component:?}"))).expect("written");
    }
    cofferdam_tests::job::run_manifest(&manifest, |_| {}).outcome
}

#[test]
fn checkpoint_of_another_component_is_refused() {
    let harness = Harness {
        count: 20_000,
        rate: Some(100_000),
        interval_ms: 10,
        parallelism: 1,
        ..Harness::default()
    };
    // The same operator with other bytes: a custom section more.
    let mut bytes = fs::read(guest::probe()).expect("the probe");
    bytes.extend_from_slice(&[0, 3, 1, b'x', 0]);
    let dir = tempfile::tempdir().expect("a directory");
    let other = dir.path().join("other.wasm");
    fs::write(&other, bytes).expect("written");

    let problem = resumed_with(&harness, &harness, Some(&other)).expect_err("another component");
    assert_eq!(problem.code, Code::StateMismatch);
    assert!(problem.message.contains("another component"), "{problem}");

    let wider = Harness { parallelism: 3, ..harness.clone() };
    let problem = resumed_with(&harness, &wider, None).expect_err("another parallelism");
    assert_eq!(problem.code, Code::StateMismatch);
    assert!(problem.message.contains("with parallelism 1"), "{problem}");

    // Declared state alone outlives its component.
    let declared = Harness { snapshot: "declared", ..harness };
    assert_eq!(resumed_with(&declared, &declared, Some(&other)), Ok(Outcome::Finished));
}
