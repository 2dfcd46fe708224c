//! What is read of two documents, and every mistake.

use std::path::Path;

use super::*;
use crate::table::{Key, Required, Setting};

static COUNT: Setting<u64> = Key::integer("limits.count", 1, 9, "how many").or(3);
static PAUSE: Setting<u64> =
    Key::duration("limits.pause", "how long").aliases(&["limits.wait"]).or(1_000);
static MODE: Setting<bool> = Key::choice("mode", &[("ON", true), ("OFF", false)], "which").or(true);
static NAME: Required<String> = Key::text("name", "its name").required("a name");

/// Reads a document by these rows: what counts, and what is wrong.
fn read(text: &str, host: &str) -> (Vec<String>, String) {
    let mut document = Document::new(Path::new("job.toml"), text);
    let start = document.add(Path::new("host.toml"), host, true);
    let table = document.parse(text, 0).expect("TOML");
    let host = document.parse(host, start).expect("TOML");
    let root = Section::root(&document, &[(&table, 0), (&host, start)]);
    let name = document.noted(root.require(&NAME));
    let (count, pause, mode) = (root.get(&COUNT), root.get(&PAUSE), root.get(&MODE));
    root.finish();
    let problems = document.mistakes().err().map_or(String::new(), |all| all.to_string());
    let name = name.map_or(String::new(), |name| name.value);
    (vec![name, count.to_string(), pause.to_string(), mode.to_string()], problems)
}

#[test]
fn the_first_document_counts_before_the_second_and_both_before_the_default() {
    let (counts, problems) =
        read("name = \"a\"\nlimits.count = 5\n", "limits = { count = 7, pause = \"2s\" }\n");
    assert_eq!(counts, ["a", "5", "2000", "true"]);
    assert_eq!(problems, "");
}

#[test]
fn every_mistake_is_found_in_the_order_of_the_document() {
    let rows = [
        ("", "`name` is missing: a name"),
        ("name = 1", "`name` must be a text, not a whole number"),
        ("name = \"a\"\nmode = \"of\"", "did you mean \"OFF\"?"),
        ("name = \"a\"\nmode = \"off\"", ""),
        ("name = \"a\"\nlimits = 3", "`limits` must be a table, not a whole number"),
        ("name = \"a\"\nlimits.count = 10", "10 is not from 1 to 9"),
        (
            "name = \"a\"\nlimits.count = { a = 1 }",
            "`limits.count` must be a whole number, not a table",
        ),
        ("name = \"a\"\nlimits.cuont = 1", "did you mean `limits.count`?"),
        ("name = \"a\"\nlimits.wait = 1", "its name is `limits.pause`"),
        ("name = \"a\"\n[other]\nx = 1", "unknown key `other`"),
        ("name = \"a\"\nlimits.pause = \"soon\"", "is not a duration"),
    ];
    for (text, expected) in rows {
        let (_, problems) = read(text, "");
        assert!(problems.contains(expected), "{text}: {problems}");
        assert_eq!(problems.is_empty(), expected.is_empty(), "{text}: {problems}");
    }
    let (_, problems) = read("mode = 1\nlimits.count = 0\nnmae = \"a\"\n", "");
    let found =
        ["`mode` must", "`limits.count`: 0", "unknown key `nmae`"].map(|it| problems.find(it));
    assert!(found.is_sorted() && found.iter().all(Option::is_some), "{problems}");
}

#[test]
fn what_counts_is_listed_with_its_place() {
    let text = "name = \"a\"\nlimits.pause = \"5s\"\n";
    let document = Document::new(Path::new("job.toml"), text);
    let table = document.parse(text, 0).expect("TOML");
    let root = Section::root(&document, &[(&table, 0)]);
    let _ = (root.get(&PAUSE), root.get(&COUNT));
    let place = "job.toml:2:16: limits.pause = \"5s\"".to_owned();
    let effective = |key: &str, value: &str, place| Effective {
        key: key.to_owned(),
        value: value.to_owned(),
        place,
    };
    let listed =
        [effective("limits.pause", "5000 ms", Some(place)), effective("limits.count", "3", None)];
    assert_eq!(document.effective(), listed);
}
