//! Every setting that a manifest can have, table by table: the reference, the schema for editors and the host's
//! settings come from here.

use cofferdam_connector::Catalog;
use cofferdam_settings::{AnySetting, Table, schema};

use super::{connector, execution, nodes, operator, restart, state};

const fn table(title: &'static str, rows: &'static [&'static dyn AnySetting]) -> Table {
    node("", title, rows)
}

const fn node(
    name: &'static str,
    title: &'static str,
    rows: &'static [&'static dyn AnySetting],
) -> Table {
    Table { name, connector: None, title, rows }
}

/// The settings of the whole job.
#[must_use]
pub fn job() -> Vec<Table> {
    vec![
        table("job", super::ROWS),
        table("exchanges", execution::EXCHANGE_ROWS),
        table("checkpoints", execution::CHECKPOINT_ROWS),
        table("state", state::ROWS),
        table("failures", restart::ROWS),
    ]
}

/// The settings of its nodes: several tables for a kind of node, one of them for each connector.
#[must_use]
pub fn nodes(catalog: &Catalog) -> Vec<Table> {
    let mut tables = vec![
        node("source", "every source", nodes::SOURCE_ROWS),
        node("source", "connectors of sources", connector::ROWS),
        node("operator", "every operator", nodes::NODE_ROWS),
        node("operator", "operators", operator::ROWS),
        node("operator", "limits", operator::LIMIT_ROWS),
        node("operator", "what an operator may reach", operator::GRANT_ROWS),
        node("sink", "every sink", nodes::NODE_ROWS),
        node("sink", "connectors of sinks", connector::ROWS),
    ];
    let of =
        |name, connector, rows| Table { name, connector: Some(connector), title: connector, rows };
    tables.extend(catalog.sources().iter().map(|it| of("source", it.name(), it.settings())));
    tables.extend(catalog.sinks().iter().map(|it| of("sink", it.name(), it.settings())));
    tables.retain(|table| !table.rows.is_empty());
    tables
}

/// The settings of an input that is written as a table.
#[must_use]
pub fn inputs() -> Table {
    node("inputs", "inputs", nodes::INPUT_ROWS)
}

/// The table of a host's file by which it grants.
#[must_use]
pub fn grants() -> Table {
    node("grants.default", "grants", super::grants::ROWS)
}

/// The JSON schema of a manifest, for editors.
#[must_use]
pub fn json_schema(catalog: &Catalog) -> serde_json::Value {
    let mut schema = schema::json_schema("Cofferdam job", &job(), &nodes(catalog));
    let input = schema::json_schema("input", &[table("input", nodes::INPUT_ROWS)], &[]);
    let items = serde_json::json!({ "anyOf": [
        { "type": "string" },
        {
            "type": "object",
            "properties": input["properties"],
            "required": input["required"],
            "additionalProperties": false,
        },
    ] });
    for node in ["operator", "sink"] {
        let inputs = &mut schema["properties"][node]["items"]["properties"]["inputs"];
        inputs["items"] = items.clone();
    }
    schema
}

