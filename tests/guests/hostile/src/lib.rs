//! An operator that attacks its host: in the export that it is told, by the deed that it is told.
//!
//! `config` has `deed = "EXPORT:DEED"`. For `describe`, which is given no config, the host's tests write the same over
//! [`SCRIPT`] in the component's bytes.
#![cfg(target_arch = "wasm32")]

use std::{cell::RefCell, hint::black_box, time::Duration};

use cofferdam_sdk::bindings::{
    self,
    cofferdam::operator::{logging, metrics, random, state, task, types::*},
    exports::cofferdam::operator::guest::Guest,
};

/// What `describe` does, behind a mark that it is found by.
static SCRIPT: [u8; 64] = *b"COFFERDAM-SCRIPT nothing:nothing                                ";

/// How many records of the first attempt pass before the task traps, where something is to be done after a restart.
const TRAP_AFTER: usize = 4_000;

thread_local! {
    static DEED: RefCell<String> = RefCell::default();
    static SEEN: RefCell<usize> = RefCell::default();
    static HOARD: RefCell<Vec<Vec<u8>>> = RefCell::default();
}

fn script() -> String {
    // SAFETY: a read of a static; volatile, since the bytes are not those that the compiler has seen.
    let script = unsafe { std::ptr::read_volatile(&raw const SCRIPT) };
    String::from_utf8_lossy(&script[17..]).trim_end().to_owned()
}

/// The deed for this export, if there is one.
fn deed(export: &str) -> String {
    let deed = DEED.with_borrow(Clone::clone);
    deed.strip_prefix(export).and_then(|deed| deed.strip_prefix(':')).unwrap_or_default().to_owned()
}

fn endless(mut step: impl FnMut(u64)) -> ! {
    for n in 0.. {
        step(black_box(n));
    }
    unreachable!()
}

/// What can be done in every export.
fn act(deed: &str) {
    match deed {
        "loop" => endless(|_| {}),
        "bulk" => {
            let mut bytes = vec![1_u8; 48 << 20];
            endless(|n| black_box(&mut bytes).fill(n as u8));
        }
        "trap" => core::arch::wasm32::unreachable(),
        "panic" => panic!("the guest gives up"),
        "huge-panic" => panic!("{}", "last words ".repeat(1 << 20)),
        "escape-panic" => {
            panic!("\u{1b}]0;owned\u{7}\u{1b}[2J\r\n2026-01-01 ERROR forged \u{202e}line\u{2028}\0")
        }
        "sleep" => std::thread::sleep(Duration::from_secs(3_600)),
        "naps" => endless(|_| std::thread::sleep(Duration::from_millis(1))),
        "memory" => HOARD.with_borrow_mut(|hoard| endless(|n| hoard.push(vec![n as u8; 1 << 20]))),
        "recurse" => _ = black_box(recurse(u64::from(task::attempt()))),
        "recurse-in-memory" => _ = black_box(recurse_in_memory(0)),
        "handles" => endless(|_| {
            std::mem::forget(std::io::Write::flush(&mut std::io::stdout()).map(|()| subscribe()))
        }),
        "random" => endless(|_| _ = black_box(random::next())),
        "random-bulk" => endless(|n| {
            black_box(std::collections::HashMap::<u64, u64>::from([(n, n)]));
        }),
        "exit" => std::process::exit(0),
        "calls" => endless(|_| _ = black_box(task::attempt())),
        "log" => endless(|n| logging::log(logging::Level::Error, &format!("line {n}"))),
        "empty-log" => endless(|_| logging::log(logging::Level::Info, "")),
        "huge-log" => endless(|_| logging::log(logging::Level::Info, &"x".repeat(8 << 20))),
        "escape-log" => logging::log(
            logging::Level::Error,
            "\u{1b}[2J\u{1b}]0;owned\u{7}\n2026-01-01 ERROR forged",
        ),
        "print" => endless(|n| println!("line {n}")),
        "print-endless-line" => endless(|_| print!("{}", "x".repeat(1 << 20))),
        "last-words" => endless(|_| logging::panicked(&"x".repeat(1 << 20))),
        "metrics" => endless(|n| metrics::add(&format!("counter {n}"), 1)),
        "metric-names" => endless(|n| metrics::add(&format!("{n}{}", "x".repeat(8 << 20)), 1)),
        "gauge-nan" => {
            for value in [f64::NAN, f64::INFINITY, -0.0] {
                metrics::set("gauge", value);
            }
        }
        "state-get" => drop(black_box(state::get(0, b"key", 0))),
        "state-get-namespace" => drop(black_box(state::get(u32::MAX, b"key", u32::MAX))),
        "state-scan" => drop(black_box(state::scan(0, Some((&[1, 2], 9))))),
        "state-put" => endless(|n| state::put(&one_change(0, &n.to_le_bytes(), &[7; 4096]))),
        "state-malformed" => {
            state::put(&StateChanges { key_ends: vec![9, 3], ..one_change(0, b"key", b"value") })
        }
        "state-foreign" => state::put(&one_change(9, b"key", b"value")),
        _ => {}
    }
}

