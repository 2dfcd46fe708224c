//! `cofferdam check`: everything that can be known about a job before it runs.

use cofferdam_connector::{catalog::Conflicts, sink::Guarantee};
use cofferdam_connectors::builtin;
use cofferdam_engine::{
    job::{self, CheckedJob, JobOptions},
    problem::Problem,
    progress::{Observer, Progress},
    restore::{Restorable, RestoreFrom, Takeover},
};
use cofferdam_settings::Effective;
use cofferdam_spec::{JobSpec, NodeKind, partitioner_name};
use serde_json::json;

use crate::{args::CheckArguments, report};

pub(crate) async fn run(arguments: CheckArguments, is_json: bool) -> Result<(), Problem> {
    let host = arguments.host.read()?;
    let spec = JobSpec::read_with(&arguments.manifest, host.as_ref(), &builtin())?;
    spec.warnings.iter().for_each(|warning| say_aside!("warning: {warning}"));
    if arguments.effective {
        effective(&spec, is_json);
        return Ok(());
    }
    let sandbox = job::sandbox(arguments.cache.engine())?;
    let checked = CheckedJob::new(spec, &sandbox).await?;
    checked.warnings().iter().for_each(|warning| say_aside!("warning: {warning}"));
    let from = arguments.from.map(|dir| RestoreFrom {
        dir,
        claim: false,
        ignore_unclaimed_state: arguments.ignore_unclaimed_state,
    });
    let options = JobOptions {
        state_dir: arguments.state_dir,
        from,
        conflicts: Conflicts {
            discard_output: arguments.discard_output,
            assume_committed: arguments.assume_committed,
        },
        ..JobOptions::default()
    };
    let restorable = checked.check_from(&options, &Aside { is_shown: !is_json })?;
    let warnings = restorable.iter().flat_map(|restorable| &restorable.warnings);
    warnings.for_each(|warning| say_aside!("warning: {warning}"));
    if is_json {
        let mut line = machine(&checked);
        if let Some(restorable) = &restorable {
            line["restores"] = takeovers(restorable);
        }
        report::line(&line);
    } else {
        people(&checked);
        if let (Some(from), Some(restorable)) = (options.from, restorable) {
            say!(
                "  a run could begin from checkpoint {} of {}",
                restorable.checkpoint,
                from.dir.display()
            );
            for (node, takeover) in &restorable.nodes {
                say!("    {node}: {}", words(*takeover));
            }
        }
    }
    Ok(())
}

/// Says what takes long, to people.
struct Aside {
    is_shown: bool,
}

impl Observer for Aside {
    fn observe(&self, progress: Progress) {
        if let Progress::Restoring { checkpoint, step } = progress
            && self.is_shown
        {
            say_aside!("checkpoint {checkpoint}: {step}");
        }
    }
}

fn words(takeover: Takeover) -> String {
    match takeover {
        Takeover::New => "is not in the checkpoint, starts without state".to_owned(),
        Takeover::Same => "restores its state".to_owned(),
        Takeover::Rescaled { from, to } => {
            format!("restores its state, redistributed from {from} tasks to {to}")
        }
    }
}

fn takeovers(restorable: &Restorable) -> serde_json::Value {
    let node = |(name, takeover): &(String, Takeover)| match takeover {
        Takeover::New => json!({ "name": name, "state": "new" }),
        Takeover::Same => json!({ "name": name, "state": "same" }),
        Takeover::Rescaled { from, to } => {
            json!({ "name": name, "state": "rescaled", "from": from, "to": to })
        }
    };
    let nodes: Vec<_> = restorable.nodes.iter().map(node).collect();
    json!({ "checkpoint": restorable.checkpoint, "nodes": nodes, "warnings": restorable.warnings })
}

/// Every setting with its value and where it comes from.
fn effective(spec: &JobSpec, is_json: bool) {
    for Effective { key, value, place } in &spec.effective {
        match is_json {
            true => report::line(&json!({ "key": key, "value": value, "from": place })),
            false => {
                let place = place.as_deref().unwrap_or("default");
                say!("{key} = {value}\n    {place}");
            }
        }
    }
}

fn kind_name(kind: &NodeKind) -> &'static str {
    match kind {
        NodeKind::Source(_) => "source",
        NodeKind::Operator(_) => "operator",
        NodeKind::Sink(_) => "sink",
    }
}

fn machine(checked: &CheckedJob) -> serde_json::Value {
    let spec = &checked.spec;
    let nodes: Vec<_> = spec
        .graph
        .nodes()
        .map(|(id, operator)| {
            let inputs: Vec<_> = spec
                .graph
                .inputs(id)
                .map(|edge| {
                    json!({
                        "from": spec.node(edge.from).name,
                        "partition": partitioner_name(edge.partitioner),
                        "chained": spec.graph.is_chained(edge),
                    })
                })
                .collect();
            json!({
                "name": operator.name,
                "kind": kind_name(&spec.node(id).kind),
                "parallelism": operator.parallelism,
                "guarantee": spec.guarantee(id).map(Guarantee::name),
                "inputs": inputs,
            })
        })
        .collect();
    let states: Vec<_> = checked
        .descriptions()
        .flat_map(|(name, description)| {
            description.states.iter().map(move |state| {
                json!({ "operator": name, "name": state.name, "kind": "value", "schema": state.schema })
            })
        })
        .collect();
    json!({ "job": spec.name, "tasks": spec.graph.tasks().len(), "nodes": nodes, "states": states })
}

fn people(checked: &CheckedJob) {
    let spec = &checked.spec;
    let tasks = spec.graph.tasks().len();
    say!("job \"{}\": {} nodes, {tasks} tasks, no problems found", spec.name, spec.nodes.len());
    for (id, operator) in spec.graph.nodes() {
        let kind = kind_name(&spec.node(id).kind);
        let guarantee = match (&spec.node(id).kind, spec.guarantee(id)) {
            (NodeKind::Sink(_), Some(guarantee)) => format!(", {}", guarantee.name()),
            (NodeKind::Sink(_), None) => ", records may be lost on the way".to_owned(),
            _ => String::new(),
        };
        say!("  {kind:<8} {} x{}{guarantee}", operator.name, operator.parallelism);
        for edge in spec.graph.inputs(id) {
            let chained = if spec.graph.is_chained(edge) { ", chained" } else { "" };
            say!(
                "    <- {} ({}{chained})",
                spec.node(edge.from).name,
                partitioner_name(edge.partitioner)
            );
        }
    }
    for (name, description) in checked.descriptions() {
        for state in &description.states {
            say!("  state    {name}.{}: value of {} by key", state.name, state.schema);
        }
    }
    match spec.checkpoint.interval_ms {
        Some(interval) => say!("  checkpoints every {interval} ms"),
        None => say!("  no periodic checkpoints: only a last one, at the end"),
    }
}
