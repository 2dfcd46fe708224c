//! Both ends of every edge: which output an input takes, whether the formats fit, and where bad records go.

use std::collections::BTreeMap;

use cofferdam_connector::{DEAD_LETTER, catalog::Formats, source::DEAD_LETTER_OUTPUT};
use cofferdam_contract::{Format, Port};
use cofferdam_core::{
    graph::{Edge, Partitioner},
    ids::NodeId,
};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{InputSpec, JobSpec, NodeKind, NodeSpec, StateBackend};

use super::{component::CheckedOperator, plan::dead_letter_output};

fn formats_of(port: &Port) -> Formats {
    Formats { key: port.key, value: port.value }
}

pub(super) fn resolve_edges(
    spec: &JobSpec,
    operators: &BTreeMap<NodeId, CheckedOperator>,
) -> Result<Vec<Edge>, Problem> {
    let mut edges = spec.graph.edges().to_vec();
    for (to, node) in (0..).map(NodeId).zip(&spec.nodes) {
        let declared = operators.get(&to).map_or(1, |operator| operator.description.inputs.len());
        if 1 < declared && declared != node.inputs.len() {
            let message = format!(
                "operator \"{}\" has {declared} inputs, the manifest gives it {}",
                node.name,
                node.inputs.len()
            );
            let ports = operators.get(&to).map(|operator| port_names(&operator.description.inputs));
            return Err(Problem::new(Code::BadValue, message)
                .detail(format!("its inputs, in order: {}", ports.unwrap_or_default())));
        }
        for (place, input) in (0u32..).zip(&node.inputs) {
            let Some(edge) = edges.iter_mut().find(|edge| edge.to == to && edge.input == place)
            else {
                continue;
            };
            // An operator with one input takes the records of all its edges through it.
            let (output, produced) =
                output_of(spec, operators, input.from, input.output.as_deref())?;
            edge.output = output;
            edge.input = if declared == 1 { 0 } else { place };
            let producer = &spec.node(input.from).name;
            check_edge(producer, node, operators.get(&to), edge, &produced)?;
        }
    }
    Ok(edges)
}

pub(super) fn has_dead_letters(spec: &JobSpec, id: NodeId) -> bool {
    match &spec.node(id).kind {
        NodeKind::Operator(operator) => operator.dead_letter_after.is_some(),
        NodeKind::Source(source) => source.has_dead_letters(),
        NodeKind::Sink(_) => false,
    }
}

/// Isolated records must go somewhere, and nowhere else.
pub(super) fn check_dead_letters(
    spec: &JobSpec,
    operators: &BTreeMap<NodeId, CheckedOperator>,
) -> Result<(), Problem> {
    let nodes = (0..).map(NodeId).zip(&spec.nodes);
    for (id, node) in nodes.filter(|(id, _)| has_dead_letters(spec, *id)) {
        let name = &node.name;
        let outputs = operators.get(&id).map(|operator| &operator.description.outputs);
        if outputs.into_iter().flatten().any(|port| port.name == DEAD_LETTER) {
            let message = format!("operator \"{name}\" has an output \"{DEAD_LETTER}\" of its own");
            return Err(
                Problem::new(Code::BadValue, message).hint("remove on-trap, or rename that output")
            );
        }
        let takes =
            |input: &InputSpec| input.from == id && input.output.as_deref() == Some(DEAD_LETTER);
        if !spec.nodes.iter().flat_map(|node| &node.inputs).any(takes) {
            let message = format!("nothing takes the dead letters of \"{name}\"");
            return Err(Problem::new(Code::BadValue, message)
                .hint(format!("give a sink inputs = [\"{name}.{DEAD_LETTER}\"]")));
        }
    }
    Ok(())
}

/// State that the host keeps must be in the checkpoints.
pub(super) fn check_snapshots(
    spec: &JobSpec,
    operators: &BTreeMap<NodeId, CheckedOperator>,
) -> Result<(), Problem> {
    if spec.state_backend == StateBackend::Hashmap {
        return Ok(());
    }
    for (id, checked) in operators {
        let node = spec.node(*id);
        if let NodeKind::Operator(operator) = &node.kind
            && !operator.snapshot.has_declared()
            && !checked.description.states.is_empty()
        {
            let message =
                format!("the checkpoints of operator \"{}\" would miss its state", node.name);
            return Err(Problem::new(Code::BadValue, message)
                .detail("with state.backend.type = \"sled\" the host keeps declared state, and snapshot = \"memory\" leaves it out")
                .hint("set snapshot = \"both\" or \"declared\""));
        }
    }
    Ok(())
}

