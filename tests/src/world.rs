//! A job in a world that misbehaves: random histories of kills, stops, savepoints, forks, rescaling, other
//! paths, moved directories, readers that take what they have read, and inputs that are cut. Each step
//! has a verdict that is known beforehand: the run succeeds, or it is refused with a code; and at the end
//! every record is in the output once.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use cofferdam_core::random::Random;

use crate::{guest, keyed};

const LINES: u64 = 40_000;
const RATE: u64 = 40_000;
const FINISHED: &str = "has finished; there is nothing to do";
/// Runs of one history before it is let finish.
const RUNS_MAX: u32 = 7;

/// What the histories consisted of.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Histories that ended with the right output.
    pub worlds: u64,
    /// How often each thing happened.
    pub events: BTreeMap<&'static str, u64>,
}

struct World {
    /// Where everything lies; it may be moved.
    dir: PathBuf,
    homes: u32,
    parallelism: u64,
    out: u64,
    rolling: &'static str,
    backend: &'static str,
    /// Directories that were written to.
    outs: u64,
    /// What a reader has taken.
    taken: Vec<String>,
    savepoints: u32,
    /// Savepoints that nothing has begun from yet.
    kept: Vec<String>,
    /// The state directory of the branch that counts, and those of branches that were left.
    state: String,
    random: Random,
}

/// Lives through so many histories.
///
/// # Errors
/// Where a verdict or the output is another than predicted, with the seed of the history.
pub fn run(worlds: u64, seed: u64, mut on_world: impl FnMut(&Tally)) -> Result<Tally> {
    let mut tally = Tally::default();
    for world in 0..worlds {
        let seed = seed + world;
        let dir = tempfile::tempdir().context("a directory")?;
        live(dir.path(), seed, &mut tally)
            .with_context(|| format!("SEED={seed} cargo xtask world 1"))?;
        tally.worlds += 1;
        on_world(&tally);
    }
    Ok(tally)
}

fn live(home: &Path, seed: u64, tally: &mut Tally) -> Result<()> {
    let mut random = Random::new(seed);
    let rollings = ["", "roll-size = \"20KiB\"\n", "roll-interval = \"200ms\"\n"];
    let backends = ["hashmap", "sled"];
    let mut world = World {
        dir: home.join("home-0"),
        homes: 1,
        parallelism: random.between(1, 4),
        out: 0,
        rolling: rollings[random.between(0, 2) as usize],
        backend: backends[random.between(0, 1) as usize],
        outs: 1,
        taken: Vec::new(),
        savepoints: 0,
        kept: Vec::new(),
        state: "state-0".to_owned(),
        random,
    };
    fs::create_dir(&world.dir)?;
    let text = keyed::input(LINES);
    fs::write(world.dir.join("in.txt"), &text)?;
    for _ in 0..RUNS_MAX {
        if world.run_and_disturb(tally)? {
            break;
        }
        for _ in 0..world.random.between(0, 2) {
            world.change(home, &text, tally)?;
        }
    }
    let last = world.cofferdam(&["run", "job.toml", "--state-dir", &world.state.clone()])?;
    ensure!(last.status.success(), "the last run: {}", said(&last));
    let again = world.cofferdam(&["run", "job.toml", "--state-dir", &world.state.clone()])?;
    ensure!(again.status.success() && said(&again).contains(FINISHED), "again: {}", said(&again));
    let mut found = std::mem::take(&mut world.taken);
    world.each_part(|path| {
        found.extend(lines(path)?);
        Ok(())
    })?;
    found.sort_unstable();
    keyed::check(&found, &keyed::counted(&text))?;
    Ok(())
}

fn said(output: &Output) -> String {
    format!("{}\n{}", output.status, String::from_utf8_lossy(&output.stderr))
}

fn lines(path: &Path) -> Result<Vec<String>> {
    Ok(fs::read_to_string(path)?.lines().map(str::to_owned).collect())
}

