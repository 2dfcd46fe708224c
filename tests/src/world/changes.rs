//! What happens to a job and its files between two runs, and what is refused.

use std::{fs, path::Path, thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};

use super::{
    DAMAGED, FINISHED, IS_DRAINED, Mistake, Setup, Tally, World, files_in, fits, had_finished,
    is_killed, lines, refusal,
};
use crate::{
    disk::{copy_dir, library, said},
    power::Before,
};

impl World {
    /// A run that has to be refused with this code, and to change nothing.
    pub(super) fn is_refused(
        &mut self,
        setup: &Setup,
        code: &'static str,
        tally: &mut Tally,
    ) -> Result<()> {
        self.is_refused_with(setup, Mistake::None, code, tally)
    }

    pub(super) fn is_refused_with(
        &mut self,
        setup: &Setup,
        mistake: Mistake,
        code: &'static str,
        tally: &mut Tally,
    ) -> Result<()> {
        self.write_with(setup, mistake)?;
        let before = self.everything()?;
        let run = ["run", "job.toml", "--state-dir", &self.state];
        let from = ["--from", &self.state];
        // The check of what it would resume from says the same; another job has nothing yet.
        let foreseen = match code {
            "C0017" => Some(code.to_owned()),
            _ => self.foreseen(&[&run[..], &from].concat())?,
        };
        let output = self.command(&run).output()?;
        let words = said(&output);
        let is_at_its_end =
            code == "C0027" && words.contains(IS_DRAINED) && output.status.success();
        if had_finished(&words) || is_at_its_end {
            self.settle(&output);
            return Ok(());
        }
        ensure!(foreseen == refusal(&output), "foreseen was {foreseen:?}: {words}");
        ensure!(words.contains(&format!("error[{code}]")), "{code} for {setup:?}: {words}");
        let after = self.everything()?;
        let changed = before.iter().filter(|(path, content)| after.get(*path) != Some(content));
        let added = after.iter().filter(|(path, _)| !before.contains_key(*path));
        let changed: Vec<_> = changed.chain(added).map(|(path, _)| path).collect();
        ensure!(changed.is_empty(), "a refused run ({code}) has changed {changed:?}");
        *tally.refusals.entry(code).or_default() += 1;
        Ok(())
    }

    /// Goes on with another setup; one that does not fit what was written is refused first.
    pub(super) fn go_on_with(
        &mut self,
        mut setup: Setup,
        step: &'static str,
        tally: &mut Tally,
    ) -> Result<()> {
        let Some(settled) = self.settled else {
            // Nobody knows what is there: nothing but the path may change.
            return Ok(());
        };
        if let Some(code) = fits(&settled, &setup, self.backend) {
            self.is_refused(&setup, code, tally)?;
            if setup.snapshot == "declared" || self.is_finished {
                return Ok(());
            }
            setup.snapshot = "declared";
        }
        // What fits now, and no more than one change away from what was written.
        if fits(&settled, &setup, self.backend).is_none() {
            self.setup = setup;
            self.did(step, tally);
        }
        Ok(())
    }

    pub(super) fn change(&mut self, home: &Path, tally: &mut Tally) -> Result<()> {
        let setup = self.setup;
        match self.random.between(0, 20) {
            0 | 1 => {
                let parallelism = self.random.between(1, 5);
                let step = if parallelism == setup.parallelism { "runs" } else { "rescales" };
                self.go_on_with(Setup { parallelism, ..setup }, step, tally)
            }
            // What is pending lies where it was written. Where that was moved as well, nobody finds it: the
            // run is refused until it has been run once with the path that it had.
            2 if self.is_moved => {
                let other = Setup { out: (self.ran_with_out + 1) % 3, ..setup };
                self.outs = self.outs.max(other.out + 1);
                let is_refused = self.is_refused_where_parts_wait(&other, tally)?;
                self.did("other paths of what was moved", tally);
                if !is_refused {
                    self.setup = other;
                }
                Ok(())
            }
            2 => {
                self.setup.out = self.random.between(0, 2);
                self.outs = self.outs.max(self.setup.out + 1);
                self.did("other paths", tally);
                Ok(())
            }
            3 if self.ran_with_out != setup.out => Ok(()),
            3 => {
                self.is_moved = true;
                let moved = home.join(format!("home-{}", self.homes));
                fs::rename(&self.dir, &moved)?;
                (self.dir, self.homes) = (moved, self.homes + 1);
                self.did("moved directories", tally);
                Ok(())
            }
            4 => {
                let mut taken = Vec::new();
                self.each_part(|path| {
                    taken.extend(lines(path)?);
                    fs::remove_file(path)?;
                    Ok(())
                })?;
                self.taken.extend(taken);
                self.did("readers", tally);
                Ok(())
            }
            5 | 6 => {
                let step = if setup.is_next { "runs" } else { "upgrades" };
                self.go_on_with(Setup { is_next: true, ..setup }, step, tally)
            }
            7 if setup.is_next => match self.settled {
                Some(settled) if settled.is_next => {
                    let back = Setup { is_next: false, snapshot: "declared", ..settled };
                    self.is_refused(&back, "C0020", tally)?;
                    self.did("downgrades", tally);
                    Ok(())
                }
                _ => Ok(()),
            },
            7 | 8 => {
                let renamed = Setup { name: setup.name + 1, ..setup };
                if let Some(settled) = self.settled {
                    let other = Setup { name: settled.name + 1, has_uid: false, ..settled };
                    self.is_refused(&other, "C0020", tally)?;
                }
                if self.is_finished {
                    return Ok(());
                }
                self.go_on_with(renamed, "renames", tally)
            }
            9 if self.backend == "hashmap" => {
                let snapshot = if setup.snapshot == "both" { "declared" } else { "both" };
                self.go_on_with(Setup { snapshot, ..setup }, "other snapshots", tally)
            }
            9 | 10 => self.damage(tally),
            11 => self.second_job(tally),
            12 => {
                self.is_refused_with(&setup, Mistake::Twin, "C0028", tally)?;
                self.did("two sinks at one path", tally);
                Ok(())
            }
            13 => {
                let Some(settled) = self.settled else { return Ok(()) };
                let unkeyed = Setup { parallelism: settled.parallelism % 5 + 1, ..settled };
                self.is_refused_with(&unkeyed, Mistake::Unkeyed, "C0033", tally)?;
                self.did("state without keys", tally);
                Ok(())
            }
            14 => self.cut_while_read(tally),
            15 => self.move_output_away(tally),
            16 | 17 => self.cut_the_power(home, tally),
            _ => self.change_input(tally),
        }
    }

