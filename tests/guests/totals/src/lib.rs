//! Counts records and sums their lengths, by key: the version that `totals-next` takes over from.

use cofferdam_sdk::prelude::*;
use serde::{Deserialize, Serialize};

/// A sum, as this version keeps it.
#[derive(Default, Serialize, Deserialize)]
pub struct Sum {
    bytes: u32,
}

/// Emits both with each record.
#[operator]
#[derive(Default)]
pub struct Totals {
    #[state]
    count: ValueState<u64>,
    #[state]
    bytes: ValueState<Sum>,
}

impl Operator for Totals {
    type Key<'a> = Text<'a>;
    type In<'a> = Raw<'a>;
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        let count = self.count.get_or_default(&record);
        *count += 1;
        let sum = self.bytes.get_or_default(&record);
        sum.bytes += record.value.0.len() as u32;
        out.emit(record.key, Text(&format!("{} {count} {}", record.key, sum.bytes)));
        Ok(())
    }
}
