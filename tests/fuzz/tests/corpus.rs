//! Replays what is kept in `corpus/`, and variations of it that are the same in every run.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails by a panic"
)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use cofferdam_connector::identity::Lineage;
use cofferdam_core::random::Random;
use cofferdam_store::{
    head::{Head, Kept},
    metadata::{CheckpointMetadata, SnapshotStats, StateIdentity, TaskIdentity, TaskMetadata},
};

/// Files of a folder, in order.
fn files(folder: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("readable").path()).collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(&path).expect("readable"))).collect()
}

/// Some of the bytes are flipped, cut out, doubled, or replaced by those of another file.
fn vary(random: &mut Random, bytes: &[u8], other: &[u8]) -> Vec<u8> {
    let mut varied = bytes.to_vec();
    for _ in 0..random.between(1, 4) {
        if varied.is_empty() {
            return other.to_vec();
        }
        let len = varied.len() as u64;
        let from = random.between(0, len - 1) as usize;
        let to = (from + random.between(1, 40) as usize).min(varied.len());
        match random.between(0, 4) {
            0 => varied[from] ^= 1 << random.between(0, 7),
            1 => varied[from] = random.between(0, 255) as u8,
            2 => drop(varied.drain(from..to)),
            3 => {
                let doubled = varied[from..to].to_vec();
                varied.splice(from..from, doubled);
            }
            _ if other.is_empty() => {}
            _ => {
                let begin = random.between(0, other.len() as u64 - 1) as usize;
                let end = (begin + random.between(1, 40) as usize).min(other.len());
                varied.splice(from..to, other[begin..end].iter().copied());
            }
        }
    }
    varied
}

/// Tries each file as it is, and so many variations of all; `FUZZ_VARIATIONS` says another number. Gives how many were
/// accepted.
fn replay(inputs: &[(PathBuf, Vec<u8>)], variations: u64, law: fn(&[u8]) -> bool) -> u64 {
    let asked_for = std::env::var("FUZZ_VARIATIONS").ok().and_then(|text| text.parse().ok());
    let variations = asked_for.unwrap_or(variations) / inputs.len() as u64;
    let mut accepted = 0;
    let mut random = Random::new(inputs.len() as u64);
    for (path, bytes) in inputs {
        let mut attempt = |what: &str, bytes: &[u8]| {
            let held = std::panic::catch_unwind(|| law(bytes));
            accepted += u64::from(*held.as_ref().unwrap_or(&false));
            if held.is_err() {
                let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("breaks-a-law");
                fs::write(&kept, bytes).expect("writable");
                panic!("{what} of {} breaks a law: see {}", path.display(), kept.display());
            }
        };
        attempt("the text", bytes);
        for number in 0..variations {
            let other = &inputs[random.between(0, inputs.len() as u64 - 1) as usize].1;
            attempt(&format!("variation {number}"), &vary(&mut random, bytes, other));
        }
    }
    accepted
}

#[test]
fn any_manifest_is_read_or_refused() {
    let mut inputs = files("corpus/manifest");
    let ui = files("../ui").into_iter();
    inputs.extend(ui.filter(|(path, _)| path.extension().is_some_and(|it| it == "toml")));
    let accepted = replay(&inputs, 40_000, cofferdam_fuzz::manifest);
    assert!(50 < accepted, "only {accepted} are manifests");
}

#[test]
fn any_record_of_the_store_is_read_as_it_was_written_or_refused() {
    let accepted = replay(&files("corpus/metadata"), 200_000, cofferdam_fuzz::metadata);
    assert!(1_000 < accepted, "only {accepted} are records");
}

#[test]
fn any_component_is_refused_or_rewritten_into_one_that_is_valid() {
    let accepted = replay(&files("corpus/component"), 30_000, cofferdam_fuzz::component);
    assert!(500 < accepted, "only {accepted} are components that can be checkpointed");
    // Bytes that choose a module.
    let mut random = Random::new(7);
    let mut accepted = 0;
    for _ in 0..2_000 {
        let count = random.between(100, 4_000);
        let choices: Vec<u8> = (0..count).map(|_| random.between(1, 255) as u8).collect();
        accepted += u64::from(cofferdam_fuzz::component(&choices));
    }
    assert!(200 < accepted, "only {accepted} modules can be checkpointed");
}

/// Writes samples that are whole into the corpus, for a new format: `cargo test -p cofferdam-fuzz -- --ignored`.
#[test]
#[ignore = "writes into the corpus"]
fn samples() {
    let write = |name: &str, bytes: &[u8]| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("writable");
        fs::write(path, bytes).expect("writable");
    };
    let kept = Kept { checkpoint: 7, generation: 2, end: 4_096, checksum: 99 };
    let head = Head { sequence: 3, generation: 2, checkpoints: vec![kept], ..Head::default() };
    write("metadata/head", &head.encode().expect("encodes"));
    write("metadata/empty-head", &Head::default().encode().expect("encodes"));
    for tasks in [0, 1, 3] {
        let states = vec![StateIdentity {
            name: "counts".to_owned(),
            renamed_from: Some("words".to_owned()),
            schema: "u64".to_owned(),
        }];
        let task = |index| TaskMetadata {
            identity: TaskIdentity {
                operator: "count".to_owned(),
                uid: "count".to_owned(),
                index,
                parallelism: tasks,
                max_parallelism: 128,
                digest: Some([7; 16]),
                has_memory: true,
                has_declared: true,
                has_host_state: false,
                is_sink: false,
                connector: None,
                directories: (index == 1).then(|| "/srv/lookup\n/scratch".to_owned()),
                config: 4,
                is_keyed: true,
                states: states.clone(),
            },
            chain: vec![1, 5 | 1 << 63, 5],
            stats: SnapshotStats::default(),
        };
        let metadata = CheckpointMetadata {
            job: "words".to_owned(),
            lineage: Lineage::new().fork(4),
            checkpoint: 5,
            written_at_ms: 1,
            tasks: (0..tasks).map(task).collect(),
        };
        write(&format!("metadata/{tasks}-tasks"), &metadata.encode().expect("encodes"));
    }
    let components = [
        ("empty", "(component)"),
        ("module", "(component (core module $m (memory 1)) (core instance (instantiate $m)))"),
        (
            "globals",
            "(component (core module $m (memory (export \"mem\") 1 4) (global (mut i32) (i32.const 3)) \
             (global (mut f64) (f64.const 1)) (global i64 (i64.const 1)) \
             (func (export \"f\") (result i32) global.get 0)) \
             (core instance $i (instantiate $m)) (func (export \"f\") (result u32) \
             (canon lift (core func $i \"f\"))))",
        ),
        (
            "two-modules",
            "(component (core module $a (memory (export \"m\") 1) (global (export \"g\") (mut i64) (i64.const 0))) \
             (core module $b (import \"a\" \"m\" (memory 1)) (import \"a\" \"g\" (global (mut i64))) \
             (global (mut f32) (f32.const 0)) (func (export \"h\") global.get 0 drop)) \
             (core instance $i (instantiate $a)) \
             (core instance $j (instantiate $b (with \"a\" (instance $i)))))",
        ),
        (
            "twice",
            "(component (core module $m (memory 1)) (core instance (instantiate $m)) \
             (core instance (instantiate $m)))",
        ),
        ("nested", "(component (component (type u32)))"),
    ];
    for (name, text) in components {
        write(&format!("component/{name}.wasm"), &wat::parse_str(text).expect("wat"));
    }
}
