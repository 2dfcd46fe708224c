//! The directory of a file sink: whose it is, and what was committed to it.
//!
//! Its folder `.cofferdam` names the owner, is locked while a run writes, and has a log of every part
//! that was committed, written before the part becomes visible. A copy of the log lies in the state
//! directory of the job. So a part that is neither pending nor there is known to have been taken by a
//! reader, or to be lost; and output that a restored state knows nothing of is seen before anything is
//! written twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use cofferdam_connector::{
    catalog::Conflicts,
    identity::{Id, Lineage},
};
use cofferdam_files::{
    FOR_ALL, is_locked, make_dir, read_regular, resolved, sync_dir, try_lock, write_whole,
};
use cofferdam_settings::{Code, Problem};
use serde::{Deserialize, Serialize};

use super::{
    committed::{
        Committed, CommittedNames, Line, Listed, Log, Logs, Noted, line_of, remove_logs, unseen_in,
    },
    names::{file_of, is_older_part, is_part, names_in, writer_of_pending},
    spec::IfExists,
};

pub(super) const FOLDER: &str = ".cofferdam";
const OWNER: &str = "owner.json";
/// How many parts a message names.
const NAMED_MAX: usize = 10;

/// Who writes to a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    job: Id,
    /// The names of the job and the sink, for people.
    name: String,
    sink: String,
}

/// Of the file of an owner.
const OWNER_BYTES_MAX: u64 = 64 << 10;

impl Owner {
    /// That of a directory. One that cannot be made sense of is nobody.
    fn of(dir: &Path) -> io::Result<Option<Self>> {
        match read_regular(&dir.join(FOLDER).join(OWNER), OWNER_BYTES_MAX) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What a sink needs to know of the run that it belongs to.
#[derive(Debug, Clone)]
pub(crate) struct Claimant {
    /// The job's name.
    pub(crate) job: String,
    /// Which job, which course of its events.
    pub(crate) lineage: Lineage,
    /// The checkpoint that is gone on from; `None`: the job begins.
    pub(crate) restored: Option<u64>,
    /// Where the second copy of the logs is kept.
    pub(crate) record_dir: Option<PathBuf>,
    /// What is to be done about output that a state knows nothing of.
    pub(crate) conflicts: Conflicts,
    /// The visible names of the parts of the restored state, by their files.
    pub(crate) own_parts: BTreeMap<String, String>,
}

/// A directory that belongs to this run.
#[derive(Debug)]
pub(crate) struct Output {
    pub(super) dir: PathBuf,
    pub(super) sink: String,
    pub(super) context: Claimant,
    /// The directory is this job's already.
    is_own: bool,
    /// Directories that the job has written to before, until it commits something after them.
    before: Mutex<BTreeSet<PathBuf>>,
    /// The writers of this run.
    writers: Mutex<BTreeSet<Id>>,
    /// The logs of each of its tasks that has begun.
    logs: Mutex<BTreeMap<u32, Arc<Logs>>>,
    /// Held as long as the run writes: of this directory, and of those that parts of the restored state
    /// still lie in.
    locks: Vec<Lock>,
}

/// Whether a run takes directories, or somebody asks whether it could.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// They are locked, and made where they are not there.
    Take,
    /// Nothing in them changes.
    Ask,
}

impl Claim {
    /// The lock of a directory; `None`: another run has it.
    fn lock(self, dir: &Path) -> io::Result<Option<Lock>> {
        let lock = dir.join(FOLDER).join("LOCK");
        match self {
            Self::Take => {
                make_dir(&dir.join(FOLDER), FOR_ALL)?;
                tempfile::tempfile_in(dir)?;
                Ok(try_lock(&lock)?.map(|file| Lock { _file: Some(file) }))
            }
            Self::Ask if is_locked(&lock)? => Ok(None),
            Self::Ask => {
                if let Some(there) = dir.ancestors().find(|it| it.exists()) {
                    rustix::fs::access(there, rustix::fs::Access::WRITE_OK)?;
                }
                Ok(Some(Lock { _file: None }))
            }
        }
    }
}

/// Of a directory; it is held as long as this lives, where it was taken.
#[derive(Debug)]
struct Lock {
    _file: Option<File>,
}

impl Output {
    /// Takes the directory of a sink for this run, or refuses before anything in it has changed.
    pub(crate) fn claim(
        sink: &str,
        dir: &Path,
        if_exists: IfExists,
        context: Claimant,
        claim: Claim,
    ) -> Result<Self, Problem> {
        let unusable = |error: io::Error| {
            Problem::new(
                Code::OutputUnwritable,
                format!("sink \"{sink}\" cannot write to {}", dir.display()),
            )
            .because(&error)
            .hint("choose another path, or make the directory writable")
        };
        let Some(lock) = claim.lock(dir).map_err(unusable)? else {
            let message = format!("sink \"{sink}\": another run writes to {}", dir.display());
            return Err(Problem::new(Code::OutputTaken, message)
                .hint("wait for it to end, or choose another path"));
        };
        let dir = resolved(dir);
        let owner = Owner::of(&dir).map_err(unusable)?;
        let is_own = owner.as_ref().is_some_and(|owner| owner.job == context.lineage.job);
        let output = Self {
            dir,
            sink: sink.to_owned(),
            context,
            is_own,
            before: Mutex::default(),
            writers: Mutex::default(),
            logs: Mutex::default(),
            locks: vec![lock],
        };
        let names = names_in(&output.dir).map_err(unusable)?;
        let mut parts = names.iter().filter(|name| is_part(name) || is_older_part(name));
        match (output.context.restored, parts.next()) {
            (None, Some(first)) if if_exists == IfExists::Fail => {
                return Err(output.occupied(first));
            }
            (Some(_), Some(_)) if !is_own => {
                let whose = owner.map_or_else(
                    || "an unknown job".to_owned(),
                    |owner| {
                        format!("job \"{}\" (sink \"{}\", {})", owner.name, owner.sink, owner.job)
                    },
                );
                let message =
                    format!("sink \"{sink}\": {} belongs to {whose}", output.dir.display());
                return Err(Problem::new(Code::OutputTaken, message)
                    .detail(format!("this is job {}", output.context.lineage.job))
                    .hint("choose another path, or move what is there away"));
            }
            (Some(checkpoint), _) => output.check_divergence(&output.dir, checkpoint)?,
            _ => {}
        }
        Ok(output)
    }

