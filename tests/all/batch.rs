//! Jobs whose regions run one after the other, over result partitions on disk.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cofferdam_core::job::Outcome;
use cofferdam_engine::{job::Job, progress::Progress};
use cofferdam_tests::{
    guest,
    job::{
        Ran, after_records, block_on, check_counts, committed, job_with_restarts, rounds,
        run_manifest, when, words,
    },
};

const COUNT: u64 = 60_000;

/// Three regions over exchanges of a type: numbers, words and counts, with what the counters do.
#[derive(Clone)]
struct Batch {
    exchange: &'static str,
    parallelism: u32,
    config: String,
    attempts: u64,
    rate: Option<u32>,
}

impl Default for Batch {
    fn default() -> Self {
        let (exchange, config) = ("blocking", String::new());
        Self { exchange, parallelism: 2, config, attempts: 100, rate: None }
    }
}

impl Batch {
    fn write(&self, dir: &Path) -> PathBuf {
        let Self { exchange, parallelism, config, attempts, rate } = self;
        let component = guest::probe();
        let rate = rate.map_or(String::new(), |rate| format!("rate = {rate}"));
        let (job, words) = (job_with_restarts("batch", *parallelism, *attempts), words(500, COUNT));
        let text = format!(
            r#"{job}{words}
timestamps = true
{rate}

[[operator]]
name = "first"
component = {component:?}
inputs = [{{ from = "words", partition = "hash", exchange = "{exchange}" }}]

[[operator]]
name = "second"
component = {component:?}
inputs = [{{ from = "first", partition = "rebalance", exchange = "{exchange}" }}]
config = {{ {config} }}

[[sink]]
name = "out"
connector = "file"
inputs = [{{ from = "second", partition = "forward", exchange = "pipelined" }}]
path = "output"

[[sink]]
name = "firsts"
connector = "file"
inputs = [{{ from = "first", partition = "forward", exchange = "pipelined" }}]
path = "firsts"
"#
        );
        let path = dir.join("job.toml");
        fs::write(&path, text).expect("written");
        path
    }

    fn run_in(&self, dir: &Path, with: impl FnOnce(&Job)) -> Ran {
        run_manifest(&self.write(dir), with)
    }
}

/// What the first counters have written, and what the second ones: each word once for each record.
fn check(dir: &Path, story: &str) {
    check_counts(&committed(&dir.join("firsts")), COUNT).expect(story);
    let words: Vec<String> = committed(&dir.join("output"));
    assert_eq!(words.len() as u64, COUNT, "{story}");
}

#[test]
fn every_exchange_gives_every_record_once() {
    for exchange in ["blocking", "blocking-persistent", "hybrid-full", "hybrid-selective"] {
        for parallelism in [1, 3] {
            let dir = tempfile::tempdir().expect("a directory");
            let batch = Batch { exchange, parallelism, ..Batch::default() };
            let ran = batch.run_in(dir.path(), |_| {});
            assert_eq!(ran.outcome, Ok(Outcome::Finished), "{exchange}");
            check(dir.path(), exchange);
            let left = fs::read_dir(dir.path().join("batch.cofferdam")).expect("listed").flatten();
            let mut left: Vec<_> = left.map(|entry| entry.file_name()).collect();
            left.sort();
            assert_eq!(left, ["JOB", "LOCK", "outputs"], "{exchange}: what it was is left");
        }
    }
}

#[test]
fn a_trap_in_one_region_leaves_the_finished_ones_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = r#"do = "trap", at = 5000, attempts = 3"#.to_owned();
    let ran = Batch { config, ..Batch::default() }.run_in(dir.path(), |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    check(dir.path(), "traps");
    let restarted = ran.restarted();
    assert!(3 <= restarted.len(), "{restarted:?}");
    for tasks in restarted {
        let is_theirs = |task: &String| task.starts_with("second/") || task.starts_with("out/");
        assert!(tasks.iter().all(is_theirs), "{tasks:?}");
        assert_eq!(tasks.len(), 2, "one pipeline of a counter and its sink: {tasks:?}");
    }
}

