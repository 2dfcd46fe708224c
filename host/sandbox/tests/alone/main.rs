//! The promises of the sandbox, with an operator of a few lines and nothing else of the project: a snapshot restores
//! exactly, limits bind, the ways to fail are told apart, and what cannot be checkpointed is refused.

#![allow(clippy::expect_used, reason = "a test fails by a panic")]

use std::{
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use cofferdam_contract::{Batch, OpenContext, Processed, StateChanges};
use cofferdam_sandbox::{
    Component, ComponentError, GuestError, Host, Image, Instance, InstanceSetup, Level, Limit,
    Limits, MemoryDelta, MemorySnapshot, QuietHost, RestoreError, Sandbox, SandboxOptions,
    TrackingChoice, rewrite,
};
use futures::executor::block_on;

/// What `process` does, by its input; see `operator.wat`.
const COUNT: u32 = 0;
const TRAP: u32 = 1;
const SPIN: u32 = 2;
const GROW: u32 = 3;
const RECURSE: u32 = 4;
const CALL_NOTHING: u32 = 5;
const REJECT: u32 = 6;
const NOT_TEXT: u32 = 7;
const ASK: u32 = 8;
const MUCH: u32 = 9;
const ASK_FOR_STATE: u32 = 10;
const BAD_POINTER: u32 = 11;
const FILL: u32 = 12;

static OPERATOR: LazyLock<Vec<u8>> =
    LazyLock::new(|| wat::parse_str(include_str!("operator.wat")).expect("a component"));

fn sandbox(tracking: TrackingChoice) -> Sandbox {
    Sandbox::new(SandboxOptions { tracking, ..SandboxOptions::default() }).expect("a sandbox")
}

fn operator() -> Component {
    static LOADED: LazyLock<Component> =
        LazyLock::new(|| sandbox(TrackingChoice::Best).load(&OPERATOR).expect("it is an operator"));
    LOADED.clone()
}

async fn open(component: &Component, host: Arc<dyn Host>, limits: Limits) -> Instance {
    let setup = InstanceSetup { host, limits, capabilities: Default::default(), seed: 7 };
    let mut instance = component.instantiate(setup).await.expect("instantiates");
    let context = OpenContext {
        operator: "small",
        task_index: 0,
        parallelism: 1,
        max_parallelism: 128,
        state_cache: None,
        tracks_changes: true,
        config: &[("key", "value")],
    };
    instance.open(context).await.expect("opens");
    instance
}

fn record() -> Batch {
    Batch {
        keys: b"key".to_vec(),
        key_ends: vec![3],
        values: b"value".to_vec(),
        value_ends: vec![5],
        timestamps: vec![1],
    }
}

/// The two numbers that an emission holds.
fn numbers(processed: Processed) -> (u64, u64) {
    let values = &processed.emissions[0].records.values;
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    (number(&values[..8]), number(&values[8..]))
}

async fn count(instance: &mut Instance, times: u64) -> (u64, u64) {
    let mut last = (0, 0);
    for _ in 0..times {
        last = numbers(instance.process(COUNT, &record()).await.expect("counts"));
    }
    last
}

#[test]
fn a_snapshot_restores_memory_and_globals_whatever_came_after_it() {
    for tracking in [TrackingChoice::Best, TrackingChoice::Compare] {
        let component = sandbox(tracking).load(&OPERATOR).expect("it is an operator");
        block_on(async {
            let mut instance = open(&component, Arc::new(QuietHost), Limits::default()).await;
            assert_eq!(count(&mut instance, 3).await, (3, 3));
            let mut image = Image::new();
            image.apply(&instance.snapshot().await.expect("a snapshot")).expect("memory");
            assert_eq!(count(&mut instance, 2).await, (5, 5));
            let second = instance.snapshot().await.expect("a snapshot");
            assert!(0 < second.changed_bytes(), "it has written");
            assert!(second.changed_bytes() < 64 << 10, "what is untouched is no part of it");

            let mut fresh = open(&component, Arc::new(QuietHost), Limits::default()).await;
            fresh.restore(&image).await.expect("restores");
            assert_eq!(count(&mut fresh, 1).await, (4, 4), "{tracking:?}");
            // What the restored instance writes stays out of the image.
            let mut other = open(&component, Arc::new(QuietHost), Limits::default()).await;
            other.restore(&image).await.expect("restores");
            assert_eq!(count(&mut other, 1).await, (4, 4), "{tracking:?}");
            image.apply(&second).expect("memory");
            let mut third = open(&component, Arc::new(QuietHost), Limits::default()).await;
            third.restore(&image).await.expect("restores");
            assert_eq!(count(&mut third, 1).await, (6, 6), "{tracking:?}");
        });
    }
}

#[test]
fn time_counts_in_which_a_guest_cannot_be_interrupted() {
    let run = |call_max| {
        let limits = Limits { call_max, ..Limits::default() };
        block_on(async {
            let mut instance = open(&operator(), Arc::new(QuietHost), limits).await;
            instance.process(FILL, &record()).await
        })
    };
    let limit = run(Duration::from_millis(20)).expect_err("it runs for longer");
    assert!(matches!(limit, GuestError::Limit(Limit::Call { .. })), "{limit:?}");
    run(Duration::from_secs(60)).expect("it has time");
}

#[test]
fn every_way_to_fail_is_told_apart_and_what_has_trapped_is_gone() {
    let limits = Limits {
        memory_bytes_max: 1 << 20,
        call_max: Duration::from_millis(50),
        output_bytes_max: 4 << 10,
        ..Limits::default()
    };
    let run = |input| {
        block_on(async {
            let mut instance = open(&operator(), Arc::new(QuietHost), limits.clone()).await;
            let error = instance.process(input, &record()).await.expect_err("it fails");
            let after = instance.process(COUNT, &record()).await;
            (error, after)
        })
    };
    type Expected = fn(&GuestError) -> bool;
    let rows: [(u32, Expected); 9] = [
        (
            TRAP,
            |it| matches!(it, GuestError::Trap { message, .. } if message.ends_with("one too many")),
        ),
        (SPIN, |it| matches!(it, GuestError::Limit(Limit::Call { .. }))),
        (GROW, |it| matches!(it, GuestError::Limit(Limit::Memory { bytes_max: 0x10_0000, .. }))),
        (RECURSE, |it| matches!(it, GuestError::Limit(Limit::Stack))),
        (CALL_NOTHING, |it| matches!(it, GuestError::Trap { .. })),
        (
            NOT_TEXT,
            |it| matches!(it, GuestError::Trap { message, .. } if message.contains("utf-8")),
        ),
        (MUCH, |it| matches!(it, GuestError::Limit(Limit::Output { bytes_max: 0x1000 }))),
        (
            ASK_FOR_STATE,
            |it| matches!(it, GuestError::Trap { message, .. } if message.contains("keeps that itself")),
        ),
        (BAD_POINTER, |it| matches!(it, GuestError::Trap { .. })),
    ];
    for (input, is_expected) in rows {
        let (error, after) = run(input);
        assert!(is_expected(&error), "input {input}: {error:?}");
        assert!(matches!(after, Err(GuestError::Host(_))), "input {input}: {after:?}");
    }
    // A verdict of its own leaves the instance as it is.
    let (error, after) = run(REJECT);
    assert_eq!(error, GuestError::Rejected { message: "no good".to_owned(), record: Some(0) });
    assert_eq!(numbers(after.expect("it goes on")), (1, 1));
}

#[derive(Debug, Default)]
struct Recording(Mutex<Vec<String>>);

impl Recording {
    fn note(&self, what: String) {
        self.0.lock().expect("not poisoned").push(what);
    }
}

impl Host for Recording {
    fn log(&self, level: Level, message: &str) {
        self.note(format!("{level:?} {message}"));
    }

    fn add_to_counter(&self, name: &str, delta: u64) {
        self.note(format!("{name} += {delta}"));
    }

    fn set_gauge(&self, name: &str, value: f64) {
        self.note(format!("{name} = {value}"));
    }

    fn now_ms(&self) -> u64 {
        1_000
    }

    fn random(&self) -> u64 {
        40
    }

    fn attempt(&self) -> u32 {
        3
    }
}

#[test]
fn what_a_guest_asks_is_answered_by_whoever_embeds_the_sandbox() {
    block_on(async {
        let host = Arc::new(Recording::default());
        let mut instance = open(&operator(), host.clone(), Limits::default()).await;
        let answered = instance.process(ASK, &record()).await.expect("answered");
        assert_eq!(numbers(answered), (1_040, 3));
        let heard = host.0.lock().expect("not poisoned").clone();
        assert_eq!(heard, ["Level::Warn no good", "no += 5", "no good = 0.5"]);
    });
}

#[test]
fn the_life_of_an_instance_goes_through_every_export() {
    block_on(async {
        let setup = InstanceSetup {
            host: Arc::new(QuietHost),
            limits: Limits::default(),
            capabilities: Default::default(),
            seed: 7,
        };
        let description = operator().describe(setup).await.expect("describes itself");
        assert!(description.inputs.is_empty() && description.states.is_empty());
        let mut instance = open(&operator(), Arc::new(QuietHost), Limits::default()).await;
        assert!(instance.advance(7).await.expect("advances").is_empty());
        let pieces = instance.hand_over(1, true, 1 << 20).await.expect("hands over");
        assert!(pieces.is_empty(), "it declares no state");
        instance.take_back(&StateChanges::default(), &[]).await.expect("takes back");
        assert!(instance.finish().await.expect("finishes").is_empty());
        instance.close().await.expect("closes");
    });
}

#[test]
fn an_image_of_another_component_or_beyond_the_limit_is_refused() {
    block_on(async {
        let mut instance = open(&operator(), Arc::new(QuietHost), Limits::default()).await;
        let own = instance.snapshot().await.expect("a snapshot");
        let image_of = |bytes: u64, globals: &[i64]| {
            let memories = vec![MemoryDelta::new(bytes)];
            let globals = globals.to_vec();
            Image::of([MemorySnapshot { memories, globals, monotonic_ns: 0 }]).expect("memory")
        };
        let more_globals = image_of(256 << 10, &[&own.globals[..], &[1]].concat());
        let other = instance.restore(&more_globals).await;
        assert!(matches!(other, Err(RestoreError::OtherShape { .. })), "{other:?}");
        let small = instance.restore(&image_of(64 << 10, &own.globals)).await;
        assert!(matches!(small, Err(RestoreError::LargerThanSnapshot { .. })), "{small:?}");

        let limits = Limits { memory_bytes_max: 1 << 20, ..Limits::default() };
        let mut limited = open(&operator(), Arc::new(QuietHost), limits).await;
        let large = limited.restore(&image_of(8 << 20, &own.globals)).await;
        assert!(matches!(large, Err(RestoreError::Limit(Limit::Memory { .. }))), "{large:?}");
    });
}

#[test]
fn memories_and_tables_beyond_their_limits_are_refused_before_anything_runs() {
    let instantiate = |limits| {
        let setup = InstanceSetup {
            host: Arc::new(QuietHost),
            limits,
            capabilities: Default::default(),
            seed: 7,
        };
        block_on(operator().instantiate(setup)).map(|_| ()).expect_err("it has more")
    };
    let memory = instantiate(Limits { memory_bytes_max: 64 << 10, ..Limits::default() });
    assert!(matches!(memory, GuestError::Limit(Limit::Memory { .. })), "{memory:?}");
    let table = instantiate(Limits { table_elements_max: 4, ..Limits::default() });
    assert!(matches!(table, GuestError::Limit(Limit::Table { elements_max: 4 })), "{table:?}");
}

#[test]
fn what_is_rewritten_is_valid_and_gives_access_to_each_global_and_memory_once() {
    let rewritten = rewrite(&OPERATOR).expect("it is sound");
    wasmparser::Validator::new().validate_all(&rewritten).expect("it is valid");
    let mut names = Vec::new();
    let mut depth = 0;
    for payload in wasmparser::Parser::new(0).parse_all(&rewritten) {
        match payload.expect("it can be read") {
            wasmparser::Payload::Version { .. } => depth += 1,
            wasmparser::Payload::End(_) => depth -= 1,
            wasmparser::Payload::ComponentExportSection(section) if depth == 1 => {
                names.extend(
                    section
                        .into_iter()
                        .map(|export| export.expect("it can be read").name.name.to_owned()),
                );
            }
            _ => {}
        }
    }
    let own: Vec<&String> = names.iter().filter(|name| name.starts_with("cofferdam-")).collect();
    // `$count` and `$free`, and the memory.
    let expected = [
        "cofferdam-get-0",
        "cofferdam-get-1",
        "cofferdam-set-0",
        "cofferdam-set-1",
        "cofferdam-grow-0",
    ];
    assert_eq!(own.len(), expected.len(), "{names:?}");
    assert!(expected.iter().all(|name| own.iter().any(|own| own == name)), "{names:?}");
    // What was rewritten already has names that are the host's.
    let again = rewrite(&rewritten).expect_err("it has been rewritten");
    assert!(matches!(again, ComponentError::Unsound(_)), "{again}");
}

#[test]
fn bytes_that_are_no_operator_are_refused_with_the_reason() {
    let load =
        |bytes: &[u8]| sandbox(TrackingChoice::Best).load(bytes).map(|_| ()).expect_err("refused");
    let wat = |text: &str| wat::parse_str(text).expect("wat");
    assert!(matches!(load(b"#!/bin/sh\n"), ComponentError::NotWasm { .. }));
    assert!(matches!(load(b""), ComponentError::NotWasm { .. }));
    assert!(matches!(load(&wat("(module)")), ComponentError::CoreModule));
    assert!(matches!(load(&wat("(component)")), ComponentError::OtherWorld { .. }));
    let import = load(&wat(
        r#"(component (import "wasi:sockets/udp@0.2.0" (instance (export "f" (func)))))"#,
    ));
    assert!(matches!(import, ComponentError::Import { .. }), "{import}");
    let mut cut = OPERATOR.clone();
    cut.truncate(cut.len() / 2);
    assert!(matches!(load(&cut), ComponentError::Malformed { .. }));
    let mut garbled = OPERATOR.clone();
    let middle = garbled.len() / 2;
    garbled[middle..middle + 100].fill(0xff);
    assert!(matches!(load(&garbled), ComponentError::Malformed { .. }));
}

#[test]
fn component_whose_state_is_not_all_memory_cannot_be_checkpointed() {
    let check = |module: &str, instances: &str, expected: &str| {
        let text = format!("(component (core module $m {module}) {instances})");
        let bytes = wat::parse_str(&text).expect("wat");
        let error = sandbox(TrackingChoice::Best).load(&bytes).map(|_| ()).expect_err("refused");
        assert!(matches!(error, ComponentError::Unsound(_)), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    let one = "(core instance (instantiate $m))";
    check(
        "(memory 1)",
        "(core instance (instantiate $m)) (core instance (instantiate $m))",
        "2 times",
    );
    check("(memory 1 1 shared)", one, "shared memory");
    check("(memory i64 1)", one, "64-bit memory");
    check(r#"(import "a" "m" (memory 1))"#, "", "imports a memory");
    check(r#"(import "a" "g" (global (mut i32)))"#, "", "imports a mutable global");
    check("(global (mut funcref) (ref.null func))", one, "not a 32- or 64-bit number");
    let table = "(table $t 1 funcref) (elem $e func)";
    check(
        &format!("{table} (func (table.set $t (i32.const 0) (ref.null func)))"),
        one,
        "table.set",
    );
    check(
        &format!("{table} (func (drop (table.grow $t (ref.null func) (i32.const 1))))"),
        one,
        "table.grow",
    );
    check(
        &format!("{table} (func (table.fill $t (i32.const 0) (ref.null func) (i32.const 1)))"),
        one,
        "table.fill",
    );
    check(
        &format!("{table} (func (table.copy $t $t (i32.const 0) (i32.const 0) (i32.const 0)))"),
        one,
        "table.copy",
    );
    check(
        &format!("{table} (func (table.init $t $e (i32.const 0) (i32.const 0) (i32.const 0)))"),
        one,
        "table.init",
    );
    check(&format!("{table} (func (elem.drop $e))"), one, "elem.drop");
    check(r#"(memory 1) (data $d "x") (func (data.drop $d))"#, one, "data.drop");
    check("", "(type $r (resource (rep i32))) (core func (canon resource.new $r))", "ResourceNew");
    let nested = wat::parse_str("(component (component (core module)))").expect("wat");
    let error = sandbox(TrackingChoice::Best).load(&nested).map(|_| ()).expect_err("refused");
    assert!(error.to_string().contains("another component"), "{error}");
}
