//! What the architecture promises, as far as a search through the sources can tell.

use std::{
    collections::{BTreeMap, BTreeSet},
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
    files
        .map(|(path, _)| path.strip_prefix(root).unwrap_or_else(|_| Path::new("")).to_owned())
        .collect()
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
    for dir in HOST_CRATES.iter().filter(|name| !["sandbox", "contract"].contains(name)) {
        assert_eq!(named_in(&format!("host/{dir}"), "wasmtime"), Vec::<PathBuf>::new());
    }
}

#[test]
fn only_the_store_names_sled() {
    let store = Path::new("host/store/src");
    for word in ["sled::Config", "sled::Db"] {
        let named = named_in("host", word);
        assert!(
            named.iter().all(|path| path.starts_with(store.join("sled"))
                || *path == store.join("table.rs")),
            "{named:?} name {word}"
        );
    }
}

/// Heavy libraries stay with the crates that need them; what reads manifests and what crosses into guests needs none.
#[test]
fn libraries_stay_where_they_belong() {
    let uses = |name: &str, library: &str| {
        let path = guest::root().join("host").join(name).join("Cargo.toml");
        let manifest = fs::read_to_string(path).expect("readable");
        let own = manifest.split("\n[").find(|part| part.starts_with("dependencies]"));
        own.is_some_and(|own| {
            own.lines().any(|line| line.split(['.', ' ', '=']).next() == Some(library))
        })
    };
    let rows: [(&str, &[&str]); 4] = [
        ("sled", &["store"]),
        ("object_store", &["store"]),
        ("wasmtime", &["contract", "sandbox"]),
        ("tokio", &["connector", "sandbox", "store", "connectors", "engine", "cli"]),
    ];
    for (library, expected) in rows {
        let found: Vec<&str> = HOST_CRATES.into_iter().filter(|name| uses(name, library)).collect();
        assert_eq!(found, expected, "{library}");
    }
}

/// The crates of the host, each below those that come after it.
const HOST_CRATES: [&str; 11] = [
    "core",
    "contract",
    "files",
    "settings",
    "connector",
    "sandbox",
    "store",
    "spec",
    "connectors",
    "engine",
    "cli",
];

/// The crates of the host that one depends on, beside its tests.
fn dependencies(name: &str) -> Vec<String> {
    let path = guest::root().join("host").join(name).join("Cargo.toml");
    let text = fs::read_to_string(path).expect("readable");
    let (_, behind) = text.split_once("[dependencies]").unwrap_or((&text, ""));
    let section = behind.split("\n[").next().unwrap_or_default();
    let own = section.lines().filter_map(|line| line.strip_prefix("cofferdam-"));
    own.filter_map(|line| line.split(['.', ' ']).next()).map(str::to_owned).collect()
}

#[test]
fn crates_depend_on_those_below_them_alone() {
    let mut folders: Vec<String> = fs::read_dir(guest::root().join("host"))
        .expect("listed")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    folders.sort();
    let mut known = HOST_CRATES.map(str::to_owned);
    known.sort();
    assert_eq!(folders, known, "the list of crates is not what there is");
    for (number, name) in HOST_CRATES.iter().enumerate() {
        for other in dependencies(name) {
            assert!(
                HOST_CRATES[..number].contains(&&*other),
                "{name} depends on {other}, which is not below it"
            );
        }
    }
    // What a program may replace, the engine does not know.
    assert!(!dependencies("engine").contains(&"connectors".to_owned()));
    assert!(!dependencies("spec").contains(&"connectors".to_owned()));
}

/// A file without the tests at its end. A module of tests that has a file of its own hides nothing.
fn code_of(text: &str) -> &str {
    let mut from = 0;
    while let Some(at) = text[from..].find("#[cfg(test)]\n") {
        let behind = &text[from + at + "#[cfg(test)]\n".len()..];
        let line = behind.lines().next().unwrap_or_default();
        if line.contains("mod ") && line.ends_with('{') {
            return &text[..from + at];
        }
        from += at + 1;
    }
    text
}

#[test]
fn only_the_tests_in_a_file_are_left_out_of_its_code() {
    let own = "mod a;\n#[cfg(test)]\nmod tests;\nfn f() {}\n";
    assert_eq!(code_of(own), own);
    let within = format!("{own}#[cfg(test)]\nmod more {{\n}}\n");
    assert_eq!(code_of(&within), own);
}

