//! Makes records up: words by a Zipf law, or numbers in sequence. Record `n` is a function of `n`
//! and the seed, so a position is a number.

mod spec;

use std::{
    ops::Range,
    sync::Arc,
    task::{Context, Poll},
};

use cofferdam_connector::{
    Answer, Result, Source, Step,
    pace::Pace,
    ready,
    state::{decode_all, encode_all, unreadable},
};
use cofferdam_contract::{BATCH_RECORDS_MAX, Batch, RecordRef, append_range};
use cofferdam_core::{
    failure::FailureCause,
    random::{Random, mix},
};
use serde::{Deserialize, Serialize};

pub(crate) use self::spec::GENERATOR;
pub use self::spec::{GeneratorContent, GeneratorSpec};

#[derive(Debug, Clone)]
pub(crate) struct GeneratorPlan {
    spec: GeneratorSpec,
    words: Option<Arc<Vocabulary>>,
}

impl GeneratorPlan {
    pub(crate) fn new(spec: &GeneratorSpec) -> Self {
        let words = match spec.content {
            GeneratorContent::Words { vocabulary, exponent } => {
                Some(Arc::new(Vocabulary::new(vocabulary, exponent, spec.seed)))
            }
            GeneratorContent::Sequence => None,
        };
        Self { spec: spec.clone(), words }
    }
}

/// Words with their frequencies, drawn in constant time by the alias method (Walker 1977, in the
/// form of Vose 1991).
#[derive(Debug)]
struct Vocabulary {
    letters: Vec<u8>,
    /// Where each word begins, and one end more.
    starts: Vec<u32>,
    columns: Vec<Column>,
}

#[derive(Debug, Clone, Copy)]
struct Column {
    /// Below this share of 2^32 the column's own word, else the other one.
    threshold: u32,
    other: u32,
}

impl Vocabulary {
    fn new(count: u32, exponent: f64, seed: u64) -> Self {
        let mut random = Random::new(mix(seed ^ 0x776f_7264));
        let (mut letters, mut starts) = (Vec::new(), vec![0]);
        for rank in 0..count {
            word(rank, &mut random, &mut letters);
            starts.push(letters.len() as u32);
        }
        let weights: Vec<f64> = (1..=count).map(|rank| f64::from(rank).powf(-exponent)).collect();
        Self { letters, starts, columns: alias_columns(&weights) }
    }

    /// Where the drawn word lies in `letters`.
    #[inline]
    fn draw(&self, bits: u64) -> Range<u32> {
        let place = ((bits >> 32) * self.columns.len() as u64) >> 32;
        let column = self.columns[place as usize];
        let chosen =
            if (bits as u32) < column.threshold { place as usize } else { column.other as usize };
        self.starts[chosen]..self.starts[chosen + 1]
    }
}

/// Frequent words are short, as in languages; the rank in letters makes each one unique.
fn word(rank: u32, random: &mut Random, letters: &mut Vec<u8>) {
    for _ in 0..random.between(0, 4) {
        letters.push(b'a' + random.between(0, 25) as u8);
    }
    let (mut rest, mut digits) = (rank, 0);
    loop {
        letters.push(b'a' + (rest % 26) as u8);
        digits += 1;
        rest /= 26;
        if rest == 0 {
            break;
        }
        rest -= 1;
    }
    // How many of the letters are the rank's: that makes words of different ranks different.
    letters.push(b'a' + digits);
}

fn alias_columns(weights: &[f64]) -> Vec<Column> {
    let total: f64 = weights.iter().sum();
    let mut scaled: Vec<f64> =
        weights.iter().map(|weight| weight * weights.len() as f64 / total).collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) =
        (0..scaled.len()).partition(|place| scaled[*place] < 1.0);
    let mut columns: Vec<Column> = (0..scaled.len())
        .map(|place| Column { threshold: u32::MAX, other: place as u32 })
        .collect();
    while let (Some(under), Some(&over)) = (small.pop(), large.last()) {
        columns[under] =
            Column { threshold: (scaled[under] * 4_294_967_296.0) as u32, other: over as u32 };
        scaled[over] -= 1.0 - scaled[under];
        if scaled[over] < 1.0 {
            large.pop();
            small.push(over);
        }
    }
    columns
}

/// Numbers that one task gives out: every `stride`-th from `next` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Strand {
    next: u64,
    stride: u64,
}

impl Strand {
    /// How many of its numbers lie below `count`.
    fn left(self, count: u64) -> u64 {
        count.saturating_sub(self.next).div_ceil(self.stride)
    }

