//! Only the regions that a failure concerns restart; all others go on undisturbed.

use cofferdam_core::job::Outcome;
use cofferdam_engine::problem::Code;
use cofferdam_tests::{
    guest,
    job::{check_counts, committed, run_manifest},
};

/// Two pipelines that share nothing but the job: `a` traps, `b` does not.
fn two_pipelines(strategy: &str, deed: &str) -> String {
    let component = guest::probe();
    let pipeline = |name: &str, config: &str| {
        format!(
            r#"
[[source]]
name = "words-{name}"
connector = "generator"
vocabulary = 300
seed = 5
count = 60000
rate = 150000

[[operator]]
name = "count-{name}"
component = {component:?}
inputs = [{{ from = "words-{name}", partition = "hash" }}]
config = {{ {config} }}

[[sink]]
name = "out-{name}"
connector = "file"
inputs = ["count-{name}"]
path = "output-{name}"
"#
        )
    };
    // Sections of one kind need not stand together.
    format!(
        r#"
[job]
name = "two"
parallelism = 2

[execution.checkpointing]
interval = "20ms"

[restart-strategy]
type = "fixed-delay"
fixed-delay = {{ attempts = 1000, delay = "0s" }}

[jobmanager.execution]
failover-strategy = "{strategy}"
{}{}"#,
        pipeline("a", deed),
        pipeline("b", "")
    )
}

struct Seen {
    restarts: usize,
    /// Every task that was restarted.
    restarted: Vec<String>,
}

fn run(strategy: &str, deed: &str) -> Seen {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = dir.path().join("job.toml");
    std::fs::write(&manifest, two_pipelines(strategy, deed)).expect("written");
    let ran = run_manifest(&manifest, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    for name in ["a", "b"] {
        let lines = committed(&dir.path().join(format!("output-{name}")));
        check_counts(&lines, 60_000).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let mut restarted = ran.restarted().concat();
    restarted.sort();
    restarted.dedup();
    Seen { restarts: ran.restart_count(), restarted }
}

#[test]
fn trap_in_one_region_leaves_the_other_at_its_first_attempt() {
    let deed = r#"do = "trap", at = 5000, step = 1500, attempts = 12"#;
    let seen = run("region", deed);
    assert!(12 <= seen.restarts, "only {} traps", seen.restarts);
    let region = ["count-a/0", "count-a/1", "out-a/0", "out-a/1", "words-a/0", "words-a/1"];
    assert_eq!(seen.restarted, region);
}

#[test]
fn full_failover_restarts_every_task() {
    let seen = run("full", r#"do = "trap", at = 5000, attempts = 2"#);
    assert_eq!(seen.restarted.len(), 12);
}

#[test]
fn operator_that_refuses_to_open_is_not_restarted() {
    for (deed, words) in [("do = \"fail-in-open\"", "no luck"), ("at = \"soon\"", "\"at\"")] {
        let dir = tempfile::tempdir().expect("a directory");
        let manifest = dir.path().join("job.toml");
        std::fs::write(&manifest, two_pipelines("region", deed)).expect("written");
        let ran = run_manifest(&manifest, |_| {});
        let problem = ran.outcome.as_ref().expect_err("it cannot be opened");
        assert_eq!(problem.code, Code::OpenRefused, "{problem}");
        assert!(problem.to_string().contains(words), "{problem}");
        assert_eq!(ran.restart_count(), 0);
    }
}
