//! `cofferdam explain`: what runs together, what restarts if a task fails, and when. Asks the code
//! that decides in a running job; opens no component.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use cofferdam_connectors::builtin;
use cofferdam_core::{
    exchange::ExchangeType,
    failover::{
        FailoverStrategy, Situation, tasks_to_restart,
        topology::{PartitionId, Topology},
    },
    graph::JobGraph,
    ids::{Millis, NodeId, TaskId},
    random::Random,
    restart::RestartStrategy,
};
use cofferdam_engine::problem::{Code, Problem};
use cofferdam_spec::{JobSpec, partitioner_name, restart_of};
use serde_json::{Value, json};

use crate::{
    args::{ExplainArguments, ExplainVerb, FailoverArguments, RestartsArguments},
    report,
};

pub(crate) fn run(arguments: &ExplainArguments, is_json: bool) -> Result<(), Problem> {
    match (&arguments.verb, &arguments.manifest) {
        (Some(ExplainVerb::Failover(arguments)), _) => failover(arguments, is_json),
        (Some(ExplainVerb::Restarts(arguments)), _) => restarts(arguments, is_json),
        (None, Some(code)) if is_code(code) => explain_error(code, is_json),
        (None, Some(manifest)) => {
            let spec = JobSpec::read_with(manifest, arguments.host.read()?.as_ref(), &builtin())?;
            let names = Names::new(&spec.graph);
            let topology = Topology::new(&spec.graph);
            match is_json {
                true => report::line(&json!({
                    "job": spec.name,
                    "strategy": spec.failover.name(),
                    "regions": names.regions(&topology),
                    "edges": edges(&spec),
                })),
                false => {
                    draw_graph(&spec);
                    draw_regions(&names, &topology, &BTreeMap::new());
                }
            }
            Ok(())
        }
        (None, None) => Err(Problem::new(Code::MissingKey, "name the job's manifest")
            .hint("for example `cofferdam explain job.toml`")),
    }
}

/// What the reference says about each error.
const ERRORS: &str = include_str!("../../../docs/errors.md");

fn is_code(text: &Path) -> bool {
    let text = text.to_string_lossy();
    let digits = text.strip_prefix(['C', 'c']).unwrap_or_default();
    digits.len() == 4 && digits.bytes().all(|digit| digit.is_ascii_digit())
}

/// The title and the text of an error's section.
fn page(code: &str) -> Option<(&'static str, &'static str)> {
    let page = ERRORS.split("\n## ").skip(1).find(|page| page.starts_with(code))?;
    let (title, text) = page.split_once('\n').unwrap_or((page, ""));
    // The anchor of the next section.
    let text = text.split("\n<a id=").next().unwrap_or(text);
    Some((title, text.trim()))
}

/// Prints the section of an error.
fn explain_error(code: &Path, is_json: bool) -> Result<(), Problem> {
    let code = code.to_string_lossy().to_uppercase();
    let Some((title, text)) = page(&code) else {
        let known: Vec<&str> = Code::ALL.iter().map(|code| code.number()).collect();
        return Err(Problem::new(Code::BadValue, format!("there is no error {code}"))
            .hint(format!("there are: {}", known.join(", "))));
    };
    match is_json {
        true => report::line(&json!({ "code": code, "title": title, "text": text })),
        false => say!("{title}\n\n{text}"),
    }
    Ok(())
}

/// Tasks as people write them: `count/1`.
struct Names<'g>(&'g JobGraph);

impl<'g> Names<'g> {
    fn new(graph: &'g JobGraph) -> Self {
        Self(graph)
    }

    fn sorted(&self, tasks: impl Iterator<Item = TaskId>) -> Vec<String> {
        let names: BTreeSet<String> = tasks.map(|task| self.0.task_name(task)).collect();
        names.into_iter().collect()
    }