/// A handle that nothing gives back.
fn subscribe() -> u32 {
    #[link(wasm_import_module = "wasi:clocks/monotonic-clock@0.2.6")]
    unsafe extern "C" {
        #[link_name = "subscribe-duration"]
        safe fn subscribe_duration(nanos: u64) -> u32;
    }
    subscribe_duration(1)
}

#[expect(unconditional_recursion, reason = "that is the deed")]
fn recurse(depth: u64) -> u64 {
    recurse(depth.wrapping_add(1)).wrapping_mul(depth) ^ depth
}

/// On the stack in linear memory, which ends sooner.
#[expect(unconditional_recursion, reason = "that is the deed")]
fn recurse_in_memory(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    recurse_in_memory(depth + 1) + frame[(depth % 64) as usize]
}

fn one_change(state: u32, key: &[u8], value: &[u8]) -> StateChanges {
    StateChanges {
        states: vec![state],
        keys: key.to_vec(),
        key_ends: vec![key.len() as u32],
        namespaces: Vec::new(),
        values: value.to_vec(),
        value_ends: vec![value.len() as u32],
        removed: vec![false],
    }
}

fn no_changes() -> StateChanges {
    StateChanges {
        states: Vec::new(),
        keys: Vec::new(),
        key_ends: Vec::new(),
        namespaces: Vec::new(),
        values: Vec::new(),
        value_ends: Vec::new(),
        removed: Vec::new(),
    }
}

/// Two records.
fn batch() -> Batch {
    Batch {
        keys: b"ab".to_vec(),
        key_ends: vec![1, 2],
        values: b"cd".to_vec(),
        value_ends: vec![1, 2],
        timestamps: vec![1, 2],
    }
}

fn emission(records: Batch) -> Vec<Emission> {
    vec![Emission { output: 0, records }]
}

fn rejection(record: u32) -> Rejection {
    Rejection { record, message: "bad".to_owned() }
}

/// Answers that no honest operator gives.
fn answer(deed: &str) -> Option<Processed> {
    let emissions = match deed {
        "ends-descend" => emission(Batch { value_ends: vec![2, 1], ..batch() }),
        "ends-beyond" => emission(Batch { value_ends: vec![1, u32::MAX], ..batch() }),
        "ends-short" => emission(Batch { value_ends: vec![1, 1], ..batch() }),
        "keys-short" => emission(Batch { key_ends: vec![2], ..batch() }),
        "keys-without-ends" => emission(Batch { key_ends: Vec::new(), ..batch() }),
        "keys-beyond" => emission(Batch { key_ends: vec![1, 99], ..batch() }),
        "times-short" => emission(Batch { timestamps: vec![1], ..batch() }),
        "times-extreme" => emission(Batch { timestamps: vec![i64::MIN, i64::MAX], ..batch() }),
        "no-keys" => emission(Batch { keys: Vec::new(), key_ends: Vec::new(), ..batch() }),
        "not-text" => {
            emission(Batch { keys: vec![0xff, 0xfe], values: vec![0xc3, 0x28], ..batch() })
        }
        "other-output" => vec![Emission { output: 7, records: batch() }],
        "last-output" => vec![Emission { output: u32::MAX, records: batch() }],
        "empty-emissions" => (0..1_000_000)
            .map(|_| Emission {
                output: 0,
                records: Batch {
                    keys: Vec::new(),
                    key_ends: Vec::new(),
                    values: Vec::new(),
                    value_ends: Vec::new(),
                    timestamps: Vec::new(),
                },
            })
            .collect(),
        "flood" => {
            let count = 16 << 20;
            let value_ends = (1..=count).collect();
            emission(Batch {
                keys: Vec::new(),
                key_ends: Vec::new(),
                values: vec![b'x'; count as usize],
                value_ends,
                timestamps: Vec::new(),
            })
        }
        "rejects-beyond" => {
            return Some(Processed { emissions: Vec::new(), rejected: vec![rejection(1 << 30)] });
        }
        "rejects-twice" => {
            let rejected = vec![rejection(0); 1 << 12];
            return Some(Processed { emissions: Vec::new(), rejected });
        }
        "rejects-loudly" => {
            let message = "\u{1b}[31m".repeat(2 << 20);
            return Some(Processed {
                emissions: Vec::new(),
                rejected: vec![Rejection { record: 0, message }],
            });
        }
        _ => return None,
    };
    Some(Processed { emissions, rejected: Vec::new() })
}

fn port(name: &str) -> Port {
    Port { name: name.to_owned(), key: Some(Format::Bytes), value: Format::Bytes }
}

