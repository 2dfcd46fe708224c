//! The rows: what is known about one setting, in one place.

use std::{fmt, ops::RangeInclusive};

/// What kind of value a setting has, and which values of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// A text.
    Text,
    /// True or false.
    Boolean,
    /// A whole number.
    Integer(RangeInclusive<u64>),
    /// A number, whole or not.
    Number,
    /// A duration, in milliseconds.
    Duration,
    /// A size, in bytes.
    Bytes,
    /// One of some words.
    Choice,
    /// An array of names and tables, which its reader takes apart itself.
    Array,
    /// A table whose keys are free.
    Free,
}

impl Kind {
    /// Its name, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Boolean => "true or false",
            Self::Integer(_) => "whole number",
            Self::Number => "number",
            Self::Duration => "duration",
            Self::Bytes => "size",
            Self::Choice => "one of some words",
            Self::Array => "array",
            Self::Free => "table",
        }
    }
}

/// A value that was read.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Of [`Kind::Text`].
    Text(String),
    /// Of [`Kind::Boolean`].
    Boolean(bool),
    /// Of [`Kind::Integer`], [`Kind::Duration`] and [`Kind::Bytes`].
    Integer(u64),
    /// Of [`Kind::Number`].
    Number(f64),
    /// Of [`Kind::Choice`]: the index of the word.
    Word(usize),
}

/// What is known about a key, whatever the type of its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its name below the table that it belongs to; its parts are joined by dots.
    pub key: &'static str,
    /// What kind of value it has.
    pub kind: Kind,
    /// What it means, for the reference.
    pub means: &'static str,
    /// Flink's older names of it.
    pub aliases: &'static [&'static str],
    /// Whether it may also be set for all jobs of a host.
    pub is_of_host: bool,
}

impl Row {
    const fn new(key: &'static str, kind: Kind, means: &'static str) -> Self {
        Self { key, kind, means, aliases: &[], is_of_host: true }
    }
}

/// The words of a choice with their values.
type Words<T> = &'static [(&'static str, T)];

/// A key with the type of its value, to which one of [`or`](Key::or), [`or_none`](Key::or_none) and
/// [`required`](Key::required) adds what counts where it is not set.
#[derive(Debug, Clone)]
pub struct Key<T: 'static> {
    pub(crate) row: Row,
    words: Words<T>,
    read: fn(&Value, Words<T>) -> Option<T>,
    show: fn(&T, Words<T>) -> String,
    why_not: fn(&T) -> Option<&'static str>,
}

/// A setting with a default.
#[derive(Debug, Clone)]
pub struct Setting<T: 'static> {
    pub(crate) key: Key<T>,
    pub(crate) default: T,
}

/// A setting that may be absent.
#[derive(Debug, Clone)]
pub struct Optional<T: 'static> {
    pub(crate) key: Key<T>,
    /// What its absence means, for people.
    pub(crate) absent: &'static str,
}

/// A setting that has to be set.
#[derive(Debug, Clone)]
pub struct Required<T: 'static> {
    pub(crate) key: Key<T>,
    /// What to write there.
    pub(crate) wanted: &'static str,
}

/// Every value of the type will do.
fn allowed<T>(_: &T) -> Option<&'static str> {
    None
}

fn integer(value: &Value, _: Words<u64>) -> Option<u64> {
    if let Value::Integer(number) = value { Some(*number) } else { None }
}

impl Key<u64> {
    /// A whole number from `low` to `high`.
    #[must_use]
    pub const fn integer(key: &'static str, low: u64, high: u64, means: &'static str) -> Self {
        let row = Row::new(key, Kind::Integer(RangeInclusive::new(low, high)), means);
        Self { row, words: &[], read: integer, show: |it, _| it.to_string(), why_not: allowed }
    }

    /// A duration, in milliseconds.
    #[must_use]
    pub const fn duration(key: &'static str, means: &'static str) -> Self {
        let row = Row::new(key, Kind::Duration, means);
        Self { row, words: &[], read: integer, show: |it, _| format!("{it} ms"), why_not: allowed }
    }

    /// A size, in bytes.
    #[must_use]
    pub const fn bytes(key: &'static str, means: &'static str) -> Self {
        let row = Row::new(key, Kind::Bytes, means);
        Self {
            row,
            words: &[],
            read: integer,
            show: |it, _| format!("{it} bytes"),
            why_not: allowed,
        }
    }
}

impl Key<bool> {
    /// True or false.
    #[must_use]
    pub const fn boolean(key: &'static str, means: &'static str) -> Self {
        Self {
            row: Row::new(key, Kind::Boolean, means),
            words: &[],
            read: |value, _| if let Value::Boolean(it) = value { Some(*it) } else { None },
            show: |value, _| value.to_string(),
            why_not: allowed,
        }
    }
}

impl Key<f64> {
    /// A number, whole or not.
    #[must_use]
    pub const fn number(key: &'static str, means: &'static str) -> Self {
        Self {
            row: Row::new(key, Kind::Number, means),
            words: &[],
            read: |value, _| if let Value::Number(it) = value { Some(*it) } else { None },
            show: |value, _| value.to_string(),
            why_not: allowed,
        }
    }
}

