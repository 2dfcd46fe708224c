//! Joins flights with planes by the number on their tail. Its next version keeps wider numbers, a field more,
//! and how often a plane has flown.

use cofferdam_sdk::prelude::*;
use serde::{Deserialize, Serialize};

#[cfg(not(feature = "next"))]
mod types {
    use super::{Deserialize, Serialize};

    pub type Row = u32;

    #[derive(Default, Serialize, Deserialize)]
    pub struct Plane {
        pub maker: String,
        pub seats: u16,
    }
}

#[cfg(feature = "next")]
mod types {
    use super::{Deserialize, Serialize};

    pub type Row = u64;

    #[derive(Default, Serialize, Deserialize)]
    pub struct Plane {
        #[serde(default)]
        pub engine: Option<String>,
        pub maker: String,
        pub seats: u32,
    }
}

use types::{Plane, Row};

/// The join: flights are the first input, planes the second.
#[operator]
#[derive(Default)]
pub struct Planes {
    #[cfg(feature = "next")]
    #[state]
    flown: ValueState<u32>,
    /// Flights whose plane has not come yet.
    #[state]
    waiting: ValueState<Vec<Row>>,
    #[state]
    planes: ValueState<Plane>,
}

impl Operator for Planes {
    type Key<'a> = Text<'a>;
    type In<'a> = Text<'a>;
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn inputs() -> Vec<Port> {
        ["flights", "planes"].map(Port::input::<Text<'static>, Text<'static>>).to_vec()
    }

    fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        let columns: Vec<&str> = record.value.split(',').collect();
        let tail = record.key;
        if record.input == 0 {
            let row: Row = columns[1].parse()?;
            #[cfg(feature = "next")]
            {
                *self.flown.get_or_default(&record) += 1;
            }
            match self.planes.get(&record) {
                Some(Plane { maker, seats, .. }) => {
                    out.emit(tail, Text(&format!("{row} {tail} {maker} {seats}")));
                }
                None => self.waiting.get_or_default(&record).push(row),
            }
            return Ok(());
        }
        let (maker, seats) = (columns[3].to_owned(), columns[6].parse()?);
        for row in self.waiting.remove(&record).unwrap_or_default() {
            out.emit(tail, Text(&format!("{row} {tail} {maker} {seats}")));
        }
        self.planes.set(&record, Plane { maker, seats, ..Plane::default() });
        Ok(())
    }

    fn finish(&mut self, out: &mut Output<'_, Self>) -> Result<()> {
        self.waiting.for_each(|key, rows| {
            let tail = std::str::from_utf8(key.key_bytes()).unwrap_or_default();
            for row in rows {
                out.emit(Text(tail), Text(&format!("{row} {tail} unknown")));
            }
        });
        Ok(())
    }
}
