//! What `totals` has become: a state in front of the others, which have changed places, one of them with
//! another name and a wider sum beside a new field.

use cofferdam_sdk::prelude::*;
use serde::{Deserialize, Serialize};

/// A sum, as this version keeps it.
#[derive(Default, Serialize, Deserialize)]
pub struct Sum {
    #[serde(default)]
    largest: u32,
    bytes: u64,
}

/// Emits the same as its earlier version.
#[operator]
#[derive(Default)]
pub struct Totals {
    #[state]
    since_upgrade: ValueState<i64>,
    #[state(renamed_from = "bytes")]
    size: ValueState<Sum>,
    #[state]
    count: ValueState<u64>,
}

impl Operator for Totals {
    type Key<'a> = Text<'a>;
    type In<'a> = Raw<'a>;
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        *self.since_upgrade.get_or_default(&record) += 1;
        let count = self.count.get_or_default(&record);
        *count += 1;
        let sum = self.size.get_or_default(&record);
        let bytes = record.value.0.len() as u32;
        sum.largest = sum.largest.max(bytes);
        sum.bytes += u64::from(bytes);
        out.emit(record.key, Text(&format!("{} {count} {}", record.key, sum.bytes)));
        Ok(())
    }
}
