//! What a job gets of two cores beside a well-behaved twin, and beside jobs that take what they can.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use cofferdam_connectors::builtin;
use cofferdam_engine::{Engine, EngineOptions, JobHandle, job::JobOptions, problem::Problem};
use cofferdam_spec::JobSpec;
use cofferdam_tests::guest;

use crate::support::{block_on, median};

/// How long each pair of jobs is measured.
const MEASURED: Duration = Duration::from_secs(4);
const ROUNDS: usize = 5;

/// What the other job does, with a call without limit.
const OTHERS: [(&str, &str); 6] = [
    ("twin", ""),
    ("computes 300 ms a record", "do = \"hog\""),
    ("fills 60 MB eight times a record", "do = \"fill\", ballast = 60000000"),
    ("calls the host 20,000 times a record", "do = \"calls\""),
    ("logs 20,000 lines a record", "do = \"chatter\""),
    ("writes 8 MiB of memory a record, checkpoints", "ballast = 64000000, dirty = 2000"),
];

fn manifest(name: &str, dir: &Path, parallelism: u32, rate: &str, config: &str) -> String {
    let (component, state) = (guest::probe(), dir.join(name));
    format!(
        "[job]\nname = \"{name}\"\nparallelism = {parallelism}\n\n\
         [execution.checkpointing]\ninterval = \"200ms\"\ndir = {state:?}\n\n\
         [[source]]\nname = \"in\"\nconnector = \"generator\"\n{rate}\n\n\
         [[operator]]\nname = \"probe\"\ncomponent = {component:?}\n\
         inputs = [{{ from = \"in\", partition = \"hash\" }}]\nconfig = {{ quiet = true, {config} }}\n\
         limits.call = \"1 h\"\n\n\
         [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"probe\"]\n"
    )
}

pub(crate) fn run() -> Result<()> {
    block_on(async {
        let engine = Engine::new(EngineOptions::default())?;
        println!(
            "a job of two tasks for each node, as fast as it can, beside another one of twice as many tasks\n"
        );
        println!("{:<46} {:>12} {:>8}", "the other", "records/s", "of twin");
        let mut rates: Vec<Vec<f64>> = vec![Vec::new(); OTHERS.len()];
        for _ in 0..ROUNDS {
            for (rates, (_, config)) in rates.iter_mut().zip(OTHERS) {
                rates.push(rate_beside(&engine, config).await?);
            }
        }
        let twin = median(rates[0].clone());
        for (rates, (name, _)) in rates.into_iter().zip(OTHERS) {
            let rate = median(rates);
            println!("{name:<46} {rate:>12.0} {:>7.1}%", 100.0 * rate / twin);
        }
        Ok(())
    })?
}

async fn submit(engine: &Engine, dir: &Path, text: &str) -> Result<JobHandle, Problem> {
    let spec = JobSpec::parse(&dir.join("job.toml"), text, None, &builtin())?;
    let job = engine.submit(engine.check(spec).await?, JobOptions::default()).await?;
    job.running().await?;
    Ok(job)
}

/// Records a second of a job beside another one.
async fn rate_beside(engine: &Engine, config: &str) -> Result<f64> {
    let dir = tempfile::tempdir()?;
    let other = manifest("other", dir.path(), 4, "", config);
    let other = submit(engine, dir.path(), &other).await?;
    let fine = submit(engine, dir.path(), &manifest("fine", dir.path(), 2, "", "")).await?;
    let read = || fine.metrics().read(|index| index == 0, |_| false).records_read;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (before, began) = (read(), Instant::now());
    tokio::time::sleep(MEASURED).await;
    let rate = (read() - before) as f64 / began.elapsed().as_secs_f64();
    for job in [fine, other] {
        ensure!(job.status().restarts == 0, "{} was restarted", job.name());
        job.cancel();
        job.ended().await?;
    }
    Ok(rate)
}
