//! Reads a TOML document key by key and remembers which keys were asked for, so that every other
//! one is an error with its line and the key that was probably meant.

use std::{cell::RefCell, collections::BTreeMap, ops::Range, path::Path};

use toml::de::{DeTable, DeValue};

use crate::problem::{Code, Problem};

/// The texts that settings come from, and where each came from, for messages. Spans go through all
/// of them, one behind the other.
#[derive(Debug)]
pub(crate) struct Text<'a> {
    files: Vec<File<'a>>,
    /// Every setting that was looked for, with the place where it was found.
    looked_for: RefCell<BTreeMap<String, Option<String>>>,
    /// What is wrong, with the table and the key that it was found at.
    mistakes: RefCell<Vec<(usize, String, Problem)>>,
}

#[derive(Debug)]
struct File<'a> {
    path: &'a Path,
    text: &'a str,
    /// Whether its lines are those of the file that people see.
    has_lines: bool,
    /// Where its spans begin.
    start: usize,
}

impl<'a> Text<'a> {
    pub(crate) fn new(path: &'a Path, text: &'a str) -> Self {
        let file = File { path, text, has_lines: true, start: 0 };
        Self { files: vec![file], looked_for: RefCell::default(), mistakes: RefCell::default() }
    }

    /// Adds a file behind the others; gives where its spans begin.
    pub(crate) fn add(&mut self, path: &'a Path, text: &'a str, has_lines: bool) -> usize {
        let start = self.files.iter().map(|file| file.start + file.text.len() + 1).max();
        let start = start.unwrap_or(0);
        self.files.push(File { path, text, has_lines, start });
        start
    }

    /// Every setting that was looked for, with the place where it was found.
    pub(crate) fn looked_for(&self) -> BTreeMap<String, Option<String>> {
        self.looked_for.borrow().clone()
    }
}

impl Text<'_> {
    /// What was read, if it could be: what is wrong with it is kept, and reading goes on.
    fn noted<T>(&self, read: Result<T>) -> Option<T> {
        match read {
            Ok(read) => Some(read),
            Err(problem) => {
                // A key is not missed where its value was wrong.
                if !problem.message.is_empty() {
                    self.mistakes.borrow_mut().push((0, String::new(), problem));
                }
                None
            }
        }
    }

    /// All that is wrong so far, as one problem.
    fn mistakes(&self) -> Result<()> {
        let mistakes = self.mistakes.take();
        Problem::all(mistakes.into_iter().map(|(.., problem)| problem)).map_or(Ok(()), Err)
    }

    fn has_mistake(&self, table: usize, key: &str) -> bool {
        self.mistakes.borrow().iter().any(|(at, known, _)| *at == table && known == key)
    }

    /// A problem at a place in the text.
    pub(crate) fn problem(
        &self,
        code: Code,
        span: &Range<usize>,
        message: impl Into<String>,
    ) -> Problem {
        Problem::new(code, message).detail(self.place(span))
    }

    /// A place in the text, with its line.
    pub(crate) fn place(&self, span: &Range<usize>) -> String {
        let file = self.files.iter().rev().find(|file| file.start <= span.start);
        let Some(File { path, text, has_lines, start }) = file else { return String::new() };
        let before = &text[..(span.start - start).min(text.len())];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let shown = text[line_start..].lines().next().unwrap_or_default().trim_end();
        if !has_lines {
            return format!("{}: {shown}", path.display());
        }
        let line = before.matches('\n').count() + 1;
        let column = before[line_start..].chars().count() + 1;
        format!("{}:{line}:{column}: {shown}", path.display())
    }
}

/// One table of the document, and the tables of the same name that come after it: what the first
/// does not say, the next one may.
pub(crate) struct Section<'a> {
    text: &'a Text<'a>,
    /// Its name for messages: `execution.checkpointing`, empty for the document.
    name: String,
    pub(crate) span: Range<usize>,
    entries: BTreeMap<String, Vec<Entry<'a>>>,
    asked: RefCell<Vec<&'static str>>,
}

#[derive(Clone)]
struct Entry<'a> {
    key_span: Range<usize>,
    value: &'a DeValue<'a>,
    layer: Layer<'a>,
}