    fn regions(&self, topology: &Topology) -> Vec<Vec<String>> {
        let mut regions: Vec<_> =
            topology.regions().iter().map(|region| self.sorted(region.iter().copied())).collect();
        regions.sort();
        regions
    }

    fn operator(&self, name: &str) -> Result<NodeId, Problem> {
        let found = self.0.nodes().find(|(_, operator)| operator.name == name);
        found.map(|(id, _)| id).ok_or_else(|| {
            let known: Vec<&str> =
                self.0.nodes().map(|(_, operator)| operator.name.as_str()).collect();
            Problem::new(Code::BadValue, format!("there is no operator \"{name}\""))
                .hint(format!("there are: {}", known.join(", ")))
        })
    }

    fn task(&self, text: &str) -> Result<TaskId, Problem> {
        let parts = text
            .rsplit_once('/')
            .and_then(|(name, index)| Some((name, index.parse::<u32>().ok()?)));
        let Some((name, index)) = parts else {
            return Err(Problem::new(Code::BadValue, format!("\"{text}\" is not a task"))
                .hint("a task is an operator and an index from 0, for example count/1"));
        };
        let operator = self.operator(name)?;
        let parallelism = self.0.node(operator).parallelism;
        if parallelism <= index {
            let message = format!("\"{name}\" has {parallelism} tasks, so there is no {text}");
            return Err(Problem::new(Code::BadValue, message)
                .hint(format!("the last one is {name}/{}", parallelism - 1)));
        }
        Ok(TaskId { node: operator, index })
    }

    /// `v1/0->v4`: what v1/0 produces for v4, by every edge between them.
    fn partitions(&self, text: &str) -> Result<Vec<PartitionId>, Problem> {
        let Some((producer, consumer)) = text.split_once("->") else {
            return Err(Problem::new(Code::BadValue, format!("\"{text}\" is not a partition"))
                .hint("a partition is a task and who reads it, for example count/1->out"));
        };
        let producer = self.task(producer.trim())?;
        let consumer = self.operator(consumer.trim())?;
        let edges = self.0.edges().iter().enumerate();
        let found: Vec<PartitionId> = edges
            .filter(|(_, edge)| edge.from == producer.node && edge.to == consumer)
            .map(|(edge, _)| PartitionId { edge, producer })
            .collect();
        match found.is_empty() {
            true => Err(Problem::new(Code::BadValue, format!("there is no edge for {text}"))
                .hint("`cofferdam explain JOB.toml` lists the edges")),
            false => Ok(found),
        }
    }
}

/// Flink's execution states.
const STATES: &[&str] = &[
    "CREATED",
    "SCHEDULED",
    "DEPLOYING",
    "INITIALIZING",
    "RUNNING",
    "FINISHED",
    "CANCELING",
    "CANCELED",
    "FAILED",
];

fn failover(arguments: &FailoverArguments, is_json: bool) -> Result<(), Problem> {
    let spec =
        JobSpec::read_with(&arguments.manifest, arguments.host.read()?.as_ref(), &builtin())?;
    let graph = &spec.graph;
    let names = Names::new(graph);
    let topology = Topology::new(graph);
    let failed = names.task(&arguments.fail)?;
    let mut lost = Vec::new();
    for partition in arguments.lost.iter().chain(&arguments.unavailable) {
        lost.extend(names.partitions(partition)?);
    }
    let mut created = Vec::new();
    for text in &arguments.state {
        let (task, state) = text.split_once('=').unwrap_or((text, ""));
        let task = names.task(task)?;
        if !STATES.contains(&state) {
            let message = format!("\"{state}\" is not an execution state");
            return Err(Problem::new(Code::BadValue, message)
                .detail(format!("in --state {text}"))
                .hint(format!("one of {}", STATES.join(", "))));
        }
        if state == "CREATED" {
            created.push(task);
        }
    }
    let situation = Situation {
        is_lost: &|partition| lost.contains(&partition),
        is_created: &|task| created.contains(&task),
        is_exact: false,
    };
    let restart = tasks_to_restart(spec.failover, &topology, failed, situation);
    let because: BTreeMap<String, String> = restart
        .iter()
        .map(|(task, reason)| (graph.task_name(*task), reason.words(graph)))
        .collect();
    if is_json {
        report::line(&json!({
            "strategy": spec.failover.name(),
            "regions": names.regions(&topology),
            "restart": because.keys().collect::<Vec<_>>(),
            "because": because,
        }));
        return Ok(());
    }
    let all = graph.tasks().len();
    say!(
        "if {} fails, {} of {all} tasks restart (failover-strategy: {})\n",
        arguments.fail,
        because.len(),
        spec.failover.name()
    );
    if spec.failover == FailoverStrategy::Region {
        draw_regions(&names, &topology, &because);
        say!("");
    }
    for (task, reason) in &because {
        say!("  {task:<16} {reason}");
    }
    Ok(())
}

