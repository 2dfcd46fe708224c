//! A job in a world that misbehaves: random histories of kills, stops, savepoints, forks, rescaling, upgrades,
//! renamed operators, other paths, moved directories, readers that take what they have read, inputs that
//! are cut, grown or replaced, outputs that somebody moves away, second jobs, flipped bits, lost files,
//! failing disks, power cuts, clocks that jump, and logs that nobody reads or that wait for a reader. Each step has a
//! verdict that is known beforehand: the run succeeds, or it is refused with a code and nothing changes;
//! and at the end every record is in the output once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use cofferdam_core::random::Random;

use crate::{
    disk::{copy_dir, library, said},
    guest, keyed,
    power::Before,
};

const LINES: u64 = 40_000;
const RATE: u64 = 40_000;
const FINISHED: &str = "has finished; there is nothing to do";
/// A checkpoint of the end of all inputs: whatever they are now, nothing more is read.
const IS_DRAINED: &str = "every task had processed the end of its inputs";
/// Runs of one history before it is let finish.
const RUNS_MAX: u32 = 7;
/// Codes of a state that is damaged: what is left of it cannot be resumed from.
const DAMAGED: [&str; 9] =
    ["C0017", "C0018", "C0019", "C0020", "C0021", "C0028", "C0029", "C0031", "C0034"];

/// What the histories consisted of.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Histories that ended with the right output.
    pub worlds: u64,
    /// How often each thing happened.
    pub events: BTreeMap<&'static str, u64>,
    /// In how many histories it was part of what ended with the right output.
    pub exact: BTreeMap<&'static str, u64>,
    /// How often each code was predicted and given.
    pub refusals: BTreeMap<&'static str, u64>,
}

/// What a manifest says of the job.
#[derive(Debug, Clone, Copy)]
struct Setup {
    parallelism: u64,
    out: u64,
    /// The second version of the operator.
    is_next: bool,
    snapshot: &'static str,
    /// Of the operator, whose `uid` stays.
    name: u64,
    has_uid: bool,
}

/// A mistake in a manifest that is always refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// A second sink writes to the same directory.
    Twin,
    /// Records come to declared state not by their key.
    Unkeyed,
}

struct World {
    /// Where everything lies; it may be moved.
    dir: PathBuf,
    homes: u32,
    setup: Setup,
    /// What the newest checkpoint was written with; `None`: there is none, or nobody knows.
    settled: Option<Setup>,
    is_finished: bool,
    /// What the last run that has begun ran with.
    ran_with: Setup,
    /// Everything was moved since the last run.
    is_moved: bool,
    /// Where the last run has written.
    ran_with_out: u64,
    rolling: &'static str,
    backend: &'static str,
    /// An operator that is chained to the source, and follows event time.
    has_relay: bool,
    /// Directories that were written to.
    outs: u64,
    /// What a reader has taken.
    taken: Vec<String>,
    savepoints: u32,
    /// Savepoints that nothing has begun from yet, with what they were written with.
    kept: Vec<(String, Setup)>,
    /// The state directory of the branch that counts, and those of branches that were left.
    state: String,
    /// What is in the input file.
    input: String,
    /// What has happened so far.
    steps: BTreeSet<&'static str>,
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
        let mut dir = tempfile::tempdir().context("a directory")?;
        // To look at what a history has left.
        dir.disable_cleanup(std::env::var_os("KEEP").is_some());
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
    let backend = ["hashmap", "sled"][random.between(0, 1) as usize];
    let snapshot = match backend {
        "sled" => "declared",
        _ => ["declared", "both"][random.between(0, 1) as usize],
    };
    let setup = Setup {
        parallelism: random.between(1, 4),
        out: 0,
        is_next: false,
        snapshot,
        name: 0,
        has_uid: true,
    };
    let text = keyed::input(LINES);
    let mut world = World {
        dir: home.join("home-0"),
        homes: 1,
        setup,
        settled: None,
        is_finished: false,
        ran_with: setup,
        is_moved: false,
        ran_with_out: 0,
        rolling: rollings[random.between(0, 2) as usize],
        backend,
        has_relay: random.one_in(2),
        outs: 1,
        taken: Vec::new(),
        savepoints: 0,
        kept: Vec::new(),
        state: "state-0".to_owned(),
        input: text.clone(),
        steps: BTreeSet::new(),
        random,
    };
    fs::create_dir(&world.dir)?;
    fs::write(world.dir.join("in.txt"), &text)?;
    for _ in 0..RUNS_MAX {
        if world.is_finished || world.run_and_disturb(tally)? {
            break;
        }
        for _ in 0..world.random.between(1, 3) {
            if world.is_finished {
                break;
            }
            world.change(home, tally).with_context(|| format!("after {:?}", world.steps))?;
        }
    }
    let story = |world: &World| format!("after {:?}, {}", world.steps, world.backend);
    let last = world.run_once()?;
    ensure!(last.status.success(), "the last run: {}\n{}", said(&last), story(&world));
    let again = world.run_once()?;
    ensure!(
        again.status.success() && said(&again).contains(FINISHED),
        "again: {}\n{}",
        said(&again),
        story(&world)
    );
    let mut found = std::mem::take(&mut world.taken);
    world.each_part(|path| {
        found.extend(lines(path)?);
        Ok(())
    })?;
    found.sort_unstable();
    keyed::check(&found, &keyed::totals(&text)).with_context(|| story(&world))?;
    for step in world.steps {
        *tally.exact.entry(step).or_default() += 1;
    }
    Ok(())
}