/// A table and where the spans of its text begin.
#[derive(Clone)]
pub(crate) struct Layer<'a> {
    pub(crate) table: &'a DeTable<'a>,
    pub(crate) start: usize,
}

fn shifted(span: Range<usize>, by: usize) -> Range<usize> {
    span.start + by..span.end + by
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Located<T> {
    pub(crate) value: T,
    pub(crate) span: Range<usize>,
}

type Result<T> = std::result::Result<T, Problem>;

impl<'a> Section<'a> {
    pub(crate) fn new(
        text: &'a Text<'a>,
        name: String,
        span: Range<usize>,
        layers: Vec<Layer<'a>>,
    ) -> Self {
        let mut entries: BTreeMap<String, Vec<Entry<'a>>> = BTreeMap::new();
        for layer in layers {
            for (key, value) in layer.table {
                let key_span = shifted(key.span(), layer.start);
                let entry = Entry { key_span, value: value.get_ref(), layer: layer.clone() };
                entries.entry(key.get_ref().to_string()).or_default().push(entry);
            }
        }
        Self { text, name, span, entries, asked: RefCell::default() }
    }

    fn path_of(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    fn get(&self, key: &'static str) -> Option<(&'a DeValue<'a>, Range<usize>)> {
        self.asked.borrow_mut().push(key);
        let entry = self.entries.get(key).and_then(|entries| entries.first());
        let found = entry.and_then(|entry| {
            let (_, value) = entry.layer.table.get_key_value(key)?;
            Some((entry.value, shifted(value.span(), entry.layer.start)))
        });
        let is_table = found.as_ref().is_some_and(|(value, _)| value.is_table());
        if !is_table {
            let place = found.as_ref().map(|(_, span)| self.text.place(span));
            self.text.looked_for.borrow_mut().insert(self.path_of(key), place);
        }
        found
    }

    /// Whether a key is there; it is known then.
    pub(crate) fn has(&self, key: &'static str) -> bool {
        self.get(key).is_some()
    }

    fn wrong_type(
        &self,
        key: &str,
        span: &Range<usize>,
        value: &DeValue<'_>,
        wanted: &str,
    ) -> Problem {
        let message = format!("`{}` must be {wanted}, not {}", self.path_of(key), type_name(value));
        self.text.problem(Code::BadValue, span, message)
    }

    /// A problem with a value that was read.
    pub(crate) fn bad_value(
        &self,
        key: &str,
        span: &Range<usize>,
        why: impl std::fmt::Display,
    ) -> Problem {
        self.text.problem(Code::BadValue, span, format!("`{}`: {why}", self.path_of(key)))
    }

    /// A place in the text, for a problem that is found later.
    pub(crate) fn place(&self, span: &Range<usize>) -> String {
        self.text.place(span)
    }

    /// See [`Text::noted`].
    pub(crate) fn noted<T>(&self, read: Result<T>) -> Option<T> {
        self.text.noted(read)
    }

    /// See [`Text::mistakes`].
    pub(crate) fn mistakes(&self) -> Result<()> {
        self.text.mistakes()
    }

    /// Keeps what is wrong with a value; it counts as not there.
    fn mistaken<T>(&self, key: &str, problem: Problem) -> Option<T> {
        self.text.mistakes.borrow_mut().push((self.span.start, self.path_of(key), problem));
        None
    }

    /// A problem with a key that is not there. It is an empty one if the key is, with a value that was
    /// found to be wrong: that was said.
    pub(crate) fn missing(&self, key: &str, what: &str) -> Problem {
        if self.text.has_mistake(self.span.start, &self.path_of(key)) {
            return Problem::new(Code::MissingKey, String::new());
        }
        let message = format!("`{}` is missing: {what}", self.path_of(key));
        self.text.problem(Code::MissingKey, &self.span, message)
    }

    /// A problem of another kind, at a place.
    pub(crate) fn problem(
        &self,
        code: Code,
        span: &Range<usize>,
        message: impl Into<String>,
    ) -> Problem {
        self.text.problem(code, span, message)
    }

    pub(crate) fn text(&self, key: &'static str) -> Option<Located<String>> {
        match self.get(key)? {
            (DeValue::String(value), span) => Some(Located { value: value.to_string(), span }),
            (other, span) => self.mistaken(key, self.wrong_type(key, &span, other, "a text")),
        }
    }

    pub(crate) fn boolean(&self, key: &'static str) -> Option<Located<bool>> {
        match self.get(key)? {
            (DeValue::Boolean(value), span) => Some(Located { value: *value, span }),
            (other, span) => {
                self.mistaken(key, self.wrong_type(key, &span, other, "true or false"))
            }
        }
    }

    /// A whole number from `low` to `high`.
    pub(crate) fn integer(
        &self,
        key: &'static str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Option<Located<u64>> {
        let (value, span) = self.get(key)?;
        let DeValue::Integer(number) = value else {
            return self.mistaken(key, self.wrong_type(key, &span, value, "a whole number"));
        };
        let parsed = i128::from_str_radix(number.as_str(), number.radix()).ok();
        match parsed.and_then(|number| u64::try_from(number).ok()) {
            Some(value) if range.contains(&value) => Some(Located { value, span }),
            _ => {
                let why =
                    format!("{} is not from {} to {}", number.as_str(), range.start(), range.end());
                self.mistaken(key, self.bad_value(key, &span, why))
            }
        }
    }

    /// A number, whole or not.
    pub(crate) fn number(&self, key: &'static str) -> Option<Located<f64>> {
        let (value, span) = self.get(key)?;
        let text = match value {
            DeValue::Integer(number) => number.as_str(),
            DeValue::Float(number) => number.as_str(),
            other => return self.mistaken(key, self.wrong_type(key, &span, other, "a number")),
        };
        match text.parse::<f64>() {
            Ok(value) if value.is_finite() => Some(Located { value, span }),
            _ => {
                let why = format!("{text} is not a finite number");
                self.mistaken(key, self.bad_value(key, &span, why))
            }
        }
    }

    pub(crate) fn duration_ms(&self, key: &'static str) -> Option<Located<u64>> {
        self.quantity(
            key,
            "a duration such as \"1s\" or \"500ms\"",
            super::value::parse_duration_ms,
        )
    }

    pub(crate) fn bytes(&self, key: &'static str) -> Option<Located<u64>> {
        self.quantity(key, "a size such as \"64MiB\"", super::value::parse_bytes)
    }

    fn quantity(
        &self,
        key: &'static str,
        wanted: &str,
        parse: impl Fn(&str) -> std::result::Result<u64, String>,
    ) -> Option<Located<u64>> {
        let (value, span) = self.get(key)?;
        let parsed = match value {
            DeValue::String(text) => {
                parse(text).map_err(|why| format!("\"{text}\" is not {wanted}: {why}"))
            }
            DeValue::Integer(number) => {
                parse(number.as_str()).map_err(|why| format!("{}: {why}", number.as_str()))
            }
            other => return self.mistaken(key, self.wrong_type(key, &span, other, wanted)),
        };
        match parsed {
            Ok(value) => Some(Located { value, span }),
            Err(why) => self.mistaken(key, self.bad_value(key, &span, why)),
        }
    }

    /// One of some words; case does not matter, as in Flink's enums.
    pub(crate) fn choice<T: Copy>(
        &self,
        key: &'static str,
        choices: &[(&str, T)],
    ) -> Option<Located<T>> {
        let Located { value, span } = self.text(key)?;
        if let Some((_, choice)) =
            choices.iter().find(|(word, _)| word.eq_ignore_ascii_case(&value))
        {
            return Some(Located { value: *choice, span });
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let why = format!("\"{value}\" is not one of {}", words.join(", "));
        let problem = self.bad_value(key, &span, why);
        let problem = match closest(&value, words) {
            Some(word) => problem.hint(format!("did you mean \"{word}\"?")),
            None => problem,
        };
        self.mistaken(key, problem)
    }

    /// A table within this one.
    pub(crate) fn section(&self, key: &'static str) -> Result<Option<Section<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some((DeValue::Table(_), span)) => {
                let mut layers = Vec::new();
                for entry in self.entries.get(key).into_iter().flatten() {
                    let DeValue::Table(table) = entry.value else {
                        return Err(self.wrong_type(key, &entry.key_span, entry.value, "a table"));
                    };
                    layers.push(Layer { table, start: entry.layer.start });
                }
                Ok(Some(Section::new(self.text, self.path_of(key), span, layers)))
            }
            Some((other, span)) => Err(self.wrong_type(key, &span, other, "a table")),
        }
    }

    /// A table that is an item of this one's array `key`.
    pub(crate) fn nested(
        &self,
        key: &str,
        span: Range<usize>,
        table: &'a DeTable<'a>,
    ) -> Section<'a> {
        // Arrays of tables are the manifest's alone, whose spans begin at 0.
        Section::new(self.text, key.to_owned(), span, vec![Layer { table, start: 0 }])
    }

    /// An array of tables: `[[operator]]`.
    pub(crate) fn sections(&self, key: &'static str) -> Result<Vec<Section<'a>>> {
        self.items(key)?
            .into_iter()
            .map(|(value, span)| match value {
                DeValue::Table(table) => Ok(self.nested(key, span, table)),
                other => {
                    Err(self.wrong_type(key, &span, other, &format!("tables: write [[{key}]]")))
                }
            })
            .collect()
    }

    /// The items of an array.
    pub(crate) fn items(&self, key: &'static str) -> Result<Vec<(&'a DeValue<'a>, Range<usize>)>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some((DeValue::Array(items), _)) => {
                Ok(items.iter().map(|item| (item.get_ref(), item.span())).collect())
            }
            Some((other, span)) => Err(self.wrong_type(key, &span, other, "an array")),
        }
    }

    /// A table whose keys are free, flattened to dotted keys and texts.
    pub(crate) fn free(&self, key: &'static str) -> Result<Vec<(String, String)>> {
        let Some((value, span)) = self.get(key) else { return Ok(Vec::new()) };
        let DeValue::Table(table) = value else {
            return Err(self.wrong_type(key, &span, value, "a table"));
        };
        let mut flat = Vec::new();
        flatten("", table, &mut flat);
        Ok(flat)
    }

    /// Reports every key that nobody has asked for.
    pub(crate) fn finish(&self) {
        let asked = self.asked.borrow();
        let unknown = self.entries.iter().filter(|(key, _)| !asked.contains(&key.as_str()));
        let unknown = unknown.filter_map(|(key, entries)| Some((key, &entries.first()?.key_span)));
        let mut unknown: Vec<_> = unknown.collect();
        unknown.sort_by_key(|(_, span)| span.start);
        let mut known = asked.clone();
        known.sort_unstable();
        known.dedup();
        for (key, span) in unknown {
            let message = format!("unknown key `{}`", self.path_of(key));
            let problem = self.problem(Code::UnknownKey, span, message);
            let problem = match closest(key, known.iter().copied()) {
                Some(meant) => problem.hint(format!("did you mean `{}`?", self.path_of(meant))),
                None => problem.hint(format!("known here: {}", known.join(", "))),
            };
            self.mistaken::<()>(key, problem);
        }
    }
}