fn edges(spec: &JobSpec) -> Vec<Value> {
    let name = |id| spec.graph.node(id).name.as_str();
    let edge = |edge: &cofferdam_core::graph::Edge| {
        json!({
            "from": name(edge.from),
            "to": name(edge.to),
            "partition": partitioner_name(edge.partitioner),
            "exchange": edge.exchange.name(),
            "chained": spec.graph.is_chained(edge),
        })
    };
    spec.graph.edges().iter().map(edge).collect()
}

fn draw_graph(spec: &JobSpec) {
    say!("job \"{}\", failover-strategy: {}\n", spec.name, spec.failover.name());
    for (id, operator) in spec.graph.nodes() {
        say!("{} x{}", operator.name, operator.parallelism);
        for edge in spec.graph.outputs(id) {
            let arrow = match edge.exchange {
                ExchangeType::PipelinedApproximate => "~~>",
                exchange if exchange.has_partition() => "==>",
                _ => "-->",
            };
            let chained = if spec.graph.is_chained(edge) { ", chained" } else { "" };
            say!(
                "  {arrow} {} ({}, {}{chained})",
                spec.graph.node(edge.to).name,
                partitioner_name(edge.partitioner),
                edge.exchange.name(),
            );
        }
    }
    say!("");
}

/// Regions as boxes; those that restart are marked.
fn draw_regions(names: &Names<'_>, topology: &Topology, restarting: &BTreeMap<String, String>) {
    for (number, region) in names.regions(topology).iter().enumerate() {
        let is_restarting = region.iter().any(|task| restarting.contains_key(task));
        let mark = if is_restarting { "  restarts" } else { "" };
        say!("+- region {} ({} tasks){mark}", number + 1, region.len());
        for line in region.chunks(8) {
            say!("|  {}", line.join("  "));
        }
        say!("+-");
    }
}

fn strategy_words(strategy: &RestartStrategy) -> String {
    match strategy {
        RestartStrategy::None => "none: the first failure ends the job".to_owned(),
        RestartStrategy::FixedDelay { attempts, delay_ms } => {
            format!("fixed-delay: {attempts} restarts, {delay_ms} ms after each failure")
        }
        RestartStrategy::FailureRate { failures_per_interval_max, interval_ms, delay_ms } => {
            format!(
                "failure-rate: up to {failures_per_interval_max} failures within {interval_ms} ms, \
                 {delay_ms} ms after each"
            )
        }
        RestartStrategy::ExponentialDelay(settings) => format!(
            "exponential-delay: {} to {} ms, times {} each, jitter {}, from the beginning after {} ms{}",
            settings.initial_backoff_ms,
            settings.backoff_ms_max,
            settings.backoff_multiplier,
            settings.jitter_factor,
            settings.reset_threshold_ms,
            settings.attempts_max.map_or(String::new(), |max| format!(", {max} restarts at most")),
        ),
    }
}

