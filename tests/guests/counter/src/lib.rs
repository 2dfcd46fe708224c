//! The keyed running count that the benchmarks measure, as a guest and natively.

use cofferdam_sdk::prelude::*;

/// Emits the new count of a word for each time it comes.
#[operator]
#[derive(Default)]
pub struct Counter {
    #[state]
    counts: ValueState<u64>,
}

impl Operator for Counter {
    type Key<'a> = Text<'a>;
    type In<'a> = ();
    type OutKey<'a> = Text<'a>;
    type Out<'a> = u64;

    fn process(&mut self, word: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        let count = self.counts.get_or_default(&word);
        *count += 1;
        out.emit(word.key, *count);
        Ok(())
    }
}
