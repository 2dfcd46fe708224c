//! Failover of one region: in a job of a thousand tasks, and ten thousand times beside a pipeline
//! that is not to notice.

use std::time::Instant;

use anyhow::{Result, ensure};
use cofferdam_core::job::Outcome;
use cofferdam_engine::progress::{Progress, Restart};
use cofferdam_tests::{
    guest,
    job::{check_counts, committed, run_manifest},
};

use crate::support::{after_restarts, median, percentile_99};

const PIPELINES: u32 = 333;
const TRAPS_OF_ONE: u64 = 30;
const TRAPS_OF_MANY: u64 = 10_000;
const RECORDS: u64 = 60_000;

pub(crate) fn run() -> Result<()> {
    one_of_many()?;
    ten_thousand_traps()
}

fn head(name: &str, interval: &str) -> String {
    format!(
        "[job]\nname = \"{name}\"\n\n[execution.checkpointing]\ninterval = \"{interval}\"\n\n\
         [restart-strategy]\ntype = \"fixed-delay\"\nfixed-delay = {{ attempts = 1000000, delay = \"0s\" }}\n"
    )
}

/// 333 pipelines of a source, an operator and a sink; one operator traps again and again.
fn one_of_many() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let component = guest::probe();
    let text = format!(
        "{}\n[[source]]\nname = \"words\"\nconnector = \"generator\"\nparallelism = {PIPELINES}\nrate = {}\n\n\
         [[operator]]\nname = \"count\"\ncomponent = {component:?}\nparallelism = {PIPELINES}\ninputs = [\"words\"]\n\
         config = {{ do = \"trap\", task = 7, at = 100, step = 20, attempts = {TRAPS_OF_ONE}, quiet = true }}\n\n\
         [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"count\"]\n",
        head("many", "500ms"),
        PIPELINES * 100,
    );
    let manifest = dir.path().join("job.toml");
    std::fs::write(&manifest, text)?;
    let ran = run_manifest(&manifest, |job| {
        let handle = job.control();
        after_restarts(job, TRAPS_OF_ONE, move || handle.cancel());
    });
    ensure!(matches!(ran.outcome, Ok(Outcome::Canceled { .. })), "{:?}", ran.outcome);
    let mut touched = 0;
    for progress in &ran.progress {
        if let Progress::Restarting(Restart { restarting, tasks, .. }) = progress {
            touched = touched.max(restarting.len());
            ensure!(*tasks == 3 * PIPELINES as usize, "{tasks} tasks");
        }
    }
    let recoveries = ran.recoveries_ms();
    ensure!(TRAPS_OF_ONE / 2 < recoveries.len() as u64, "only {} recoveries", recoveries.len());
    println!(
        "one region of {} tasks: {touched} tasks restarted, {:.2} ms median, {:.2} ms 99th percentile, {} traps\n",
        3 * PIPELINES,
        median(recoveries.clone()),
        percentile_99(recoveries),
        ran.restart_count(),
    );
    Ok(())
}

/// Two pipelines; the operators of one trap ten thousand times in all.
fn ten_thousand_traps() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let component = guest::probe();
    let pipeline = |name: &str, config: &str| {
        format!(
            "\n[[source]]\nname = \"words-{name}\"\nconnector = \"generator\"\nvocabulary = 300\nseed = 5\ncount = {RECORDS}\n\n\
             [[operator]]\nname = \"count-{name}\"\ncomponent = {component:?}\n\
             inputs = [{{ from = \"words-{name}\", partition = \"hash\" }}]\nconfig = {{ {config} }}\n\n\
             [[sink]]\nname = \"out-{name}\"\nconnector = \"file\"\ninputs = [\"count-{name}\"]\npath = \"output-{name}\"\n"
        )
    };
    let deed = format!("do = \"trap\", at = 50, step = 1, attempts = {TRAPS_OF_MANY}");
    let text = head("two", "100ms") + &pipeline("a", &deed) + &pipeline("b", "");
    let manifest = dir.path().join("job.toml");
    std::fs::write(&manifest, text)?;
    let began = Instant::now();
    let mut metrics = None;
    let ran = run_manifest(&manifest, |job| metrics = Some(job.metrics()));
    let took = began.elapsed();
    ensure!(ran.outcome == Ok(Outcome::Finished), "{:?}", ran.outcome);
    for name in ["a", "b"] {
        let lines = committed(&dir.path().join(format!("output-{name}")));
        check_counts(&lines, RECORDS).map_err(|error| anyhow::anyhow!("{name}: {error}"))?;
    }
    for progress in &ran.progress {
        if let Progress::Restarting(Restart { restarting, .. }) = progress {
            let other = restarting.keys().find(|task| task.contains("-b/"));
            ensure!(other.is_none(), "{other:?} was restarted");
        }
    }
    let read = metrics.map_or(0, |metrics| {
        let is_other = |index: usize| metrics.operators[index].name == "words-b";
        metrics.read(is_other, |_| false).records_read
    });
    ensure!(read == RECORDS, "the other pipeline read {read} records, {RECORDS} are there");
    println!(
        "{} traps in one region in {:.1} s: outputs are right, and the other region read each of its {RECORDS} records once",
        ran.restart_count(),
        took.as_secs_f64(),
    );
    Ok(())
}
