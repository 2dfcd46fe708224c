//! Several jobs in one engine, and everything that their handles can be asked.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Duration};

use cofferdam_connectors::builtin;
use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    Engine, EngineOptions, JobHandle,
    events::{JobEvent, JobState},
    job::JobOptions,
    progress::Progress,
};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::JobSpec;
use cofferdam_tests::{
    guest,
    job::{HOST_STATE, Harness, committed, golden},
};

#[path = "../../host/engine/examples/two_jobs.rs"]
#[allow(dead_code, reason = "an example has a main function, and this calls what is behind it")]
mod two_jobs;

fn engine() -> Engine {
    let cache_dir = Some(guest::root().join("target/tests-cache"));
    Engine::new(EngineOptions { cache_dir, ..EngineOptions::default() }).expect("an engine")
}

async fn submit(engine: &Engine, manifest: &Path) -> Result<JobHandle, Problem> {
    let spec = JobSpec::read_with(manifest, None, &builtin())?;
    engine.submit(engine.check(spec).await?, JobOptions::default()).await
}

fn on_runtime<T>(future: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(future)
}

fn in_a_directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn tasks(nodes: &[(&str, u32)]) -> BTreeMap<String, u32> {
    nodes.iter().map(|(name, tasks)| ((*name).to_owned(), *tasks)).collect()
}

#[test]
fn the_example_of_two_jobs_runs() {
    let dir = in_a_directory();
    let (short, long) = on_runtime(two_jobs::two_jobs(dir.path())).expect("it runs");
    assert_eq!(short, 20_000);
    assert!(0 < long);
}

#[test]
fn a_job_is_rescaled_up_and_down_while_it_runs_and_every_record_counts_once() {
    let dir = in_a_directory();
    let harness = Harness { snapshot: "declared", rate: Some(40_000), ..Harness::default() };
    let manifest = harness.write(dir.path());
    on_runtime(async {
        let job = submit(&engine(), &manifest).await.expect("it begins");
        for parallelism in [5, 1, 3] {
            job.running().await.expect("it runs");
            job.checkpoint().await.expect("a checkpoint");
            let nodes = tasks(&[("words", parallelism), ("count", parallelism), ("out", 2)]);
            job.rescale(&nodes).await.expect("rescaled");
            assert_eq!(job.spec().parallelism, 2, "what the manifest says stays");
            assert_eq!(job.status().tasks, 2 * parallelism as usize + 2);
        }
        assert_eq!(job.ended().await, Ok(Outcome::Finished));
        assert_eq!(job.status().state, JobState::Finished);
    });
    assert!(committed(&dir.path().join("output")) == golden());
}

#[test]
fn a_rescale_that_cannot_be_is_refused_and_the_job_continues_as_it_was() {
    let dir = in_a_directory();
    // Linear memory cannot be distributed.
    let harness = Harness { snapshot: "both", rate: Some(60_000), ..Harness::default() };
    let manifest = harness.write(dir.path());
    on_runtime(async {
        let job = submit(&engine(), &manifest).await.expect("it begins");
        let refused = job.rescale(&tasks(&[("count", 3)])).await.expect_err("of its memory");
        assert_eq!(refused.code, Code::StateMismatch, "{refused}");
        let unknown = job.rescale(&tasks(&[("cuont", 3)])).await.expect_err("no such node");
        assert!(unknown.to_string().contains("its nodes: words, count, out"), "{unknown}");
        let none = job.rescale(&tasks(&[("count", 0)])).await.expect_err("none");
        assert_eq!(none.code, Code::BadValue);
        job.running().await.expect("it runs");
        assert_eq!((job.status().state, job.status().tasks), (JobState::Running, 6));
        assert_eq!(job.ended().await, Ok(Outcome::Finished));
        let late = job.rescale(&tasks(&[("out", 1)])).await.expect_err("it has ended");
        assert_eq!(late.code, Code::RequestRefused, "{late}");
    });
    assert!(committed(&dir.path().join("output")) == golden());
}

#[test]
fn a_stop_during_a_rescale_ends_the_job_and_it_resumes() {
    let dir = in_a_directory();
    let harness = Harness { snapshot: "declared", rate: Some(60_000), ..Harness::default() };
    let manifest = harness.write(dir.path());
    for parallelism in [3, 4, 5] {
        on_runtime(async {
            let job = submit(&engine(), &manifest).await.expect("it begins or resumes");
            job.running().await.expect("it runs");
            job.checkpoint().await.expect("a checkpoint");
            let nodes = tasks(&[("count", parallelism)]);
            let (rescaled, ()) = tokio::join!(job.rescale(&nodes), async {
                tokio::time::sleep(Duration::from_millis(2 * u64::from(parallelism))).await;
                job.stop();
            });
            // Whichever was first: it has stopped.
            assert!(matches!(job.ended().await, Ok(Outcome::Stopped { .. })), "{rescaled:?}");
            assert_eq!(job.status().state, JobState::Stopped);
        });
        fs::write(&manifest, Harness { parallelism, ..harness.clone() }.manifest())
            .expect("written");
    }
    let ran = Harness { parallelism: 2, rate: None, ..harness }.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert!(committed(&dir.path().join("output")) == golden());
}