    /// An input that is not what it was is refused; one that has grown is read as far as it went.
    pub(super) fn change_input(&mut self, tally: &mut Tally) -> Result<()> {
        // Without a checkpoint the job has not read anything yet.
        let Some(settled) = self.settled else { return Ok(()) };
        let path = self.dir.join("in.txt");
        let half = self.input.len() / 2;
        let (changed, name) = match self.random.between(0, 2) {
            0 => (self.input[..half].to_owned(), "inputs that are cut"),
            1 => {
                let other = self.input.replacen("k01 ", "k02 ", 1);
                (other, "inputs that are replaced")
            }
            _ => {
                self.input.push_str("k01 000000\nk02 000000\n");
                fs::write(&path, &self.input)?;
                self.did("inputs that grow", tally);
                return Ok(());
            }
        };
        fs::write(&path, changed)?;
        let refused = self.is_refused(&settled, "C0027", tally);
        fs::write(&path, &self.input)?;
        refused?;
        self.did(name, tally);
        Ok(())
    }

    /// The power fails in the middle of a run: of what was not synced any part is lost.
    pub(super) fn cut_the_power(&mut self, home: &Path, tally: &mut Tally) -> Result<()> {
        // Where it has written must be known for some of the steps.
        if self.is_moved || self.ran_with_out != self.setup.out {
            return Ok(());
        }
        // The socket of a run that was killed is no file.
        let _ = fs::remove_dir_all(self.dir.join(&self.state).join("control"));
        let mut command = self.run_command()?;
        let (before, trace) = (Before::of(&self.dir)?, home.join("trace"));
        let _ = fs::remove_file(&trace);
        command.env("LD_PRELOAD", library()).env("DISK_ROOT", self.dir.canonicalize()?);
        command.env("DISK_TRACE", &trace);
        let mut child = command.spawn()?;
        sleep(Duration::from_millis(self.random.between(50, 700)));
        let _ = child.kill();
        let output = child.wait_with_output()?;
        if had_finished(&said(&output)) {
            self.settle(&output);
            return Ok(());
        }
        before.cut(&self.dir, &trace, &mut self.random)?;
        (self.settled, self.ran_with) = (None, self.setup);
        self.did("power cuts", tally);
        Ok(())
    }

    /// Somebody moves the output away: what was committed is with them, and what was not is missed.
    pub(super) fn move_output_away(&mut self, tally: &mut Tally) -> Result<()> {
        let out = self.dir.join(format!("out-{}", self.ran_with_out));
        if self.is_moved || !out.exists() || self.settled.is_none() {
            return Ok(());
        }
        let away = self.dir.join("moved-away");
        fs::rename(&out, &away)?;
        let setup = Setup { out: self.ran_with_out, ..self.setup };
        if self.is_refused_where_parts_wait(&setup, tally)? {
            let _ = fs::remove_dir_all(&out);
            fs::rename(&away, &out)?;
        } else {
            for entry in fs::read_dir(&away)?.flatten() {
                if entry.file_name().to_string_lossy().starts_with("part-") {
                    self.taken.extend(lines(&entry.path())?);
                }
            }
            fs::remove_dir_all(&away)?;
        }
        self.did("outputs that are moved away", tally);
        Ok(())
    }