fn port_names(ports: &[Port]) -> String {
    ports.iter().map(|port| port.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn output_of(
    spec: &JobSpec,
    operators: &BTreeMap<NodeId, CheckedOperator>,
    from: NodeId,
    name: Option<&str>,
) -> Result<(u32, Formats), Problem> {
    let node = spec.node(from);
    let unknown = |known: String| {
        let message = format!("\"{}\" has no output \"{}\"", node.name, name.unwrap_or_default());
        Problem::new(Code::UnknownInput, message).hint(format!("its outputs: {known}"))
    };
    let Some(operator) = operators.get(&from) else {
        let NodeKind::Source(source) = &node.kind else { return Err(unknown(String::new())) };
        let has_letters = has_dead_letters(spec, from);
        if name == Some(DEAD_LETTER) && has_letters {
            return Ok((DEAD_LETTER_OUTPUT, Formats { key: None, value: Format::Json }));
        }
        if name.is_some_and(|name| name != "out") {
            let known = if has_letters { format!("out, {DEAD_LETTER}") } else { "out".to_owned() };
            return Err(unknown(known));
        }
        return Ok((0, source.formats()));
    };
    let outputs = &operator.description.outputs;
    if name == Some(DEAD_LETTER) && has_dead_letters(spec, from) {
        let output = dead_letter_output(&operator.description);
        return Ok((output, Formats { key: None, value: Format::Json }));
    }
    let found = (0u32..).zip(outputs).find(|(_, port)| name.is_none_or(|name| name == port.name));
    found
        .map(|(output, port)| (output, formats_of(port)))
        .ok_or_else(|| unknown(port_names(outputs)))
}

fn check_edge(
    producer: &str,
    node: &NodeSpec,
    operator: Option<&CheckedOperator>,
    edge: &Edge,
    produced: &Formats,
) -> Result<(), Problem> {
    if edge.partitioner == Partitioner::Hash && produced.key.is_none() {
        let message = format!(
            "the edge from \"{producer}\" to \"{}\" is by hash, but its records have no key",
            node.name
        );
        return Err(Problem::new(Code::HashWithoutKey, message).hint(
            "emit a key, let the source take one from a field, or use partition = \"rebalance\"",
        ));
    }
    let mismatch = |what: &str, out: Option<Format>, into: Option<Format>| {
        let message =
            format!("\"{producer}\" and \"{}\" disagree on the format of {what}", node.name);
        Problem::new(Code::FormatMismatch, message).detail(format!(
            "\"{producer}\" gives {}, \"{}\" takes {}",
            format_name(out),
            node.name,
            format_name(into)
        ))
    };
    let fits =
        |out: Format, into: Format| into == Format::Bytes || out == Format::Bytes || out == into;
    if let Some(operator) = operator {
        let port = &operator.description.inputs[edge.input as usize];
        if !fits(produced.value, port.value) {
            return Err(mismatch("values", Some(produced.value), Some(port.value)));
        }
        return match (produced.key, port.key) {
            (_, None) => Ok(()),
            (Some(out), Some(into)) if fits(out, into) => Ok(()),
            (out, into) => Err(mismatch("keys", out, into)),
        };
    }
    let NodeKind::Sink(sink) = &node.kind else { return Ok(()) };
    if !sink.takes(produced.value) {
        return Err(mismatch("values", Some(produced.value), Some(Format::Text)).hint(
            "values leave a job as Text or Json: change the type `Out` of the last operator",
        ));
    }
    Ok(())
}

fn format_name(format: Option<Format>) -> &'static str {
    match format {
        None => "none",
        Some(Format::Bytes) => "bytes",
        Some(Format::Text) => "text",
        Some(Format::Json) => "json",
        Some(Format::Postcard) => "postcard",
    }
}
