//! Runs of a history, and what disturbs them.

use std::{fs, process::Stdio, thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};

use super::{Tally, World, ends_by_itself, fits, is_killed, refusal};
use crate::{
    disk::{library, said},
    guest,
};

impl World {
    /// One run, which is disturbed at a random moment. True where it has finished.
    pub(super) fn run_and_disturb(&mut self, tally: &mut Tally) -> Result<bool> {
        let state = self.state.clone();
        let mut command = self.run_command()?;
        let has_bad_disk = self.random.one_in(6);
        if has_bad_disk {
            let at = self.random.between(1, 1_500).to_string();
            let mode = ["once", "reopen", "torn"][self.random.between(0, 2) as usize];
            command.env("LD_PRELOAD", library()).env("DISK_ROOT", self.dir.canonicalize()?);
            command.env("DISK_FAIL", at).env("DISK_MODE", mode);
        }
        if self.random.one_in(4) {
            let seconds =
                [-86_400 * 365, -3_600, 3_600, 86_400 * 365][self.random.between(0, 3) as usize];
            let from = self.random.between(0, 40);
            command.env("LD_PRELOAD", library()).env("DISK_CLOCK", format!("{seconds}@{from}"));
            self.did("clocks that jump", tally);
        }
        // Where it has written must be known for some of the steps.
        let is_unread =
            self.random.one_in(4) && !self.is_moved && self.ran_with_out == self.setup.out;
        // What it says waits for a reader that is there and does not read.
        let sleeping = match is_unread && self.random.one_in(2) {
            true => {
                self.did("readers that do not read", tally);
                Some(self.full_pipe(&mut command)?)
            }
            false => None,
        };
        let mut child = command.spawn()?;
        // Or the writing ends would stay open here.
        drop(command);
        sleep(Duration::from_millis(self.random.between(30, 450)));
        if is_unread && sleeping.is_none() {
            // What it says from now on nobody reads.
            drop(child.stderr.take());
            self.did("closed pipes", tally);
        }
        sleep(Duration::from_millis(self.random.between(0, 450)));
        let what = self.random.between(0, 3);
        let mut savepoint = None;
        if what == 0 || what == 1 {
            self.savepoints += 1;
            let name = format!("saved-{}", self.savepoints);
            let verb =
                if what == 0 { vec!["stop", &state, "-p"] } else { vec!["savepoint", &state] };
            let asked: Vec<&str> = verb.into_iter().chain([name.as_str()]).collect();
            let answer = self.command(&asked).stdout(Stdio::piped()).output()?;
            if answer.status.success() {
                let dir = self.dir.join(&name);
                let told = String::from_utf8_lossy(&answer.stdout).into_owned();
                let made = fs::read_dir(dir).with_context(|| format!("{asked:?}: {told}"))?;
                let made = made.flatten().next();
                savepoint = made.map(|it| format!("{name}/{}", it.file_name().to_string_lossy()));
            }
        }
        guest::signal(&child, if what == 1 || what == 2 { "KILL" } else { "INT" });
        if sleeping.is_some() {
            ends_by_itself(&mut child)?;
        }
        let output = child.wait_with_output()?;
        drop(sleeping);
        self.settle(&output);
        let is_killed = is_killed(&output);
        if is_unread {
            self.settled = None;
            if !has_bad_disk && !is_killed && !output.status.success() {
                // An earlier one that nobody has read had finished.
                let read = self.run_once()?;
                ensure!(self.is_finished, "after a run that nobody has read: {}", said(&read));
                return Ok(true);
            }
            self.ran_with = self.setup;
        }
        let is_told = is_unread || said(&output).contains("error[C");
        let is_told = (has_bad_disk && is_told) || self.is_finished;
        ensure!(is_killed || output.status.success() || is_told, "a run: {}", said(&output));
        let name = match (what, is_killed) {
            _ if has_bad_disk => "failing disks",
            (0, _) => "stops with a savepoint",
            (1, true) => "savepoints and kills",
            (_, true) => "kills",
            (_, false) => "stops",
        };
        self.did(name, tally);
        if self.is_finished {
            return Ok(true);
        }
        match savepoint {
            Some(savepoint) if what == 0 => self.resume(&savepoint),
            Some(savepoint) => {
                self.kept.push((savepoint, self.setup));
                self.fork(tally)
            }
            // The stop of a bad disk may have written its savepoint and no answer.
            None if has_bad_disk && what == 0 => self.resume_from_any(),
            None => self.fork(tally),
        }
    }

