//! A keyed running count that misbehaves as its config says.
//!
//! `do` is what it does, `at` the number of the record at which it does it (counted by the task),
//! `attempts` in how many attempts (default: in all), `step` how many records later in each further
//! attempt (default: 0), `task` the index of the only task that does it (default: all do). Beside that, `ballast` is a number of bytes
//! that it holds from the first record on, and `dirty` a number of pages of them that it writes for
//! each record. With `do = "poison"` it traps at the records whose event times `poison` lists;
//! with `do = "nap"` it sleeps for 30 ms before each record whose number `at` divides. As a neighbour of other jobs it
//! is greedy at each record: with `hog` it computes for `busy` ms (default: 300), with `late-hog` only from record `at`
//! on, with `fill` it overwrites its ballast eight times, with `calls` it calls the host 20,000 times, with `chatter` it
//! logs 20,000 lines, with `wordy` it emits 20,000 bytes more.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use cofferdam_sdk::prelude::*;

const PAGE: usize = 4096;

#[operator]
#[derive(Default)]
pub struct Probe {
    #[state]
    counts: ValueState<u64>,
    /// Kept in memory only, so that both kinds of state are exercised.
    seen: u64,
    deed: String,
    at: u64,
    step: u64,
    attempts: u32,
    ballast_bytes: usize,
    ballast: Vec<u8>,
    dirty: usize,
    next_page: usize,
    last_timestamp: Option<i64>,
    started: Option<Instant>,
    quiet: bool,
    poison: Vec<i64>,
    busy: Duration,
}

impl Operator for Probe {
    type Key<'a> = Text<'a>;
    type In<'a> = Raw<'a>;
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn open(&mut self, context: &Context) -> Result<()> {
        self.deed = context.config.get("do").unwrap_or_default().to_owned();
        self.at = context.config.get_or("at", 0)?;
        let only: u32 = context.config.get_or("task", context.task_index)?;
        if only != context.task_index {
            self.deed.clear();
        }
        self.step = context.config.get_or("step", 0)?;
        self.attempts = context.config.get_or("attempts", u32::MAX)?;
        self.dirty = context.config.get_or("dirty", 0)?;
        let poison = context.config.get("poison").unwrap_or_default();
        self.poison = poison.split_whitespace().filter_map(|time| time.parse().ok()).collect();
        self.busy = Duration::from_millis(context.config.get_or("busy", 300)?);
        self.quiet = context.config.get_or("quiet", false)?;
        self.started = Some(Instant::now());
        self.ballast_bytes = context.config.get_or("ballast", 0)?;
        if self.deed == "trap-in-open" && host::attempt() < self.attempts {
            panic!("open does not want to");
        }
        if self.deed == "write-in-open" {
            // More than a cache holds.
            for n in 0..self.at {
                self.counts.set(&StateKey::new(&n.to_le_bytes()), 1);
            }
        }
        if self.deed == "fail-in-open" {
            return Err(Error::failed("no luck"));
        }
        Ok(())
    }

    fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        if self.ballast.len() < self.ballast_bytes {
            // Not in `open`, which also runs before a restore.
            self.ballast = vec![1; self.ballast_bytes];
        }
        if self.at <= self.seen && !self.deed.is_empty() && self.is_due() {
            self.misbehave(out)?;
        }
        if let Some(time) = record.timestamp.filter(|time| self.poison.contains(time)) {
            panic!("record {time} is poison");
        }
        if self.deed == "nap" && self.seen.is_multiple_of(self.at) {
            std::thread::sleep(std::time::Duration::from_millis(30));
        }
        self.be_greedy(out);
        self.seen += 1;
        let count = self.counts.get_or_default(&record);
        *count += 1;
        if self.last_timestamp < record.timestamp {
            self.last_timestamp = record.timestamp;
        }
        for _ in 0..self.dirty {
            if let Some(byte) = self.ballast.get_mut(self.next_page * PAGE) {
                *byte = byte.wrapping_add(1);
            }
            self.next_page = (self.next_page + 1) % (self.ballast.len() / PAGE).max(1);
        }
        if !self.quiet {
            let (seen, count) = (self.seen, *count);
            out.emit(record.key, Text(&format!("{} {count} {}", record.key, seen > 0)));
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Output<'_, Self>) -> Result<()> {
        if self.deed == "trap-in-finish" && host::attempt() < self.attempts {
            panic!("finish does not want to");
        }
        if self.quiet {
            let (mut keys, mut sum) = (0, 0);
            self.counts.for_each(|_, count| (keys, sum) = (keys + 1, sum + count));
            out.emit(Text("seen"), Text(&format!("{} {keys} {sum}", self.seen)));
        }
        Ok(())
    }
}

impl Probe {
    fn is_due(&self) -> bool {
        let attempt = host::attempt();
        attempt < self.attempts && self.at + u64::from(attempt) * self.step == self.seen
    }

    fn be_greedy(&mut self, out: &mut Output<'_, Self>) {
        match self.deed.as_str() {
            "late-hog" if self.seen < self.at => {}
            "hog" | "late-hog" => {
                let began = Instant::now();
                while began.elapsed() < self.busy {
                    let _ = black_box((0..10_000_u64).fold(0, |sum, n| black_box(sum ^ n)));
                }
            }
            "wordy" => out.emit(Text("wordy"), Text(&"x".repeat(20_000))),
            "fill" => (0..8).for_each(|n| black_box(&mut self.ballast).fill(n)),
            "calls" => (0..20_000).for_each(|_| host::add_to_counter("calls", 1)),
            "chatter" => (0..20_000).for_each(|n| println!("line {n} of many")),
            _ => {}
        }
    }

    fn misbehave(&mut self, out: &mut Output<'_, Self>) -> Result<()> {
        match self.deed.as_str() {
            "trap" => panic!("record {} is one too many", self.seen),
            "spin" => loop {
                black_box(self.seen);
            },
            "eat-memory" => loop {
                self.ballast.resize(self.ballast.len() + (1 << 20), 1);
            },
            "recurse" => {
                black_box(recurse(self.seen));
            }
            "huge-output" => loop {
                out.emit(Text("huge"), Text(&"x".repeat(1 << 20)));
            },
            "reject" => return Err(Error::rejected("this record has a bad smell")),
            "fail" => return Err(Error::failed("the operator gives up")),
            "exit" => std::process::exit(3),
            "foreign-key" => {
                self.counts.set(&StateKey::new(b"nobody's"), 1);
            }
            "count" => {
                host::add_to_counter("reached", 1);
                host::set_gauge("at", self.seen as f64);
            }
            "println" => println!("record {}", self.seen),
            "eprintln" => eprintln!("record {}", self.seen),
            "grow" => self.ballast = vec![1; 32 << 20],
            "log-flood" => (0..100_000).for_each(|n| println!("line {n} of a flood")),
            "clock" => {
                let started = self.started.map_or(0, |at| at.elapsed().as_nanos());
                println!("elapsed {started}");
            }
            "sleep" => std::thread::sleep(std::time::Duration::from_secs(3600)),
            _ => {}
        }
        Ok(())
    }
}

#[expect(unconditional_recursion, reason = "that is the deed")]
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    recurse(depth + 1) + frame[(depth % 64) as usize]
}