#[test]
fn lost_partition_is_made_again_by_its_producer_and_gives_no_wrong_record() {
    for harm in ["damage", "remove"] {
        let dir = tempfile::tempdir().expect("a directory");
        let partitions = dir.path().join("batch.cofferdam/partitions");
        // The second counters are slow enough for the harm to strike before they have read all.
        let config = r#"do = "nap", at = 400"#.to_owned();
        let batch = Batch { config, parallelism: 1, ..Batch::default() };
        let struck = Arc::new(AtomicBool::new(false));
        let ran = batch.run_in(dir.path(), |job| {
            let (metrics, struck) = (job.metrics(), struck.clone());
            // Once it has emitted, what the first counter has made is read.
            let written = move || metrics.read(|_| false, |index| index == 3).records_written;
            when(
                move || 0 < written(),
                move || struck.store(harm_last_block(&partitions, harm), Ordering::Release),
            );
        });
        assert!(struck.load(Ordering::Acquire), "{harm}: there was nothing to harm");
        assert_eq!(ran.outcome, Ok(Outcome::Finished), "{harm}");
        check(dir.path(), harm);
        let restarted = ran.restarted();
        let [tasks] = restarted.as_slice() else { panic!("{harm}: {restarted:?}") };
        // The partition of the sources was released when the first counter had read it, so they, too.
        assert_eq!(tasks, &["first/0", "firsts/0", "out/0", "second/0", "words/0"], "{harm}");
    }
}

/// Harms the end of what the first counter has made for the second; false: it is not there.
fn harm_last_block(partitions: &Path, harm: &str) -> bool {
    let entries = fs::read_dir(partitions).into_iter().flatten().flatten();
    // The edge to the second counter is the second one.
    let Some(file) = entries
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("1-")))
    else {
        return false;
    };
    if harm == "remove" {
        return fs::remove_file(file).is_ok();
    }
    let Ok(mut bytes) = fs::read(&file) else { return false };
    let last = bytes.len() - 100;
    bytes[last] ^= 0x40;
    fs::write(&file, bytes).is_ok()
}

#[test]
fn killed_job_begins_anew_and_stopped_one_says_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let batch = Batch { rate: Some(60_000), ..Batch::default() };
    let ran = batch.run_in(dir.path(), |job| after_records(job, 10_000, |job| job.stop()));
    assert!(matches!(ran.outcome, Ok(Outcome::Stopped { checkpoint: None, .. })), "{ran:?}");
    let manifest = batch.write(dir.path());
    let mut child = guest::start(&["run", "--no-progress"], &manifest, Stdio::null());
    let partitions = dir.path().join("batch.cofferdam/partitions");
    let deadline = Instant::now() + Duration::from_secs(30);
    let has_bytes = |file: fs::DirEntry| file.metadata().is_ok_and(|it| 0 < it.len());
    let has_result =
        || fs::read_dir(&partitions).is_ok_and(|mut files| files.any(|it| it.is_ok_and(has_bytes)));
    while !has_result() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(has_result(), "killed with a result that is not whole");
    child.kill().expect("it runs");
    child.wait().expect("it has ended");
    let ran = batch.run_in(dir.path(), |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    check(dir.path(), "killed");
}

#[test]
fn savepoints_of_such_a_job_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().expect("a directory");
    let batch = Batch { rate: Some(60_000), ..Batch::default() };
    let answer = Arc::new(Mutex::new(None));
    let target = dir.path().join("saved");
    let ran = batch.run_in(dir.path(), |job| {
        let answer = answer.clone();
        after_records(job, 5_000, move |job| {
            let saved = block_on(job.savepoint(target));
            *answer.lock().expect("no panic") = Some(saved);
        });
    });
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    let answer = answer.lock().expect("no panic").take().expect("answered");
    assert!(answer.expect_err("refused").reason.contains("exchanges that are not pipelined"));
}

#[test]
fn a_result_larger_than_its_limit_is_told_as_such() {
    let dir = tempfile::tempdir().expect("a directory");
    let batch = Batch { attempts: 0, ..Batch::default() };
    let manifest = batch.write(dir.path());
    let text = fs::read_to_string(&manifest).expect("readable");
    let limited = "name = \"first\"\nlimits = { partition = \"64KiB\" }";
    fs::write(&manifest, text.replacen("name = \"first\"", limited, 1)).expect("written");
    let problem = run_manifest(&manifest, |_| {}).outcome.expect_err("too large");
    assert_eq!(problem.code.number(), "C0102", "{problem}");
    assert!(problem.to_string().contains("raise limits.partition"), "{problem}");
}

