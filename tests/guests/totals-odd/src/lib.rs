//! Counts records and sums their lengths, by key, as `totals` does, in types of its own: the count tells
//! nobody what it looks like, and the sum under the key that `unwritable` names cannot be written down.

use std::cell::RefCell;

use cofferdam_sdk::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

std::thread_local! {
    static UNWRITABLE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// What stands in front of each count that was written down.
const MARK: u32 = 0x636f_756e;

/// A count that takes back only what it has written: what asks it for its looks learns nothing.
#[derive(Default, Clone, Copy)]
pub struct Count(u64);

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        (MARK, self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match <(u32, u64)>::deserialize(deserializer)? {
            (MARK, count) => Ok(Self(count)),
            _ => Err(serde::de::Error::custom("it is not a count")),
        }
    }
}

/// A sum, and whose it is.
#[derive(Default, Deserialize)]
pub struct Sum {
    bytes: u32,
    key: String,
}

impl Serialize for Sum {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        UNWRITABLE.with_borrow(|unwritable| {
            assert_ne!(Some(&self.key), unwritable.as_ref(), "it is not for writing down");
        });
        (self.bytes, &self.key).serialize(serializer)
    }
}

/// Emits both with each record.
#[operator]
#[derive(Default)]
pub struct Totals {
    #[state]
    count: ValueState<Count>,
    #[state]
    bytes: ValueState<Sum>,
    unwritable: Option<String>,
}

impl Operator for Totals {
    type Key<'a> = Text<'a>;
    type In<'a> = Raw<'a>;
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn open(&mut self, context: &Context) -> Result<()> {
        self.unwritable = context.config.get("unwritable").map(str::to_owned);
        Ok(())
    }

    fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        UNWRITABLE.set(self.unwritable.clone());
        let count = self.count.get_or_default(&record);
        count.0 += 1;
        let sum = self.bytes.get_or_default(&record);
        sum.bytes += record.value.0.len() as u32;
        record.key.0.clone_into(&mut sum.key);
        out.emit(record.key, Text(&format!("{} {} {}", record.key, count.0, sum.bytes)));
        Ok(())
    }
}
