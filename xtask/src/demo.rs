//! The demo: word count over a real text, undisturbed and with a trap, and what Unix makes of it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::steps::{announce, built, cargo, components, root};

pub(crate) fn run_job(example: &str) -> Result<String> {
    let manifest = root().join("examples").join(example).join("job.toml");
    let state = root().join("target/demo").join(example);
    if state.exists() {
        fs::remove_dir_all(&state).context("remove the state of an earlier demo")?;
    }
    let output = Command::new(built("cofferdam"))
        .arg("run")
        .arg(manifest)
        .args(["--log", "info", "--no-progress", "--state-dir"])
        .arg(state)
        .stderr(Stdio::piped())
        .output()
        .context("run cofferdam")?;
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    log.lines().for_each(|line| eprintln!("   {line}"));
    ensure!(output.status.success(), "the job {example} ended with {}", output.status);
    Ok(log)
}

pub(crate) fn run() -> Result<()> {
    components("examples")?;
    announce("building cofferdam, without object stores: some minutes the first time");
    crate::steps::run(cargo(".").args([
        "build",
        "--package",
        "cofferdam",
        "--no-default-features",
    ]))?;

    announce("wordcount: the words of the King James Bible, undisturbed");
    run_job("wordcount")?;
    announce("faulty: the same job with an operator that traps");
    let log = run_job("faulty")?;
    ensure!(log.contains("is one too many"), "the operator of `faulty` did not trap");
    ensure!(log.contains("recovered in"), "the job `faulty` did not recover");

    let expected = count_natively(&root().join("examples/wordcount/input"))?;
    let (golden, faulted) = (lines("wordcount")?, lines("faulty")?);
    ensure!(golden == expected, "the result of wordcount is not what counting natively gives");
    ensure!(faulted == expected, "the result of faulty is not that of the undisturbed run");
    ensure!(bytes("wordcount")? == bytes("faulty")?, "the two results differ in their bytes");

    let mut top: Vec<(&String, &u64)> = expected.iter().collect();
    top.sort_by(|left, right| right.1.cmp(left.1).then(left.0.cmp(right.0)));
    println!();
    for (word, count) in top.iter().take(5) {
        println!("{count:>8} {word}");
    }
    println!("     ... and {} words more", top.len().saturating_sub(5));
    println!();
    let restored = log
        .lines()
        .find(|line| line.contains("attempt 1:"))
        .and_then(|line| line.rsplit_once(", "));
    let place = restored.map_or("from its newest checkpoint", |(_, place)| place);
    println!("The operator of `faulty` trapped once, and the job recovered {place}.");
    println!(
        "The result equals the undisturbed run, byte for byte, and what counting natively gives."
    );
    Ok(())
}

/// Word -> count, as the job has written it.
fn lines(example: &str) -> Result<BTreeMap<String, u64>> {
    let text = String::from_utf8(bytes(example)?).context("the result is text")?;
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let (count, word) = line.split_once(' ').context("a count and a word")?;
        let before = counts.insert(word.to_owned(), count.parse().context("a count")?);
        ensure!(before.is_none(), "\"{word}\" stands twice in the result of {example}");
    }
    Ok(counts)
}

/// The committed parts of a job's result, one after the other.
fn bytes(example: &str) -> Result<Vec<u8>> {
    let dir = root().join("examples").join(example).join("output");
    let mut parts: Vec<PathBuf> = fs::read_dir(&dir)
        .with_context(|| format!("list {}", dir.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("part-"))
        })
        .collect();
    parts.sort();
    let mut all = Vec::new();
    for part in parts {
        all.extend(fs::read(&part).with_context(|| format!("read {}", part.display()))?);
    }
    Ok(all)
}

/// What `tr -cs A-Za-z '\n' | sort | uniq -c` gives.
fn count_natively(dir: &Path) -> Result<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    for entry in fs::read_dir(dir).context("list the input")?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "txt") {
            let text = fs::read_to_string(entry.path()).context("read the input")?;
            for word in text
                .split(|letter: char| !letter.is_ascii_alphabetic())
                .filter(|word| !word.is_empty())
            {
                *counts.entry(word.to_owned()).or_insert(0) += 1;
            }
        }
    }
    Ok(counts)
}