    /// A run that is refused if parts are pending which it does not find, and else continues until it is
    /// stopped. True where it was refused.
    pub(super) fn is_refused_where_parts_wait(
        &mut self,
        setup: &Setup,
        tally: &mut Tally,
    ) -> Result<bool> {
        self.write_manifest(setup)?;
        let before = self.visible()?;
        let output =
            self.interrupted(self.command(&["run", "job.toml", "--state-dir", &self.state]))?;
        let words = said(&output);
        if words.contains("error[C0028]") {
            ensure!(self.visible()? == before, "a refused run has changed the output");
            *tally.refusals.entry("C0028").or_default() += 1;
            return Ok(true);
        }
        if is_killed(&output) {
            // Before it had begun; what it has made of the state nobody knows.
            self.settled = None;
            return Ok(true);
        }
        let asked = std::mem::replace(&mut self.setup, *setup);
        self.settle(&output);
        self.setup = if self.is_finished { self.setup } else { asked };
        ensure!(
            output.status.success() || self.is_finished,
            "without the directory that it wrote to: {words}"
        );
        Ok(false)
    }

    /// Somebody truncates the input while it is read, as copytruncate does: the run fails, or had read
    /// everything.
    pub(super) fn cut_while_read(&mut self, tally: &mut Tally) -> Result<()> {
        let mut command = self.run_command()?;
        let child = command.spawn()?;
        sleep(Duration::from_millis(self.random.between(30, 500)));
        let path = self.dir.join("in.txt");
        fs::File::options().write(true).open(&path)?.set_len(100)?;
        let output = child.wait_with_output()?;
        self.settle(&output);
        fs::write(&path, &self.input)?;
        let words = said(&output);
        ensure!(
            words.contains("error[C0027]") || self.is_finished || words.contains(FINISHED),
            "truncated while it was read: {words}"
        );
        self.is_finished |= words.contains(FINISHED);
        if words.contains("error[C0027]") {
            *tally.refusals.entry("C0027").or_default() += 1;
        }
        self.did("inputs that are cut while they are read", tally);
        Ok(())
    }

    /// Another job that is to write where this one has written.
    pub(super) fn second_job(&mut self, tally: &mut Tally) -> Result<()> {
        let mut is_seen = false;
        let out = self.dir.join(format!("out-{}", self.setup.out));
        for entry in fs::read_dir(out).into_iter().flatten().flatten() {
            is_seen |= entry.file_name().to_string_lossy().starts_with("part-");
        }
        if !is_seen {
            return Ok(());
        }
        let state = std::mem::replace(&mut self.state, "state-of-another".to_owned());
        let setup = Setup { name: 0, ..self.setup };
        let refused = self.is_refused(&setup, "C0017", tally);
        self.state = state;
        refused?;
        self.did("second jobs", tally);
        Ok(())
    }

    /// A bit of the state is flipped, or one of its files is lost: the run resumes from what is whole, or
    /// it is refused and the state is put back from a copy.
    pub(super) fn damage(&mut self, tally: &mut Tally) -> Result<()> {
        let state = self.dir.join(&self.state);
        if self.settled.is_none() || !state.exists() {
            return Ok(());
        }
        let copy = self.dir.join("copy-of-state");
        copy_dir(&state, &copy)?;
        let mut files = Vec::new();
        files_in(&state, &mut files)?;
        files.retain(|(path, bytes)| 0 < *bytes && !path.ends_with("LOCK"));
        files.sort();
        if files.is_empty() {
            return Ok(());
        }
        let (path, bytes) = &files[self.random.between(0, files.len() as u64 - 1) as usize];
        let is_lost = self.random.one_in(3);
        if is_lost {
            fs::remove_file(path)?;
        } else {
            let mut content = fs::read(path)?;
            let at = self.random.between(0, bytes - 1) as usize;
            content[at] ^= 1 << self.random.between(0, 7);
            fs::write(path, content)?;
        }
        let output = self.interrupted(self.run_command()?)?;
        self.settle(&output);
        let words = said(&output);
        if is_killed(&output) || had_finished(&words) {
            // Interrupted before it could look at anything, or there was nothing to do: nobody knows.
            fs::remove_dir_all(&state)?;
            fs::rename(&copy, &state)?;
        } else if !output.status.success() {
            let code = DAMAGED.iter().find(|code| words.contains(&format!("error[{code}]")));
            let code = code.with_context(|| format!("damaged {}: {words}", path.display()))?;
            *tally.refusals.entry(code).or_default() += 1;
            fs::remove_dir_all(&state)?;
            fs::rename(&copy, &state)?;
        } else {
            fs::remove_dir_all(&copy)?;
        }
        self.did(if is_lost { "lost files" } else { "flipped bits" }, tally);
        Ok(())
    }
}
