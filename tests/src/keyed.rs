//! The job of the tests that run the program: lines with a key, counted by it. What it has to commit is
//! computed apart.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use anyhow::{Result, ensure};

const KEYS: u64 = 97;

/// So many lines, each with a key and its number. All are equally long: which of a key comes first is open.
#[must_use]
pub fn input(lines: u64) -> String {
    let mut text = String::new();
    for line in 0..lines {
        let _ = writeln!(text, "k{:02} {line:06}", line * line % KEYS);
    }
    text
}

/// The source that reads them from `in.txt`, so many a second; lines that follow belong to it.
#[must_use]
pub fn source(rate: u64) -> String {
    format!(
        r#"[[source]]
name = "in"
connector = "file"
path = "in.txt"
key = "^k[0-9]+"
split-size = "16KiB"
rate = {rate}
"#
    )
}

/// What the job makes of the lines, sorted: each record of a key with its number.
#[must_use]
pub fn counted(text: &str) -> Vec<String> {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut expected: Vec<String> = Vec::new();
    for line in text.lines() {
        let key = line.split(' ').next().unwrap_or_default();
        let count = counts.entry(key).or_default();
        *count += 1;
        expected.push(format!("{key} {count} true"));
    }
    expected.sort_unstable();
    expected
}

/// What a job of `totals` makes of the lines, sorted: each record of a key with its number and the bytes so
/// far.
#[must_use]
pub fn totals(text: &str) -> Vec<String> {
    let mut totals: BTreeMap<&str, (u64, usize)> = BTreeMap::new();
    let mut expected: Vec<String> = Vec::new();
    for line in text.lines() {
        let key = line.split(' ').next().unwrap_or_default();
        let (count, bytes) = totals.entry(key).or_default();
        (*count, *bytes) = (*count + 1, *bytes + line.len());
        expected.push(format!("{key} {count} {bytes}"));
    }
    expected.sort_unstable();
    expected
}

/// Whether sorted lines are the expected ones.
///
/// # Errors
/// Where they are not, with how many there are.
pub fn check(found: &[String], expected: &[String]) -> Result<()> {
    let (is, must) = (found.len(), expected.len());
    let distinct = found.iter().collect::<BTreeSet<_>>().len();
    ensure!(found == expected, "{is} records, {distinct} distinct, and {must} are right");
    Ok(())
}