fn restarts(arguments: &RestartsArguments, is_json: bool) -> Result<(), Problem> {
    let restart = match &arguments.manifest {
        Some(manifest) => {
            JobSpec::read_with(manifest, arguments.host.read()?.as_ref(), &builtin())?.restart
        }
        None => restart_of(&arguments.set)?,
    };
    if !arguments.failures.is_sorted() {
        return Err(Problem::new(Code::BadValue, "the times of --failures must ascend")
            .hint("they are milliseconds since the start, for example 0,500,2000"));
    }
    let mut state = restart.state();
    let mut random = Random::new(arguments.seed);
    if !is_json {
        say!("{}\n", strategy_words(&restart.strategy));
    }
    for &at_ms in &arguments.failures {
        let verdict = state.on_failure(Millis(at_ms), &mut random);
        if is_json {
            report::line(&json!({
                "at_ms": at_ms,
                "new_attempt": verdict.is_new_attempt,
                "can_restart": verdict.can_restart,
                "backoff_ms": verdict.backoff_ms,
            }));
            continue;
        }
        let attempt = if verdict.is_new_attempt { "a new attempt" } else { "the same attempt" };
        match verdict.can_restart {
            true => say!("{at_ms:>10} ms  restart after {} ms, {attempt}", verdict.backoff_ms),
            false => say!("{at_ms:>10} ms  the job fails"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use cofferdam_core::graph::{Edge, Node, Partitioner};

    use super::*;

    #[test]
    fn codes_and_manifests_are_told_apart() {
        for (text, expected) in [
            ("C0020", true),
            ("c0101", true),
            ("C20", false),
            ("C00200", false),
            ("job.toml", false),
        ] {
            assert_eq!(is_code(Path::new(text)), expected, "{text}");
        }
    }

    #[test]
    fn every_error_has_its_page_and_the_page_ends_before_the_next() {
        for code in Code::ALL {
            let (title, text) = page(code.number()).expect("documented");
            assert!(title.starts_with(code.number()), "{title}");
            assert!(!text.is_empty() && !text.contains("<a id="), "{text}");
        }
        assert_eq!(page("C9999"), None);
    }

    #[test]
    fn tasks_and_partitions_are_found_by_the_names_that_people_write() {
        let operator = |name: &str, parallelism| Node { name: name.to_owned(), parallelism };
        let (read, count) = (NodeId(0), NodeId(1));
        let edge = Edge {
            from: read,
            output: 0,
            to: count,
            input: 0,
            partitioner: Partitioner::Hash,
            exchange: ExchangeType::Pipelined,
        };
        let graph = JobGraph::new(vec![operator("read", 1), operator("count", 2)], vec![edge]);
        let graph = graph.expect("no cycle");
        let names = Names::new(&graph);
        let task = TaskId { node: count, index: 1 };
        assert_eq!(names.task("count/1").expect("there is one"), task);
        let found = names.partitions("read/0 -> count").expect("there is one");
        assert_eq!(found.len(), 1);
        for (text, hint) in [
            ("count", "for example count/1"),
            ("count/x", "for example count/1"),
            ("count/2", "the last one is count/1"),
            ("cuont/1", "there are: read, count"),
        ] {
            let problem = names.task(text).expect_err(text);
            let advice = problem.hint.unwrap_or_default();
            assert!(advice.contains(hint), "{text}: {advice}");
        }
        assert!(names.partitions("read/0").is_err(), "no reader");
        assert!(names.partitions("count/0->read").is_err(), "no such edge");
    }

    #[test]
    fn a_restart_strategy_is_told_in_one_line() {
        let fixed = RestartStrategy::FixedDelay { attempts: 3, delay_ms: 50 };
        assert_eq!(strategy_words(&fixed), "fixed-delay: 3 restarts, 50 ms after each failure");
        assert_eq!(strategy_words(&RestartStrategy::None), "none: the first failure ends the job");
    }
}