impl World {
    fn write_manifest(&self) -> Result<()> {
        let Self { parallelism, out, rolling, backend, .. } = self;
        let component = guest::probe();
        let text = format!(
            r#"
[job]
name = "world"
parallelism = {parallelism}
[execution.checkpointing]
interval = "30ms"
[state.backend]
type = "{backend}"
[restart-strategy]
type = "fixed-delay"
fixed-delay = {{ attempts = 3, delay = "0s" }}
[[source]]
name = "in"
connector = "file"
path = "in.txt"
key = "^k[0-9]+"
split-size = "16KiB"
rate = {RATE}
[[operator]]
name = "count"
component = {component:?}
snapshot = "declared"
inputs = [{{ from = "in", partition = "hash" }}]
[[sink]]
name = "out"
connector = "file"
path = "out-{out}"
{rolling}inputs = ["count"]
"#
        );
        fs::write(self.dir.join("job.toml"), text)?;
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(guest::program());
        command.current_dir(&self.dir).args(arguments);
        if arguments[0] == "run" {
            let cache = guest::root().join("target/tests-cache");
            command.arg("--cache-dir").arg(cache).args(["--no-progress", "--log", "info"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn cofferdam(&self, arguments: &[&str]) -> Result<Output> {
        self.write_manifest()?;
        self.command(arguments).output().context("run cofferdam")
    }

    /// One run, which is disturbed at a random moment. True where it has finished.
    fn run_and_disturb(&mut self, tally: &mut Tally) -> Result<bool> {
        self.write_manifest()?;
        let state = self.state.clone();
        let child = self.command(&["run", "job.toml", "--state-dir", &state]).spawn()?;
        std::thread::sleep(Duration::from_millis(self.random.between(30, 900)));
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
        let signal = match what {
            1 | 2 => "-KILL",
            _ => "-INT",
        };
        let id = child.id().to_string();
        // It may have ended by itself.
        let _ = Command::new("kill").args([signal, &id]).stderr(Stdio::null()).status();
        let output = child.wait_with_output()?;
        let is_killed = output.status.code().is_none();
        ensure!(is_killed || output.status.success(), "a run: {}", said(&output));
        let name = match (what, is_killed) {
            (0, _) => "stops with a savepoint",
            (1, true) => "savepoints and kills",
            (_, true) => "kills",
            (_, false) => "stops",
        };
        *tally.events.entry(name).or_default() += 1;
        if said(&output).contains(" finished after ") {
            return Ok(true);
        }
        match savepoint {
            Some(savepoint) if what == 0 => self.resume(&savepoint),
            Some(savepoint) => {
                self.kept.push(savepoint);
                self.fork(tally)
            }
            None => self.fork(tally),
        }
    }

    /// From the savepoint of a stop, in the same state directory: killed, and the same command again, as a
    /// supervisor does it. Finishes.
    fn resume(&mut self, savepoint: &str) -> Result<bool> {
        self.write_manifest()?;
        let state = self.state.clone();
        let run = ["run", "job.toml", "--state-dir", &state, "--from", savepoint];
        let mut child = self.command(&run).spawn()?;
        std::thread::sleep(Duration::from_millis(self.random.between(200, 600)));
        if child.try_wait()?.is_none() {
            child.kill()?;
        }
        let output = child.wait_with_output()?;
        let is_killed = output.status.code().is_none();
        ensure!(is_killed || output.status.success(), "resumed: {}", said(&output));
        let run = self.command(&run).output()?;
        ensure!(run.status.success(), "the same command again: {}", said(&run));
        Ok(true)
    }

    /// From a savepoint of a job that was killed later, with another state directory. True where it has
    /// finished.
    fn fork(&mut self, tally: &mut Tally) -> Result<bool> {
        // In another place than the job's the output of both would overlap, as somebody has chosen.
        if self.kept.is_empty() || 1 < self.outs || self.random.between(0, 1) == 0 {
            return Ok(false);
        }
        let chosen = self.random.between(0, self.kept.len() as u64 - 1);
        let savepoint = &self.kept[chosen as usize].clone();
        self.savepoints += 1;
        let state = format!("state-{}", self.savepoints);
        let run = ["run", "job.toml", "--state-dir", &state, "--from", savepoint];
        let digest = self.visible()?;
        // The reader may have taken what would have to be taken back.
        let plain = self.cofferdam(&run)?;
        let words = said(&plain);
        if plain.status.success() {
            *tally.events.entry("forks").or_default() += 1;
            self.state = state;
            return Ok(true);
        }
        ensure!(words.contains("C0029"), "a fork: {words}");
        ensure!(self.visible()? == digest, "a refused fork has changed the output");
        *tally.events.entry("forks that are refused").or_default() += 1;
        if words.contains("--discard-output") && self.random.between(0, 1) == 0 {
            let mut discard = run.to_vec();
            discard.push("--discard-output");
            let forked = self.cofferdam(&discard)?;
            ensure!(forked.status.success(), "a fork that discards: {}", said(&forked));
            *tally.events.entry("forks that discard").or_default() += 1;
            self.state = state;
            return Ok(true);
        }
        Ok(false)
    }

    fn change(&mut self, home: &Path, text: &str, tally: &mut Tally) -> Result<()> {
        let name = match self.random.between(0, 4) {
            0 => {
                self.parallelism = self.random.between(1, 5);
                "other parallelisms"
            }
            1 => {
                self.out = self.random.between(0, 2);
                self.outs = self.outs.max(self.out + 1);
                "other paths"
            }
            2 => {
                let moved = home.join(format!("home-{}", self.homes));
                fs::rename(&self.dir, &moved)?;
                (self.dir, self.homes) = (moved, self.homes + 1);
                "moved directories"
            }
            3 => {
                let mut taken = Vec::new();
                self.each_part(|path| {
                    taken.extend(lines(path)?);
                    fs::remove_file(path)?;
                    Ok(())
                })?;
                self.taken.extend(taken);
                "readers"
            }
            _ => {
                // Without a checkpoint the job has not read anything yet.
                if !self.cofferdam(&["checkpoints", "list", &self.state])?.status.success() {
                    return Ok(());
                }
                let input = self.dir.join("in.txt");
                fs::write(&input, &text[..text.len() / 2])?;
                let run = ["run", "job.toml", "--state-dir", &self.state.clone()];
                let refused = self.cofferdam(&run)?;
                let words = said(&refused);
                fs::write(&input, text)?;
                if words.contains(FINISHED) {
                    return Ok(());
                }
                ensure!(words.contains("C0027"), "half of the input: {words}");
                "inputs that are cut"
            }
        };
        *tally.events.entry(name).or_default() += 1;
        Ok(())
    }

    fn visible(&self) -> Result<Vec<PathBuf>> {
        let mut all = Vec::new();
        self.each_part(|path| {
            all.push(path.to_owned());
            Ok(())
        })?;
        all.sort();
        Ok(all)
    }

    fn each_part(&self, mut each: impl FnMut(&Path) -> Result<()>) -> Result<()> {
        for out in 0..self.outs {
            let Ok(entries) = fs::read_dir(self.dir.join(format!("out-{out}"))) else { continue };
            for entry in entries.flatten() {
                if entry.file_name().to_string_lossy().starts_with("part-") {
                    each(&entry.path())?;
                }
            }
        }
        Ok(())
    }
}
