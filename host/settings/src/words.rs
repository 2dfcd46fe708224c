//! Words for what is found and what is wanted.

use std::collections::BTreeSet;

use toml::de::DeValue;

use crate::table::Kind;

/// The keys and tables that are known in a table.
pub(super) fn siblings<'k>(known: &'k BTreeSet<String>, parent: &str) -> BTreeSet<&'k str> {
    let below = |path: &'k String| match parent {
        "" => Some(path.as_str()),
        parent => path.strip_prefix(parent)?.strip_prefix('.'),
    };
    known.iter().filter_map(below).filter_map(|rest| rest.split('.').next()).collect()
}

pub(super) fn joined(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

pub(super) fn flatten(prefix: &str, value: &DeValue<'_>, flat: &mut Vec<(String, String)>) {
    let text = match value {
        DeValue::Table(inner) => {
            for (key, value) in inner {
                flatten(&joined(prefix, key.get_ref()), value.get_ref(), flat);
            }
            return;
        }
        DeValue::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                match item.get_ref() {
                    DeValue::Array(_) | DeValue::Table(_) => {
                        flat.push((format!("{prefix}.{index}"), format!("{:?}", item.get_ref())));
                    }
                    item => flatten(&format!("{prefix}.{index}"), item, flat),
                }
            }
            return;
        }
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => number.as_str().to_owned(),
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(value) => value.to_string(),
    };
    flat.push((prefix.to_owned(), text));
}

/// Longer words are compared with none: it takes the product of both lengths.
const WORD_BYTES_MAX: usize = 100;

/// The word that was probably meant.
pub fn closest<'w>(word: &str, known: impl IntoIterator<Item = &'w str>) -> Option<&'w str> {
    if WORD_BYTES_MAX < word.len() {
        return None;
    }
    let word = word.to_lowercase();
    known
        .into_iter()
        .filter(|candidate| candidate.len() <= WORD_BYTES_MAX)
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(3) / 3)
        .min()
        .map(|(_, candidate)| candidate)
}

pub(super) fn wanted(kind: &Kind) -> &'static str {
    match kind {
        Kind::Text | Kind::Choice => "a text",
        Kind::Boolean => "true or false",
        Kind::Integer(_) => "a whole number",
        Kind::Number => "a number",
        Kind::Duration => "a duration such as \"1s\" or \"500ms\"",
        Kind::Bytes => "a size such as \"64MiB\"",
        Kind::Array => "an array",
        Kind::Free => "a table",
    }
}

pub(super) fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}