    /// The same numbers, as `parts` strands.
    fn split(self, parts: u64) -> impl Iterator<Item = Self> {
        (0..parts).map(move |part| Self {
            next: self.next + part * self.stride,
            stride: self.stride * parts,
        })
    }
}

/// Shares the strands of all tasks out among another number of tasks.
pub(super) fn share(
    old: &[&[u8]],
    parallelism: usize,
) -> std::result::Result<Vec<Vec<u8>>, String> {
    let own: Vec<Vec<Strand>> = decode_all(old)?;
    let strands = own.concat();
    // Enough for everyone: each is split into as many.
    let parts = parallelism.div_ceil(strands.len().max(1)) as u64;
    let mut shares = vec![Vec::new(); parallelism];
    let split = strands.into_iter().flat_map(|strand| strand.split(parts));
    split.enumerate().for_each(|(place, strand)| shares[place % parallelism].push(strand));
    encode_all(&shares)
}

pub(crate) struct GeneratorSource {
    plan: GeneratorPlan,
    /// More than one after the parallelism was lowered.
    strands: Vec<Strand>,
    pace: Pace,
}

impl GeneratorSource {
    pub(crate) fn open(
        plan: &GeneratorPlan,
        index: u32,
        parallelism: u32,
        position: Option<&[u8]>,
    ) -> Result<Self> {
        let (next, stride) = (u64::from(index), u64::from(parallelism));
        let strands = match position {
            Some(bytes) => {
                let unreadable = |error| unreadable("position of a source", error);
                postcard::from_bytes(bytes).map_err(unreadable)?
            }
            None => vec![Strand { next, stride }],
        };
        let pace = Pace::new(plan.spec.rate, parallelism);
        Ok(Self { plan: plan.clone(), strands, pace })
    }

    /// The strand whose next number is the least, and how many it has left: numbers ascend as far as
    /// batches allow, however the strands were dealt out.
    fn least(&self) -> Option<(usize, u64)> {
        let count = self.plan.spec.count.unwrap_or(u64::MAX);
        let left = self.strands.iter().map(|strand| strand.left(count)).enumerate();
        left.filter(|(_, left)| 0 < *left).min_by_key(|(place, _)| self.strands[*place].next)
    }
}

impl GeneratorSource {
    /// The next records, at most so many; `None`: all were given out.
    pub(crate) fn batch(&mut self, allowed: u64) -> Option<Batch> {
        let (place, left) = self.least()?;
        let count = left.min(allowed).min(BATCH_RECORDS_MAX as u64);
        let mut batch = Batch::empty();
        batch.value_ends.reserve(count as usize);
        let has_timestamps = self.plan.spec.has_timestamps;
        if self.plan.words.is_some() {
            batch.key_ends.reserve(count as usize);
            batch.keys.reserve(count as usize * 8);
        }
        let strand = &mut self.strands[place];
        for _ in 0..count {
            let number = strand.next;
            strand.next += strand.stride;
            let timestamp = has_timestamps.then_some(number as i64);
            match &self.plan.words {
                Some(words) => {
                    let bits = mix(self.plan.spec.seed ^ mix(number.wrapping_add(1)));
                    append_range(&mut batch.keys, &words.letters, words.draw(bits));
                    batch.key_ends.push(batch.keys.len() as u32);
                    batch.value_ends.push(0);
                    batch.timestamps.extend(timestamp);
                }
                None => {
                    let text = number.to_string();
                    batch.push(RecordRef { key: None, value: text.as_bytes(), timestamp });
                }
            }
        }
        Some(batch)
    }
}

impl Source for GeneratorSource {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Step>> {
        let allowed = std::task::ready!(self.pace.poll_allowance(context));
        let Some(batch) = self.batch(allowed) else { return Poll::Ready(Ok(Step::End)) };
        self.pace.give(batch.record_count());
        // Every later record has a number of one of the strands.
        let earliest = self.strands.iter().map(|strand| strand.next).min().unwrap_or(0);
        let watermark = self.plan.spec.has_timestamps.then(|| earliest as i64 - 1);
        Poll::Ready(Ok(Step::records(batch, watermark)))
    }

    fn position(&mut self) -> Answer<'_, Vec<u8>> {
        let encoded = postcard::to_stdvec(&self.strands);
        ready(encoded.map_err(|error| FailureCause::HostBug {
            message: format!("encode the position of a source: {error}"),
        }))
    }
}