/// A program that was asked to end does so, whether or not anybody reads its output.
fn ends_by_itself(child: &mut Child) -> Result<()> {
    let began = Instant::now();
    while child.try_wait()?.is_none() {
        if Duration::from_secs(30) < began.elapsed() {
            child.kill()?;
            bail!("a run does not end while nobody reads what it says");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Whether a signal has ended it, if only before it had begun.
fn is_killed(output: &Output) -> bool {
    matches!(output.status.code(), None | Some(130))
}

/// Whether a run found that the job has finished already, as it is now (a message, no failure) or as it was.
fn had_finished(words: &str) -> bool {
    words.contains(FINISHED) || words.contains("error[C0036]")
}

fn lines(path: &Path) -> Result<Vec<String>> {
    Ok(fs::read_to_string(path)?.lines().map(str::to_owned).collect())
}

impl World {
    fn write_manifest(&self, setup: &Setup) -> Result<()> {
        self.write_with(setup, Mistake::None)
    }

    fn write_with(&self, setup: &Setup, mistake: Mistake) -> Result<()> {
        let Self { rolling, backend, .. } = self;
        let Setup { parallelism, out, is_next, snapshot, name, has_uid } = setup;
        let component = guest::probe().with_file_name(match is_next {
            true => "totals_next.wasm",
            false => "totals.wasm",
        });
        let relay = guest::probe().with_file_name("relay.wasm");
        let (relay, from) = match self.has_relay {
            true => (
                format!(
                    "[[operator]]\nname = \"relay\"\ncomponent = {relay:?}\nsnapshot = \"declared\"\n\
                     inputs = [\"in\"]\n"
                ),
                "relay",
            ),
            false => (String::new(), "in"),
        };
        let partition = if mistake == Mistake::Unkeyed { "rebalance" } else { "hash" };
        let twin = match mistake {
            Mistake::Twin => format!(
                "[[sink]]\nname = \"twin\"\nconnector = \"file\"\npath = \"./out-{out}\"\n\
                 inputs = [\"totals-{name}\"]\n"
            ),
            _ => String::new(),
        };
        let source = keyed::source(RATE);
        let uid = if *has_uid { "uid = \"totals\"" } else { "" };
        let text = format!(
            r#"
[job]
name = "world"
parallelism = {parallelism}
[execution.checkpointing]
interval = "30ms"
externalized-checkpoint-retention = "RETAIN_ON_CANCELLATION"
[state.backend]
type = "{backend}"
[restart-strategy]
type = "fixed-delay"
fixed-delay = {{ attempts = 3, delay = "0s" }}
{source}timestamp = "^k[0-9]+ ([0-9]+)"
max-out-of-orderness = "1m"
{relay}[[operator]]
name = "totals-{name}"
{uid}
component = {component:?}
snapshot = "{snapshot}"
inputs = [{{ from = "{from}", partition = "{partition}" }}]
{twin}[[sink]]
name = "out"
connector = "file"
path = "out-{out}"
{rolling}inputs = ["totals-{name}"]
"#
        );
        fs::write(self.dir.join("job.toml"), text)?;
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = guest::command(&self.dir, arguments);
        if arguments[0] == "run" {
            command.args(["--no-progress", "--log", "info"]);
        }
        command
    }

    fn run_command(&self) -> Result<Command> {
        self.write_manifest(&self.setup)?;
        Ok(self.command(&["run", "job.toml", "--state-dir", &self.state.clone()]))
    }

    /// Runs the job as it is now until it ends by itself.
    fn run_once(&mut self) -> Result<Output> {
        let output = self.run_command()?.output().context("run cofferdam")?;
        self.settle(&output);
        Ok(output)
    }

    /// Lets a command say what it says into a pipe that is full already. Anyone who holds the reader keeps it open.
    fn full_pipe(&mut self, command: &mut Command) -> Result<io::PipeReader> {
        let (reader, mut writer) = io::pipe()?;
        // As much as a pipe holds on Linux: one byte more would wait.
        writer.write_all(&[b'.'; 64 << 10])?;
        if self.random.one_in(2) {
            command.arg("--json");
        }
        command.stdout(writer.try_clone()?).stderr(writer);
        Ok(reader)
    }

    /// A run that is stopped after a while.
    fn interrupted(&mut self, mut run: Command) -> Result<Output> {
        let child = run.spawn()?;
        std::thread::sleep(Duration::from_millis(self.random.between(100, 500)));
        guest::signal(&child, "INT");
        Ok(child.wait_with_output()?)
    }

    /// What a run has told of its state.
    fn settle(&mut self, output: &Output) {
        self.is_finished |= said(output).contains(" finished after ");
        let words = said(output);
        if words.contains(" INFO attempt 0: ") {
            self.ran_with = self.setup;
        }
        if had_finished(&words) {
            // It was killed when it had finished, and had not said so.
            (self.is_finished, self.setup) = (true, self.ran_with);
        }
        if words.contains("tasks, from checkpoint ") || words.contains(" INFO checkpoint ") {
            self.settled = Some(self.setup);
            (self.is_moved, self.ran_with_out) = (false, self.setup.out);
        } else if !output.status.success() {
            // It was killed, or its disk has failed, at a moment that nobody knows.
            self.settled = None;
        }
    }

    fn did(&mut self, step: &'static str, tally: &mut Tally) {
        self.steps.insert(step);
        *tally.events.entry(step).or_default() += 1;
    }

    /// One run, which is disturbed at a random moment. True where it has finished.
    fn run_and_disturb(&mut self, tally: &mut Tally) -> Result<bool> {
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
        std::thread::sleep(Duration::from_millis(self.random.between(30, 450)));
        if is_unread && sleeping.is_none() {
            // What it says from now on nobody reads.
            drop(child.stderr.take());
            self.did("closed pipes", tally);
        }
        std::thread::sleep(Duration::from_millis(self.random.between(0, 450)));
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
    fn resume_from_any(&mut self) -> Result<bool> {
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
    fn resume(&mut self, savepoint: &str) -> Result<bool> {
        self.write_manifest(&self.setup)?;
        let state = self.state.clone();
        let run = ["run", "job.toml", "--state-dir", &state, "--from", savepoint];
        let foreseen = self.foreseen(&run)?;
        ensure!(foreseen.is_none(), "foreseen was {foreseen:?} where the job was stopped");
        let mut child = self.command(&run).spawn()?;
        std::thread::sleep(Duration::from_millis(self.random.between(200, 600)));
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
    fn fork(&mut self, tally: &mut Tally) -> Result<bool> {
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
    fn foreseen(&self, run: &[&str]) -> Result<Option<String>> {
        let check: Vec<&str> = std::iter::once("check").chain(run[1..].iter().copied()).collect();
        let before = self.everything()?;
        let output = self.command(&check).output()?;
        ensure!(self.everything()? == before, "{check:?} has changed something: {}", said(&output));
        let refusal = refusal(&output);
        ensure!(refusal.is_some() != output.status.success(), "{check:?}: {}", said(&output));
        Ok(refusal)
    }

    /// A run that has to be refused with this code, and to change nothing.
    fn is_refused(&mut self, setup: &Setup, code: &'static str, tally: &mut Tally) -> Result<()> {
        self.is_refused_with(setup, Mistake::None, code, tally)
    }

    fn is_refused_with(
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
    fn go_on_with(
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

    fn change(&mut self, home: &Path, tally: &mut Tally) -> Result<()> {
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
    fn change_input(&mut self, tally: &mut Tally) -> Result<()> {
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
    fn cut_the_power(&mut self, home: &Path, tally: &mut Tally) -> Result<()> {
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
        std::thread::sleep(Duration::from_millis(self.random.between(50, 700)));
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
    fn move_output_away(&mut self, tally: &mut Tally) -> Result<()> {
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
    fn is_refused_where_parts_wait(&mut self, setup: &Setup, tally: &mut Tally) -> Result<bool> {
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
    fn cut_while_read(&mut self, tally: &mut Tally) -> Result<()> {
        let mut command = self.run_command()?;
        let child = command.spawn()?;
        std::thread::sleep(Duration::from_millis(self.random.between(30, 500)));
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
    fn second_job(&mut self, tally: &mut Tally) -> Result<()> {
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
    fn damage(&mut self, tally: &mut Tally) -> Result<()> {
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

    /// What is in each file of state and output, as a hash. Locks are none of it.
    fn everything(&self) -> Result<BTreeMap<PathBuf, u64>> {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut files = Vec::new();
        files_in(&self.dir, &mut files)?;
        let mut everything = BTreeMap::new();
        for (path, _) in files.into_iter().filter(|(path, _)| !path.ends_with("LOCK")) {
            let mut hasher = DefaultHasher::new();
            fs::read(&path)?.hash(&mut hasher);
            everything.insert(path, hasher.finish());
        }
        Ok(everything)
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

/// The code with which the program has refused something.
fn refusal(output: &Output) -> Option<String> {
    let words = said(output);
    let (_, rest) = words.split_once("error[")?;
    rest.split_once(']').map(|(code, _)| code.to_owned())
}

/// With which code a setup is refused to take over what another one has written; `None`: it fits.
fn fits(before: &Setup, now: &Setup, backend: &str) -> Option<&'static str> {
    let is_downgrade = before.is_next && !now.is_next;
    let is_other_version = before.is_next != now.is_next;
    match backend {
        _ if is_downgrade => Some("C0020"),
        "sled" => None,
        _ if now.snapshot == "declared" || before.snapshot == "declared" => None,
        // Memory is that of one component, and is not shared out.
        _ if is_other_version || before.parallelism != now.parallelism => Some("C0020"),
        _ => None,
    }
}

fn files_in(dir: &Path, files: &mut Vec<(PathBuf, u64)>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            files_in(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push((entry.path(), entry.metadata()?.len()));
        }
    }
    Ok(())
}
