//! What a run resumes from, or why it is refused; and the outputs that it claims. Looks, and changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use cofferdam_connector::{
    catalog::{Conflicts, OutputContext, SinkPlan},
    identity::Id,
};
use cofferdam_core::{exchange::ExchangeType, share::WEIGHT_DEFAULT};
use cofferdam_files::resolved;
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{JobSpec, NodeKind};
use cofferdam_store::{
    OpenedStore, SnapshotStore, Storage,
    faulty::Faults,
    metadata::{CheckpointMetadata, TaskIdentity},
};

use super::{files::OUTPUTS, restore, target::Tasks};
use crate::job::{
    restore::RestoreFrom,
    state_dir::{Ended, JobRecord, unusable_state},
};

/// What the manifest does not say.
#[derive(Debug, Clone)]
pub struct JobOptions {
    /// Where the state is, instead of where the manifest says.
    pub state_dir: Option<PathBuf>,
    /// Seeds jitter and the first checkpoint.
    pub seed: u64,
    /// What to begin from, instead of the newest checkpoint of the state directory.
    pub from: Option<RestoreFrom>,
    /// Runs a finished job again.
    pub again: bool,
    /// Ways out of conflicts between the state and the output.
    pub conflicts: Conflicts,
    /// Its share of the processor's time beside the other jobs of the process, relative to theirs; 100 by default.
    pub weight: u32,
    /// Makes the storage fail, for tests of what follows from that.
    pub faults: Option<Faults>,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self {
            state_dir: None,
            seed: 0,
            from: None,
            again: false,
            conflicts: Conflicts::default(),
            weight: WEIGHT_DEFAULT,
            faults: None,
        }
    }
}

impl JobOptions {
    /// What the run begins from and owns.
    pub(super) fn claimed(&self) -> Option<PathBuf> {
        self.from.as_ref().filter(|from| from.claim).map(|from| from.dir.clone())
    }
}

/// What a state directory was before a run.
pub(super) enum Before {
    Nothing,
    Running,
    /// Its job has ended, and what begins now is something else.
    Ended(Id),
}

impl Before {
    /// Records the job in a state directory that had none, before an output is said to be this job's.
    pub(super) fn mark(&self, record: &JobRecord, state_dir: Option<&Path>) -> io::Result<()> {
        match (self, state_dir) {
            (Self::Nothing, Some(dir)) => record.write(dir),
            _ => Ok(()),
        }
    }

    /// Whether the checkpoints that are there belong to a job that has ended. A crash may have left them
    /// behind after its end was recorded. What the run is to begin from is not over, whatever its place is
    /// called.
    fn is_over(&self, found: &OpenedStore, from: Option<&RestoreFrom>) -> bool {
        let Self::Ended(job) = self else { return false };
        let is_its = |metadata: &CheckpointMetadata| metadata.lineage.job == *job;
        if found.checkpoints.is_empty() || !found.checkpoints.iter().all(is_its) {
            return false;
        }
        let named = from.and_then(|from| restore::open_named(&from.dir).ok());
        named.is_none_or(|(_, named)| !found.checkpoints.iter().any(|it| it.is_that_of(&named)))
    }
}

/// What a run would resume from.
pub(super) struct Resumption {
    pub(super) record: JobRecord,
    pub(super) before: Before,
    /// What is in the store is of a job that has ended.
    pub(super) is_over: bool,
    /// The store that was looked into.
    pub(super) looked: SnapshotStore,
    pub(super) chosen: restore::Chosen,
}

/// Finds out what a run would resume from, or why it is refused. Changes nothing.
pub(super) fn look(
    tasks: &Tasks<'_>,
    storage: Box<dyn Storage>,
    state_dir: Option<&Path>,
    options: &JobOptions,
    digest: &str,
) -> Result<Resumption, Problem> {
    let (record, before) = read_record(tasks.spec, state_dir, options, digest)?;
    let (looked, mut found) =
        SnapshotStore::look(storage).map_err(|error| unusable_state(state_dir, &error))?;
    let is_over = before.is_over(&found, options.from.as_ref());
    if is_over {
        found = OpenedStore::default();
    }
    let chosen = restore::choose(tasks, &looked, &found, options.from.as_ref(), &record)?;
    let is_half_way = || chosen.restores.iter().any(|restore| !restore.state.is_drained);
    let has_partitions = tasks.spec.graph.has_exchange(ExchangeType::has_partition);
    if has_partitions && chosen.checkpoint().is_some() && is_half_way() {
        let message =
            "the checkpoint was taken in the middle of a job, but this job runs region by region";
        return Err(Problem::new(Code::StateMismatch, message)
            .detail("the input that its sources had not read yet would be lost")
            .hint("make its exchanges pipelined again, or start over with another --state-dir"));
    }
    if chosen.checkpoint().is_none() {
        tasks.sources.values().try_for_each(|source| source.check_fresh())?;
    }
    Ok(Resumption { record, before, is_over, looked, chosen })
}