/// The paths below `crate`, `super` and `self` that are named in the middle of some code.
fn inline_paths(code: &str) -> Vec<String> {
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut paths = Vec::new();
    for line in lines {
        for root in ["crate::", "super::", "self::"] {
            for (at, _) in line.match_indices(root) {
                let is_word = |letter: char| letter.is_alphanumeric() || "_:$".contains(letter);
                let is_inner = line[..at].chars().next_back().is_some_and(is_word);
                let end =
                    line[at..].find(|letter| !is_word(letter)).map_or(line.len(), |len| at + len);
                if !is_inner {
                    paths.push(line[at..end].trim_end_matches(':').to_owned());
                }
            }
        }
    }
    paths
}

/// The modules of a crate that each of its files names outside of its tests, in `use` or in the middle of some code.
/// A file and those in the folder of its name are one room: what is within may name what it lies in.
fn imports(source: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut files = BTreeMap::new();
    for (path, text) in sources(&source.display().to_string()) {
        let path = path.strip_prefix(guest::root().join(source)).expect("inside");
        let name = path.with_extension("").display().to_string().replace('/', "::");
        let name = name.strip_suffix("::mod").unwrap_or(&name).to_owned();
        let name = if ["lib", "main"].contains(&&*name) { String::new() } else { name };
        files.insert(name, code_of(&text).to_owned());
    }
    let find = |path: &[&str]| {
        let prefixes = (1..=path.len()).rev().map(|len| path[..len].join("::"));
        prefixes.into_iter().find(|name| files.contains_key(name))
    };
    let mut found = BTreeMap::new();
    for (name, code) in &files {
        let mut named = BTreeSet::new();
        let own: Vec<&str> = name.split("::").filter(|part| !part.is_empty()).collect();
        let statements =
            code.split("use ").skip(1).map(|it| it.split(';').next().unwrap_or_default());
        for used in statements.flat_map(flattened).chain(inline_paths(code)) {
            let parts: Vec<&str> = used.split("::").collect();
            let path: Vec<&str> = match parts[0] {
                "crate" => parts[1..].to_vec(),
                "self" => own.iter().copied().chain(parts[1..].iter().copied()).collect(),
                "super" => {
                    let up = parts.iter().take_while(|part| **part == "super").count();
                    let above = &own[..own.len().saturating_sub(up)];
                    above.iter().copied().chain(parts[up..].iter().copied()).collect()
                }
                _ => continue,
            };
            let other = find(&path).filter(|other| other != name);
            named.extend(other.filter(|other| !name.starts_with(&format!("{other}::"))));
        }
        found.insert(name.clone(), named);
    }
    found
}

/// The single paths of `a::{b, c::{d, e}}`.
fn flattened(tree: &str) -> Vec<String> {
    let tree: String = tree.chars().filter(|letter| !letter.is_whitespace()).collect();
    let Some((prefix, list)) = tree.split_once('{') else { return vec![tree] };
    let list = list.strip_suffix('}').unwrap_or(list);
    let (mut depth, mut begin, mut parts) = (0, 0, Vec::new());
    for (at, letter) in list.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&list[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[begin..]);
    let paths = parts.into_iter().filter(|part| !part.is_empty()).flat_map(flattened);
    paths.map(|path| format!("{prefix}{path}")).collect()
}

#[test]
fn no_modules_import_each_other_in_a_circle() {
    let crates = HOST_CRATES.iter().map(|name| format!("host/{name}/src"));
    for source in crates.chain(["guest-sdk/src".to_owned()]) {
        let mut rest = imports(Path::new(&source));
        assert!(!rest.is_empty(), "{source} has no modules");
        // What imports nothing that is left is in no circle.
        loop {
            let left: BTreeSet<String> = rest.keys().cloned().collect();
            let before = rest.len();
            rest.retain(|_, named| named.iter().any(|other| left.contains(other)));
            if rest.len() == before {
                break;
            }
        }
        assert!(rest.is_empty(), "{source} has a circle among {:?}", rest.keys());
    }
}

/// The longest file, and the longest function outside of tests, in lines.
const FILE_LINES_MAX: usize = 700;
const FUNCTION_LINES_MAX: usize = 70;