    /// Takes a directory that the sink has written to before, in which parts of the restored state still
    /// lie, or refuses. `claimed` are those of this run.
    pub(crate) fn claim_before(
        &mut self,
        dir: &Path,
        claimed: &BTreeSet<PathBuf>,
        claim: Claim,
    ) -> Result<(), Problem> {
        let taken = |what: String| {
            let message = format!("sink \"{}\" cannot commit its pending output", self.sink);
            Problem::new(Code::OutputTaken, message).detail(format!("{}: {what}", dir.display()))
        };
        let owner = Owner::of(dir).ok().flatten();
        if let Some(owner) = owner.filter(|owner| owner.job != self.context.lineage.job) {
            return Err(taken(format!("it belongs to job \"{}\" now", owner.name))
                .hint("use a checkpoint or savepoint whose output was committed"));
        }
        if !claimed.contains(dir) {
            match claim
                .lock(dir)
                .map_err(|error| taken("it cannot be written to".to_owned()).because(&error))?
            {
                Some(lock) => self.locks.push(lock),
                None => {
                    return Err(taken("another run writes to it".to_owned())
                        .hint("wait for it to end, or use a savepoint of a job that was stopped"));
                }
            }
        }
        match self.context.restored {
            Some(checkpoint) => self.check_divergence(dir, checkpoint),
            None => Ok(()),
        }
    }

    fn occupied(&self, first: &str) -> Problem {
        Problem::new(
            Code::OutputUnwritable,
            format!(
                "sink \"{}\": {} holds the output of an earlier run",
                self.sink,
                self.dir.display()
            ),
        )
        .detail(format!("for example {}", self.dir.join(first).display()))
        .hint("move it away, choose another path, or set if-exists = \"replace\"")
    }

    /// The name of its sink.
    pub(crate) fn sink(&self) -> &str {
        &self.sink
    }

    fn folder(&self) -> PathBuf {
        self.dir.join(FOLDER)
    }

    /// Committed parts of a future that the restored state does not have; and whether there were more,
    /// that are not listed any more.
    fn diverged(&self, dir: &Path, own: u64) -> io::Result<(BTreeMap<String, Listed>, bool)> {
        let is_future = |timeline: Id, checkpoint: u64| {
            self.context.lineage.shares(timeline, own).is_none_or(|shared| shared < checkpoint)
        };
        // What another job has written down here is none of this one's, and is replaced.
        let is_ours = self.is_own || dir != self.dir;
        let here = if is_ours { Committed::read(&dir.join(FOLDER))? } else { Committed::default() };
        let mut parts = here.parts;
        // The directory may have been moved away, and with it its log.
        if let Some(record) = &self.context.record_dir {
            let recorded = Committed::read(record)?.parts.into_iter();
            parts.extend(recorded.filter(|(_, part)| part.dir == dir));
        }
        // What was still written to when its checkpoint was taken, and was then cut and committed by a
        // restart, is the beginning of what this state holds whole.
        let is_cut = |name: &str| {
            let own = file_of(name).and_then(|file| self.context.own_parts.get(&file));
            own.is_some_and(|own| own != name)
        };
        parts.retain(|name, part| is_future(part.timeline, part.checkpoint) || is_cut(name));
        let has_more = here.through.into_iter().any(|(timeline, it)| is_future(timeline, it));
        Ok((parts, has_more))
    }

