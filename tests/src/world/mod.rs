//! A job in a world that misbehaves: random histories of kills, stops, savepoints, forks, rescaling, upgrades,
//! renamed operators, other paths, moved directories, readers that take what they have read, inputs that
//! are cut, grown or replaced, outputs that somebody moves away, second jobs, flipped bits, lost files,
//! failing disks, power cuts, clocks that jump, and logs that nobody reads or that wait for a reader. Each step has a
//! verdict that is known beforehand: the run succeeds, or it is refused with a code and nothing changes;
//! and at the end every record is in the output once.

mod changes;
mod runs;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use cofferdam_core::random::Random;

use crate::{disk::said, guest, keyed};

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