#[test]
fn no_file_and_no_function_is_too_long_to_grasp() {
    for source in ["host", "guest-sdk", "tests", "benches", "xtask", "examples"] {
        for (path, text) in sources(source) {
            let lines: Vec<&str> = text.lines().collect();
            let file = path.display();
            assert!(lines.len() <= FILE_LINES_MAX, "{file} has {} lines", lines.len());
            if path.components().any(|part| part.as_os_str().to_string_lossy().contains("test")) {
                continue;
            }
            let code = lines.iter().take(code_of(&text).lines().count()).enumerate();
            let mut began = None;
            for (number, line) in code {
                let indent = line.len() - line.trim_start().len();
                let head = line.split('(').next().unwrap_or_default();
                if head.split_whitespace().any(|word| word == "fn") && !line.ends_with(';') {
                    began = Some((number, indent));
                } else if let Some((begin, depth)) = began
                    && indent == depth
                    && line.trim_start().starts_with('}')
                {
                    let length = number - begin + 1;
                    let name = lines[begin].trim();
                    assert!(length <= FUNCTION_LINES_MAX, "{file}: {length} lines: {name}");
                    began = None;
                }
            }
        }
    }
}

#[test]
fn paths_of_imports_are_taken_apart() {
    let paths = flattened("crate::{a, b::{self, C},\n d::{e::F, G}}");
    let expected = ["crate::a", "crate::b::self", "crate::b::C", "crate::d::e::F", "crate::d::G"];
    assert_eq!(paths, expected);
}

#[test]
fn paths_in_the_middle_of_code_are_found() {
    let code =
        "// crate::a\nlet x = super::files::f(y, &crate::b::C);\nself::d::e();\npub(super) fn\n";
    assert_eq!(inline_paths(code), ["crate::b::C", "super::files::f", "self::d::e"]);
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
    let crates = HOST_CRATES.iter().map(|name| format!("host/{name}"));
    let others = ["guest-sdk", "wit", "examples", "tests", "benches", "xtask"];
    for folder in crates.chain(others.map(str::to_owned)) {
        assert!(text.contains(&format!("`{folder}")), "{folder} is not in ARCHITECTURE.md");
    }
}

/// A page that names a file which is not there leads a reader astray.
#[test]
fn every_file_that_the_architecture_names_is_there() {
    let root = guest::root();
    let text = fs::read_to_string(root.join("ARCHITECTURE.md")).expect("readable");
    for named in text.split('`').skip(1).step_by(2) {
        let is_path = ["host/", "tests/", "guest-sdk/", "docs/", "benches/"]
            .iter()
            .any(|folder| named.starts_with(folder));
        if is_path {
            assert!(root.join(named).exists(), "{named} is not there");
        }
    }
    // In a row of the code map, names are those of files below its folder.
    for row in text.lines().filter(|line| line.starts_with("| `host/")) {
        let mut names = row.split('`').skip(1).step_by(2);
        let folder = names.next().unwrap_or_default();
        let below: Vec<String> = sources(folder)
            .into_iter()
            .filter_map(|(path, _)| path.strip_prefix(root).ok().map(|it| it.display().to_string()))
            .collect();
        let is_below =
            |name: &&str| !name.contains("host/") && (name.ends_with(".rs") || name.ends_with('/'));
        for name in names.filter(is_below) {
            let is_there = |path: &String| match name.strip_suffix('/') {
                Some(dir) => path.contains(&format!("/{dir}/")),
                None => path.ends_with(&format!("/{name}")),
            };
            assert!(below.iter().any(is_there), "{folder} has no {name}");
        }
    }
}

/// A promise whose guard is gone is none.
#[test]
fn every_test_that_guards_a_promise_is_there() {
    let code: Vec<String> = ["host", "tests", "guest-sdk"]
        .iter()
        .flat_map(|dir| sources(dir))
        .map(|(_, text)| text)
        .collect();
    let mut promises = 0;
    for page in ["docs/security.md", "docs/hazards.md"] {
        let text = fs::read_to_string(guest::root().join(page)).expect("readable");
        for row in text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |")) {
            let guards = row.rsplit(" | ").next().unwrap_or_default();
            for name in guards.split('`').skip(1).step_by(2).filter(|name| name.contains('_')) {
                let function = format!("fn {name}(");
                assert!(code.iter().any(|text| text.contains(&function)), "{page}: no test {name}");
                promises += 1;
            }
        }
    }
    assert!(50 < promises, "only {promises} were found");
}

#[test]
fn a_new_project_carries_every_file_of_the_sdk() {
    let list = fs::read_to_string(guest::root().join("host/cli/src/new.rs")).expect("readable");
    for (path, _) in sources("guest-sdk") {
        let place = path.strip_prefix(guest::root()).expect("inside").display().to_string();
        // A project tests its operator, not the SDK.
        if place.starts_with("guest-sdk/tests/") {
            continue;
        }
        assert!(list.contains(&format!("\".cofferdam/{place}\"")), "{place} is not carried");
    }
}
