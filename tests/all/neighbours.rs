//! Jobs that share an engine with one that is greedy: what it makes the host do holds up nothing but itself.

use std::{
    path::Path,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use cofferdam_connectors::builtin;
use cofferdam_core::job::Outcome;
use cofferdam_engine::{Engine, EngineOptions, JobHandle, job::JobOptions};
use cofferdam_spec::JobSpec;
use cofferdam_tests::guest;

fn engine() -> Engine {
    let cache_dir = Some(guest::root().join("target/tests-cache"));
    Engine::new(EngineOptions { cache_dir, ..EngineOptions::default() }).expect("an engine")
}

/// A generator that never ends, and as many probes as `parallelism` says.
fn manifest(name: &str, parallelism: usize, config: &str) -> String {
    let component = guest::probe();
    let component = component.display();
    format!(
        r#"
[job]
name = "{name}"
parallelism = {parallelism}
[[source]]
name = "in"
connector = "generator"
[[operator]]
name = "probe"
component = "{component}"
inputs = [{{ from = "in", partition = "hash" }}]
config = {{ quiet = "true", {config} }}
limits.call = "1 h"
[[sink]]
name = "out"
connector = "discard"
inputs = ["probe"]
"#
    )
}

async fn submit(engine: &Engine, dir: &Path, text: &str) -> JobHandle {
    let spec = JobSpec::parse(&dir.join("job.toml"), text, None, &builtin()).expect("a job");
    let checked = engine.check(spec).await.expect("it can run");
    engine.submit(checked, JobOptions::default()).await.expect("it begins")
}

fn on_one_thread<T>(future: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().expect("a runtime").block_on(future)
}

async fn read(job: &JobHandle, records: u64) {
    let read = || job.metrics().read(|index| index == 0, |_| false).records_read;
    let (before, deadline) = (read(), Instant::now() + Duration::from_secs(60));
    while read() < before + records {
        assert!(Instant::now() < deadline, "{} of {records} records", read() - before);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What the threads of guests have used of the processor, in the kernel's ticks.
fn guests_ticks() -> u64 {
    let mut ticks = 0;
    for thread in std::fs::read_dir("/proc/self/task").expect("threads") {
        let thread = thread.expect("a thread").path();
        let Ok(stat) = std::fs::read_to_string(thread.join("stat")) else { continue };
        if !stat.contains("(cofferdam-guest") {
            continue;
        }
        // The name may contain anything; time in user and kernel mode are the 12th and 13th number after it.
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        ticks += fields.skip(11).take(2).filter_map(|it| it.parse::<u64>().ok()).sum::<u64>();
    }
    ticks
}

/// Twice as many greedy guests as there are cores. Everything that is not a guest has one thread here; when guests had
/// the threads of the runtime, its timers came 61 calls later.
#[test]
fn greedy_guests_hold_up_neither_timers_nor_requests_nor_another_job() {
    let dir = tempfile::tempdir().expect("a directory");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for (deed, config) in [
        ("hog", "do = \"hog\""),
        ("fill", "do = \"fill\", ballast = \"60000000\""),
        ("calls", "do = \"calls\""),
        ("chatter", "do = \"chatter\""),
    ] {
        on_one_thread(async {
            let engine = engine();
            let greedy = submit(&engine, dir.path(), &manifest(deed, 2 * cores, config)).await;
            greedy.running().await.expect("it runs");
            let fine = submit(&engine, dir.path(), &manifest("fine", 2, "")).await;
            fine.running().await.expect("it runs");
            let (mut late, busy) = (Vec::new(), guests_ticks());
            for _ in 0..100 {
                let began = Instant::now();
                tokio::time::sleep(Duration::from_millis(1)).await;
                late.push(began.elapsed());
            }
            late.sort();
            assert!(busy < guests_ticks(), "{deed}: no guest was busy");
            assert!(late[90] < Duration::from_millis(100), "{deed}: {:?}", &late[80..]);
            read(&fine, 100_000).await;
            assert_eq!(greedy.metrics().restarts.load(Ordering::Relaxed), 0, "{deed}");
            for job in [&fine, &greedy] {
                job.cancel();
                let ended = tokio::time::timeout(Duration::from_secs(20), job.ended()).await;
                let ended = ended.expect("its end is held up");
                assert!(matches!(ended, Ok(Outcome::Canceled { .. })), "{deed}: {ended:?}");
            }
        });
    }
}