impl Key<String> {
    /// A text.
    #[must_use]
    pub const fn text(key: &'static str, means: &'static str) -> Self {
        Self {
            row: Row::new(key, Kind::Text, means),
            words: &[],
            read: |value, _| if let Value::Text(it) = value { Some(it.clone()) } else { None },
            show: |value, _| value.clone(),
            why_not: allowed,
        }
    }
}

impl Key<()> {
    /// An array that its reader takes apart itself.
    #[must_use]
    pub const fn array(key: &'static str, means: &'static str) -> Self {
        let row = Row::new(key, Kind::Array, means);
        Self { row, words: &[], read: |_, _| None, show: |(), _| String::new(), why_not: allowed }
    }

    /// A table whose keys are free.
    #[must_use]
    pub const fn free(key: &'static str, means: &'static str) -> Self {
        let row = Row::new(key, Kind::Free, means);
        Self { row, words: &[], read: |_, _| None, show: |(), _| String::new(), why_not: allowed }
    }
}

impl<T: Copy + PartialEq> Key<T> {
    /// One of some words. Of several words for one value the first is its name.
    #[must_use]
    pub const fn choice(key: &'static str, words: Words<T>, means: &'static str) -> Self {
        Self {
            row: Row::new(key, Kind::Choice, means),
            words,
            read: |value, words| match value {
                Value::Word(index) => words.get(*index).map(|(_, value)| *value),
                _ => None,
            },
            show: |value, words| {
                let word = words.iter().find(|(_, other)| other == value);
                word.map_or_else(String::new, |(word, _)| (*word).to_owned())
            },
            why_not: allowed,
        }
    }
}

impl<T> Key<T> {
    /// Flink's older names of it.
    #[must_use]
    pub const fn aliases(mut self, aliases: &'static [&'static str]) -> Self {
        self.row.aliases = aliases;
        self
    }

    /// Which of its values cannot be used, and why.
    #[must_use]
    pub const fn unless(mut self, why_not: fn(&T) -> Option<&'static str>) -> Self {
        self.why_not = why_not;
        self
    }

    /// It can be set for one job alone.
    #[must_use]
    pub const fn of_job(mut self) -> Self {
        self.row.is_of_host = false;
        self
    }

    /// What counts where it is not set.
    #[must_use]
    pub const fn or(self, default: T) -> Setting<T> {
        Setting { key: self, default }
    }

    /// It may be absent, which means this.
    #[must_use]
    pub const fn or_none(self, absent: &'static str) -> Optional<T> {
        Optional { key: self, absent }
    }

    /// It has to be set, to this.
    #[must_use]
    pub const fn required(self, wanted: &'static str) -> Required<T> {
        Required { key: self, wanted }
    }

    pub(crate) fn words(&self) -> Vec<&'static str> {
        self.words.iter().map(|(word, _)| *word).collect()
    }

    pub(crate) fn value(&self, value: &Value) -> Option<T> {
        (self.read)(value, self.words)
    }

    pub(crate) fn why_not(&self, value: &T) -> Option<&'static str> {
        (self.why_not)(value)
    }

    pub(crate) fn shown(&self, value: &T) -> String {
        (self.show)(value, self.words)
    }
}

/// A setting of any type, as a row of a [`Table`].
pub trait AnySetting: fmt::Debug + Sync {
    /// What is known about it.
    fn row(&self) -> &Row;

    /// The words of a choice.
    fn words(&self) -> Vec<&'static str>;

    /// What counts where it is not set, for people.
    fn default_shown(&self) -> String;

    /// Whether it has to be set.
    fn is_required(&self) -> bool {
        false
    }
}

impl<T: fmt::Debug + Sync> AnySetting for Setting<T> {
    fn row(&self) -> &Row {
        &self.key.row
    }

    fn words(&self) -> Vec<&'static str> {
        self.key.words()
    }

    fn default_shown(&self) -> String {
        self.key.shown(&self.default)
    }
}

impl<T: fmt::Debug + Sync> AnySetting for Optional<T> {
    fn row(&self) -> &Row {
        &self.key.row
    }

    fn words(&self) -> Vec<&'static str> {
        self.key.words()
    }

    fn default_shown(&self) -> String {
        self.absent.to_owned()
    }
}

impl<T: fmt::Debug + Sync> AnySetting for Required<T> {
    fn row(&self) -> &Row {
        &self.key.row
    }

    fn words(&self) -> Vec<&'static str> {
        self.key.words()
    }

    fn default_shown(&self) -> String {
        "required".to_owned()
    }

    fn is_required(&self) -> bool {
        true
    }
}

/// The rows of one table of a document.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// The table's name; empty: the keys stand on their own. Of several nodes of one kind, theirs: `source`.
    pub name: &'static str,
    /// The connector that alone has these keys, if it is one.
    pub connector: Option<&'static str>,
    /// What the reference calls it.
    pub title: &'static str,
    /// Its settings.
    pub rows: &'static [&'static dyn AnySetting],
}
