//! Passes every record on, and traps where event time goes back.

use cofferdam_sdk::prelude::*;

/// Remembers where event time is.
#[operator]
#[derive(Default)]
pub struct Relay {
    watermark: Option<i64>,
}

impl Operator for Relay {
    type Key<'a> = Text<'a>;
    type In<'a> = Text<'a>;
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        out.emit(record.key, record.value);
        Ok(())
    }

    fn advance(&mut self, watermark: i64, _: &mut Output<'_, Self>) -> Result<()> {
        assert!(self.watermark < Some(watermark), "{watermark} comes after {:?}", self.watermark);
        self.watermark = Some(watermark);
        Ok(())
    }
}
