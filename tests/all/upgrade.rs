//! Declared state in the hands of another version of its operator.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, sync::Arc};

use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    job::{CheckedJob, Job, JobOptions},
    problem::Code,
    progress::Progress,
    restore::{RestoreFrom, open_named},
};
use cofferdam_spec::JobSpec;
use cofferdam_tests::{
    disk::copy_dir,
    guest,
    job::{
        Harness, Ran, after_checkpoints, after_records, block_on, committed, run_manifest,
        run_with, sandbox,
    },
    keyed,
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

#[derive(Clone, Copy)]
struct Version {
    component: &'static str,
    parallelism: u32,
    partition: &'static str,
    snapshot: &'static str,
    backend: &'static str,
    config: &'static str,
}

impl Version {
    fn write(&self, dir: &Path) -> std::path::PathBuf {
        self.write_with_rate(dir, 100_000)
    }

    /// So slow that it is not at its end when it is stopped, however busy the machine is.
    fn write_slow(&self, dir: &Path) -> std::path::PathBuf {
        self.write_with_rate(dir, 10_000)
    }

    fn write_with_rate(&self, dir: &Path, rate: u64) -> std::path::PathBuf {
        let Self { component, parallelism, partition, snapshot, backend, config } = self;
        let component = guest::probe().with_file_name(component);
        let source = keyed::source(rate);
        let text = format!(
            r#"
[job]
name = "totals"
parallelism = {parallelism}
[execution.checkpointing]
interval = "20ms"
[state.backend]
type = "{backend}"
{source}[[operator]]
name = "totals"
component = {component:?}
snapshot = "{snapshot}"
config = {{ {config} }}
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

    fn stopped(&self, dir: &Path) -> Ran {
        let ran = run_manifest(&self.write_slow(dir), |job| {
            after_checkpoints(job, 5, |job| job.stop());
        });
        assert!(matches!(ran.outcome, Ok(Outcome::Stopped { .. })), "{:?}", ran.outcome);
        ran
    }

    fn finished(&self, dir: &Path) -> Ran {
        run_manifest(&self.write(dir), |_| {})
    }
}

const FIRST: Version = Version {
    component: "totals.wasm",
    parallelism: 2,
    partition: "hash",
    snapshot: "declared",
    backend: "hashmap",
    config: "",
};

/// Its checkpoints hold the memory; declared state is in that, and nowhere else.
const IN_IMAGE: Version = Version { snapshot: "both", ..FIRST };

#[test]
fn state_follows_its_name_its_schema_and_its_keys_into_the_next_version() {
    for (parallelism, backend) in [(2, "hashmap"), (5, "hashmap"), (1, "hashmap"), (3, "sled")] {
        let dir = tempfile::tempdir().expect("a directory");
        let first = Version { backend, ..FIRST };
        first.stopped(dir.path());
        let next = Version { component: "totals_next.wasm", parallelism, ..first };
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

/// What a run from a savepoint is refused for, a check is refused for, with the same code: by its state
/// directory, and by output that was committed since. Where it is not, the run begins.
#[test]
fn a_check_is_refused_what_a_run_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let saved = dir.path().join("saved");
    let target = saved.clone();
    let manifest = FIRST.write_slow(dir.path());
    let program = |verb: &str, more: &[&str]| {
        let mut command = guest::command(dir.path(), &[verb, "job.toml", "--from", "saved"]);
        let output = command.args(more).output().expect("the program runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (during, asked) = std::sync::mpsc::channel();
    let (done, end) = std::sync::mpsc::channel();
    // What is not built yet would take longer than the job.
    let _ = guest::program();
    std::thread::scope(|scope| {
        let program = &program;
        scope.spawn(move || {
            let _ = run_manifest(&manifest, |job| {
                after_checkpoints(job, 5, move |job| {
                    block_on(job.savepoint(target)).expect("written");
                    during.send(()).expect("somebody waits");
                    end.recv().expect("somebody says so");
                    job.stop();
                });
            });
        });
        asked.recv().expect("the savepoint is written");
        let (code, words) = program("check", &[]);
        done.send(()).expect("the job runs");
        assert_eq!(code, Some(0), "{words}");
        assert!(words.contains("a run uses the state directory"), "{words}");
    });
    let before = files_in(dir.path());
    let cases: [(&[&str], &str); 2] = [(&[], "C0020"), (&["--state-dir", "other"], "C0029")];
    for (more, refusal) in cases {
        let checked = program("check", more);
        assert!(files_in(dir.path()) == before, "a check changes nothing");
        for (code, words) in [checked, program("run", more)] {
            assert_eq!(code, Some(2), "{words}");
            assert!(words.contains(refusal), "{more:?}: {words}");
        }
        let _ = fs::remove_dir_all(dir.path().join("other"));
    }
    let more = ["--state-dir", "other", "--discard-output"];
    let (code, words) = program("check", &more);
    assert_eq!(code, Some(0), "{words}");
    assert!(files_in(dir.path()) == before, "a check changes nothing");
    FIRST.write(dir.path());
    let (code, words) = program("run", &more);
    assert_eq!(code, Some(0), "{words}");
    assert!(committed(&dir.path().join("output")) == expected());
}

/// A part that is still written to when its sink goes would never be seen: refused, whatever is said of the
/// state; and a sink that takes it over commits it.
#[test]
fn parts_of_a_sink_that_is_no_more_are_not_left_behind() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = FIRST.write_slow(dir.path());
    let file = "name = \"out\"\nconnector = \"file\"\npath = \"output\"\nroll-size = \"1GiB\"\n";
    let with_sink = |sink: &str| {
        FIRST.write(dir.path());
        let text = fs::read_to_string(&manifest).expect("written");
        let before = &text[..text.find("[[sink]]").expect("a sink")];
        let text = format!("{before}[[sink]]\n{sink}inputs = [\"totals\"]\n");
        fs::write(&manifest, text).expect("written");
    };
    FIRST.write_slow(dir.path());
    let text = fs::read_to_string(&manifest).expect("written");
    let rolling = text.replace("path = \"output\"\n", "path = \"output\"\nroll-size = \"1GiB\"\n");
    fs::write(&manifest, rolling).expect("written");
    // One that is stopped ends its parts.
    let mut killed = guest::start(&["run"], &manifest, std::process::Stdio::null());
    let has_one = || open_named(&dir.path().join("totals.cofferdam")).is_ok();
    while !has_one() {
        assert_eq!(killed.try_wait().expect("a child"), None, "it runs");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    killed.kill().expect("it runs");
    killed.wait().expect("a child");
    let before = files_in(&dir.path().join("output"));
    let pending = |path: &&std::path::PathBuf| path.extension().is_some_and(|it| it == "pending");
    assert_eq!(before.keys().filter(pending).count(), 2);
    let run = |more: &[&str]| {
        let mut command = guest::command(dir.path(), &["run", "job.toml"]);
        let output = command.args(more).output().expect("the program runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let elsewhere =
        ["--from", "totals.cofferdam", "--state-dir", "other", "--ignore-unclaimed-state"];
    let cases: [(&str, &[&str]); 3] = [
        ("name = \"out\"\nconnector = \"discard\"\n", &[]),
        ("name = \"none\"\nconnector = \"discard\"\n", &elsewhere),
        ("name = \"new\"\nconnector = \"file\"\npath = \"new\"\n", &elsewhere),
    ];
    for (sink, more) in cases {
        with_sink(sink);
        let (code, words) = run(more);
        assert_eq!(code, Some(2), "{words}");
        assert!(words.contains("C0028") && words.contains("no longer exists"), "{sink}: {words}");
        assert!(words.contains("uid = \"out\""), "{words}");
        assert!(files_in(&dir.path().join("output")) == before, "a refused run changes nothing");
    }
    with_sink(&file.replace("\"out\"", "\"new\"\nuid = \"out\""));
    let (code, words) = run(&[]);
    assert_eq!(code, Some(0), "{words}");
    assert!(committed(&dir.path().join("output")) == expected());
}

/// The position of a file says nothing to a generator.
#[test]
fn a_source_of_another_kind_does_not_take_over_the_position() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("in.txt"), input()).expect("written");
    let manifest = dir.path().join("job.toml");
    let write = |source: &str| {
        let text = format!(
            "[job]\nname = \"kinds\"\n\n[execution.checkpointing]\ninterval = \"20ms\"\n\n[[source]]\n{source}\n\
             [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"in\"]\n"
        );
        fs::write(&manifest, text).expect("written");
    };
    let file = "name = \"in\"\nconnector = \"file\"\npath = \"in.txt\"\nrate = 20000\n";
    let generator = "name = \"in\"\nconnector = \"generator\"\ncount = 1000\n";
    write(file);
    let stopped = run_manifest(&manifest, |job| after_records(job, 1_000, |job| job.stop()));
    assert!(matches!(stopped.outcome, Ok(Outcome::Stopped { .. })), "{:?}", stopped.outcome);
    write(generator);
    let problem = run_manifest(&manifest, |_| {}).outcome.expect_err("another kind");
    assert_eq!(problem.code, Code::StateMismatch);
    assert!(problem.to_string().contains("connector = \"file\", not \"generator\""), "{problem}");
    // As the hint says: it begins at its beginning.
    write(&generator.replace("\"in\"\n", "\"in\"\nuid = \"numbers\"\n"));
    let from = RestoreFrom {
        dir: dir.path().join("kinds.cofferdam"),
        claim: false,
        ignore_unclaimed_state: true,
    };
    let state_dir = Some(dir.path().join("other"));
    let options = JobOptions { from: Some(from), state_dir, ..JobOptions::default() };
    let ran = run_with(&manifest, &options, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    write(file);
    assert_eq!(run_manifest(&manifest, |_| {}).outcome, Ok(Outcome::Finished));
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

/// No checkpoint has handed anything over: the component that wrote it reads it out of its memory.
#[test]
fn state_in_an_image_is_read_out_by_the_component_that_wrote_it() {
    for parallelism in [2, 5, 1] {
        let dir = tempfile::tempdir().expect("a directory");
        IN_IMAGE.stopped(dir.path());
        let (store, newest) = open_named(&dir.path().join("totals.cofferdam")).expect("opens");
        let tasks = store.inspect(newest.checkpoint).expect("whole");
        assert_eq!(tasks.iter().filter(|task| task.is_in_image).count(), 2);
        drop(store);
        let next = Version { component: "totals_next.wasm", parallelism, ..FIRST };
        let again = Version { parallelism: 3, snapshot: "both", ..next };
        let refused =
            again.finished(dir.path()).outcome.expect_err("memory fits no other component");
        assert_eq!(refused.code, Code::StateMismatch, "{refused}");
        let ran = next.stopped(dir.path());
        let steps = ran.progress.iter().filter_map(|progress| match progress {
            Progress::Restoring { step, .. } => Some(step.to_string()),
            _ => None,
        });
        let steps: Vec<String> = steps.collect();
        let read = steps.iter().filter(|step| step.contains("out of")).count();
        let converted = steps.iter().filter(|step| step.contains("converting")).count();
        assert_eq!((read, converted), (2, parallelism as usize), "{steps:?}");
        assert!(steps.last().is_some_and(|step| step.contains("writing")), "{steps:?}");
        // What was not declared is given up by now, so its memory may be kept again.
        let ran = again.finished(dir.path());
        assert_eq!(ran.outcome, Ok(Outcome::Finished));
        assert_eq!(ran.restored().len(), 1, "it has resumed");
        assert!(committed(&dir.path().join("output")) == expected(), "at {parallelism}");
    }
}

/// The newest checkpoint counts, also where an earlier one of the same tasks holds packs.
#[test]
fn packs_of_an_earlier_checkpoint_are_not_taken_for_the_state_of_a_later_one() {
    let dir = tempfile::tempdir().expect("a directory");
    FIRST.stopped(dir.path());
    IN_IMAGE.stopped(dir.path());
    let next = Version { component: "totals_next.wasm", parallelism: 3, ..FIRST };
    assert_eq!(next.finished(dir.path()).outcome, Ok(Outcome::Finished));
    assert!(committed(&dir.path().join("output")) == expected());
}

#[test]
fn component_that_is_not_kept_any_more_is_named_and_nothing_is_lost() {
    let dir = tempfile::tempdir().expect("a directory");
    IN_IMAGE.stopped(dir.path());
    let state = dir.path().join("totals.cofferdam");
    let component = fs::read(guest::probe().with_file_name("totals.wasm")).expect("readable");
    let is_pack = |path: &&std::path::PathBuf| path.ends_with("pack");
    let pack = files_in(&state).keys().find(is_pack).cloned().expect("a pack");
    let mut bytes = fs::read(&pack).expect("readable");
    let begin = &component[..64];
    let at = bytes.windows(64).position(|window| window == begin).expect("the component is kept");
    bytes[at + component.len() / 2] ^= 1;
    fs::write(&pack, &bytes).expect("written");
    let before = files_in(&state);
    let next = Version { component: "totals_next.wasm", parallelism: 3, ..FIRST };
    let problem = next.finished(dir.path()).outcome.expect_err("nobody can read it out");
    assert_eq!(problem.code, Code::StateMismatch, "{problem}");
    assert!(problem.to_string().contains("the component"), "{problem}");
    let of_state = |files: BTreeMap<std::path::PathBuf, Vec<u8>>| -> Vec<_> {
        files.into_iter().filter(|(path, _)| !path.ends_with("JOB")).collect()
    };
    assert!(of_state(files_in(&state)) == of_state(before), "a refused run changes nothing");
    assert_eq!(IN_IMAGE.finished(dir.path()).outcome, Ok(Outcome::Finished));
    assert!(committed(&dir.path().join("output")) == expected());
}

/// A state key belongs to the key of a record: under another one it would be left behind.
#[test]
fn state_under_the_key_of_no_record_is_refused_at_once_or_when_it_is_read_out() {
    let with = |at: u64, snapshot: &'static str| Harness {
        config: format!("do = \"foreign-key\", at = {at}"),
        rate: Some(100_000),
        snapshot,
        ..Harness::default()
    };
    for snapshot in ["declared", "both"] {
        let dir = tempfile::tempdir().expect("a directory");
        let problem = with(0, snapshot).run_in(dir.path()).outcome.expect_err("it is refused");
        assert_eq!(problem.code, Code::ForeignKey, "{problem}");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let late = with(9_000, "both");
    let manifest = late.write(dir.path());
    let ran = run_manifest(&manifest, |job| after_records(job, 30_000, |job| job.stop()));
    assert!(matches!(ran.outcome, Ok(Outcome::Stopped { .. })), "{:?}", ran.outcome);
    let rescaled = Harness { parallelism: 3, snapshot: "declared", ..late.clone() };
    let problem = rescaled.run_in(dir.path()).outcome.expect_err("it cannot be shared out");
    assert_eq!(problem.code, Code::StateMismatch, "{problem}");
    assert!(problem.to_string().contains("nobody"), "{problem}");
    assert_eq!(late.run_in(dir.path()).outcome, Ok(Outcome::Finished), "as it was, it finishes");
}

/// What cannot be written down lies in the memory for long before anybody asks for it.
#[test]
fn state_that_cannot_be_read_out_is_named_from_the_beginning() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = "unwritable = \"k4\"";
    let odd = Version { component: "totals_odd.wasm", config, ..IN_IMAGE };
    let target = dir.path().join("saved");
    let ran = run_manifest(&odd.write_slow(dir.path()), move |job| {
        after_checkpoints(job, 5, move |job| {
            let refused = block_on(job.savepoint(target)).expect_err("it cannot be read out");
            assert!(refused.reason.contains("state \"bytes\" under the key `k4`"), "{refused:?}");
            job.stop();
        });
    });
    assert!(matches!(ran.outcome, Ok(Outcome::Stopped { .. })), "{:?}", ran.outcome);
    assert_eq!(ran.restarted(), Vec::<Vec<String>>::new(), "the job itself is not held up");
    let warned = ran.warnings();
    let is_it =
        |it: &&String| it.contains("totals/") && it.contains("\"bytes\" under the key `k4`");
    assert_eq!(warned.iter().filter(is_it).count(), 1, "{warned:?}");
    let rescaled = Version { parallelism: 3, snapshot: "declared", ..odd };
    let problem = rescaled.finished(dir.path()).outcome.expect_err("it cannot be shared out");
    assert_eq!(problem.code, Code::StateMismatch, "{problem}");
    for named in ["totals/", "component", "state \"bytes\"", "`k4`"] {
        assert!(problem.to_string().contains(named), "{problem}");
    }
    assert_eq!(odd.finished(dir.path()).outcome, Ok(Outcome::Finished), "as it was, it finishes");
    assert!(committed(&dir.path().join("output")) == expected());
}

/// What a type does not tell of itself, the same component knows, and no other.
#[test]
fn state_that_nobody_can_look_into_stays_with_the_component_that_wrote_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let odd = Version { component: "totals_odd.wasm", ..FIRST };
    odd.stopped(dir.path());
    // A section that says nothing makes another component of it.
    let mut bytes = fs::read(guest::probe().with_file_name(odd.component)).expect("readable");
    bytes.extend_from_slice(b"\0\x02\x01x");
    let other = dir.path().join("other.wasm");
    fs::write(&other, bytes).expect("written");
    let component = other.to_str().expect("a name").to_owned().leak();
    let problem = Version { component, ..odd }.finished(dir.path()).outcome.expect_err("refused");
    assert_eq!(problem.code, Code::SchemaMismatch, "{problem}");
    assert!(problem.to_string().contains("state \"count\""), "{problem}");
    let ran = Version { parallelism: 3, ..odd }.finished(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert_eq!(ran.restored().len(), 1, "it has resumed");
    assert!(committed(&dir.path().join("output")) == expected());
}

/// Whoever looks from outside sees what the operator has: in packs, in an image, and in a savepoint.
#[test]
fn state_is_read_from_outside() {
    let shown = |state: &Path, more: &[&str]| {
        let mut command = std::process::Command::new(guest::program());
        command.arg("state").arg(state).args(more);
        let output = command.output().expect("the program runs");
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{words}");
        let text = String::from_utf8(output.stdout).expect("text");
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    };
    for version in [FIRST, IN_IMAGE] {
        let dir = tempfile::tempdir().expect("a directory");
        let savepoint = dir.path().join("saved");
        let target = savepoint.clone();
        let ran = run_manifest(&version.write_slow(dir.path()), |job| {
            after_checkpoints(job, 5, move |job| {
                block_on(job.stop_with_savepoint(target, false)).expect("written");
            });
        });
        assert!(matches!(ran.outcome, Ok(Outcome::Stopped { .. })), "{:?}", ran.outcome);
        let emitted = committed(&dir.path().join("output"));
        let counted = |key: &str| {
            let of_key = emitted.iter().filter(|line| line.split(' ').next() == Some(key));
            of_key.count()
        };
        let all = shown(&savepoint, &["--operator", "totals", "--state", "count", "--json"]);
        assert!(!all.is_empty(), "there is state");
        for line in &all {
            let entry: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let key = entry["key"].as_str().expect("a key");
            assert_eq!(entry["value"].as_u64(), Some(counted(key) as u64), "{line}");
        }
        let one = shown(&savepoint, &["--key", "k4"]);
        assert!(one.contains(&format!("totals.count k4 = {}", counted("k4"))), "{one:?}");
        let summary = shown(&savepoint, &[]);
        let counts = summary.iter().find(|line| line.contains("totals.count:")).expect("listed");
        assert!(counts.contains(&format!("{} entries", all.len())), "{counts}");
    }
    let dir = tempfile::tempdir().expect("a directory");
    IN_IMAGE.stopped(dir.path());
    let state = dir.path().join("totals.cofferdam");
    let before = files_in(&state);
    assert!(!shown(&state, &["--operator", "totals"]).is_empty(), "the image is read out");
    assert_eq!(files_in(&state), before, "and nothing of it changes");
}

/// Makes a job ready, and lets it die before it runs: what it takes over is in its store by then.
fn prepared_and_killed(manifest: &Path) {
    block_on(async {
        let spec = JobSpec::read_with(manifest, None, &cofferdam_connectors::builtin())
            .expect("a manifest");
        let checked = CheckedJob::new(spec, sandbox()).await.expect("it is right");
        drop(Job::prepare(checked, &JobOptions::default(), Arc::new(())).expect("it fits"));
    });
}

/// What `snapshot = "memory"` has written holds declared state in the image, whatever comes after it.
#[test]
fn state_of_a_job_that_kept_memory_alone_is_not_taken_for_empty() {
    let memory = Version { snapshot: "memory", ..FIRST };
    let next = Version { component: "totals_next.wasm", parallelism: 3, ..FIRST };
    for begins_with_packs in [false, true] {
        let dir = tempfile::tempdir().expect("a directory");
        if begins_with_packs {
            FIRST.stopped(dir.path());
            IN_IMAGE.stopped(dir.path());
        }
        memory.stopped(dir.path());
        prepared_and_killed(&IN_IMAGE.write(dir.path()));
        assert_eq!(next.finished(dir.path()).outcome, Ok(Outcome::Finished));
        assert!(committed(&dir.path().join("output")) == expected(), "{begins_with_packs}");
    }
}

/// A crash between the record of a job's end and the removal of its checkpoints leaves them behind.
#[test]
fn checkpoints_that_an_ended_job_has_left_are_neither_in_the_way_nor_removed_where_they_are_named()
{
    // Of the last one a removal that a power cut has ended left no head.
    for (left, named, is_headless) in [
        ("first", "second", false),
        ("second", "second", false),
        ("second", "link", false),
        ("first", "second", true),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let targets = (first.clone(), second.clone());
        let ran = run_manifest(&FIRST.write_slow(dir.path()), |job| {
            after_checkpoints(job, 3, move |job| {
                block_on(job.savepoint(targets.0)).expect("written");
                std::thread::sleep(std::time::Duration::from_millis(60));
                block_on(job.stop_with_savepoint(targets.1, false)).expect("written");
            });
        });
        assert!(matches!(ran.outcome, Ok(Outcome::Stopped { .. })), "{:?}", ran.outcome);
        let state = dir.path().join("totals.cofferdam");
        copy_dir(&dir.path().join(left), &state).expect("left behind");
        if is_headless {
            let heads = fs::read_dir(&state).expect("listed").flatten();
            let heads = heads.filter(|it| it.file_name().to_string_lossy().starts_with("HEAD"));
            let removed = heads.map(|head| fs::remove_file(head.path()).expect("removed")).count();
            assert!(0 < removed, "it had none");
        }
        std::os::unix::fs::symlink(&state, dir.path().join("link")).expect("linked");
        let from = RestoreFrom {
            dir: dir.path().join(named),
            claim: false,
            ignore_unclaimed_state: false,
        };
        let options = JobOptions { from: Some(from), ..JobOptions::default() };
        let ran = run_with(&FIRST.write(dir.path()), &options, |_| {});
        assert_eq!(ran.outcome, Ok(Outcome::Finished), "{left} is left, {named} is named");
        assert_eq!(ran.restored().len(), 1, "it has resumed");
        assert!(committed(&dir.path().join("output")) == expected(), "{left}, {named}");
    }
}
