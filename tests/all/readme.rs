//! What the README shows is what happens: its code is compiled, its commands exist, its outputs are given.

use std::{collections::BTreeMap, fs, process::Command};

use cofferdam_tests::guest;

fn readme() -> String {
    fs::read_to_string(guest::root().join("README.md")).expect("readable")
}

/// The blocks of a language, in order.
fn blocks(language: &str) -> Vec<String> {
    let text = readme();
    let mut blocks = Vec::new();
    for part in text.split("```").skip(1).step_by(2) {
        let (first, rest) = part.split_once('\n').expect("a language");
        if first == language {
            blocks.push(rest.to_owned());
        }
    }
    assert!(!blocks.is_empty(), "README has no {language}");
    blocks
}

fn said(program: &mut Command) -> (bool, String) {
    let output = program.output().expect("it runs");
    let both = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&both).into_owned())
}

/// The SDK's tests compile and run it.
#[test]
fn its_operator_is_the_one_that_is_compiled() {
    let compiled = fs::read_to_string(guest::root().join("guest-sdk/tests/readme.rs"));
    let compiled = compiled.expect("readable");
    for block in blocks("rust") {
        assert!(compiled.contains(&block), "guest-sdk/tests/readme.rs does not have:\n{block}");
    }
}

#[test]
fn its_commands_and_their_flags_exist() {
    let mut commands = 0;
    for line in blocks("sh").iter().flat_map(|block| block.lines().map(str::to_owned)) {
        let line = line.split('#').next().unwrap_or_default();
        for command in line.split("&&").map(str::trim) {
            let words: Vec<&str> = command.split_whitespace().collect();
            let [program, verb, rest @ ..] = words.as_slice() else { continue };
            let (is_known, help) = match *program {
                "cofferdam" => said(Command::new(guest::program()).args([*verb, "--help"])),
                "cargo" if *verb == "xtask" => {
                    let source = fs::read_to_string(guest::root().join("xtask/src/main.rs"));
                    let source = source.expect("readable");
                    let [verb] = rest else { panic!("{command}") };
                    let name = format!("Verb::{}{} =>", verb[..1].to_uppercase(), &verb[1..]);
                    (source.contains(&name), source)
                }
                _ => continue,
            };
            assert!(is_known, "`{command}`: {help}");
            for flag in rest.iter().filter(|word| word.starts_with('-')) {
                assert!(help.contains(flag), "`{command}` has no {flag}: {help}");
            }
            commands += 1;
        }
    }
    assert!(8 <= commands, "only {commands} commands were tried");
}

/// Lines up to `...`, of commands that begin with `$`.
#[test]
fn its_predictions_are_those_that_are_given() {
    let mut tried = 0;
    for block in blocks("text") {
        let mut expected: Option<(String, Vec<String>)> = None;
        let mut all = Vec::new();
        for line in block.lines() {
            match line.strip_prefix("$ cofferdam ") {
                Some(command) => all.extend(expected.replace((command.to_owned(), Vec::new()))),
                None => {
                    if let Some((_, lines)) = &mut expected {
                        lines.push(line.to_owned());
                    }
                }
            }
        }
        for (command, lines) in all.into_iter().chain(expected) {
            let mut program = Command::new(guest::program());
            program.args(command.split_whitespace()).current_dir(guest::root());
            let (is_done, given) = said(&mut program);
            assert!(is_done, "{command}: {given}");
            let shown = lines.iter().take_while(|line| *line != "...");
            for (shown, given) in shown.zip(given.lines().map(Some).chain(std::iter::repeat(None)))
            {
                assert_eq!(Some(shown.trim_end()), given.map(str::trim_end), "{command}");
            }
            tried += 1;
        }
    }
    assert_eq!(tried, 2, "commands with their output");
}

/// Numbers of a run differ from the next one's; words do not.
fn without_numbers(line: &str) -> String {
    let mut shape = String::new();
    for letter in line.trim().chars() {
        let letter = if letter.is_ascii_digit() || letter == '.' { '0' } else { letter };
        if !(letter == '0' && shape.ends_with('0')) {
            shape.push(letter);
        }
    }
    shape
}

#[test]
fn its_demo_says_what_the_jobs_of_the_demo_say() {
    let shown = blocks("text").remove(0);
    let (log, results) = shown.split_once("\n\n").expect("a log, and the results");
    let dir = tempfile::tempdir().expect("a directory");
    let mut run = guest::command(guest::root(), &["run", "examples/faulty/job.toml"]);
    run.args(["--log", "info", "--no-progress", "--state-dir"]).arg(dir.path().join("state"));
    let output = run.output().expect("it runs");
    let given = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{given}");
    let given: Vec<String> = given.lines().map(without_numbers).collect();
    for line in log.lines() {
        let shape = without_numbers(line);
        assert!(given.iter().any(|given| given.contains(&shape)), "`{line}` is not in {given:#?}");
    }
    let counts = counted();
    let mut shown_words = 0;
    for line in results.lines() {
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            [count, word] if count.parse::<u64>().is_ok() => {
                assert_eq!(counts[*word].to_string(), *count, "{word}");
                shown_words += 1;
            }
            ["...", "and", more, "words", "more"] => {
                assert_eq!(more.parse::<usize>().expect("a number"), counts.len() - shown_words);
            }
            _ => {}
        }
    }
    assert_eq!(shown_words, 5);
}

/// The words of the demo's text.
fn counted() -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for entry in fs::read_dir(guest::root().join("examples/wordcount/input")).expect("there") {
        let path = entry.expect("readable").path();
        if path.extension().is_some_and(|extension| extension == "txt") {
            let text = fs::read_to_string(path).expect("readable");
            let words = text.split(|letter: char| !letter.is_ascii_alphabetic());
            for word in words.filter(|word| !word.is_empty()) {
                *counts.entry(word.to_owned()).or_default() += 1;
            }
        }
    }
    counts
}
