//! What a manifest says about a generator.

use std::sync::Arc;

use cofferdam_connector::{
    Answer, Source, TaskContext,
    catalog::{Formats, NodeContext, SourcePlan, SourceSpec},
    ready,
    state::mismatch,
};
use cofferdam_contract::Format;
use cofferdam_settings::{AnySetting, Optional, Problem, Section, Setting, table::Key};

use super::{GeneratorPlan, GeneratorSource, share};
use crate::settings::{BuiltIn, RATE};

/// Records made up by a seeded generator.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratorSpec {
    /// What the records are.
    pub content: GeneratorContent,
    /// How many, by all tasks together; `None`: without end.
    pub count: Option<u64>,
    /// Records a second, by all tasks together; `None`: as fast as they are taken.
    pub rate: Option<f64>,
    /// Determines every record.
    pub seed: u64,
    /// Whether record `n` has event time `n` milliseconds.
    pub has_timestamps: bool,
}

/// What a generator makes.
#[derive(Debug, Clone, PartialEq)]
pub enum GeneratorContent {
    /// Words as keys, with no value, by a Zipf law.
    Words {
        /// How many different ones.
        vocabulary: u32,
        /// The law's exponent; 0 makes all equally frequent.
        exponent: f64,
    },
    /// The record's number, as text, with no key.
    Sequence,
}

static CONTENT: Setting<bool> = Key::choice(
    "content",
    &[("words", true), ("sequence", false)],
    "`words`: made-up words as keys; `sequence`: the record's number",
)
.of_job()
.or(true);

static VOCABULARY: Setting<u64> =
    Key::integer("vocabulary", 1, 10_000_000, "how many different words").of_job().or(10_000);

static EXPONENT: Setting<f64> =
    Key::number("exponent", "words follow a Zipf law with this exponent, from 0 (all alike) to 10")
        .of_job()
        .unless(|it| (!(0.0..=10.0).contains(it)).then_some("it must be from 0 to 10"))
        .or(1.0);

static COUNT: Optional<u64> =
    Key::integer("count", 0, u64::MAX, "how many records, of all tasks together")
        .of_job()
        .or_none("unbounded");

static SEED: Setting<u64> =
    Key::integer("seed", 0, u64::MAX, "determines every record").of_job().or(0);

static TIMESTAMPS: Setting<bool> =
    Key::boolean("timestamps", "whether record `n` has event time `n` ms").of_job().or(false);

static GENERATOR_ROWS: &[&dyn AnySetting] =
    &[&RATE, &CONTENT, &VOCABULARY, &EXPONENT, &COUNT, &SEED, &TIMESTAMPS];

/// Records that are made up.
pub(crate) const GENERATOR: BuiltIn<dyn SourceSpec> = BuiltIn {
    name: "generator",
    rows: GENERATOR_ROWS,
    read: |section, _| Ok(Arc::new(read_generator(section))),
};

fn read_generator(section: &Section<'_>) -> GeneratorSpec {
    let is_words = section.get(&CONTENT);
    let vocabulary = section.get(&VOCABULARY);
    let exponent = section.get(&EXPONENT);
    let content = match is_words {
        true => GeneratorContent::Words {
            vocabulary: u32::try_from(vocabulary).unwrap_or(u32::MAX),
            exponent,
        },
        false => {
            let unused = ["vocabulary", "exponent"].map(|key| section.shown_key(key));
            section.document().forget(|key| unused.iter().any(|it| it == key));
            GeneratorContent::Sequence
        }
    };
    let count = section.find(&COUNT).map(|number| number.value);
    let rate = section.find(&RATE).map(|rate| rate.value);
    let seed = section.get(&SEED);
    let has_timestamps = section.get(&TIMESTAMPS);
    GeneratorSpec { content, count, rate, seed, has_timestamps }
}

impl SourceSpec for GeneratorSpec {
    fn formats(&self) -> Formats {
        match self.content {
            GeneratorContent::Words { .. } => {
                Formats { key: Some(Format::Text), value: Format::Bytes }
            }
            GeneratorContent::Sequence => Formats { key: None, value: Format::Text },
        }
    }

    fn is_bounded(&self) -> bool {
        self.count.is_some()
    }

    fn prepare(&self, _: NodeContext<'_>) -> Result<Arc<dyn SourcePlan>, Problem> {
        Ok(Arc::new(GeneratorPlan::new(self)))
    }
}

impl SourcePlan for GeneratorPlan {
    fn open(
        &self,
        task: &TaskContext,
        position: Option<Vec<u8>>,
    ) -> Answer<'static, Box<dyn Source>> {
        let (index, parallelism) = (task.index, task.parallelism);
        let opened = GeneratorSource::open(self, index, parallelism, position.as_deref());
        ready(opened.map(|source| Box::new(source) as Box<dyn Source>))
    }

    fn redistribute<'a>(
        &'a self,
        positions: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        ready(share(positions, parallelism).map_err(mismatch))
    }
}
