//! What a guest does while it runs: in each export, and to each thing that it can reach.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use super::{Attack, HostileJob};
use crate::guest;

const EXPORTS: [&str; 7] =
    ["open", "process", "advance", "checkpoint", "restore", "finish", "close"];

const LIMIT: &[&str] = &["C0102"];
const TRAP: &[&str] = &["C0101"];
const FINISHED: &[&str] = &["finished"];

/// The deed, in words, what stops it, how it ends, and what is said.
type Row = (&'static str, &'static str, &'static str, &'static [&'static str], &'static str);

/// What can be done in every export.
const EVERYWHERE: &[Row] = &[
    ("loop", "runs for ever", "`limits.call`", LIMIT, "ran longer than 200 ms"),
    (
        "bulk",
        "fills 48 MB again and again by bulk instructions",
        "`limits.call`",
        LIMIT,
        "ran longer than 200 ms",
    ),
    ("calls", "calls the host again and again", "`limits.call`", LIMIT, "ran longer than 200 ms"),
    ("trap", "traps", "the sandbox", TRAP, "unreachable"),
    ("sleep", "sleeps for an hour", "`limits.wait`", LIMIT, "waited longer than 300 ms"),
    ("memory", "takes memory without end", "`limits.memory`", LIMIT, "bytes of memory"),
    ("recurse", "calls itself without end", "the stack's limit", LIMIT, "stack overflow"),
    ("handles", "takes handles without end", "`limits.handles`", LIMIT, "more than 64 resources"),
];

/// What is done to the host from `process`.
const ONCE: &[Row] = &[
    ("naps", "waits a millisecond at a time, for ever", "`limits.wait`", LIMIT, "waited longer"),
    ("panic", "panics", "the sandbox", TRAP, "unreachable"),
    ("huge-panic", "panics with 11 MB of words", "8 KiB a text", &["C0101", "C0102"], ""),
    (
        "escape-panic",
        "panics with escape sequences and forged lines",
        "texts are escaped",
        TRAP,
        "unreachable",
    ),
    ("exit", "ends its process", "the sandbox", TRAP, "exit(0)"),
    ("random", "takes random numbers for ever", "`limits.call`", LIMIT, "ran longer"),
    ("random-bulk", "seeds tables for ever", "`limits.call`", LIMIT, "ran longer"),
    ("log", "logs without end", "`limits.log`, `limits.call`", LIMIT, "ran longer"),
    (
        "empty-log",
        "logs empty messages without end",
        "`limits.log`, `limits.call`",
        LIMIT,
        "ran longer",
    ),
    ("huge-log", "logs messages of 8 MB", "`limits.output`", LIMIT, "a call"),
    (
        "escape-log",
        "logs escape sequences and forged lines",
        "texts are escaped",
        FINISHED,
        "forged",
    ),
    ("print", "prints without end", "`limits.log`, `limits.call`", LIMIT, "ran longer"),
    ("print-endless-line", "prints a line without end", "8 KiB a text", LIMIT, "ran longer"),
    ("last-words", "says last words again and again", "`limits.call`", LIMIT, "a call"),
    ("metrics", "makes counters without end", "1,000 names a node", LIMIT, "ran longer"),
    (
        "metric-names",
        "makes counters with names of 8 MB",
        "256 bytes a name, `limits.output`",
        LIMIT,
        "a call",
    ),
    ("gauge-nan", "sets a gauge to what is no number", "nothing is harmed", FINISHED, ""),
    ("state-get", "asks for state that it keeps itself", "the contract", TRAP, ""),
    ("state-get-namespace", "asks with a namespace longer than the key", "the contract", TRAP, ""),
    ("state-scan", "scans from a namespace longer than the key", "the contract", TRAP, ""),
    (
        "error",
        "rejects a record that there is not, with 4 MB of words",
        "8 KiB a text",
        &["C0103"],
        "",
    ),
    ("ends-descend", "gives values whose ends descend", "batches are checked", TRAP, ""),
    ("ends-beyond", "gives values that end at 4 GiB", "batches are checked", TRAP, ""),
    ("ends-short", "gives more bytes than values", "batches are checked", TRAP, ""),
    ("keys-short", "gives fewer keys than values", "batches are checked", TRAP, ""),
    ("keys-without-ends", "gives bytes of keys without ends", "batches are checked", TRAP, ""),
    ("keys-beyond", "gives keys that end beyond their bytes", "batches are checked", TRAP, ""),
    ("times-short", "gives fewer times than values", "batches are checked", TRAP, ""),
    (
        "times-extreme",
        "gives the first and the last time that there is",
        "nothing is harmed",
        FINISHED,
        "",
    ),
    (
        "no-keys",
        "gives records without keys on a port with keys",
        "batches are checked",
        &["C0101", "finished"],
        "",
    ),
    ("not-text", "gives bytes that are no text", "nothing is harmed", FINISHED, ""),
    (
        "other-output",
        "gives records for an output that there is not",
        "batches are checked",
        TRAP,
        "",
    ),
    ("last-output", "gives records for output 4,294,967,295", "batches are checked", TRAP, ""),
    (
        "empty-emissions",
        "gives a million empty batches",
        "`limits.output`",
        LIMIT,
        "gave back more",
    ),
    ("flood", "gives 16 million records at once", "`limits.output`", LIMIT, "gave back more"),
    (
        "rejects-beyond",
        "rejects a record that it was not given",
        "batches are checked",
        TRAP,
        "not given",
    ),
    (
        "rejects-twice",
        "rejects a record four thousand times",
        "batches are checked",
        TRAP,
        "not given",
    ),
    (
        "rejects-loudly",
        "rejects with 10 MB of escape sequences",
        "`limits.output`",
        LIMIT,
        "gave back more",
    ),
];

const HAND_OVER: &[Row] = &[
    ("never-last", "hands state over without end", "`limits.state`", LIMIT, "bytes of state"),
    ("empty-pieces", "hands nothing over without end", "the contract", TRAP, "empty piece"),
    (
        "unknown-state",
        "hands over a state that it has not declared",
        "the contract",
        TRAP,
        "not declared",
    ),
    ("columns", "hands over columns of different lengths", "state is checked", TRAP, "malformed"),
    ("ends-beyond", "hands over a value that ends at 4 GiB", "state is checked", TRAP, "malformed"),
    (
        "namespace-beyond",
        "hands over a namespace longer than its key",
        "state is checked",
        TRAP,
        "malformed",
    ),
    ("huge", "hands over a value of 40 MB", "`limits.output`", LIMIT, "gave back more"),
    ("error", "fails with 2 MB of words", "8 KiB a text", TRAP, ""),
];

/// With state that the host keeps.
const KEPT: &[Row] = &[
    ("state-put", "puts state without end", "`limits.state`, `limits.call`", LIMIT, ""),
    (
        "state-malformed",
        "puts columns of which ends descend",
        "state is checked",
        TRAP,
        "malformed",
    ),
    (
        "state-foreign",
        "puts into a state that it has not declared",
        "state is checked",
        TRAP,
        "not declared",
    ),
    (
        "state-get-namespace",
        "asks with a namespace longer than the key",
        "the contract",
        TRAP,
        "namespace",
    ),
    ("state-scan", "scans from a namespace longer than the key", "the contract", TRAP, "namespace"),
];

/// What `describe` says or does beside that.
const DESCRIBE: &[(&str, &str, &str)] = &[
    ("recurse-in-memory", "calls itself without end, with large frames", "out of bounds"),
    ("no-inputs", "says that it has no inputs", ""),
    ("many-inputs", "says that it has 100,000 inputs", ""),
    ("many-states", "says that it has 100,000 states", ""),
    ("same-outputs", "says that two outputs have one name", ""),
    ("same-states", "says that two states have one name", ""),
    ("long-name", "says a name of 4 MB", ""),
    ("escape-name", "says a name with escape sequences", ""),
    ("huge-schema", "says a schema of 16 MB", ""),
];

pub(super) fn attacks() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for row in EVERYWHERE {
        attacks.extend(EXPORTS.map(|export| at("each export", export, row, "")));
        let (deed, words, .., says) = row;
        attacks.push(described(deed, words, says));
    }
    attacks.extend(DESCRIBE.iter().map(|(deed, words, says)| described(deed, words, says)));
    let answers = "floods and false answers";
    attacks.extend(ONCE.iter().map(|row| at(answers, "process", row, "")));
    let elsewhere = |(deed, ..): &&Row| ["ends-beyond", "other-output", "flood"].contains(deed);
    for row in ONCE.iter().filter(elsewhere) {
        attacks.extend(["advance", "finish"].map(|export| at(answers, export, row, "")));
    }
    let words = "refuses to open, with 4 MB of escape sequences";
    attacks.push(at(answers, "open", &("error", words, "8 KiB a text", &["C0108"], ""), ""));
    attacks.extend(HAND_OVER.iter().map(|row| at("state", "checkpoint", row, "")));
    let tables = "[state.backend]\ntype = \"sled\"";
    attacks.extend(KEPT.iter().map(|row| at("state", "process", row, tables)));
    attacks
}

