//! The operator that the README shows, as it stands there; a test of the project compares both.

#![allow(clippy::expect_used, reason = "a test fails by a panic")]

use cofferdam_sdk::{prelude::*, testing::TestTask};

/// Counts how often each word has been seen.
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

    fn process(&mut self, word: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        let count = self.counts.get_or_default(&word);
        *count += 1;
        out.emit(word.key, Text(&format!("{} {count}", word.key)));
        Ok(())
    }
}

#[test]
fn the_operator_of_the_readme_counts() {
    let mut task = TestTask::<Count>::open(&[]).expect("opens");
    for word in ["the", "of", "the"] {
        task.process(Text(word), ()).expect("counts");
    }
    let output = task.take_output();
    let said: Vec<Text<'_>> = output.iter().map(|record| record.value()).collect();
    assert_eq!(said.iter().map(|text| text.0).collect::<Vec<_>>(), ["the 1", "of 1", "the 2"]);
}
