//! What the architecture promises, as far as a search through the sources can tell.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cofferdam_tests::guest;

fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut waiting = vec![guest::root().join(dir)];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(&dir).expect("listed").flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && name != ".git" {
                waiting.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("readable");
                found.push((path, text));
            }
        }
    }
    found
}

fn named_in(dir: &str, word: &str) -> Vec<PathBuf> {
    let root = guest::root();
    let files = sources(dir).into_iter().filter(|(_, text)| text.contains(word));
    files.map(|(path, _)| path.strip_prefix(root).unwrap_or(Path::new("")).to_owned()).collect()
}

#[test]
fn every_file_begins_by_saying_what_it_is_for() {
    for dir in ["host", "guest-sdk", "tests", "benches", "xtask", "examples"] {
        for (path, text) in sources(dir) {
            assert!(text.starts_with("//! "), "{} has no first line", path.display());
        }
    }
}

#[test]
fn only_the_sandbox_names_wasmtime() {
    assert_eq!(named_in("host/core", "wasmtime"), Vec::<PathBuf>::new());
    assert_eq!(named_in("host/engine", "wasmtime"), Vec::<PathBuf>::new());
    assert_eq!(named_in("host/cli", "wasmtime"), Vec::<PathBuf>::new());
}

#[test]
fn only_two_files_use_sled() {
    let mut found = named_in("host", "sled::Config");
    found.sort();
    let storage = Path::new("host/engine/src/storage");
    assert_eq!(found, [storage.join("sled.rs"), storage.join("table.rs")]);
}

#[test]
fn the_core_has_no_dependencies() {
    let manifest =
        fs::read_to_string(guest::root().join("host/core/Cargo.toml")).expect("readable");
    assert!(!manifest.contains("dependencies]"), "{manifest}");
}

#[test]
fn every_folder_stands_in_the_architecture() {
    let text = fs::read_to_string(guest::root().join("ARCHITECTURE.md")).expect("readable");
    for folder in [
        "host/core",
        "host/sandbox",
        "host/engine",
        "host/cli",
        "guest-sdk",
        "wit",
        "examples",
        "tests",
        "benches",
        "xtask",
    ] {
        assert!(text.contains(&format!("`{folder}")), "{folder} is not in ARCHITECTURE.md");
    }
}

#[test]
fn a_new_project_carries_every_file_of_the_sdk() {
    let list = fs::read_to_string(guest::root().join("host/cli/src/new.rs")).expect("readable");
    for (path, _) in sources("guest-sdk") {
        let place = path.strip_prefix(guest::root()).expect("inside").display().to_string();
        assert!(list.contains(&format!("\".cofferdam/{place}\"")), "{place} is not carried");
    }
}
