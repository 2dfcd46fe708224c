//! The rows as others want them: tables of a reference, and a JSON schema for editors.

use std::{collections::BTreeSet, fmt::Write};

use serde_json::{Map, Value, json};

use crate::table::{AnySetting, Kind, Table};

/// The default of a setting, in the largest unit that it is a multiple of.
fn default_of(setting: &dyn AnySetting) -> String {
    let shown = setting.default_shown();
    let units: &[(u64, &str)] = match setting.row().kind {
        Kind::Bytes => &[(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")],
        Kind::Duration => &[(3_600_000, "h"), (60_000, "min"), (1_000, "s")],
        _ => return shown,
    };
    let number = shown.split(' ').next().and_then(|number| number.parse::<u64>().ok());
    let Some(number) = number.filter(|number| 0 < *number) else { return shown };
    let unit = units.iter().find(|(size, _)| number.is_multiple_of(*size));
    unit.map_or(shown, |(size, unit)| format!("{} {unit}", number / size))
}

/// The rows of a table as a table of Markdown.
#[must_use]
pub fn markdown(table: &Table) -> String {
    let mut text = "| key | type | default | meaning |\n|---|---|---|---|\n".to_owned();
    for setting in table.rows {
        let row = setting.row();
        let key = match table.name {
            "" => row.key.to_owned(),
            name => format!("{name}.{}", row.key),
        };
        let kind = match &row.kind {
            Kind::Choice => {
                let words: Vec<String> =
                    setting.words().iter().map(|word| format!("`{word}`")).collect();
                words.join(", ")
            }
            Kind::Integer(range) if *range.end() < u64::from(u32::MAX) => {
                format!("whole number, {} to {}", range.start(), range.end())
            }
            kind => kind.name().to_owned(),
        };
        let default = default_of(*setting);
        let mut means = row.means.to_owned();
        if !row.aliases.is_empty() {
            let names: Vec<String> = row.aliases.iter().map(|it| format!("`{it}`")).collect();
            let _ = write!(means, " (Flink also calls it {})", names.join(", "));
        }
        let _ = writeln!(text, "| `{key}` | {kind} | {default} | {means} |");
    }
    text
}

/// The JSON schema of a document: `tables` stand at its top, `nodes` are arrays of tables.
#[must_use]
pub fn json_schema(title: &str, tables: &[Table], nodes: &[Table]) -> Value {
    let mut root = object();
    for table in tables {
        table.rows.iter().for_each(|setting| insert(&mut root, *setting));
    }
    let names: BTreeSet<&str> = nodes.iter().map(|table| table.name).collect();
    let mut arrays = Map::new();
    for name in names {
        let of_node = |table: &&Table| table.name == name;
        let mut item = object();
        for table in nodes.iter().filter(of_node) {
            table.rows.iter().for_each(|setting| insert(&mut item, *setting));
        }
        let array = json!({ "type": "array", "items": Value::Object(item) });
        arrays.insert(name.to_owned(), array);
    }
    if let Some(Value::Object(properties)) = root.get_mut("properties") {
        properties.extend(arrays);
    }
    root.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
    root.insert("title".to_owned(), json!(title));
    Value::Object(root)
}

fn object() -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("type".to_owned(), json!("object"));
    object.insert("additionalProperties".to_owned(), json!(false));
    object.insert("properties".to_owned(), json!({}));
    object
}

/// Adds a setting, and the tables that it stands in.
fn insert(object_: &mut Map<String, Value>, setting: &dyn AnySetting) {
    let row = setting.row();
    let mut table = object_;
    let mut parts: Vec<&str> = row.key.split('.').collect();
    let Some(last) = parts.pop() else { return };
    for part in parts {
        let Some(Value::Object(properties)) = table.get_mut("properties") else { return };
        let inner = properties.entry(part).or_insert_with(|| Value::Object(object()));
        let Value::Object(inner) = inner else { return };
        table = inner;
    }
    if setting.is_required() {
        let required = table.entry("required").or_insert_with(|| json!([]));
        if let Value::Array(required) = required
            && !required.contains(&json!(last))
        {
            required.push(json!(last));
        }
    }
    let Some(Value::Object(properties)) = table.get_mut("properties") else { return };
    let known = properties.entry(last).or_insert_with(|| described(setting));
    // Connectors share keys: what one of them takes is allowed.
    let own = described(setting);
    if *known != own {
        let mut any = match known.get("anyOf") {
            Some(Value::Array(any)) => any.clone(),
            _ => vec![known.clone()],
        };
        if !any.contains(&own) {
            any.push(own);
        }
        *known = json!({ "anyOf": any });
    }
}

fn described(setting: &dyn AnySetting) -> Value {
    let row = setting.row();
    let mut value = match &row.kind {
        Kind::Text => json!({ "type": "string" }),
        Kind::Boolean => json!({ "type": "boolean" }),
        Kind::Integer(range) => {
            json!({ "type": "integer", "minimum": range.start(), "maximum": range.end() })
        }
        Kind::Number => json!({ "type": "number" }),
        Kind::Duration | Kind::Bytes => json!({ "type": ["string", "integer"] }),
        Kind::Choice => choice(&setting.words()),
        Kind::Array => json!({ "type": "array" }),
        Kind::Free => json!({ "type": "object" }),
    };
    value["description"] = json!(row.means);
    if !setting.is_required() {
        value["$comment"] = json!(format!("default: {}", default_of(setting)));
    }
    value
}

/// The words that an editor proposes, and what is read as one of them: any case will do, as in Flink's enums.
fn choice(words: &[&str]) -> Value {
    let any_case = |letter: char| match letter {
        letter if letter.is_ascii_alphabetic() => {
            format!("[{}{}]", letter.to_ascii_lowercase(), letter.to_ascii_uppercase())
        }
        letter => letter.to_string(),
    };
    let patterns: Vec<String> =
        words.iter().map(|word| word.chars().map(any_case).collect()).collect();
    let pattern = format!("^({})$", patterns.join("|"));
    json!({ "anyOf": [{ "enum": words }, { "type": "string", "pattern": pattern }] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Key, Required, Setting};

    static NAME: Required<String> = Key::text("job.name", "its name").required("a name");
    static SIZE: Setting<u64> = Key::bytes("limits.size", "how much").or(16 << 20);
    static PAUSE: Setting<u64> =
        Key::duration("limits.pause", "how long").aliases(&["wait"]).or(90_000);

    #[test]
    fn rows_become_a_table_and_a_schema() {
        let rows: &[&dyn AnySetting] = &[&NAME, &SIZE, &PAUSE];
        let rows: &'static [&'static dyn AnySetting] = Box::leak(rows.to_vec().into_boxed_slice());
        let table = Table { name: "", connector: None, title: "all", rows };
        let markdown = markdown(&table);
        assert!(markdown.contains("| `limits.size` | size | 16 MiB | how much |"), "{markdown}");
        assert!(
            markdown.contains("| 90 s | how long (Flink also calls it `wait`) |"),
            "{markdown}"
        );
        let schema = json_schema("it", &[table], &[]);
        assert_eq!(schema.pointer("/properties/job/required/0"), Some(&json!("name")));
        let size = "/properties/limits/properties/size/type/0";
        assert_eq!(schema.pointer(size), Some(&json!("string")));
    }
}
