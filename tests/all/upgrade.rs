//! Declared state in the hands of another version of its operator.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use cofferdam_core::job::Outcome;
use cofferdam_engine::problem::Code;
use cofferdam_tests::{
    guest,
    job::{Ran, after_checkpoints, committed, run_manifest},
};

const LINES: u64 = 30_000;

fn input() -> String {
    let mut text = String::new();
    for line in 0..LINES {
        writeln!(text, "k{} {line:06}", line * line % 89).expect("a string");
    }
    text
}

/// What both versions emit.
fn expected() -> Vec<String> {
    let mut totals: BTreeMap<&str, (u64, usize)> = BTreeMap::new();
    let text = input();
    let emitted = text.lines().map(|line| {
        let key = line.split(' ').next().expect("a key");
        let (count, bytes) = totals.entry(key).or_default();
        (*count, *bytes) = (*count + 1, *bytes + line.len());
        format!("{key} {count} {bytes}")
    });
    let mut emitted: Vec<String> = emitted.collect();
    emitted.sort();
    emitted
}

struct Version {
    component: &'static str,
    parallelism: u32,
    partition: &'static str,
}

impl Version {
    fn write(&self, dir: &Path) -> std::path::PathBuf {
        let Self { component, parallelism, partition } = self;
        let component = guest::probe().with_file_name(component);
        let text = format!(
            r#"
[job]
name = "totals"
parallelism = {parallelism}
[execution.checkpointing]
interval = "20ms"
[[source]]
name = "in"
connector = "file"
path = "in.txt"
key = "^k[0-9]+"
split-size = "16KiB"
rate = 40000
[[operator]]
name = "totals"
component = {component:?}
snapshot = "declared"
inputs = [{{ from = "in", partition = "{partition}" }}]
[[sink]]
name = "out"
connector = "file"
path = "output"
inputs = ["totals"]
"#
        );
        let manifest = dir.join("job.toml");
        fs::write(dir.join("in.txt"), input()).expect("written");
        fs::write(&manifest, text).expect("written");
        manifest
    }

    fn stopped(&self, dir: &Path) {
        let ran = run_manifest(&self.write(dir), |job| {
            after_checkpoints(job, 5, |job| job.stop());
        });
        assert!(matches!(ran.outcome, Ok(Outcome::Stopped { .. })), "{:?}", ran.outcome);
    }

    fn finished(&self, dir: &Path) -> Ran {
        run_manifest(&self.write(dir), |_| {})
    }
}

const FIRST: Version = Version { component: "totals.wasm", parallelism: 2, partition: "hash" };

#[test]
fn state_follows_its_name_its_schema_and_its_keys_into_the_next_version() {
    for parallelism in [2, 5, 1] {
        let dir = tempfile::tempdir().expect("a directory");
        FIRST.stopped(dir.path());
        let next = Version { component: "totals_next.wasm", parallelism, ..FIRST };
        let ran = next.finished(dir.path());
        assert_eq!(ran.outcome, Ok(Outcome::Finished));
        assert_eq!(ran.restored().len(), 1, "it has resumed");
        assert!(committed(&dir.path().join("output")) == expected(), "at {parallelism}");
    }
}

/// What a run would be refused for is known before anybody stops anything.
#[test]
fn what_does_not_fit_is_refused_at_check_already() {
    let dir = tempfile::tempdir().expect("a directory");
    let next = Version { component: "totals_next.wasm", ..FIRST };
    next.stopped(dir.path());
    let state = dir.path().join("totals.cofferdam");
    let before = files_in(&state);
    let check = |version: &Version, from: &Path| {
        let mut check = std::process::Command::new(guest::program());
        check.arg("check").arg(version.write(dir.path())).arg("--json").arg("--from").arg(from);
        check.output().expect("the program runs")
    };
    let refused = check(&FIRST, &state);
    assert_eq!(refused.status.code(), Some(2));
    let words = String::from_utf8_lossy(&refused.stderr).into_owned()
        + &String::from_utf8_lossy(&refused.stdout);
    assert!(words.contains("C0020") && words.contains("since_upgrade"), "{words}");
    let fits = check(&Version { parallelism: 3, ..next }, &state);
    let answer: serde_json::Value = serde_json::from_slice(&fits.stdout).expect("one line of JSON");
    let totals = &answer["restores"]["nodes"][1];
    assert_eq!(totals["name"], "totals", "{answer}");
    assert_eq!(
        (&totals["state"], &totals["from"], &totals["to"]),
        (&"rescaled".into(), &2.into(), &3.into())
    );
    assert_eq!(files_in(&state), before, "a check changes nothing");
}

/// Every file with its content.
fn files_in(dir: &Path) -> BTreeMap<std::path::PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        match entry.path().is_dir() {
            true => files.extend(files_in(&entry.path())),
            false => {
                files.insert(entry.path(), fs::read(entry.path()).expect("readable"));
            }
        }
    }
    files
}

/// The way back would lose what was widened and added: refused, and the new version goes on.
#[test]
fn state_that_does_not_fit_is_refused_and_the_version_that_wrote_it_goes_on() {
    let dir = tempfile::tempdir().expect("a directory");
    let next = Version { component: "totals_next.wasm", ..FIRST };
    next.stopped(dir.path());
    let problem = FIRST.finished(dir.path()).outcome.expect_err("a state is not there");
    assert_eq!(problem.code, Code::StateMismatch, "{problem}");
    assert!(problem.to_string().contains("since_upgrade"), "{problem}");
    assert_eq!(next.finished(dir.path()).outcome, Ok(Outcome::Finished));
    assert!(committed(&dir.path().join("output")) == expected());
}

#[test]
fn state_without_keys_is_refused_another_parallelism() {
    let dir = tempfile::tempdir().expect("a directory");
    let unkeyed = Version { partition: "rebalance", ..FIRST };
    unkeyed.stopped(dir.path());
    let rescaled = Version { parallelism: 3, ..unkeyed };
    let problem = rescaled.finished(dir.path()).outcome.expect_err("it follows no records");
    assert_eq!(problem.code, Code::StateWithoutKeys, "{problem}");
    let unkeyed = Version { partition: "rebalance", ..FIRST };
    assert_eq!(unkeyed.finished(dir.path()).outcome, Ok(Outcome::Finished));
}
