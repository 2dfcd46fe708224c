//! A disk on which one call fails, beneath the program: whatever the call was, the run succeeds with the
//! right output, or it fails with an error, and the next run resumes and finishes.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use cofferdam_core::random::Random;

use crate::disk::{DiskJob, said, wait};

/// Faults of one job before the next job with other settings.
const FAULTS_OF_A_JOB: u64 = 12;
/// EIO and ENOSPC.
const ERRNOS: [&str; 2] = ["5", "28"];
const MODES: [&str; 4] = ["once", "reopen", "gone", "torn"];

/// What was tried.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Faults that have struck.
    pub faults: u64,
    /// Faults that the run has survived.
    pub survived: u64,
    /// By call.
    pub calls: BTreeMap<String, u64>,
}

/// Makes so many calls fail, one a run.
///
/// # Errors
/// Where a run succeeds with another output, or the next one does not, with the seed.
pub fn run(faults: u64, seed: u64, mut on_fault: impl FnMut(&Tally)) -> Result<Tally> {
    let mut tally = Tally::default();
    for seed in seed.. {
        let mut random = Random::new(seed);
        for _ in 0..FAULTS_OF_A_JOB {
            let job = DiskJob::new(&mut Random::new(seed))?;
            strike(&job, &mut random, &mut tally)
                .with_context(|| format!("SEED={seed}, {}", job.variant))?;
            on_fault(&tally);
            if faults <= tally.faults {
                return Ok(tally);
            }
        }
    }
    Ok(tally)
}

fn strike(job: &DiskJob, random: &mut Random, tally: &mut Tally) -> Result<()> {
    let mut choose =
        |from: &[&'static str]| from[random.between(0, from.len() as u64 - 1) as usize];
    let (mode, errno) = (choose(&MODES), choose(&ERRNOS));
    // Half of them in the beginning, where there is more to go wrong.
    let at = match random.one_in(2) {
        true => random.between(1, 150),
        false => random.between(1, 900),
    };
    let report = job.beside("report");
    let mut command = job.run_on_disk();
    command.env("DISK_FAIL", at.to_string()).env("DISK_MODE", mode).env("DISK_ERRNO", errno);
    command.env("DISK_REPORT", &report);
    // On what an earlier run has left, as often as not.
    let moment = |random: &mut Random| Duration::from_millis(random.between(40, 260));
    if random.one_in(2) {
        job.kill_after(job.run().spawn()?, moment(random))?;
    }
    let run = command.spawn()?;
    let output = match random.one_in(3) {
        true => job.stop_after(run, moment(random))?,
        false => wait(run)?,
    };
    let words = said(&output);
    let told = fs::read_to_string(&report).unwrap_or_default();
    let Some(struck) = told.lines().find_map(|line| line.strip_prefix("struck ")) else {
        // It had come to its end before.
        ensure!(output.status.success(), "no call was made to fail: {words}");
        return job.finish();
    };
    let fault = format!("call {at} ({struck}) fails with {errno}, {mode}");
    ensure!(
        !words.contains("panicked at /") && !words.contains("panicked at host/"),
        "{fault}: {words}"
    );
    ensure!(
        output.status.success() || words.contains("error[C"),
        "{fault}: an error has a code: {words}"
    );
    ensure!(
        !output.status.success() || !words.contains("error[C"),
        "{fault}: it succeeds with an error: {words}"
    );
    tally.survived += u64::from(output.status.success());
    tally.faults += 1;
    let call = struck.split(' ').next().unwrap_or_default();
    *tally.calls.entry(call.to_owned()).or_default() += 1;
    job.finish().with_context(|| format!("{fault}; that run: {words}"))
}
