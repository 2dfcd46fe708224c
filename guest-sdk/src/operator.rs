//! The trait that an operator's author implements, and what its methods are given.

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::{
    Decode, Encode, Format, Output,
    bindings::cofferdam::operator::types::{self, ErrorClass, OpenContext},
    state::{DeclaredState, Keyed, StateKey},
};

/// One task of an operator. A fresh one is `Default`; then it is opened.
///
/// The four types say what the operator reads and writes: any serde type travels as postcard,
/// [`Text`](crate::Text) and [`Json`](crate::Json) as what they say, and `()` as a key means that
/// the records have none.
pub trait Operator: DeclaredState + Default + 'static {
    /// The key of the records read.
    type Key<'a>: Decode<'a>;
    /// The value of the records read.
    type In<'a>: Decode<'a>;
    /// The key of the records written.
    type OutKey<'a>: Encode;
    /// The value of the records written.
    type Out<'a>: Encode;

    /// Prepares the task. Runs again before each restore: it must not depend on when it runs, nor write
    /// declared state.
    ///
    /// # Errors
    /// Ends the attempt.
    fn open(&mut self, _context: &Context) -> Result<()> {
        Ok(())
    }

    /// Processes one record.
    ///
    /// # Errors
    /// [`Error::rejected`] for a bad record, which must be as if it had not been there: what it has
    /// emitted is taken back, what it has changed in the operator's fields is not. [`Error::failed`] for
    /// a broken task, which ends the attempt.
    fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()>;

    /// Event time has reached `watermark`, in milliseconds: no record of it or earlier will come. It
    /// ascends, and is `i64::MAX` at the end of the input: before you add to it, use
    /// [`i64::saturating_add`].
    ///
    /// # Errors
    /// Ends the attempt.
    fn advance(&mut self, _watermark: i64, _out: &mut Output<'_, Self>) -> Result<()> {
        Ok(())
    }

    /// Every input has ended; what is still held back goes out now.
    ///
    /// # Errors
    /// Ends the attempt.
    fn finish(&mut self, _out: &mut Output<'_, Self>) -> Result<()> {
        Ok(())
    }

    /// The inputs, in the order of [`Record::input`]. By default one, called `in`.
    #[must_use]
    fn inputs() -> Vec<Port> {
        vec![Port::input::<Self::Key<'static>, Self::In<'static>>("in")]
    }

    /// The outputs, in the order of [`Output::emit_to`]. By default one, called `out`.
    #[must_use]
    fn outputs() -> Vec<Port> {
        vec![Port::output::<Self::OutKey<'static>, Self::Out<'static>>("out")]
    }
}

/// An input or an output, as the host sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its name in the manifest: `from = "split.errors"`.
    pub name: &'static str,
    /// How keys are encoded; `None`: no keys.
    pub key: Option<Format>,
    /// How values are encoded; `None`: values are empty.
    pub value: Option<Format>,
}

impl Port {
    /// An input with records of these types. Of several, all have the types that the operator reads:
    /// [`Record::input`] says which one a record has come from.
    ///
    /// ```
    /// use cofferdam_sdk::prelude::*;
    ///
    /// /// Joins orders with their customers, by the key of both.
    /// #[operator]
    /// #[derive(Default)]
    /// struct Join {
    ///     #[state]
    ///     customers: ValueState<String>,
    ///     #[state]
    ///     waiting: ValueState<Vec<String>>,
    /// }
    ///
    /// impl Operator for Join {
    ///     type Key<'a> = Text<'a>;
    ///     type In<'a> = Text<'a>;
    ///     type OutKey<'a> = Text<'a>;
    ///     type Out<'a> = Text<'a>;
    ///
    ///     fn inputs() -> Vec<Port> {
    ///         ["orders", "customers"].map(Port::input::<Text<'static>, Text<'static>>).to_vec()
    ///     }
    ///
    ///     fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
    ///         let is_order = record.input == 0;
    ///         match self.customers.get(&record) {
    ///             Some(customer) if is_order => {
    ///                 out.emit(record.key, Text(&format!("{}: {customer}", record.value)));
    ///             }
    ///             _ if is_order => {
    ///                 self.waiting.get_or_default(&record).push(record.value.to_string());
    ///             }
    ///             _ => {
    ///                 for order in self.waiting.remove(&record).unwrap_or_default() {
    ///                     out.emit(record.key, Text(&format!("{order}: {}", record.value)));
    ///                 }
    ///                 self.customers.set(&record, record.value.to_string());
    ///             }
    ///         }
    ///         Ok(())
    ///     }
    /// }
    /// ```
    #[must_use]
    pub fn input<K: Decode<'static>, V: Decode<'static>>(name: &'static str) -> Self {
        Self { name, key: K::FORMAT, value: V::FORMAT }
    }