    /// Refuses to resume from a state that is older than what was committed since.
    fn check_divergence(&self, dir: &Path, own: u64) -> Result<(), Problem> {
        let failed = |error: io::Error| {
            let message = format!("sink \"{}\" cannot read its log", self.sink);
            Problem::new(Code::OutputUnwritable, message).because(&error)
        };
        let (mut parts, has_more) = self.diverged(dir, own).map_err(failed)?;
        // Written down and never renamed: nobody has seen it.
        parts.retain(|name, part| unseen_in(dir, name, part.is_cut).is_none());
        if parts.is_empty() && !has_more {
            return Ok(());
        }
        let is_there = |(name, part): &(&String, &Listed)| {
            fs::metadata(dir.join(name)).is_ok_and(|it| it.is_file() && it.len() == part.bytes)
        };
        let (there, gone): (Vec<_>, Vec<_>) = parts.iter().partition(is_there);
        let is_here = dir == self.dir;
        if self.context.conflicts.discard_output && is_here && gone.is_empty() && !has_more {
            return Ok(());
        }
        let message = format!(
            "sink \"{}\" has committed output after checkpoint {own}, which would be written twice",
            self.sink
        );
        let mut problem = Problem::new(Code::OutputDiverged, message).detail(format!(
            "in {}: {} parts",
            dir.display(),
            parts.len()
        ));
        for (name, part) in parts.iter().take(NAMED_MAX) {
            problem = problem.detail(format!("{name} ({} bytes)", part.bytes));
        }
        if NAMED_MAX < parts.len() {
            problem = problem.detail("and others");
        }
        if has_more {
            problem = problem.detail(
                "and more parts that are not listed: older ones, or parts in another directory",
            );
        }
        if !is_here {
            return Err(problem.hint(
                "parts of the restored state must still be committed there: resume with that path \
                 and --discard-output, or from a newer savepoint",
            ));
        }
        if gone.is_empty() && !has_more {
            return Err(problem.hint(format!(
                "choose another path, or remove these {} parts with --discard-output",
                there.len()
            )));
        }
        if gone.is_empty() {
            return Err(problem.hint("choose another path, or resume from a newer checkpoint"));
        }
        let gone: Vec<&str> = gone.iter().take(NAMED_MAX).map(|(name, _)| name.as_str()).collect();
        Err(problem
            .detail(format!("some of them were removed or modified: {}", gone.join(", ")))
            .hint("choose another path: output that was removed or modified cannot be discarded"))
    }

    /// Whether a writer is of this run. What earlier runs have left is gone since its begin.
    pub(super) fn is_own_writer(&self, writer: Id) -> bool {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner).contains(&writer)
    }

    /// Where logs are kept: here, and in the record of the job.
    fn log_dirs(&self) -> impl Iterator<Item = PathBuf> {
        [Some(self.folder()), self.context.record_dir.clone()].into_iter().flatten()
    }

    /// The parts that were committed, here, in the record of the job, or in the directories that they
    /// were written to; whether or not they are still there.
    pub(super) fn committed(&self, dirs: &BTreeSet<&Path>) -> io::Result<CommittedNames> {
        let mut names = BTreeSet::new();
        let folders = dirs.iter().map(|dir| dir.join(FOLDER));
        for folder in self.log_dirs().chain(folders) {
            names.extend(Committed::read(&folder)?.parts.into_keys());
        }
        let files = names.iter().filter_map(|name| file_of(name)).collect();
        Ok(CommittedNames { names, files })
    }