#[test]
fn of_a_savepoint_that_ends_the_job_and_a_rescale_only_one_happens() {
    let dir = in_a_directory();
    let harness = Harness { snapshot: "declared", rate: Some(60_000), ..Harness::default() };
    let manifest = harness.write(dir.path());
    on_runtime(async {
        let job = submit(&engine(), &manifest).await.expect("it begins");
        job.running().await.expect("it runs");
        let nodes = tasks(&[("count", 3)]);
        let savepoint = dir.path().join("savepoint");
        let (rescaled, saved) =
            tokio::join!(job.rescale(&nodes), job.stop_with_savepoint(savepoint.clone(), false));
        assert!(rescaled.is_ok() != saved.is_ok(), "{rescaled:?}, {saved:?}");
        if saved.is_ok() {
            assert!(matches!(job.ended().await, Ok(Outcome::Stopped { has_savepoint: true, .. })));
            return;
        }
        job.running().await.expect("it runs on");
        job.stop_with_savepoint(savepoint, false).await.expect("now it stops");
        assert!(matches!(job.ended().await, Ok(Outcome::Stopped { has_savepoint: true, .. })));
        let late = job.rescale(&nodes).await.expect_err("it has ended");
        assert_eq!(late.code, Code::RequestRefused);
    });
    assert!(dir.path().join("savepoint").is_dir());
}

#[test]
fn a_job_that_fails_leaves_the_other_alone_and_its_handle_says_what_has_failed() {
    let (good, bad) = (in_a_directory(), in_a_directory());
    let good_manifest = Harness { rate: Some(60_000), ..Harness::default() }.write(good.path());
    let failing = Harness {
        config: r#"do = "trap", at = 1000, attempts = 100"#.to_owned(),
        attempts: 2,
        ..Harness::default()
    };
    let bad_manifest = failing.write(bad.path());
    on_runtime(async {
        let engine = engine();
        let good = submit(&engine, &good_manifest).await.expect("it begins");
        let bad = submit(&engine, &bad_manifest).await.expect("it begins");
        let mut events = bad.subscribe();
        let taken = submit(&engine, &good_manifest).await.err().expect("its state is in use");
        assert_eq!(taken.code, Code::StateInUse);
        let problem = bad.ended().await.expect_err("it fails for good");
        assert_eq!(problem.code, Code::Trapped, "{problem}");
        let status = bad.status();
        assert_eq!((status.state, status.restarts), (JobState::Failed, 2));
        let failures = bad.failures();
        let kinds: Vec<&str> =
            failures.iter().filter_map(|entry| entry.event["event"].as_str()).collect();
        assert_eq!(kinds.iter().filter(|kind| **kind == "restarting").count(), 2, "{kinds:?}");
        assert_eq!(kinds.last(), Some(&"failed"));
        let logged = bad.logs();
        assert!(
            logged.iter().any(
                |line| line.message.contains("one too many") && line.task.starts_with("count/")
            ),
            "the last words of a panic: {logged:?}"
        );
        let mut heard = Vec::new();
        while let Some(event) = events.next().await {
            if let JobEvent::Progress(progress) = event {
                heard.push(progress);
            }
        }
        assert!(matches!(heard.last().map(Arc::as_ref), Some(Progress::Failed { .. })));
        let refused = bad.checkpoint().await.expect_err("it has ended");
        assert_eq!(refused.code, Code::RequestRefused);
        assert_eq!(engine.jobs().iter().map(JobHandle::name).collect::<Vec<_>>(), ["probe"]);
        assert_eq!(good.ended().await, Ok(Outcome::Finished));
        assert!(engine.jobs().is_empty());
        assert_eq!(good.failures().len(), 0);
    });
    assert!(committed(&good.path().join("output")) == golden());
}

#[test]
fn a_checkpoint_is_taken_when_it_is_asked_for_and_shown_task_by_task() {
    let dir = in_a_directory();
    let slow = Harness { interval_ms: 3_600_000, rate: Some(20_000), ..Harness::default() };
    let manifest = slow.write(dir.path());
    on_runtime(async {
        let job = submit(&engine(), &manifest).await.expect("it begins");
        job.running().await.expect("it runs");
        let first = job.checkpoint().await.expect("one");
        let second = job.checkpoint().await.expect("another");
        assert!(first < second);
        let kept: Vec<u64> = job.checkpoints().iter().map(|kept| kept.checkpoint).collect();
        assert_eq!(kept, [second], "one is kept");
        assert_eq!(job.status().last_checkpoint, Some(second));
        let tasks = job.checkpoint_tasks(second).await.expect("it is kept");
        let names: Vec<&str> = tasks.iter().map(|task| task.name.as_str()).collect();
        assert_eq!(names, ["words/0", "words/1", "count/0", "count/1", "out/0", "out/1"]);
        assert!(tasks.iter().any(|task| 0 < task.memory_bytes));
        job.checkpoint_tasks(first).await.expect_err("it is not kept any more");
        assert!(0 < job.metrics().checkpoints.load(std::sync::atomic::Ordering::Relaxed));
        job.cancel();
        assert!(matches!(job.ended().await, Ok(Outcome::Canceled { .. })));
        assert_eq!(job.status().state.flink_name(), "CANCELED");
    });
}

/// A program that embeds the engine may have one thread alone.
#[test]
fn jobs_run_on_a_runtime_of_one_thread() {
    let dirs = [in_a_directory(), in_a_directory()];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let engine = engine();
        let mut jobs = Vec::new();
        for dir in &dirs {
            let harness = Harness {
                snapshot: "declared",
                checkpointing: HOST_STATE.to_owned(),
                interval_ms: 10,
                ..Harness::default()
            };
            jobs.push(submit(&engine, &harness.write(dir.path())).await.expect("it begins"));
        }
        for job in jobs {
            assert_eq!(job.ended().await, Ok(Outcome::Finished));
        }
    });
    for dir in &dirs {
        assert!(committed(&dir.path().join("output")) == golden());
    }
}
