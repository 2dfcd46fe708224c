//! Counts words like the operator of `wordcount`, but traps once, at the record that the manifest
//! chooses: in its first attempt, as code does that fails under conditions which pass.

use cofferdam_sdk::prelude::*;

/// The counts by word as declared state, and the number of records as plain memory: a restart
/// brings both back.
#[operator]
#[derive(Default)]
pub struct FaultyCount {
    #[state]
    counts: ValueState<u64>,
    seen: u64,
    trap_at: u64,
}

impl Operator for FaultyCount {
    type Key<'a> = Text<'a>;
    type In<'a> = ();
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn open(&mut self, context: &Context) -> Result<()> {
        self.trap_at = context.config.get_or("trap-at", u64::MAX)?;
        Ok(())
    }

    fn process(&mut self, word: Record<'_, Self>, _: &mut Output<'_, Self>) -> Result<()> {
        self.seen += 1;
        if self.seen == self.trap_at && host::attempt() == 0 {
            panic!("record {} is one too many", self.seen);
        }
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