    /// Where the job was stopped with a savepoint that nobody was told of.
    pub(super) fn resume_from_any(&mut self) -> Result<bool> {
        let name = format!("saved-{}", self.savepoints);
        let record = fs::read_to_string(self.dir.join(&self.state).join("JOB")).unwrap_or_default();
        if !record.contains("\"stopped\"") {
            return Ok(false);
        }
        let made = fs::read_dir(self.dir.join(&name)).context("it was stopped with one")?;
        let made = made.flatten().map(|it| it.file_name().to_string_lossy().into_owned());
        let made = made.filter(|name| !name.starts_with('.')).min().context("a savepoint")?;
        self.resume(&format!("{name}/{made}"))
    }

    /// From the savepoint of a stop, in the same state directory: killed, and the same command again, as a
    /// supervisor does it. Finishes.
    pub(super) fn resume(&mut self, savepoint: &str) -> Result<bool> {
        self.write_manifest(&self.setup)?;
        let state = self.state.clone();
        let run = ["run", "job.toml", "--state-dir", &state, "--from", savepoint];
        let foreseen = self.foreseen(&run)?;
        ensure!(foreseen.is_none(), "foreseen was {foreseen:?} where the job was stopped");
        let mut child = self.command(&run).spawn()?;
        sleep(Duration::from_millis(self.random.between(200, 600)));
        if child.try_wait()?.is_none() {
            child.kill()?;
        }
        let output = child.wait_with_output()?;
        self.settle(&output);
        let is_killed = is_killed(&output);
        ensure!(is_killed || output.status.success(), "resumed: {}", said(&output));
        // Without `--from` it resumes as well, once it has a checkpoint of its own.
        if is_killed && self.settled.is_some() && self.random.one_in(2) {
            return Ok(false);
        }
        let run = self.command(&run).output()?;
        ensure!(run.status.success(), "the same command again: {}", said(&run));
        Ok(true)
    }

    /// From a savepoint of a job that was killed later, with another state directory. True where it has
    /// finished.
    pub(super) fn fork(&mut self, tally: &mut Tally) -> Result<bool> {
        // In another place than the job's the output of both would overlap, as somebody has chosen.
        if self.kept.is_empty() || 1 < self.outs || self.random.between(0, 1) == 0 {
            return Ok(false);
        }
        let chosen = self.random.between(0, self.kept.len() as u64 - 1);
        let (savepoint, written_with) = self.kept[chosen as usize].clone();
        if fits(&written_with, &self.setup, self.backend).is_some() {
            return Ok(false);
        }
        self.savepoints += 1;
        let state = format!("state-{}", self.savepoints);
        let run = ["run", "job.toml", "--state-dir", &state, "--from", &savepoint];
        self.write_manifest(&self.setup)?;
        let before = self.visible()?;
        let foreseen = self.foreseen(&run)?;
        // The reader may have taken what would have to be taken back.
        let plain = self.command(&run).output()?;
        let words = said(&plain);
        ensure!(foreseen == refusal(&plain), "foreseen was {foreseen:?}: {words}");
        if plain.status.success() {
            self.did("forks", tally);
            (self.state, self.ran_with) = (state, self.setup);
            return Ok(true);
        }
        ensure!(words.contains("C0029"), "a fork: {words}");
        ensure!(self.visible()? == before, "a refused fork has changed the output");
        *tally.refusals.entry("C0029").or_default() += 1;
        self.did("forks that are refused", tally);
        if words.contains("--discard-output") && self.random.between(0, 1) == 0 {
            let mut discard = run.to_vec();
            discard.push("--discard-output");
            let foreseen = self.foreseen(&discard)?;
            ensure!(foreseen.is_none(), "foreseen was {foreseen:?} for a fork that discards");
            let forked = self.command(&discard).output()?;
            ensure!(forked.status.success(), "a fork that discards: {}", said(&forked));
            self.did("forks that discard", tally);
            (self.state, self.ran_with) = (state, self.setup);
            return Ok(true);
        }
        Ok(false)
    }

    /// What `check` says beforehand of a run that begins from somewhere: the code with which it would be
    /// refused. Changes nothing.
    pub(super) fn foreseen(&self, run: &[&str]) -> Result<Option<String>> {
        let check: Vec<&str> = std::iter::once("check").chain(run[1..].iter().copied()).collect();
        let before = self.everything()?;
        let output = self.command(&check).output()?;
        ensure!(self.everything()? == before, "{check:?} has changed something: {}", said(&output));
        let refusal = refusal(&output);
        ensure!(refusal.is_some() != output.status.success(), "{check:?}: {}", said(&output));
        Ok(refusal)
    }
}
