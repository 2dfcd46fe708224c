//! Reads documents key by key and remembers which keys were asked for, so that every other one is an error with
//! its place and the key that was probably meant.
//!
//! A mistake does not end the reading: it is noted, the default counts in its place, and all that is wrong comes
//! out together.

#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use toml::de::{DeTable, DeValue};

use crate::{
    Effective,
    document::{Document, MISTAKES_MAX, shifted},
    problem::{Code, Problem},
    table::{AnySetting, Key, Kind, Optional, Required, Setting, Value},
    value::{parse_bytes, parse_duration_ms},
    words::{closest, flatten, joined, siblings, type_name, wanted},
};

type Result<T> = std::result::Result<T, Problem>;

/// Keys of a table whose keys are free.
const FREE_MAX: usize = 1_000;

/// A value and where it stands.
#[derive(Debug, Clone)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub span: Range<usize>,
}

/// A table of the document with all tables in it. Of a key that several files set the first file counts.
#[derive(Debug)]
pub struct Section<'a> {
    document: &'a Document<'a>,
    /// What messages call it; empty at the top.
    name: String,
    /// What its keys begin with in the list of what counts.
    shown: RefCell<String>,
    /// Where it begins, for messages about keys that are missing.
    pub span: Range<usize>,
    entries: BTreeMap<String, Entry<'a>>,
    tables: BTreeMap<String, Range<usize>>,
    asked: RefCell<BTreeSet<String>>,
    /// Flink's older names of keys that were asked for, each with the key.
    aliases: RefCell<BTreeMap<&'static str, &'static str>>,
    /// Whether its rows are known, so that other keys are unknown whatever was read.
    has_rows: Cell<bool>,
}

#[derive(Debug)]
struct Entry<'a> {
    key_span: Range<usize>,
    /// Where the spans of its file begin.
    start: usize,
    value: &'a DeValue<'a>,
    span: Range<usize>,
}

impl<'a> Section<'a> {
    /// The tables of all files of a document, each with where its spans begin.
    #[must_use]
    pub fn root(document: &'a Document<'a>, layers: &[(&'a DeTable<'a>, usize)]) -> Self {
        let mut root = Self::empty(document, "", 0..0);
        layers.iter().for_each(|(table, start)| root.add("", table, *start));
        root
    }

    fn empty(document: &'a Document<'a>, name: &str, span: Range<usize>) -> Self {
        Self {
            document,
            name: name.to_owned(),
            shown: RefCell::new(name.to_owned()),
            span,
            entries: BTreeMap::new(),
            tables: BTreeMap::new(),
            asked: RefCell::default(),
            aliases: RefCell::default(),
            has_rows: Cell::new(false),
        }
    }

    fn add(&mut self, prefix: &str, table: &'a DeTable<'a>, start: usize) {
        for (key, value) in table {
            let path = joined(prefix, key.get_ref());
            let key_span = shifted(key.span(), start);
            match value.get_ref() {
                DeValue::Table(inner) => {
                    self.tables.entry(path.clone()).or_insert(key_span);
                    self.add(&path, inner, start);
                }
                value_at => {
                    let span = shifted(value.span(), start);
                    let entry = Entry { key_span, start, value: value_at, span };
                    self.entries.entry(path).or_insert(entry);
                }
            }
        }
    }

    /// The document that it is part of.
    #[must_use]
    pub fn document(&self) -> &'a Document<'a> {
        self.document
    }

    /// In the list of what counts its keys begin with its kind and this name from now on.
    pub fn call(&self, name: &str) {
        *self.shown.borrow_mut() = joined(&self.name, name);
    }

    fn path_of(&self, key: &str) -> String {
        joined(&self.name, key)
    }

    /// A key as it is listed among those that count.
    #[must_use]
    pub fn shown_key(&self, key: &str) -> String {
        joined(&self.shown.borrow(), key)
    }

    /// The name by which a mistake of this section's key is remembered: names alone are those of many nodes.
    fn mistake_key(&self, key: &str) -> String {
        format!("{}:{}", self.span.start, self.path_of(key))
    }

