//! Whether the state of a checkpoint can become the state of these tasks.

use cofferdam_core::fit::{self, Misfit};
use cofferdam_sandbox::Limits;
use cofferdam_settings::{Code, Problem};
use cofferdam_store::{
    self,
    metadata::{CheckpointMetadata, TaskIdentity},
};

use super::target::Tasks;
use crate::job::read_out::on_instance;

/// What to do with a type that does not fit.
pub(super) const HOW_TO_GROW: &str = "keep the type, or extend it: a new field needs \
                           #[serde(default)], an integer may become wider; or give the new \
                           type a new state name";

/// Whether a checkpoint's state can become the state of these tasks.
pub(super) fn check_fit(
    tasks: &Tasks<'_>,
    metadata: &CheckpointMetadata,
    ignore_unclaimed_state: bool,
) -> Result<(), Problem> {
    let mismatch =
        |what: String, hint: &str| Err(Problem::new(Code::StateMismatch, what).hint(hint));
    if metadata.job != tasks.spec.name {
        return mismatch(
            format!(
                "the checkpoint is of job \"{}\", not of \"{}\"",
                metadata.job, tasks.spec.name
            ),
            "to start from the beginning, move the state directory away or choose another with --state-dir",
        );
    }
    let stored = || metadata.tasks.iter().map(|task| &task.identity);
    for task in tasks.identities {
        if let Some(known) = stored().find(|known| known.uid == task.uid) {
            check_operator(tasks, known, task, ignore_unclaimed_state)?;
        }
    }
    let is_known = |known: &TaskIdentity| tasks.identities.iter().any(|task| task.uid == known.uid);
    match stored().find(|known| !is_known(known)) {
        Some(extra) if !ignore_unclaimed_state => mismatch(
            format!(
                "the checkpoint has state of \"{}\", which is not in the manifest",
                extra.operator
            ),
            &format!(
                "put it back; or, if it was renamed, give it uid = \"{}\"; or discard its state \
                 with --from DIR --ignore-unclaimed-state",
                extra.uid
            ),
        ),
        _ => Ok(()),
    }
}

fn check_operator(
    tasks: &Tasks<'_>,
    known: &TaskIdentity,
    task: &TaskIdentity,
    ignore_unclaimed_state: bool,
) -> Result<(), Problem> {
    if known.has_declared && task.has_declared {
        check_states(tasks, known, task)?;
    }
    fit::fit(&known.state(), &task.state(), ignore_unclaimed_state)
        .map_err(|misfit| problem_of(&misfit, known, task))
}

/// What a misfit is for the user: what is wrong, and what to do about it.
pub(super) fn problem_of(misfit: &Misfit, known: &TaskIdentity, task: &TaskIdentity) -> Problem {
    let name = &task.operator;
    let mismatch = |what: String, hint: String| Problem::new(Code::StateMismatch, what).hint(hint);
    let foreign = |what: String, fits: &str| {
        let hint = format!("linear memory fits only the {fits}{}", by_declared_state(known));
        mismatch(format!("the checkpoint of \"{name}\" {what}"), hint)
    };
    match misfit {
        Misfit::OtherSource => other_source(known, task),
        Misfit::KeysChanged | Misfit::StateWithoutKeys => without_keys(misfit, known, task),
        Misfit::StateLeft { name: left } => mismatch(
            format!(
                "the checkpoint has state \"{left}\" of \"{name}\", which its component does not have"
            ),
            format!(
                "if it was renamed, add #[state(renamed_from = \"{left}\")]; or discard it \
                 with --from DIR --ignore-unclaimed-state"
            ),
        ),
        Misfit::MaxParallelism => mismatch(
            format!(
                "the checkpoint has \"{name}\" with max-parallelism {}, the manifest with {}",
                known.max_parallelism, task.max_parallelism
            ),
            format!(
                "max-parallelism is fixed by the first checkpoint: set max-parallelism = {}",
                known.max_parallelism
            ),
        ),
        Misfit::MemoryLeft => mismatch(
            format!("the checkpoint of \"{name}\" holds linear memory and no declared state"),
            "restore the old snapshot setting, component and parallelism; or, if the operator needs \
             nothing from its memory, discard the memory with --from DIR --ignore-unclaimed-state"
                .to_owned(),
        ),
        Misfit::NoMemory => mismatch(
            format!("the checkpoint of \"{name}\" holds no linear memory"),
            "set snapshot = \"declared\", as it was when the checkpoint was taken".to_owned(),
        ),
        Misfit::OtherComponent => {
            let (then, now) = (digest_text(known.digest), digest_text(task.digest));
            let what = format!("was written by another component ({then} then, {now} now)");
            foreign(what, "component that wrote it: restore that component")
        }
        Misfit::OtherBackend => {
            let backend = |is_host: bool| if is_host { "sled" } else { "hashmap" };
            let (then, now) = (backend(known.has_host_state), backend(task.has_host_state));
            let what = format!(
                "was taken with state.backend.type = \"{then}\", the manifest has \"{now}\""
            );
            foreign(what, "state backend that wrote it: set state.backend.type back")
        }
        Misfit::OtherDirectories => {
            let list = |names: &Option<String>| {
                names.as_deref().map_or_else(|| "none".to_owned(), |names| names.replace('\n', ", "))
            };
            let (then, now) = (list(&known.directories), list(&task.directories));
            let what = format!("was taken with other directories at hand ({then} then, {now} now)");
            foreign(what, "directories that it had: set `grants` back")
        }
        Misfit::MemoryParallelism => mismatch(
            format!(
                "the checkpoint has \"{name}\" with parallelism {}, the manifest with {}",
                known.parallelism, task.parallelism
            ),
            format!(
                "linear memory cannot be redistributed: set the parallelism back{}",
                by_declared_state(known)
            ),
        ),
    }
}