    /// An output with records of these types.
    #[must_use]
    pub fn output<K: Encode, V: Encode>(name: &'static str) -> Self {
        Self { name, key: K::FORMAT, value: V::FORMAT }
    }
}

/// One record of a batch, decoded.
pub struct Record<'a, O: Operator> {
    /// Its key.
    pub key: O::Key<'a>,
    /// Its value.
    pub value: O::In<'a>,
    /// Its event time in milliseconds, if it has one.
    pub timestamp: Option<i64>,
    /// Which input it came from.
    pub input: u32,
    pub(crate) key_bytes: &'a [u8],
}

impl<O: Operator> Record<'_, O> {
    /// What state of this record's key is told apart by beside the key: a window, a kind.
    ///
    /// ```
    /// # use cofferdam_sdk::prelude::*;
    /// # #[operator]
    /// # #[derive(Default)]
    /// # struct Windows { #[state] counts: ValueState<u64> }
    /// # impl Operator for Windows {
    /// #     type Key<'a> = Text<'a>;
    /// #     type In<'a> = ();
    /// #     type OutKey<'a> = ();
    /// #     type Out<'a> = u64;
    /// fn process(&mut self, record: Record<'_, Self>, _: &mut Output<'_, Self>) -> Result<()> {
    ///     let window = record.timestamp.unwrap_or(0) / 3_600_000;
    ///     *self.counts.get_or_default(&record.in_namespace(&window.to_be_bytes())) += 1;
    ///     Ok(())
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn in_namespace<'s>(&'s self, namespace: &'s (impl AsRef<[u8]> + ?Sized)) -> StateKey<'s> {
        StateKey::new(self.key_bytes).with(namespace)
    }
}

impl<O: Operator> Keyed for Record<'_, O> {
    #[inline]
    fn key_bytes(&self) -> &[u8] {
        self.key_bytes
    }
}

/// Where a task stands in its job, and what the manifest says to it.
#[derive(Debug, Clone)]
pub struct Context {
    /// The operator's name in the manifest.
    pub operator: String,
    /// Which of the operator's tasks this is, from 0.
    pub task_index: u32,
    /// How many tasks the operator has.
    pub parallelism: u32,
    /// The operator's `config` table.
    pub config: Config,
}

impl From<OpenContext> for Context {
    fn from(context: OpenContext) -> Self {
        Self {
            operator: context.operator,
            task_index: context.task_index,
            parallelism: context.parallelism,
            config: Config(context.config.into_iter().collect()),
        }
    }
}

/// The operator's `config` table of the manifest; nested keys are joined by dots.
#[derive(Debug, Clone, Default)]
pub struct Config(pub(crate) BTreeMap<String, String>);

impl Config {
    /// A setting as it was written.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// A setting as a type, or `default` where the manifest has none.
    ///
    /// # Errors
    /// Where the manifest's value is not of the type; names the setting.
    pub fn get_or<T: FromStr>(&self, key: &str, default: T) -> Result<T>
    where
        T::Err: fmt::Display,
    {
        let Some(text) = self.get(key) else { return Ok(default) };
        text.parse()
            .map_err(|error| Error::failed(format!("config \"{key}\" = \"{text}\": {error}")))
    }
}

/// An operator's own verdict on a record or on itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    pub(crate) class: ErrorClass,
    pub(crate) message: String,
}

impl Error {
    /// The record is bad; the operator is as it was before it.
    pub fn rejected(message: impl fmt::Display) -> Self {
        Self { class: ErrorClass::Rejected, message: message.to_string() }
    }

    /// The operator cannot continue.
    pub fn failed(message: impl fmt::Display) -> Self {
        Self { class: ErrorClass::Failed, message: message.to_string() }
    }

    pub(crate) fn into_wit(self, record: Option<u32>) -> types::OperatorError {
        types::OperatorError { class: self.class, message: self.message, record }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// So that `?` works on every error: what an operator cannot handle breaks its task.
impl<E: std::error::Error> From<E> for Error {
    fn from(error: E) -> Self {
        Self::failed(error)
    }
}

/// The result of an operator's method.
pub type Result<T> = std::result::Result<T, Error>;