/// The batches that one task of a generator gives out, to measure the same records without a job around them.
pub fn generate(spec: &GeneratorSpec, index: u32, parallelism: u32) -> impl Iterator<Item = Batch> {
    let plan = GeneratorPlan::new(spec);
    let mut source = GeneratorSource::open(&plan, index, parallelism, None).ok();
    std::iter::from_fn(move || source.as_mut()?.batch(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use futures::FutureExt;

    use super::*;

    fn position(source: &mut GeneratorSource) -> Vec<u8> {
        source.position().now_or_never().expect("it does not wait").expect("a position")
    }

    fn plan(content: GeneratorContent, count: u64) -> GeneratorPlan {
        let spec = GeneratorSpec {
            content,
            count: Some(count),
            rate: None,
            seed: 3,
            has_timestamps: false,
        };
        GeneratorPlan::new(&spec)
    }

    fn all(
        plan: &GeneratorPlan,
        index: u32,
        parallelism: u32,
        position: Option<&[u8]>,
    ) -> Vec<String> {
        let mut source = GeneratorSource::open(plan, index, parallelism, position).expect("opens");
        let mut out = Vec::new();
        while let Some(batch) = source.batch(u64::MAX) {
            for record in batch.records() {
                out.push(String::from_utf8_lossy(record.key.unwrap_or(record.value)).into_owned());
            }
        }
        out
    }

    #[test]
    fn tasks_together_give_every_number_once() {
        let plan = plan(GeneratorContent::Sequence, 10_001);
        let mut numbers: Vec<u64> = (0..3)
            .flat_map(|index| all(&plan, index, 3, None))
            .map(|text| text.parse().expect("a number"))
            .collect();
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..10_001));
    }

    #[test]
    fn shared_out_strands_together_give_every_number_once() {
        let plan = plan(GeneratorContent::Sequence, 20_011);
        let mut numbers = Vec::new();
        let mut take = |positions: Vec<Vec<u8>>, is_last: bool| -> Vec<Vec<u8>> {
            let parallelism = positions.len() as u32;
            let open = |(index, position): (u32, &Vec<u8>)| {
                GeneratorSource::open(&plan, index, parallelism, Some(position)).expect("opens")
            };
            let mut sources: Vec<_> = (0..).zip(&positions).map(open).collect();
            for source in &mut sources {
                let mut turns = 0;
                while let Some(batch) = source.batch(u64::MAX) {
                    numbers.extend(batch.records().map(|record| {
                        String::from_utf8_lossy(record.value).parse::<u64>().expect("a number")
                    }));
                    turns += 1;
                    if turns == 2 && !is_last {
                        break;
                    }
                }
            }
            sources.iter_mut().map(position).collect()
        };
        let fresh = (0..2)
            .map(|index| {
                position(&mut GeneratorSource::open(&plan, index, 2, None).expect("opens"))
            })
            .collect();
        let two = take(fresh, false);
        let slices = |positions: &[Vec<u8>]| -> Vec<Vec<u8>> { positions.to_vec() };
        let mut positions = two;
        for (parallelism, is_last) in [(5, false), (3, false), (4, true)] {
            let old = slices(&positions);
            let old: Vec<&[u8]> = old.iter().map(Vec::as_slice).collect();
            positions = take(share(&old, parallelism).expect("shared"), is_last);
        }
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..20_011));
    }

    #[test]
    fn restored_position_continues_the_same_records() {
        let plan = plan(GeneratorContent::Words { vocabulary: 50, exponent: 1.0 }, 5_000);
        let whole = all(&plan, 1, 2, None);
        let mut source = GeneratorSource::open(&plan, 1, 2, None).expect("opens");
        source.batch(u64::MAX).expect("records");
        let rest = all(&plan, 1, 2, Some(&position(&mut source)));
        assert_eq!(rest, whole[BATCH_RECORDS_MAX..]);
    }

    #[test]
    fn words_are_distinct_and_follow_the_law() {
        let vocabulary = Vocabulary::new(20_000, 1.0, 1);
        let words: BTreeSet<&[u8]> = vocabulary
            .starts
            .windows(2)
            .map(|pair| &vocabulary.letters[pair[0] as usize..pair[1] as usize])
            .collect();
        assert_eq!(words.len(), 20_000);
        let plan = plan(GeneratorContent::Words { vocabulary: 100, exponent: 1.0 }, 200_000);
        let mut counts = BTreeMap::<String, u32>::new();
        for word in all(&plan, 0, 1, None) {
            *counts.entry(word).or_default() += 1;
        }
        let mut counts: Vec<u32> = counts.into_values().collect();
        counts.sort_unstable_by(|left, right| right.cmp(left));
        // The harmonic number of 100 is 5.187: the first word has 19.3 %, the second half of it.
        assert!((36_000..41_000).contains(&counts[0]), "{}", counts[0]);
        assert!((17_500..21_000).contains(&counts[1]), "{}", counts[1]);
    }
}