fn other_source(known: &TaskIdentity, task: &TaskIdentity) -> Problem {
    let TaskIdentity { operator, uid, connector, .. } = known;
    let before = connector.as_deref().unwrap_or_default();
    let now = match &task.connector {
        Some(now) if !task.is_sink => format!("not \"{now}\""),
        Some(_) => "and it is a sink now".to_owned(),
        None => "and it is an operator now".to_owned(),
    };
    let message = format!(
        "the checkpoint has the position of source \"{operator}\" with connector = \"{before}\", {now}"
    );
    Problem::new(Code::StateMismatch, message).hint(format!(
        "to begin without that position, give the node another uid than \"{uid}\" and use --from DIR \
         --ignore-unclaimed-state"
    ))
}

/// The other way for state that lies in linear memory.
fn by_declared_state(known: &TaskIdentity) -> &'static str {
    match known.has_declared {
        true => "; or set snapshot = \"declared\" to resume from its declared state only",
        false => {
            "; or, if the operator needs nothing from its memory, set snapshot = \"declared\" and \
             discard the memory with --from DIR --ignore-unclaimed-state"
        }
    }
}

/// Declared state does not lie with the keys of the records that come now.
fn without_keys(misfit: &Misfit, known: &TaskIdentity, task: &TaskIdentity) -> Problem {
    let name = &task.operator;
    let by = |is_keyed: bool| if is_keyed { "keyed" } else { "not keyed" };
    let (message, hint) = match misfit {
        Misfit::KeysChanged => (
            format!(
                "the input of \"{name}\" was {} when its declared state was written, and is {} now",
                by(known.is_keyed),
                by(task.is_keyed)
            ),
            "set the partition of its inputs back",
        ),
        _ => (
            format!(
                "\"{name}\" has declared state, its input is not partitioned by key, and its parallelism \
                 changed from {} to {}",
                known.parallelism, task.parallelism
            ),
            "set the parallelism back; to change it, start over with partition = \"hash\" and another state \
             directory",
        ),
    };
    Problem::new(Code::StateWithoutKeys, message)
        .detail("declared state that is not partitioned by key cannot be redistributed")
        .hint(hint)
}

/// How a schema names a type that says nothing of what its values look like.
const OPAQUE: &str = "opaque ";

/// Declared state is matched by name, and must look as it did, or be convertible.
fn check_states(
    tasks: &Tasks<'_>,
    known: &TaskIdentity,
    task: &TaskIdentity,
) -> Result<(), Problem> {
    let name = &task.operator;
    for (number, state) in (0..).zip(&task.states) {
        let Some(before) = state.find(&known.states) else { continue };
        // What nobody can look into is the same only in the same component.
        let is_known = !before.schema.contains(OPAQUE) || known.digest == task.digest;
        if before.schema == state.schema && is_known {
            continue;
        }
        let mismatch = |what: String| {
            let message = format!("state \"{}\" of \"{name}\" has another schema", state.name);
            Problem::new(Code::SchemaMismatch, message)
                .detail(format!("in the checkpoint: {}", before.schema))
                .detail(format!("in the component:  {}", state.schema))
                .detail(what)
                .hint(HOW_TO_GROW)
        };
        if !is_known {
            let what =
                "serde does not describe the type of its values, and the component has changed";
            return Err(mismatch(what.to_owned()));
        }
        let Some(component) = tasks.components.get(name) else { continue };
        let node = tasks.spec.nodes.iter().find(|node| node.name == *name);
        let limits = node.map_or_else(Limits::default, |node| node.kind.limits());
        let answer = on_instance(component, limits, async |instance| {
            instance.converts(number, &before.schema).await
        });
        match answer {
            Ok(Ok(())) => {}
            Ok(Err(what)) => return Err(mismatch(what)),
            Err(error) => return Err(mismatch(error.to_string())),
        }
    }
    Ok(())
}

fn digest_text(digest: Option<[u8; 16]>) -> String {
    digest.map_or_else(
        || "none".to_owned(),
        |digest| cofferdam_sandbox::Digest(digest).to_string()[..12].to_owned(),
    )
}