fn flatten(prefix: &str, table: &DeTable<'_>, flat: &mut Vec<(String, String)>) {
    for (key, value) in table {
        let key = match prefix {
            "" => key.get_ref().to_string(),
            prefix => format!("{prefix}.{}", key.get_ref()),
        };
        match value.get_ref() {
            DeValue::Table(inner) => flatten(&key, inner, flat),
            DeValue::String(text) => flat.push((key, text.to_string())),
            DeValue::Integer(number) => flat.push((key, number.as_str().to_owned())),
            DeValue::Float(number) => flat.push((key, number.as_str().to_owned())),
            DeValue::Boolean(value) => flat.push((key, value.to_string())),
            DeValue::Datetime(value) => flat.push((key, value.to_string())),
            DeValue::Array(items) => {
                for (place, item) in items.iter().enumerate() {
                    let text = item
                        .get_ref()
                        .as_str()
                        .map_or_else(|| format!("{:?}", item.get_ref()), str::to_owned);
                    flat.push((format!("{key}.{place}"), text));
                }
            }
        }
    }
}

/// The word that was probably meant.
pub(crate) fn closest<'w>(word: &str, known: impl IntoIterator<Item = &'w str>) -> Option<&'w str> {
    let word = word.to_lowercase();
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(3) / 3)
        .min()
        .map(|(_, candidate)| candidate)
}

fn type_name(value: &DeValue<'_>) -> &'static str {
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