    /// The run begins: what it may remove goes, and the directory is its own. `kept` are the pending
    /// parts that the restored state looks after.
    pub(crate) fn begin(&self, if_exists: IfExists, kept: &BTreeSet<String>) -> io::Result<()> {
        let folder = self.folder();
        let committed = Committed::read(&folder)?;
        match self.context.restored {
            None => {
                // An earlier run's, whichever run that was: its own parts, and no other file.
                for name in names_in(&self.dir)? {
                    let is_its_own = is_part(&name) || writer_of_pending(&name).is_some();
                    if if_exists == IfExists::Replace && (is_its_own || is_older_part(&name)) {
                        fs::remove_file(self.dir.join(name))?;
                    }
                }
                remove_logs(&folder)?;
            }
            Some(_) if !self.is_own => remove_logs(&folder)?,
            Some(own) => {
                self.discard_diverged(own)?;
                for name in names_in(&self.dir)? {
                    let Some((_, writer)) = writer_of_pending(&name) else { continue };
                    let timeline = committed.writers.get(&writer);
                    if timeline == Some(&self.context.lineage.timeline) && !kept.contains(&name) {
                        fs::remove_file(self.dir.join(name))?;
                    }
                }
            }
        }
        let owner = Owner {
            job: self.context.lineage.job,
            name: self.context.job.clone(),
            sink: self.sink.clone(),
        };
        write_whole(&folder.join(OWNER), &serde_json::to_vec_pretty(&owner)?)?;
        self.find_before()?;
        sync_dir(&self.dir)
    }

    /// A part of this checkpoint is about to be seen: directories that the sink has left are told, so that
    /// a state from before does not commit there what comes here again.
    pub(super) fn leave_before(&self, checkpoint: u64) -> io::Result<()> {
        if self.context.restored.is_none_or(|own| checkpoint <= own) {
            return Ok(());
        }
        let timeline = self.context.lineage.timeline;
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        for dir in before.iter() {
            let owner = Owner::of(dir).ok().flatten();
            if owner.is_some_and(|owner| owner.job == self.context.lineage.job) {
                let line = Line::Through { timeline, checkpoint };
                Log::open(&dir.join(FOLDER), "elsewhere")?.append(&[line])?;
            }
        }
        before.clear();
        Ok(())
    }

    fn find_before(&self) -> io::Result<()> {
        let Some(record) = &self.context.record_dir else { return Ok(()) };
        let parts = Committed::read(record)?.parts.into_values().map(|part| part.dir);
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        before.extend(parts.filter(|dir| *dir != self.dir));
        Ok(())
    }

    fn discard_diverged(&self, own: u64) -> io::Result<()> {
        let (parts, _) = self.diverged(&self.dir, own)?;
        if parts.is_empty() {
            return Ok(());
        }
        for (name, part) in &parts {
            let path = self.dir.join(name);
            let file = file_of(name).unwrap_or_default();
            let hidden = |end: &str| self.dir.join(format!(".part-{file}.{end}"));
            let is_begun = self.context.own_parts.contains_key(&file)
                && !hidden("pending").exists()
                && !hidden("savepoint").exists();
            match unseen_in(&self.dir, name, part.is_cut) {
                // A savepoint needs it.
                Some(path) if path.extension().is_some_and(|it| it == "savepoint") => {}
                Some(path) => fs::remove_file(path)?,
                // Its beginning belongs to the restored state.
                None if is_begun => fs::rename(path, hidden("pending"))?,
                None => fs::remove_file(path)?,
            }
        }
        sync_dir(&self.dir)?;
        let discarded: Vec<Line> = parts.into_keys().map(|name| Line::Discarded { name }).collect();
        self.log_dirs().try_for_each(|dir| Log::open(&dir, "discarded")?.append(&discarded))
    }

    /// The logs of a task that begins to write.
    pub(super) fn logs(&self, index: u32) -> io::Result<(Arc<Logs>, Id)> {
        let mut all = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        let logs = match all.get(&index) {
            Some(logs) => logs.clone(),
            None => {
                let name = format!("{}-{index}", self.sink);
                let logs = self.log_dirs().map(|dir| Log::open(&dir, &name));
                let logs = logs.collect::<io::Result<_>>()?;
                let noted = Mutex::new(Noted { logs, spares: Vec::new() });
                let logs = Arc::new(Logs { timeline: self.context.lineage.timeline, noted });
                all.insert(index, logs.clone());
                logs
            }
        };
        drop(all);
        let writer = logs.writer()?;
        self.writers.lock().unwrap_or_else(PoisonError::into_inner).insert(writer);
        Ok((logs, writer))
    }
}

/// Notes parts in the log of a directory that the sink has written to before.
pub(super) fn note_elsewhere<'p>(
    dir: &Path,
    parts: impl Iterator<Item = &'p super::Part>,
) -> io::Result<()> {
    Log::open(&dir.join(FOLDER), "elsewhere")?.append(&parts.map(line_of).collect::<Vec<_>>())
}