fn described(deed: &str) -> Description {
    let declared = |name: &str| StateDeclaration {
        name: name.to_owned(),
        renamed_from: None,
        kind: StateKind::Value,
        schema: "bytes".to_owned(),
    };
    let mut it = Description {
        name: "Hostile".to_owned(),
        inputs: vec![port("in")],
        outputs: vec![port("out")],
        states: vec![declared("state")],
    };
    match deed {
        "no-inputs" => it.inputs.clear(),
        "many-inputs" => it.inputs = (0..100_000).map(|n| port(&n.to_string())).collect(),
        "many-outputs" => it.outputs = (0..100_000).map(|n| port(&n.to_string())).collect(),
        "many-states" => it.states = (0..100_000).map(|n| declared(&n.to_string())).collect(),
        "same-outputs" => it.outputs = vec![port("out"), port("out")],
        "same-states" => it.states = vec![declared("state"), declared("state")],
        "dead-letter-output" => it.outputs = vec![port("dead-letter")],
        "long-name" => it.outputs = vec![port(&"x".repeat(4 << 20))],
        "escape-name" => it.outputs = vec![port("\u{1b}[2Jout\n\u{202e}")],
        "empty-name" => it.states = vec![declared("")],
        "huge-schema" => it.states[0].schema = "x".repeat(16 << 20),
        "deep-schema" => it.states[0].schema = "list ".repeat(10_000),
        "renamed-to-itself" => it.states[0].renamed_from = Some("state".to_owned()),
        other => act(other),
    }
    it
}

struct Hostile;

impl Guest for Hostile {
    fn describe() -> Description {
        let script = script();
        described(script.strip_prefix("describe:").unwrap_or_default())
    }

    fn open(context: OpenContext) -> Result<(), OperatorError> {
        // Later ones are not counted as held.
        let _ = std::io::Write::flush(&mut std::io::stdout());
        println!("opens");
        let config = context.config.into_iter().find(|(key, _)| key == "deed");
        DEED.set(config.map(|(_, deed)| deed).unwrap_or_default());
        let deed = deed("open");
        act(&deed);
        match deed.as_str() {
            "error" => Err(OperatorError {
                class: ErrorClass::Failed,
                message: "\u{1b}[2J".repeat(1 << 20),
                record: Some(u32::MAX),
            }),
            _ => Ok(()),
        }
    }

    fn process(_: u32, records: Batch) -> Result<Processed, OperatorError> {
        let deed_now = deed("process");
        act(&deed_now);
        if let Some(answer) = answer(&deed_now) {
            return Ok(answer);
        }
        if deed_now == "error" {
            let message = "x".repeat(4 << 20);
            return Err(OperatorError {
                class: ErrorClass::Rejected,
                message,
                record: Some(u32::MAX),
            });
        }
        let seen = SEEN.with_borrow_mut(|seen| {
            *seen += records.value_ends.len();
            *seen
        });
        if DEED.with_borrow(|deed| deed.starts_with("restore:"))
            && task::attempt() == 0
            && TRAP_AFTER < seen
        {
            core::arch::wasm32::unreachable();
        }
        Ok(Processed { emissions: emission(records), rejected: Vec::new() })
    }

    fn advance(_: i64) -> Result<Vec<Emission>, OperatorError> {
        let deed = deed("advance");
        act(&deed);
        Ok(answer(&deed).map(|answer| answer.emissions).unwrap_or_default())
    }

    fn checkpoint(_: CheckpointRequest) -> Result<HandedOver, OperatorError> {
        let deed = deed("checkpoint");
        act(&deed);
        let change = one_change(0, b"key", b"value");
        let (changes, is_last) = match deed.as_str() {
            "never-last" => (one_change(0, b"key", &vec![7; 1 << 20]), false),
            "empty-pieces" => (no_changes(), false),
            "unknown-state" => (one_change(9, b"key", b"value"), true),
            "columns" => (StateChanges { removed: Vec::new(), ..change }, true),
            "ends-beyond" => (StateChanges { value_ends: vec![u32::MAX], ..change }, true),
            "namespace-beyond" => (StateChanges { namespaces: vec![99], ..change }, true),
            "huge" => (one_change(0, b"key", &vec![7; 40 << 20]), true),
            "error" => {
                let message = "no".repeat(1 << 20);
                return Err(OperatorError { class: ErrorClass::Failed, message, record: None });
            }
            _ => (change, true),
        };
        Ok(HandedOver { changes, is_last })
    }

    fn restore(_: StateChanges, _: Vec<(u32, String)>) -> Result<(), OperatorError> {
        act(&deed("restore"));
        Ok(())
    }

    fn converts(_: u32, _: String) -> Result<(), String> {
        Ok(())
    }

    fn finish() -> Result<Vec<Emission>, OperatorError> {
        let deed = deed("finish");
        act(&deed);
        Ok(answer(&deed).map(|answer| answer.emissions).unwrap_or_default())
    }

    fn close() {
        act(&deed("close"));
    }
}

bindings::export!(Hostile with_types_in cofferdam_sdk::bindings);