/// The settings that a host may have, for all of its jobs.
pub(super) fn of_host() -> impl Iterator<Item = &'static dyn AnySetting> {
    let rows = job().into_iter().flat_map(|table| table.rows.iter().copied());
    rows.filter(|setting| setting.row().is_of_host)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fmt::Write, fs, path::Path};

    use cofferdam_settings::table::Kind;

    use super::*;
    use crate::JobSpec;

    /// What the reference calls a table.
    fn name_of(table: &Table) -> String {
        match table.connector {
            Some(connector) => format!("{} {connector}", table.name),
            None => table.title.to_owned(),
        }
    }

    /// `BLESS=1` rewrites the tables of the reference.
    #[test]
    fn the_tables_of_the_reference_are_those_of_the_rows() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/settings.md");
        let known = fs::read_to_string(&path).expect("the reference");
        let of_nodes = nodes(&cofferdam_connectors::builtin()).into_iter();
        let tables: Vec<Table> =
            job().into_iter().chain(of_nodes).chain([inputs(), grants()]).collect();
        let mut text = String::new();
        let mut rest = known.as_str();
        let mut shown = BTreeSet::new();
        while let Some((before, behind)) = rest.split_once("<!-- rows: ") {
            let (title, behind) = behind.split_once(" -->").expect("a title");
            let (_, behind) = behind.split_once("<!-- end -->").expect("an end");
            let table =
                tables.iter().find(|it| name_of(it) == title).expect("a table of this title");
            shown.insert(title.to_owned());
            let rows = schema::markdown(table);
            let _ = write!(text, "{before}<!-- rows: {title} -->\n{rows}<!-- end -->");
            rest = behind;
        }
        text.push_str(rest);
        assert_eq!(shown, tables.iter().map(name_of).collect());
        if std::env::var_os("BLESS").is_some() {
            fs::write(&path, text).expect("written");
        } else {
            assert!(text == known, "docs/settings.md is not what the rows say: run with BLESS=1");
        }
    }

    #[test]
    fn the_schema_has_every_key_where_a_manifest_has_it() {
        let schema = json_schema(&cofferdam_connectors::builtin());
        let interval = "/properties/execution/properties/checkpointing/properties/interval/type";
        assert!(schema.pointer(interval).is_some_and(serde_json::Value::is_array), "{schema:#}");
        assert_eq!(schema.pointer("/properties/job/required/0"), Some(&serde_json::json!("name")));
        let memory = "/properties/operator/items/properties/limits/properties/memory";
        assert!(schema.pointer(memory).is_some());
        // Two connectors have a path: a source reads one, a sink writes one.
        let paths =
            ["source", "sink"].map(|node| format!("/properties/{node}/items/properties/path/type"));
        assert!(paths.iter().all(|path| schema.pointer(path).is_some()));
        let inputs = "/properties/sink/items/properties/inputs/items/anyOf/1/properties/partition/anyOf/0/enum";
        assert!(schema.pointer(inputs).is_some());
    }

    /// What is read and what has a row is the same, so the reference and the schema can leave nothing out.
    #[test]
    fn every_row_is_read_and_everything_that_is_read_has_a_row() {
        let text = r#"
[job]
name = "all"

[execution.checkpointing]
interval = "1s"

[state.backend]
type = "sled"

[[source]]
name = "lines"
connector = "file"
path = "*.csv"
format = "csv"

[[source]]
name = "words"
connector = "generator"

[[operator]]
name = "count"
component = "count.wasm"
inputs = [{ from = "words", partition = "hash" }, "lines"]
on-trap = "dead-letter"
config = { free = 1 }

[[sink]]
name = "parts"
connector = "file"
path = "out"
inputs = ["count"]
"#;
        let mut read = BTreeSet::new();
        for strategy in ["fixed-delay", "failure-rate", "exponential-delay"] {
            let text = format!("{text}\n[restart-strategy]\ntype = \"{strategy}\"\n");
            let spec = JobSpec::parse(
                Path::new("job.toml"),
                &text,
                None,
                &cofferdam_connectors::builtin(),
            )
            .expect("a manifest");
            read.extend(spec.effective.into_iter().map(|it| it.key));
        }
        let named: [(&str, &[&str]); 3] =
            [("source", &["lines", "words"]), ("operator", &["count"]), ("sink", &["parts"])];
        let mut known = BTreeSet::new();
        for table in job() {
            known.extend(table.rows.iter().map(|it| it.row().key.to_owned()));
        }
        for table in nodes(&cofferdam_connectors::builtin()) {
            let names = named.iter().find(|(kind, _)| *kind == table.name).expect("a kind").1;
            let names = names.iter().filter(|name| match table.connector {
                Some("generator") => **name == "words",
                Some("stdout") => false,
                Some(_) => **name != "words",
                None => true,
            });
            for name in names {
                known.extend(
                    table.rows.iter().map(|it| format!("{}.{name}.{}", table.name, it.row().key)),
                );
            }
        }
        // What is listed for a node beside what it is set to.
        let is_derived = |key: &str| {
            key.contains(".inputs[") || key.contains(".config.") || key.ends_with(".state-cache")
        };
        let read: BTreeSet<String> = read.into_iter().filter(|key| !is_derived(key)).collect();
        // The name of a node is part of the keys of all others.
        let is_listed_otherwise = |key: &String| {
            let is_of_node = !key.starts_with("job.");
            is_of_node && [".name", ".inputs", ".config"].iter().any(|end| key.ends_with(end))
        };
        known.retain(|key| !is_listed_otherwise(key));
        assert_eq!(read, known);
    }

    /// Another value than the default.
    fn sample(setting: &dyn AnySetting) -> Option<String> {
        let default = setting.default_shown();
        Some(match &setting.row().kind {
            Kind::Boolean => (default != "true").to_string(),
            Kind::Integer(range) => {
                // Not the lowest, which may mean none.
                range.clone().skip(1).map(|value| value.to_string()).find(|it| *it != default)?
            }
            Kind::Number if setting.row().key.ends_with("jitter-factor") => "0.5".to_owned(),
            Kind::Number => "1.25".to_owned(),
            Kind::Duration => "\"77s\"".to_owned(),
            Kind::Bytes => "\"77MiB\"".to_owned(),
            Kind::Choice => {
                let words = setting.words();
                format!("\"{}\"", words.iter().rev().find(|word| **word != default)?)
            }
            Kind::Text | Kind::Array | Kind::Free => return None,
        })
    }

    /// Of every setting of a job: what the manifest says is what `check --effective` shows, with its place.
    #[test]
    fn what_a_manifest_sets_is_what_counts_and_is_shown_with_its_place() {
        // With what each needs beside itself.
        let needs = |key: &str| match key {
            "job.max-parallelism" | "execution.checkpointing.interval" => "",
            "execution.checkpointing.storage" => "execution.checkpointing.dir = \"kept\"\n",
            "restart-strategy.exponential-delay.initial-backoff" => {
                "restart-strategy.type = \"exponential-delay\"\nrestart-strategy.exponential-delay.max-backoff = \"1h\"\n"
            }
            key if key.starts_with("state.backend.sled") => "state.backend.type = \"sled\"\n",
            key if key.contains("aligned-checkpoint-timeout") || key.contains("max-aligned") => {
                "execution.checkpointing.unaligned.enabled = true\nexecution.checkpointing.interval = \"1s\"\n"
            }
            key if key.starts_with("restart-strategy.fixed-delay.") => {
                "restart-strategy.type = \"fixed-delay\"\n"
            }
            key if key.starts_with("restart-strategy.failure-rate.") => {
                "restart-strategy.type = \"failure-rate\"\n"
            }
            key if key.starts_with("restart-strategy.exponential-delay.") => {
                "restart-strategy.type = \"exponential-delay\"\n"
            }
            _ => "execution.checkpointing.interval = \"1s\"\n",
        };
        let graph = "[[source]]\nname = \"in\"\nconnector = \"generator\"\n\
                     [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"in\"]\n";
        let (mut shown, mut refused) = (0, Vec::new());
        for table in job() {
            for setting in table.rows {
                let key = setting.row().key;
                let Some(value) = sample(*setting) else { continue };
                let name = "job.name = \"all\"\n";
                let text = format!("{key} = {value}\n{name}{}{graph}", needs(key));
                let path = Path::new("job.toml");
                let builtin = cofferdam_connectors::builtin();
                let spec = match JobSpec::parse(path, &text, None, &builtin) {
                    Ok(spec) => spec,
                    Err(problem) => {
                        refused.push(format!("{key} = {value}: {problem}"));
                        continue;
                    }
                };
                let counts = spec.effective.iter().find(|it| it.key == key).expect(key);
                assert_ne!(counts.value, setting.default_shown(), "{key} = {value}");
                let place = counts.place.as_deref().unwrap_or_default();
                assert!(place.starts_with("job.toml:1:"), "{key} = {value} is set at {place}");
                shown += 1;
            }
        }
        assert_eq!(refused, Vec::<String>::new());
        assert!(25 <= shown, "{shown}");
    }
}
