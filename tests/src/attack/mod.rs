//! Attacks on a host by components, manifests, files and checkpoints, each with how it must end, while a well-behaved
//! job in the same engine keeps its rate and loses nothing.

mod components;
mod guests;
mod manifests;
mod places;

use std::{
    collections::BTreeMap,
    fs,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use cofferdam_connectors::builtin;
use cofferdam_contract::text::printable;
use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    Engine, EngineOptions, JobHandle,
    compiler::{CompileLimits, Compiler},
    job::JobOptions,
    problem::Problem,
};
use cofferdam_spec::{JobSpec, host::HostSettings};
use futures::FutureExt;
use tempfile::TempDir;

use crate::{guest, job::committed};

/// One attack.
pub struct Attack {
    /// What is attacked.
    pub category: &'static str,
    /// What the attacker does.
    pub deed: String,
    /// Where, if the same is done in several places.
    pub place: &'static str,
    /// What stops it.
    pub stopped_by: &'static str,
    /// The codes with which it may end; `finished`: it harms nothing.
    pub expected: &'static [&'static str],
    /// What the answer must say.
    pub says: &'static str,
    strike: Strike,
}

/// Lays an attack out in an empty directory: its manifest, and the host's file if there is one.
type Strike = Box<dyn Fn(&Path) -> Result<Laid>>;

/// What an attack consists of.
pub(crate) struct Laid {
    manifest: PathBuf,
    host: Option<PathBuf>,
}

/// How an attack has ended.
#[derive(Debug, Clone)]
pub struct Struck {
    /// The code, or `finished`, or what must not happen.
    pub ended: String,
    /// All that was said.
    pub said: String,
    /// How long it took.
    pub took: Duration,
    /// How many records the neighbour had meanwhile, of those that it should have had.
    pub neighbour: f64,
}

/// Longer than any of them may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Records a second of the neighbour.
const RATE: u64 = 10_000;

/// All attacks.
#[must_use]
pub fn all() -> Vec<Attack> {
    let mut attacks = guests::attacks();
    attacks.extend(components::attacks());
    attacks.extend(manifests::attacks());
    attacks.extend(places::attacks());
    attacks
}

/// What compiling a component may take here; the defaults leave more time.
fn compile_limits() -> CompileLimits {
    CompileLimits {
        component_bytes_max: 16 << 20,
        memory_bytes_max: 512 << 20,
        code_bytes_max: 64 << 20,
        processor_max: Duration::from_secs(20),
        wall_max: Duration::from_secs(40),
    }
}

/// A host under attack, with the neighbour.
pub struct Arena {
    engine: Engine,
    dir: TempDir,
    neighbour: JobHandle,
}

impl Arena {
    /// Begins the neighbour.
    ///
    /// # Errors
    /// Where it does not begin.
    pub async fn new() -> Result<Self> {
        let arguments = vec!["compile-component".into()];
        let compiler =
            Compiler::Child { program: guest::program(), arguments, limits: compile_limits() };
        let cache_dir = Some(guest::root().join("target/tests-cache"));
        let engine = Engine::new(EngineOptions { cache_dir, compiler })?;
        let dir = tempfile::tempdir()?;
        let component = guest::probe();
        let text = format!(
            "[job]\nname = \"neighbour\"\n[execution.checkpointing]\ninterval = \"200ms\"\n\
             [[source]]\nname = \"in\"\nconnector = \"generator\"\nrate = {RATE}\nvocabulary = 500\n\
             [[operator]]\nname = \"probe\"\ncomponent = {component:?}\n\
             inputs = [{{ from = \"in\", partition = \"hash\" }}]\n\
             [[sink]]\nname = \"out\"\nconnector = \"file\"\npath = \"out\"\nline = \"value\"\ninputs = [\"probe\"]\n"
        );
        let spec = JobSpec::parse(&dir.path().join("job.toml"), &text, None, &builtin())?;
        let checked = engine.check(spec).await?;
        let neighbour = engine.submit(checked, JobOptions::default()).await?;
        neighbour.running().await?;
        Ok(Self { engine, dir, neighbour })
    }

    fn records(&self) -> u64 {
        self.neighbour.metrics().read(|index| index == 0, |_| false).records_read
    }

    /// Strikes once. The neighbour is looked at for some time at least, so that a short attack says something of it, too.
    ///
    /// # Errors
    /// Where the attack cannot be laid out.
    pub async fn strike(&self, attack: &Attack, at_least: Duration) -> Result<Struck> {
        let dir = tempfile::tempdir()?;
        let laid = (attack.strike)(dir.path())?;
        let (began, before) = (Instant::now(), self.records());
        let run = AssertUnwindSafe(tokio::time::timeout(PATIENCE, self.run(&laid))).catch_unwind();
        let (ended, said) = match run.await {
            Ok(Ok(Ok((outcome, logs)))) => {
                (outcome, logs + &committed(&dir.path().join("out")).join("\n"))
            }
            Ok(Ok(Err(problem))) => {
                (problem.code.number().to_owned(), printable(problem.to_string()))
            }
            Ok(Err(_)) => ("HANGS".to_owned(), String::new()),
            Err(_) => ("PANICS".to_owned(), String::new()),
        };
        let took = began.elapsed();
        tokio::time::sleep(at_least.saturating_sub(took)).await;
        let should = began.elapsed().as_secs_f64() * RATE as f64;
        let neighbour = (self.records() - before) as f64 / should;
        Ok(Struck { ended, said, took, neighbour })
    }