    fn entry(&self, key: &str) -> Option<&Entry<'a>> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.entries.get(key)
    }

    /// Whether there is a table of this name. It counts as known then.
    #[must_use]
    pub fn has_table(&self, name: &str) -> bool {
        self.asked.borrow_mut().insert(name.to_owned());
        self.tables.contains_key(name)
    }

    /// Whether a key or a table is there. It counts as known then, with all that is in it.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        let is_in = |path: &String| {
            path.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let found: Vec<String> =
            self.entries.keys().chain(self.tables.keys()).filter(|it| is_in(it)).cloned().collect();
        let is_there = !found.is_empty();
        self.asked.borrow_mut().extend(found);
        is_there
    }

    /// Notes a problem with a key; its default counts.
    fn mistaken<T>(&self, key: &str, problem: Problem) -> Option<T> {
        let (mut mistakes, mistake) =
            (self.document.mistakes.borrow_mut(), (self.mistake_key(key), problem));
        // A setting may be read more than once.
        if mistakes.len() < MISTAKES_MAX && !mistakes.contains(&mistake) {
            mistakes.push(mistake);
        }
        None
    }

    fn wrong_type(&self, key: &str, span: &Range<usize>, found: &str, wanted: &str) -> Problem {
        let message = format!("`{}` must be {wanted}, not {found}", self.path_of(key));
        self.document.problem(Code::BadValue, span, message)
    }

    /// A problem with a value that was read.
    pub fn bad_value(
        &self,
        key: &str,
        span: &Range<usize>,
        why: impl std::fmt::Display,
    ) -> Problem {
        let message = format!("`{}`: {why}", self.path_of(key));
        self.document.problem(Code::BadValue, span, message)
    }

    /// A problem with a word that is none of those that there are.
    #[must_use]
    pub fn not_one_of(
        &self,
        key: &str,
        span: &Range<usize>,
        text: &str,
        words: &[&str],
    ) -> Problem {
        let why = format!("\"{text}\" is not one of {}", words.join(", "));
        let problem = self.bad_value(key, span, why);
        match closest(text, words.iter().copied()) {
            Some(meant) => problem.hint(format!("did you mean \"{meant}\"?")),
            None => problem,
        }
    }

    /// Notes that a value cannot be used; what is read in its place counts.
    pub fn refuse(&self, key: &dyn AnySetting, span: &Range<usize>, why: impl std::fmt::Display) {
        let key = key.row().key;
        self.mistaken::<()>(key, self.bad_value(key, span, why));
    }

    /// A problem with a key that is not there. It is an empty one where the key has a value that was found to
    /// be wrong.
    pub fn missing(&self, key: &str, wanted: &str) -> Problem {
        if self.document.has_mistake(&self.mistake_key(key)) {
            return Problem::new(Code::MissingKey, String::new());
        }
        let message = format!("`{}` is missing: {wanted}", self.path_of(key));
        self.document.problem(Code::MissingKey, &self.span, message)
    }

    fn note(&self, key: &str, value: String, span: Option<&Range<usize>>) {
        let place = span.map(|span| self.document.place(span));
        let key = self.shown_key(key);
        let mut effective = self.document.effective.borrow_mut();
        match effective.iter_mut().find(|known| known.key == key) {
            Some(known) => *known = Effective { key, value, place },
            None => effective.push(Effective { key, value, place }),
        }
    }

    /// The value of a setting: the one that is set, or its default.
    pub fn get<T: Clone>(&self, setting: &Setting<T>) -> T {
        self.located(setting).map_or_else(|| setting.default.clone(), |located| located.value)
    }

    /// Where a setting is set, if it is.
    #[must_use]
    pub fn span_of(&self, setting: &dyn AnySetting) -> Option<Range<usize>> {
        self.entries.get(setting.row().key).map(|entry| entry.span.clone())
    }

    /// The value of a setting where it is set, with its place.
    pub fn located<T: Clone>(&self, setting: &Setting<T>) -> Option<Located<T>> {
        let located = self.read(&setting.key);
        let value = located.as_ref().map_or(&setting.default, |located| &located.value);
        let shown = setting.key.shown(value);
        self.note(setting.key.row.key, shown, located.as_ref().map(|located| &located.span));
        located
    }

    /// The value of a setting that may be absent.
    pub fn find<T>(&self, setting: &Optional<T>) -> Option<Located<T>> {
        let located = self.read(&setting.key);
        let value = located.as_ref().map(|located| setting.key.shown(&located.value));
        let shown = value.unwrap_or_else(|| setting.absent.to_owned());
        self.note(setting.key.row.key, shown, located.as_ref().map(|located| &located.span));
        located
    }

    /// The value of a setting that has to be set.
    ///
    /// # Errors
    /// Where it is not; an empty problem where it is, and was found to be wrong.
    pub fn require<T>(&self, setting: &Required<T>) -> Result<Located<T>> {
        let key = setting.key.row.key;
        self.try_require(setting).ok_or_else(|| self.missing(key, setting.wanted))
    }

    /// The value of a setting that has to be set, where it is.
    pub fn try_require<T>(&self, setting: &Required<T>) -> Option<Located<T>> {
        let located = self.read(&setting.key)?;
        self.note(setting.key.row.key, setting.key.shown(&located.value), Some(&located.span));
        Some(located)
    }

    fn read<T>(&self, key: &Key<T>) -> Option<Located<T>> {
        let Located { value, span } = self.value(&key.row, || key.words())?;
        let value = key.value(&value)?;
        match key.why_not(&value) {
            Some(why) => {
                let key = key.row.key;
                self.mistaken(key, self.bad_value(key, &span, why))
            }
            None => Some(Located { value, span }),
        }
    }

    fn value(
        &self,
        row: &crate::table::Row,
        words: impl Fn() -> Vec<&'static str>,
    ) -> Option<Located<Value>> {
        let key = row.key;
        self.aliases.borrow_mut().extend(row.aliases.iter().map(|alias| (*alias, key)));
        let wanted = wanted(&row.kind);
        if let Some(span) = self.tables.get(key) {
            let _ = self.has(key);
            return self.mistaken(key, self.wrong_type(key, span, "a table", wanted));
        }
        let Entry { value, span, .. } = self.entry(key)?;
        let located = |value| Some(Located { value, span: span.clone() });
        let wrong_type =
            || self.mistaken(key, self.wrong_type(key, span, type_name(value), wanted));
        let refused = |why: String| self.mistaken(key, self.bad_value(key, span, why));
        match (&row.kind, value) {
            (Kind::Text, DeValue::String(text)) => located(Value::Text(text.to_string())),
            (Kind::Boolean, DeValue::Boolean(value)) => located(Value::Boolean(*value)),
            (Kind::Integer(range), DeValue::Integer(number)) => {
                let parsed = i128::from_str_radix(number.as_str(), number.radix()).ok();
                match parsed.and_then(|number| u64::try_from(number).ok()) {
                    Some(value) if range.contains(&value) => located(Value::Integer(value)),
                    _ => refused(format!(
                        "{} is not from {} to {}",
                        number.as_str(),
                        range.start(),
                        range.end()
                    )),
                }
            }
            (Kind::Number, DeValue::Integer(_) | DeValue::Float(_)) => {
                let text = match value {
                    DeValue::Integer(number) => number.as_str(),
                    DeValue::Float(number) => number.as_str(),
                    _ => "",
                };
                match text.parse::<f64>() {
                    Ok(value) if value.is_finite() => located(Value::Number(value)),
                    _ => refused(format!("{text} is not a finite number")),
                }
            }
            (Kind::Duration | Kind::Bytes, DeValue::String(_) | DeValue::Integer(_)) => {
                match amount(&row.kind, value, wanted) {
                    Ok(value) => located(Value::Integer(value)),
                    Err(why) => refused(why),
                }
            }
            // Case does not matter, as in Flink's enums.
            (Kind::Choice, DeValue::String(text)) => {
                let words = words();
                match words.iter().position(|word| word.eq_ignore_ascii_case(text)) {
                    Some(index) => located(Value::Word(index)),
                    None => self.mistaken(key, self.not_one_of(key, span, text, &words)),
                }
            }
            (Kind::Array, DeValue::Array(_)) | (Kind::Free, _) => None,
            _ => wrong_type(),
        }
    }

    /// An array of tables: `[[operator]]`. Each has a name of its own among those that count.
    ///
    /// # Errors
    /// Where it is something else.
    pub fn sections(&self, key: &'static str) -> Result<Vec<Section<'a>>> {
        if let Some(span) = self.tables.get(key) {
            let _ = self.has(key);
            return Err(self.wrong_type(key, span, "a table", "an array"));
        }
        let items = self.items(key)?;
        let section = |(value, span): (&'a DeValue<'a>, Range<usize>)| match value {
            DeValue::Table(table) => Ok(self.nested(key, span, table)),
            other => {
                let wanted = format!("tables: write [[{key}]]");
                Err(self.wrong_type(key, &span, type_name(other), &wanted))
            }
        };
        items.into_iter().map(section).collect()
    }

    /// Tables of a document that begins at `start`, as one of this name. Of a key that several have the first counts.
    #[must_use]
    pub fn of_tables(
        document: &'a Document<'a>,
        name: &str,
        tables: &[&'a DeTable<'a>],
        start: usize,
    ) -> Self {
        let mut section = Section::empty(document, name, start..start);
        tables.iter().for_each(|table| section.add("", table, start));
        section
    }

    /// A table that is an item of an array of this one.
    #[must_use]
    pub fn nested(&self, key: &str, span: Range<usize>, table: &'a DeTable<'a>) -> Section<'a> {
        let mut section = Section::empty(self.document, key, span);
        // Arrays of tables are the manifest's alone, whose spans begin at 0.
        section.add("", table, 0);
        section
    }

    /// The items of an array.
    ///
    /// # Errors
    /// Where it is something else.
    pub fn items(&self, key: &'static str) -> Result<Vec<(&'a DeValue<'a>, Range<usize>)>> {
        match self.entry(key) {
            None => Ok(Vec::new()),
            Some(Entry { value: DeValue::Array(items), start, .. }) => {
                let item =
                    |it: &'a toml::Spanned<DeValue<'a>>| (it.get_ref(), shifted(it.span(), *start));
                Ok(items.iter().map(item).collect())
            }
            Some(Entry { value, span, .. }) => {
                Err(self.wrong_type(key, span, type_name(value), "an array"))
            }
        }
    }

    /// The texts of a list, each with its place; `what` says what one is.
    ///
    /// # Errors
    /// Where it is something else, or one of them is empty.
    pub fn texts(&self, list: &Optional<()>, what: &str) -> Result<Vec<(String, Range<usize>)>> {
        let key = list.key.row.key;
        let mut texts = Vec::new();
        for (value, span) in self.items(key)? {
            match value {
                DeValue::String(text) if !text.is_empty() && !text.contains('\0') => {
                    texts.push((text.to_string(), span));
                }
                _ => return Err(self.bad_value(key, &span, what)),
            }
        }
        let shown: Vec<&str> = texts.iter().map(|(text, _)| text.as_str()).collect();
        match shown.is_empty() {
            true => self.note(key, list.absent.to_owned(), None),
            false => self.note(key, format!("{shown:?}"), self.span_of(list).as_ref()),
        }
        Ok(texts)
    }

    /// A table whose keys are free, flattened to dotted keys and texts.
    ///
    /// # Errors
    /// Where it is something else.
    pub fn free(&self, key: &'static str) -> Result<Vec<(String, String)>> {
        if let Some(Entry { value, span, .. }) = self.entry(key) {
            return Err(self.wrong_type(key, span, type_name(value), "a table"));
        }
        let _ = self.has(key);
        let mut flat = Vec::new();
        for (path, entry) in &self.entries {
            if let Some(rest) = path.strip_prefix(key).and_then(|rest| rest.strip_prefix('.')) {
                flatten(rest, entry.value, &mut flat);
            }
        }
        if FREE_MAX < flat.len() {
            let message = format!(
                "`{}` has {} keys, but at most {FREE_MAX} are allowed",
                self.path_of(key),
                flat.len()
            );
            return Err(self.document.problem(Code::BadValue, &self.span, message));
        }
        for (name, value) in &flat {
            let path = format!("{key}.{name}");
            let span = self.entries.get(&path).map(|entry| &entry.span);
            self.note(&path, value.clone(), span);
        }
        Ok(flat)
    }

    /// These are the keys that it has beside those that were read by now: others are unknown, also where reading
    /// ends early.
    pub fn know(&self, rows: &[&dyn AnySetting]) {
        self.has_rows.set(true);
        for row in rows.iter().map(|setting| setting.row()) {
            self.asked.borrow_mut().insert(row.key.to_owned());
            if row.kind == Kind::Free {
                let _ = self.has(row.key);
            }
        }
    }

    /// As [`finish`](Self::finish), after reading has ended early; notes nothing where the rows are not known.
    pub fn finish_early(&self) {
        if self.has_rows.get() {
            self.finish();
        }
    }

    /// Notes every key that nobody has asked for, and every table without such a key.
    pub fn finish(&self) {
        let asked = self.asked.borrow();
        let is_known = |path: &str| {
            asked.contains(path)
                || asked
                    .iter()
                    .any(|it| it.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
        };
        let keys = self.entries.iter().map(|(path, entry)| (path, &entry.key_span));
        let unknown = keys.chain(&self.tables).filter(|(path, _)| !asked.contains(*path));
        let unknown =
            unknown.filter(|(path, _)| !self.tables.contains_key(*path) || !is_known(path));
        let mut unknown: Vec<_> = unknown.collect();
        // Of what is in a table that is unknown, nothing need be said.
        let tables: BTreeSet<&str> = unknown
            .iter()
            .map(|(path, _)| path.as_str())
            .filter(|it| self.tables.contains_key(*it))
            .collect();
        let is_inside =
            |path: &str| path.match_indices('.').any(|(at, _)| tables.contains(&path[..at]));
        unknown.retain(|(path, _)| !is_inside(path));
        unknown.sort_by_key(|(_, span)| span.start);
        for (path, span) in unknown.into_iter().take(MISTAKES_MAX) {
            if is_known(path) {
                // Keys are looked for in it, and it is none.
                let value = self.entries.get(path).map_or("a value", |it| type_name(it.value));
                let span = self.entries.get(path).map_or(span, |it| &it.span);
                self.mistaken::<()>(path, self.wrong_type(path, span, value, "a table"));
                continue;
            }
            let message = format!("unknown key `{}`", self.path_of(path));
            let problem = self.document.problem(Code::UnknownKey, span, message);
            if let Some(key) = self.aliases.borrow().get(path.as_str()) {
                let hint =
                    format!("its name is `{}`; Flink called it so earlier", self.path_of(key));
                self.mistaken::<()>(path, problem.hint(hint));
                continue;
            }
            let (parent, key) = path.rsplit_once('.').unwrap_or(("", path));
            let siblings = siblings(&asked, parent);
            let problem = match closest(key, siblings.iter().copied()) {
                Some(meant) => {
                    let meant = self.path_of(&joined(parent, meant));
                    problem.hint(format!("did you mean `{meant}`?"))
                }
                None => {
                    let known: Vec<&str> = siblings.into_iter().collect();
                    problem.hint(format!("known here: {}", known.join(", ")))
                }
            };
            self.mistaken::<()>(path, problem);
        }
    }
}

/// A duration in milliseconds or a size in bytes, written as a number or as a text with a unit.
fn amount(kind: &Kind, value: &DeValue<'_>, wanted: &str) -> std::result::Result<u64, String> {
    let parse = if *kind == Kind::Duration { parse_duration_ms } else { parse_bytes };
    match value {
        DeValue::Integer(number) => {
            parse(number.as_str()).map_err(|why| format!("{}: {why}", number.as_str()))
        }
        _ => {
            let text = value.as_str().unwrap_or_default();
            parse(text).map_err(|why| format!("\"{text}\" is not {wanted}: {why}"))
        }
    }
}
