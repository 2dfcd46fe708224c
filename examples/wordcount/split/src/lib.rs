//! Splits lines into words: runs of the letters A to Z, as `tr -cs A-Za-z '\n'` does.

use cofferdam_sdk::prelude::*;

/// Keeps nothing between two lines.
#[operator]
#[derive(Default)]
pub struct Split;

impl Operator for Split {
    type Key<'a> = ();
    type In<'a> = Text<'a>;
    type OutKey<'a> = Text<'a>;
    type Out<'a> = ();

    fn process(&mut self, line: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        let words = line.value.0.split(|letter: char| !letter.is_ascii_alphabetic());
        for word in words.filter(|word| !word.is_empty()) {
            out.emit(Text(word), ());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_sdk::testing::TestTask;

    #[test]
    fn words_are_runs_of_letters() {
        let mut task = TestTask::<Split>::open(&[]).unwrap();
        task.process((), Text("In the beginning, 1:1 God's")).unwrap();
        let output = task.take_output();
        let words: Vec<&str> = output.iter().map(|record| record.key::<Text>().0).collect();
        assert_eq!(words, ["In", "the", "beginning", "God", "s"]);
    }
}
