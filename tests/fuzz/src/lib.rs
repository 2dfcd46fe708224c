//! What must hold of any bytes that come from outside: a manifest, a record of the store, a component.
//!
//! Each function says whether the bytes were accepted, and panics where its law is broken. `libfuzzer/` looks for bytes that break one; `tests/corpus.rs` replays
//! what is kept in `corpus/`, and variations of it, with the other tests.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a broken law is a panic"
)]

use std::{collections::BTreeMap, path::Path};

use arbitrary::Unstructured;
use cofferdam_sandbox::ComponentError;
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::JobSpec;
use cofferdam_store::{StorageError, head::Head, metadata::CheckpointMetadata};
use wasm_encoder as enc;
use wasmparser::{Parser, Payload, Validator};

/// A manifest is read, or refused with problems that say what and where; the host is never at fault.
pub fn manifest(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let catalog = cofferdam_connectors::builtin();
    match JobSpec::parse(Path::new("job.toml"), text, None, &catalog) {
        Ok(job) => {
            let again = job.with_parallelism(&BTreeMap::new());
            again.unwrap_or_else(|problem| panic!("it was read once: {problem}"));
            true
        }
        Err(problem) => {
            std::iter::once(&problem).chain(&problem.more).for_each(check_problem);
            false
        }
    }
}

fn check_problem(problem: &Problem) {
    assert_ne!(problem.code, Code::HostBug, "{problem}");
    assert!(!problem.message.is_empty(), "{problem:?}");
    assert!(problem.to_string().contains(problem.code.number()), "{problem}");
}

/// A record of the store is read as it was written, or it is damaged, or of another format.
pub fn metadata(bytes: &[u8]) -> bool {
    let mut is_accepted = true;
    match CheckpointMetadata::decode("the metadata", bytes) {
        Ok(metadata) => {
            let written = metadata.encode().expect("what was read can be written");
            let read = CheckpointMetadata::decode("the metadata", &written);
            assert_eq!(read.expect("what was written can be read"), metadata);
        }
        Err(error) => {
            check_refusal(&error);
            is_accepted = false;
        }
    }
    match Head::newest(&[bytes.to_vec()]) {
        Ok(head) => {
            let head = head.expect("a copy was given");
            let written = head.encode().expect("what was read can be written");
            assert_eq!(Head::newest(&[written]).expect("it can be read"), Some(head));
            true
        }
        Err(error) => {
            check_refusal(&error);
            is_accepted
        }
    }
}

fn check_refusal(error: &StorageError) {
    let is_known = matches!(error, StorageError::Damaged { .. } | StorageError::Format { .. });
    assert!(is_known, "{error}");
}

/// A component is refused, or rewritten into one that is valid, keeps what it had, and has an access to each mutable
/// global and each memory. Bytes that are no component choose one: a module of every kind that an engine knows.
pub fn component(bytes: &[u8]) -> bool {
    match bytes.starts_with(b"\0asm") {
        true => check_component(bytes),
        false => {
            let mut choices = Unstructured::new(bytes);
            // Most without what is always refused.
            let has_all = choices.ratio(1, 4).unwrap_or(false);
            let config = wasm_smith::Config {
                threads_enabled: has_all,
                gc_enabled: has_all,
                exceptions_enabled: has_all,
                max_imports: 0,
                max_memories: 3,
                min_memories: 1,
                memory64_enabled: false,
                multi_value_enabled: true,
                bulk_memory_enabled: true,
                ..wasm_smith::Config::default()
            };
            let module = wasm_smith::Module::new(config, &mut choices);
            module.is_ok_and(|module| check_component(&around(&module.to_bytes())))
        }
    }
}

/// A component of one module, which is instantiated.
fn around(module: &[u8]) -> Vec<u8> {
    let mut component = enc::Component::new();
    component.section(&enc::RawSection { id: 1, data: module });
    let mut instances = enc::InstanceSection::new();
    instances.instantiate(0, std::iter::empty::<(&str, enc::ModuleArg)>());
    component.section(&instances);
    component.finish()
}

fn check_component(bytes: &[u8]) -> bool {
    let rewritten = match cofferdam_sandbox::rewrite(bytes) {
        Ok(rewritten) => rewritten,
        Err(ComponentError::Compile(error)) => panic!("it was not to be compiled: {error}"),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return false;
        }
    };
    let valid = Validator::new().validate_all(&rewritten);
    valid.unwrap_or_else(|error| panic!("what was valid is rewritten into what is not: {error}"));
    let (before, after) = (Inventory::of(bytes), Inventory::of(&rewritten));
    // The accesses have code of their own, behind everything.
    assert!(after.code.starts_with(&before.code), "code was touched");
    let expected = before.exports + 2 * before.mutable_globals + before.memories;
    assert_eq!(after.exports, expected, "an access is missing");
    true
}

/// What a component has at its outermost level, and the code of its modules.
#[derive(Debug, Default, PartialEq, Eq)]
struct Inventory {
    exports: usize,
    mutable_globals: usize,
    memories: usize,
    code: Vec<Vec<u8>>,
}

impl Inventory {
    /// Of modules that are instantiated, which in what is accepted is at most once.
    fn of(bytes: &[u8]) -> Self {
        let mut found = Self::default();
        let mut instantiated = Vec::new();
        let mut modules: Vec<(usize, usize)> = Vec::new();
        let mut levels = Vec::new();
        for payload in Parser::new(0).parse_all(bytes) {
            let payload = payload.expect("valid");
            match &payload {
                Payload::Version { encoding, .. } => {
                    levels.push(*encoding);
                    if *encoding == wasmparser::Encoding::Module {
                        modules.push((0, 0));
                    }
                }
                Payload::End(_) => drop(levels.pop()),
                Payload::ComponentExportSection(section) if levels.len() == 1 => {
                    found.exports += section.count() as usize;
                }
                Payload::InstanceSection(section) if levels.len() == 1 => {
                    for instance in section.clone() {
                        if let wasmparser::Instance::Instantiate { module_index, .. } =
                            instance.expect("valid")
                        {
                            instantiated.push(module_index as usize);
                        }
                    }
                }
                Payload::GlobalSection(section) => {
                    let globals = section.clone().into_iter();
                    let mutable = globals.filter(|it| it.as_ref().expect("valid").ty.mutable);
                    modules.last_mut().expect("a module").0 += mutable.count();
                }
                Payload::MemorySection(section) => {
                    modules.last_mut().expect("a module").1 += section.count() as usize;
                }
                Payload::CodeSectionEntry(body) => {
                    let range = body.range();
                    found.code.push(bytes[range].to_vec());
                }
                _ => {}
            }
        }
        for module in instantiated {
            if let Some((globals, memories)) = modules.get(module) {
                found.mutable_globals += globals;
                found.memories += memories;
            }
        }
        found
    }
}
