//! Limits hold for what a record takes, however many of them the host puts into a call.

use std::path::Path;

use cofferdam_core::job::Outcome;
use cofferdam_tests::{guest, job::run_manifest};

fn manifest(dir: &Path, count: u32, config: &str, limits: &str) -> std::path::PathBuf {
    let component = guest::probe();
    let text = format!(
        "[job]\nname = \"limited\"\n\n[restart-strategy]\ntype = \"none\"\n\n\
         [[source]]\nname = \"in\"\nconnector = \"generator\"\ncount = {count}\n\n\
         [[operator]]\nname = \"probe\"\ncomponent = {component:?}\n\
         inputs = [{{ from = \"in\", partition = \"hash\" }}]\nconfig = {{ {config} }}\n{limits}\n\n\
         [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"probe\"]\n"
    );
    let path = dir.join("job.toml");
    std::fs::write(&path, text).expect("written");
    path
}

/// A batch has a thousand records, each of which takes a fiftieth of its limit.
#[test]
fn a_batch_of_slow_records_keeps_the_limits_of_a_call() {
    for (config, limits) in [
        ("do = \"hog\", busy = 2", "limits.call = \"100 ms\""),
        ("do = \"nap\", at = 1", "limits.wait = \"300 ms\""),
        ("do = \"wordy\"", "limits.output = \"200 KiB\""),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let ran = run_manifest(&manifest(dir.path(), 200, config, limits), |_| {});
        assert_eq!(ran.outcome, Ok(Outcome::Finished), "{config}");
    }
}

/// Nothing says beforehand that a record takes a thousand times as long: its attempt fails once, and then it comes alone.
#[test]
fn a_record_that_is_suddenly_slow_comes_alone_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = "do = \"late-hog\", at = 4000, busy = 60";
    let path = manifest(dir.path(), 4_020, config, "limits.call = \"100 ms\"");
    let text = std::fs::read_to_string(&path).expect("readable");
    let restart = "type = \"fixed-delay\"\nfixed-delay = { attempts = 1, delay = \"0s\" }";
    std::fs::write(&path, text.replace("type = \"none\"", restart)).expect("written");
    let ran = run_manifest(&path, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert_eq!(ran.restart_count(), 1, "it was to fail once");
}