    /// What a job comes to, and what its guests have logged.
    async fn run(&self, laid: &Laid) -> Result<(String, String), Problem> {
        let host = laid.host.as_deref().map(HostSettings::read).transpose()?;
        let spec = JobSpec::read_with(&laid.manifest, host.as_ref(), &builtin())?;
        let checked = self.engine.check(spec).await?;
        let job = self.engine.submit(checked, JobOptions::default()).await?;
        let ended = job.ended().await;
        let logs: String = job.logs().iter().map(|line| line.message.clone() + "\n").collect();
        match ended? {
            Outcome::Finished => Ok(("finished".to_owned(), logs)),
            other => Ok((format!("{other:?}"), logs)),
        }
    }

    /// Ends the neighbour, and looks at what it has written: each record once.
    ///
    /// # Errors
    /// Where it has failed, has lost a record or has one twice.
    pub async fn end(self) -> Result<u64> {
        self.neighbour.stop();
        let ended = self.neighbour.ended().await?;
        ensure!(matches!(ended, Outcome::Stopped { .. }), "the neighbour: {ended:?}");
        ensure!(self.neighbour.status().restarts == 0, "the neighbour was restarted");
        let mut counts: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        let lines = committed(&self.dir.path().join("out"));
        for line in &lines {
            let mut words = line.split(' ');
            let (key, count) = (words.next(), words.next().and_then(|it| it.parse().ok()));
            let (key, count) = key.zip(count).with_context(|| format!("a line: {line}"))?;
            counts.entry(key.to_owned()).or_default().push(count);
        }
        for (key, counts) in &mut counts {
            counts.sort_unstable();
            let is_whole = counts.iter().copied().eq(1..=counts.len() as u64);
            ensure!(is_whole, "records of {key} are lost or twice there");
        }
        Ok(lines.len() as u64)
    }
}

impl Attack {
    /// Why an attack has not ended as it must.
    #[must_use]
    pub fn failure(&self, struck: &Struck) -> Option<String> {
        let name = format!("{}, {} {}", self.category, self.deed, self.place);
        if !self.expected.contains(&struck.ended.as_str()) {
            return Some(format!(
                "{name}: {} and not {:?}\n{}",
                struck.ended, self.expected, struck.said
            ));
        }
        if !struck.said.contains(self.says) {
            return Some(format!("{name}: it does not say {:?}\n{}", self.says, struck.said));
        }
        let is_control = |it: char| it.is_control() && it != '\n';
        if struck.said.contains(is_control) || struck.said.contains('\u{202e}') {
            return Some(format!("{name}: control characters pass\n{:?}", struck.said));
        }
        None
    }
}

/// The table of all attacks, those alike in one row.
#[must_use]
pub fn table(attacks: &[Attack], struck: &[Struck]) -> String {
    let mut text = "| attack | in | stopped by | outcome |\n|---|---|---|---|\n".to_owned();
    let mut category = "";
    let mut rows: Vec<(String, Vec<&str>, &str, String)> = Vec::new();
    let flush = |text: &mut String, rows: &mut Vec<(String, Vec<&str>, &str, String)>| {
        for (deed, places, stopped_by, ended) in rows.drain(..) {
            text.push_str(&format!(
                "| {deed} | {} | {stopped_by} | {ended} |\n",
                places.join(", ")
            ));
        }
    };
    for (attack, struck) in attacks.iter().zip(struck) {
        if attack.category != category {
            flush(&mut text, &mut rows);
            category = attack.category;
            text.push_str(&format!("| **{category}** | | | |\n"));
        }
        let known = rows.iter_mut().find(|(deed, _, stopped_by, ended)| {
            (deed, *stopped_by, ended) == (&attack.deed, attack.stopped_by, &struck.ended)
        });
        match known {
            Some((_, places, ..)) => places.push(attack.place),
            None => rows.push((
                attack.deed.clone(),
                vec![attack.place],
                attack.stopped_by,
                struck.ended.clone(),
            )),
        }
    }
    flush(&mut text, &mut rows);
    text
}

/// A job of one operator whose component lies beside its manifest.
pub(crate) struct HostileJob<'a> {
    pub(crate) component: &'a Path,
    pub(crate) config: &'a str,
    /// Further tables.
    pub(crate) tables: &'a str,
    pub(crate) restarts: u32,
}

impl HostileJob<'_> {
    pub(crate) fn lay(&self, dir: &Path) -> Result<Laid> {
        let Self { component, config, tables, restarts } = self;
        let text = format!(
            "[job]\nname = \"hostile\"\n\
             [restart-strategy]\ntype = \"fixed-delay\"\nfixed-delay = {{ attempts = {restarts}, delay = \"0s\" }}\n\
             [execution.checkpointing]\ninterval = \"10ms\"\n{tables}\n\
             [[source]]\nname = \"in\"\nconnector = \"generator\"\ncount = 8000\nrate = 40000\ntimestamps = true\n\
             [[operator]]\nname = \"hostile\"\ncomponent = {component:?}\nsnapshot = \"declared\"\n\
             inputs = [{{ from = \"in\", partition = \"hash\" }}]\nconfig = {{ {config} }}\n\
             limits = {{ call = \"200ms\", wait = \"300ms\", memory = \"200 MiB\", output = \"8 MiB\", state = \"64 MiB\" }}\n\
             [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"hostile\"]\n"
        );
        laid(dir, &text)
    }
}

/// A pipe that no one writes to.
pub(crate) fn pipe(path: &Path) -> Result<()> {
    ensure!(Command::new("mkfifo").arg(path).status()?.success(), "mkfifo");
    Ok(())
}

/// A manifest alone.
pub(crate) fn laid(dir: &Path, text: &str) -> Result<Laid> {
    let manifest = dir.join("job.toml");
    fs::write(&manifest, text)?;
    Ok(Laid { manifest, host: None })
}