#[test]
fn a_job_that_runs_region_by_region_does_not_begin_half_way() {
    let dir = tempfile::tempdir().expect("a directory");
    let pipelined = Batch { exchange: "pipelined-bounded", rate: Some(60_000), ..Batch::default() };
    let ran = pipelined.run_in(dir.path(), |job| after_records(job, 5_000, |job| job.stop()));
    assert!(matches!(ran.outcome, Ok(Outcome::Stopped { is_last: true, .. })), "{:?}", ran.outcome);
    let blocking = Batch { exchange: "blocking", ..pipelined.clone() };
    let problem = blocking.run_in(dir.path(), |_| {}).outcome.expect_err("refused").to_string();
    assert!(problem.contains("in the middle of a job"), "{problem}");
    let ran = pipelined.run_in(dir.path(), |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished), "and nothing was harmed");
    check(dir.path(), "as it was");
}

#[test]
fn an_input_that_is_named_twice_brings_every_record_twice() {
    for exchange in ["pipelined", "blocking"] {
        let dir = tempfile::tempdir().expect("a directory");
        let manifest = Batch::default().write(dir.path());
        let text = fs::read_to_string(&manifest).expect("readable");
        let input =
            format!(r#"{{ from = "first", partition = "rebalance", exchange = "{exchange}" }}"#);
        let once = r#"[{ from = "first", partition = "forward", exchange = "pipelined" }]"#;
        assert!(text.contains(once));
        fs::write(&manifest, text.replace(once, &format!("[{input}, {input}]"))).expect("written");
        assert_eq!(run_manifest(&manifest, |_| {}).outcome, Ok(Outcome::Finished));
        let mut lines = committed(&dir.path().join("firsts"));
        lines.sort();
        assert_eq!(lines.len() as u64, 2 * COUNT, "{exchange}");
        assert!(lines.chunks(2).all(|pair| pair[0] == pair[1]), "{exchange}");
    }
}

#[test]
fn full_failover_begins_with_the_first_region_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = r#"do = "trap", at = 5000, attempts = 1"#.to_owned();
    let batch = Batch { config, ..Batch::default() };
    let manifest = batch.write(dir.path());
    let text = fs::read_to_string(&manifest).expect("readable");
    let full = "[jobmanager.execution]\nfailover-strategy = \"full\"\n\n[[source]]";
    fs::write(&manifest, text.replacen("[[source]]", full, 1)).expect("written");
    let ran = run_manifest(&manifest, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    check(dir.path(), "full");
    assert!(ran.restarted().iter().all(|tasks| tasks.len() == 10), "{:?}", ran.restarted());
}

#[test]
fn runtime_mode_batch_makes_the_exchanges_blocking() {
    let dir = tempfile::tempdir().expect("a directory");
    let manifest = Batch::default().write(dir.path());
    let text = fs::read_to_string(&manifest).expect("readable");
    let text = text.replace(", exchange = \"blocking\"", "").replacen(
        "[restart-strategy]",
        "[execution]\nruntime-mode = \"BATCH\"\n\n[restart-strategy]",
        1,
    );
    fs::write(&manifest, text).expect("written");
    let ran = run_manifest(&manifest, |_| {});
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    check(dir.path(), "BATCH");
    let is_start = |progress: &&Progress| matches!(progress, Progress::Started { .. });
    assert!(3 <= ran.progress.iter().filter(is_start).count(), "region by region");
}

#[test]
fn thousands_of_traps_in_one_region_change_no_record_and_touch_no_other() {
    let traps = rounds("REGION_TRAPS", 300);
    let golden = tempfile::tempdir().expect("a directory");
    let batch = Batch { parallelism: 1, ..Batch::default() };
    assert_eq!(batch.run_in(golden.path(), |_| {}).outcome, Ok(Outcome::Finished));

    let dir = tempfile::tempdir().expect("a directory");
    let config = format!(r#"do = "trap", at = 3, attempts = {traps}"#);
    let began = Instant::now();
    let ran = Batch { config, attempts: traps, ..batch }.run_in(dir.path(), |_| {});
    println!("{traps} traps in {:.1} s", began.elapsed().as_secs_f64());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert_eq!(ran.restart_count() as u64, traps);
    let is_theirs = |task: &String| task == "second/0" || task == "out/0";
    assert!(ran.restarted().iter().all(|tasks| tasks.iter().all(is_theirs)));
    // Sources, first counters and their sink were started once, and have read each record once.
    let firsts = ran
        .progress
        .iter()
        .filter(|progress| matches!(progress, Progress::Started { attempt: 0, .. }));
    assert_eq!(firsts.count(), 3, "three regions in their first attempt");
    for output in ["firsts", "output"] {
        let (faulted, golden) = (dir.path().join(output), golden.path().join(output));
        assert!(committed(&faulted) == committed(&golden), "{output} is not the golden run's");
    }
}