/// The record of the job in a state directory. One that has ended does not begin by itself.
fn read_record(
    spec: &JobSpec,
    state_dir: Option<&Path>,
    options: &JobOptions,
    digest: &str,
) -> Result<(JobRecord, Before), Problem> {
    let nothing = || Ok((JobRecord::new(&spec.name), Before::Nothing));
    let Some(dir) = state_dir else { return nothing() };
    let known = JobRecord::read(dir).map_err(|error| {
        let message = format!("the record of the job in {} cannot be read", dir.display());
        Problem::new(Code::StateUnusable, message).because(&error).hint(
            "restore `JOB` from a backup; without it the owner of the state and output is unknown",
        )
    })?;
    let Some(mut record) = known else { return nothing() };
    let before = match &record.ended {
        Some(_) => Before::Ended(record.job),
        None => Before::Running,
    };
    let anew = "to run it from the beginning, use --again";
    let from = options.from.as_ref().and_then(|from| restore::absolute(&from.dir));
    match &record.ended {
        Some(_) if options.again => record = JobRecord::new(&spec.name),
        Some(Ended::Finished { digest: finished, .. }) => {
            let is_the_same = finished == digest && (from.is_none() || from == record.begun_from);
            if from.is_some() && !is_the_same {
                record = JobRecord::new(&spec.name);
            } else if is_the_same {
                let message = format!("job \"{}\" has finished; there is nothing to do", spec.name);
                return Err(Problem::new(Code::AlreadyFinished, message).hint(anew));
            } else {
                let message =
                    format!("job \"{}\" finished with other components or settings", spec.name);
                return Err(Problem::new(Code::OtherFinished, message)
                    .detail(format!("its state directory is {}", dir.display()))
                    .hint(format!("{anew}; or give it another --state-dir")));
            }
        }
        Some(Ended::Stopped { savepoint, .. }) if from.is_none() => {
            let message = format!("job \"{}\" was stopped with a savepoint", spec.name);
            let problem = Problem::new(Code::OtherFinished, message);
            return Err(match savepoint {
                Some(dir) => problem
                    .detail(dir.display())
                    .hint(format!("resume from it: --from {}; {anew}", dir.display())),
                None => problem.hint(format!("resume from it: --from DIR; {anew}")),
            });
        }
        Some(Ended::Stopped { .. }) => record.ended = None,
        None => {}
    }
    Ok((record, before))
}

/// Takes the outputs of all sinks, or asks for them. Refuses before anything in them has changed.
pub(super) fn claim_outputs(
    spec: &JobSpec,
    identities: &[TaskIdentity],
    chosen: &restore::Chosen,
    state_dir: Option<&Path>,
    options: &JobOptions,
    is_asking: bool,
) -> Result<BTreeMap<String, Box<dyn SinkPlan>>, Problem> {
    let mut claimed: BTreeMap<PathBuf, &str> = BTreeMap::new();
    let mut plans: BTreeMap<String, Box<dyn SinkPlan>> = BTreeMap::new();
    let grants = &spec.files();
    for node in &spec.nodes {
        let NodeKind::Sink(sink) = &node.kind else { continue };
        let tasks = identities.iter().zip(&chosen.restores);
        let own = tasks.filter(|(identity, _)| identity.operator == node.name);
        let states: Vec<&[u8]> =
            own.map(|(_, restore)| &*restore.state.state).filter(|it| !it.is_empty()).collect();
        if let Some(path) = sink.directory()
            && let Some(other) = path.canonicalize().ok().and_then(|dir| claimed.get(&dir))
        {
            let message = format!("sinks \"{other}\" and \"{}\" write to one directory", node.name);
            return Err(Problem::new(Code::OutputTaken, message)
                .detail(path.display())
                .hint("give each a directory of its own"));
        }
        let plan = sink.claim(OutputContext {
            sink: &node.name,
            job: &spec.name,
            lineage: &chosen.lineage,
            // A sink that the checkpoint does not know begins with the run.
            restored: chosen.checkpoint().filter(|_| !states.is_empty()),
            states,
            record_dir: state_dir.map(|dir| dir.join(OUTPUTS)),
            grants,
            conflicts: options.conflicts,
            is_asking,
        })?;
        claimed.extend(sink.directory().map(|path| (resolved(path), node.name.as_str())));
        plans.insert(node.name.clone(), plan);
    }
    let claimed: BTreeSet<PathBuf> = claimed.into_keys().collect();
    plans.values_mut().try_for_each(|plan| plan.claim_elsewhere(&claimed))?;
    Ok(plans)
}