fn hostile() -> PathBuf {
    guest::probe().with_file_name("hostile.wasm")
}

fn at(category: &'static str, export: &'static str, row: &Row, tables: &'static str) -> Attack {
    let (deed, words, stopped_by, expected, says) = *row;
    let strike = move |dir: &Path| {
        let config = format!("deed = \"{export}:{deed}\"");
        let restarts = u32::from(export == "restore");
        HostileJob { component: &hostile(), config: &config, tables, restarts }.lay(dir)
    };
    let (deed, place) = (words.to_owned(), export);
    Attack { category, deed, place, stopped_by, expected, says, strike: Box::new(strike) }
}

/// A component whose `describe` does it: the deed is written over what it has in its bytes.
fn described(deed: &'static str, words: &str, says: &'static str) -> Attack {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| fs::read(hostile()).expect("a component"));
    let strike = move |dir: &Path| {
        let mut bytes = BYTES.clone();
        let mark = b"COFFERDAM-SCRIPT ";
        let at = bytes.windows(mark.len()).position(|it| it == mark).expect("the mark");
        let script = format!("{:47}", format!("describe:{deed}"));
        bytes[at + mark.len()..][..47].copy_from_slice(script.as_bytes());
        let component = dir.join("hostile.wasm");
        fs::write(&component, bytes)?;
        HostileJob { component: &component, config: "", tables: "", restarts: 0 }.lay(dir)
    };
    Attack {
        category: "each export",
        deed: words.to_owned(),
        place: "describe",
        stopped_by: "the limits of the operator; descriptions are checked",
        expected: &["C0015"],
        says,
        strike: Box::new(strike),
    }
}
