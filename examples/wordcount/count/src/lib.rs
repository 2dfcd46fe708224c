//! Counts words and, when the input has ended, says how often each was seen.

use cofferdam_sdk::prelude::*;

/// The counts by word, as declared state.
#[operator]
#[derive(Default)]
pub struct Count {
    #[state]
    counts: ValueState<u64>,
}

impl Operator for Count {
    type Key<'a> = Text<'a>;
    type In<'a> = ();
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn process(&mut self, word: Record<'_, Self>, _: &mut Output<'_, Self>) -> Result<()> {
        *self.counts.get_or_default(&word) += 1;
        Ok(())
    }

    fn finish(&mut self, out: &mut Output<'_, Self>) -> Result<()> {
        let mut counts = Vec::new();
        self.counts.for_each(|word, count| counts.push((word.key_bytes().to_vec(), *count)));
        counts.sort();
        for (word, count) in &counts {
            let word = std::str::from_utf8(word)?;
            out.emit(Text(word), Text(&format!("{count} {word}")));
        }
        Ok(())
    }
}
