//! What jobs make of the flights of a year; the setting `do` says which job this is. Its next version has
//! one more state in front, wider numbers, fields with a default, and another name for a state; it makes the
//! same of the flights.

use std::collections::BTreeMap;

use cofferdam_sdk::prelude::*;
use serde::{Deserialize, Serialize};

const DAY_MS: i64 = 86_400_000;
/// A plane that has not flown for so long begins a session anew.
const GAP_MS: i64 = DAY_MS / 2;
const LISTED: usize = 10;

/// The columns of a flight.
mod column {
    pub(crate) const FILE: usize = 0;
    pub(crate) const ROW: usize = 1;
    pub(crate) const MONTH: usize = 2;
    pub(crate) const DAY: usize = 3;
    pub(crate) const CARRIER: usize = 4;
    pub(crate) const FLIGHT: usize = 5;
    pub(crate) const DEST: usize = 8;
    pub(crate) const DISTANCE: usize = 9;
}

#[cfg(not(feature = "next"))]
mod types {
    use super::{Deserialize, Serialize};

    pub type Count = u32;
    pub type Small = u16;

    #[derive(Default, Serialize, Deserialize)]
    pub struct Window {
        pub count: u32,
        pub miles: u32,
    }

    #[derive(Default, Serialize, Deserialize)]
    pub struct Session {
        pub start: i64,
        pub end: i64,
        pub count: u16,
    }

    #[derive(Default, Serialize, Deserialize)]
    pub struct Sum {
        pub count: u32,
        pub miles: u64,
    }

    #[derive(Default, Serialize, Deserialize)]
    pub struct Rows {
        pub count: u16,
        pub last: u32,
    }
}

#[cfg(feature = "next")]
mod types {
    use super::{Deserialize, Serialize};

    pub type Count = u64;
    pub type Small = u32;

    #[derive(Default, Serialize, Deserialize)]
    pub struct Window {
        #[serde(default)]
        pub longest: u32,
        pub count: u64,
        pub miles: u64,
    }

    #[derive(Default, Serialize, Deserialize)]
    pub struct Session {
        pub start: i64,
        pub end: i64,
        pub count: u64,
        #[serde(default)]
        pub note: Option<String>,
    }

    #[derive(Default, Serialize, Deserialize)]
    pub struct Sum {
        pub count: u64,
        pub miles: u64,
        #[serde(default)]
        pub parts: u32,
    }

    #[derive(Default, Serialize, Deserialize)]
    pub struct Rows {
        pub count: u32,
        pub last: u64,
    }
}

use types::{Count, Rows, Session, Small, Sum, Window};

/// One of the jobs.
#[operator]
#[derive(Default)]
pub struct Flights {
    #[cfg(feature = "next")]
    #[state]
    since: ValueState<u64>,
    #[state]
    counts: ValueState<Count>,
    #[cfg(not(feature = "next"))]
    #[state]
    windows: ValueState<Window>,
    #[cfg(feature = "next")]
    #[state(name = "days", renamed_from = "windows")]
    windows: ValueState<Window>,
    #[state]
    sessions: ValueState<Vec<Session>>,
    #[state]
    sums: ValueState<Sum>,
    #[state]
    seen: ValueState<()>,
    #[state]
    repeats: ValueState<Small>,
    #[state]
    places: ValueState<BTreeMap<String, Small>>,
    #[state]
    rows: ValueState<Rows>,
    job: String,
}

impl Operator for Flights {
    type Key<'a> = Text<'a>;
    type In<'a> = Text<'a>;
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn open(&mut self, context: &Context) -> Result<()> {
        self.job = context.config.get("do").unwrap_or_default().to_owned();
        Ok(())
    }

    fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        let flight: Vec<&str> = record.value.split(',').collect();
        let key = record.key;
        let time = || record.timestamp.ok_or_else(|| Error::failed("a flight without a time"));
        match self.job.as_str() {
            "counts" => {
                let count = self.counts.get_or_default(&record);
                *count += 1;
                out.emit(key, Text(&format!("{key} {count}")));
            }
            "windows" => {
                let day = time()?.div_euclid(DAY_MS);
                let miles: u32 = flight[column::DISTANCE].parse()?;
                let window = self.windows.get_or_default(&record.in_namespace(&day.to_be_bytes()));
                window.count += 1;
                window.miles += Count::from(miles);
                #[cfg(feature = "next")]
                {
                    window.longest = window.longest.max(miles);
                }
            }
            "sessions" => {
                let at = time()?;
                let sessions = self.sessions.get_or_default(&record);
                sessions.push(Session { start: at, end: at, count: 1, ..Session::default() });
                merge(sessions);
            }
            "combine" => {
                let miles: u64 = flight[column::DISTANCE].parse()?;
                let sum = self.sums.get_or_default(&record);
                sum.count += 1;
                sum.miles += miles;
            }
            "sum" => {
                let (count, miles) =
                    record.value.split_once(' ').ok_or_else(|| Error::failed("not a part"))?;
                let sum = self.sums.get_or_default(&record);
                sum.count += count.parse::<Count>()?;
                sum.miles += miles.parse::<u64>()?;
                #[cfg(feature = "next")]
                {
                    sum.parts += 1;
                }
            }
            "rekey" => {
                let [carrier, number] = [flight[column::CARRIER], flight[column::FLIGHT]];
                let [month, day] = [flight[column::MONTH], flight[column::DAY]];
                let identity = format!("{carrier} {number} {month}-{day}");
                out.emit(Text(&identity), record.value);
            }
            "dedup" => match self.seen.get(&record) {
                None => {
                    self.seen.set(&record, ());
                    out.emit(key, Text(&format!("{key}")));
                }
                Some(()) => {
                    let repeats = self.repeats.get_or_default(&record);
                    *repeats += 1;
                    out.emit(key, Text(&format!("again {key} {repeats}")));
                }
            },
            "top" => {
                let places = self.places.get_or_default(&record);
                *places.entry(flight[column::DEST].to_owned()).or_default() += 1;
            }
            "order" => {
                let row = flight[column::ROW].parse()?;
                let file = flight[column::FILE].as_bytes();
                let rows = self.rows.get_or_default(&record.in_namespace(file));
                if row <= rows.last {
                    out.emit(key, Text(&format!("{key}: {row} after {}", rows.last)));
                }
                rows.last = row;
                rows.count += 1;
            }
            other => return Err(Error::failed(format!("no job is called {other:?}"))),
        }
        #[cfg(feature = "next")]
        {
            *self.since.get_or_default(&record) += 1;
        }
        Ok(())
    }

    fn advance(&mut self, watermark: i64, out: &mut Output<'_, Self>) -> Result<()> {
        match self.job.as_str() {
            "windows" => self.close_windows(watermark, out),
            "sessions" => self.close_sessions(watermark, out),
            "combine" => self.give_parts(out),
            _ => Ok(()),
        }
    }

    fn finish(&mut self, out: &mut Output<'_, Self>) -> Result<()> {
        match self.job.as_str() {
            "combine" => self.give_parts(out)?,
            "sum" => self.sums.for_each(|key, sum| {
                let key = text(key.key_bytes());
                out.emit(Text(key), Text(&format!("{key} {} {}", sum.count, sum.miles)));
            }),
            "top" => self.places.for_each(|key, places| {
                let key = text(key.key_bytes());
                let mut places: Vec<_> = places.iter().collect();
                places.sort_by(|left, right| right.1.cmp(left.1).then(left.0.cmp(right.0)));
                for (place, (dest, count)) in (1..).zip(places.into_iter().take(LISTED)) {
                    out.emit(Text(key), Text(&format!("{key} {place} {dest} {count}")));
                }
            }),
            "order" => self.rows.for_each(|key, rows| {
                let (plane, file) = (text(key.key_bytes()), text(key.namespace_bytes()));
                let line = format!("{plane} {file} {} {}", rows.count, rows.last);
                out.emit(Text(plane), Text(&line));
            }),
            _ => {}
        }
        Ok(())
    }
}

impl Flights {
    fn close_windows(&mut self, watermark: i64, out: &mut Output<'_, Self>) -> Result<()> {
        let mut closed = Vec::new();
        self.windows.for_each(|key, window| {
            let day = key.namespace_bytes().try_into().map_or(0, i64::from_be_bytes);
            if (day + 1) * DAY_MS - 1 <= watermark {
                closed.push((key.to_owned(), day, window.count, window.miles));
            }
        });
        for (key, day, count, miles) in closed {
            self.windows.remove(&key);
            let origin = text(key.key_bytes());
            out.emit(Text(origin), Text(&format!("{origin} {day} {count} {miles}")));
        }
        Ok(())
    }

    fn close_sessions(&mut self, watermark: i64, out: &mut Output<'_, Self>) -> Result<()> {
        let is_closed = |session: &Session| session.end.saturating_add(GAP_MS - 1) <= watermark;
        let mut due = Vec::new();
        self.sessions.for_each(|key, sessions| {
            if sessions.iter().any(is_closed) {
                due.push(key.to_owned());
            }
        });
        for key in due {
            let sessions = self.sessions.remove(&key).unwrap_or_default();
            let (closed, open): (Vec<_>, Vec<_>) = sessions.into_iter().partition(is_closed);
            if !open.is_empty() {
                self.sessions.set(&key, open);
            }
            let plane = text(key.key_bytes());
            for Session { start, end, count, .. } in closed {
                out.emit(Text(plane), Text(&format!("{plane} {start} {end} {count}")));
            }
        }
        Ok(())
    }

    fn give_parts(&mut self, out: &mut Output<'_, Self>) -> Result<()> {
        let mut parts = Vec::new();
        self.sums.for_each(|key, sum| parts.push((key.to_owned(), sum.count, sum.miles)));
        for (key, count, miles) in parts {
            self.sums.remove(&key);
            out.emit(Text(text(key.key_bytes())), Text(&format!("{count} {miles}")));
        }
        Ok(())
    }
}

/// Sessions that are nearer than the gap become one.
fn merge(sessions: &mut Vec<Session>) {
    sessions.sort_by_key(|session| session.start);
    let mut merged: Vec<Session> = Vec::new();
    for session in sessions.drain(..) {
        match merged.last_mut() {
            Some(last) if session.start - last.end < GAP_MS => {
                last.end = last.end.max(session.end);
                last.count += session.count;
            }
            _ => merged.push(session),
        }
    }
    *sessions = merged;
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}
