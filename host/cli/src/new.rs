//! `cofferdam new`: a crate for an operator that builds, is tested, and runs in a job.
//!
//! The SDK comes with it, in the version this program understands, so that a new project needs
//! nothing but cargo.

use std::{fs, path::Path};

use cofferdam_engine::problem::{Code, Problem};
use serde_json::json;

use crate::{args::NewArguments, report};

/// The SDK's sources, by their places in a project.
const SDK: &[(&str, &str)] = &[
    (".cofferdam/wit/operator.wit", include_str!("../../../wit/operator.wit")),
    (".cofferdam/guest-sdk/Cargo.toml", include_str!("../../../guest-sdk/Cargo.toml")),
    (".cofferdam/guest-sdk/src/index.rs", include_str!("../../../guest-sdk/src/index.rs")),
    (".cofferdam/guest-sdk/src/lib.rs", include_str!("../../../guest-sdk/src/lib.rs")),
    (".cofferdam/guest-sdk/src/codec.rs", include_str!("../../../guest-sdk/src/codec.rs")),
    (".cofferdam/guest-sdk/src/host.rs", include_str!("../../../guest-sdk/src/host.rs")),
    (".cofferdam/guest-sdk/src/operator.rs", include_str!("../../../guest-sdk/src/operator.rs")),
    (".cofferdam/guest-sdk/src/output.rs", include_str!("../../../guest-sdk/src/output.rs")),
    (".cofferdam/guest-sdk/src/runtime.rs", include_str!("../../../guest-sdk/src/runtime.rs")),
    (".cofferdam/guest-sdk/src/changes.rs", include_str!("../../../guest-sdk/src/changes.rs")),
    (".cofferdam/guest-sdk/src/key.rs", include_str!("../../../guest-sdk/src/key.rs")),
    (
        ".cofferdam/guest-sdk/src/schema/mod.rs",
        include_str!("../../../guest-sdk/src/schema/mod.rs"),
    ),
    (
        ".cofferdam/guest-sdk/src/schema/text.rs",
        include_str!("../../../guest-sdk/src/schema/text.rs"),
    ),
    (
        ".cofferdam/guest-sdk/src/schema/trace.rs",
        include_str!("../../../guest-sdk/src/schema/trace.rs"),
    ),
    (
        ".cofferdam/guest-sdk/src/schema/tests.rs",
        include_str!("../../../guest-sdk/src/schema/tests.rs"),
    ),
    (".cofferdam/guest-sdk/src/short.rs", include_str!("../../../guest-sdk/src/short.rs")),
    (".cofferdam/guest-sdk/src/state/mod.rs", include_str!("../../../guest-sdk/src/state/mod.rs")),
    (
        ".cofferdam/guest-sdk/src/state/value.rs",
        include_str!("../../../guest-sdk/src/state/value.rs"),
    ),
    (
        ".cofferdam/guest-sdk/src/state/tests.rs",
        include_str!("../../../guest-sdk/src/state/tests.rs"),
    ),
    (".cofferdam/guest-sdk/src/testing.rs", include_str!("../../../guest-sdk/src/testing.rs")),
    (
        ".cofferdam/guest-sdk/macros/Cargo.toml",
        include_str!("../../../guest-sdk/macros/Cargo.toml"),
    ),
    (
        ".cofferdam/guest-sdk/macros/src/lib.rs",
        include_str!("../../../guest-sdk/macros/src/lib.rs"),
    ),
];

/// The project's own files; `NAME`, `FILE` and `TYPE` are replaced.
const PROJECT: &[(&str, &str)] = &[
    ("Cargo.toml", include_str!("../template/Cargo.toml.in")),
    (".cargo/config.toml", include_str!("../template/cargo-config.toml")),
    (".gitignore", include_str!("../template/gitignore")),
    ("README.md", include_str!("../template/README.md")),
    ("job.toml", include_str!("../template/job.toml")),
    ("src/lib.rs", include_str!("../template/lib.rs.in")),
];

pub(crate) fn run(arguments: &NewArguments, is_json: bool) -> Result<(), Problem> {
    let path = &arguments.path;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let is_name = name.starts_with(|letter: char| letter.is_ascii_lowercase())
        && name.chars().all(|letter| {
            letter.is_ascii_lowercase() || letter.is_ascii_digit() || "-_".contains(letter)
        });
    if !is_name {
        return Err(Problem::new(Code::BadValue, format!("\"{name}\" cannot name a crate"))
            .hint("use lower-case letters, digits and `-`, beginning with a letter"));
    }
    let is_taken = fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
    if is_taken || path.is_file() {
        return Err(Problem::new(Code::ProjectExists, format!("{} is not empty", path.display()))
            .hint("choose another name, or move it away"));
    }
    for (place, text) in SDK {
        write(&path.join(place), text)?;
    }
    for (place, text) in PROJECT {
        let text = text.replace("FILE", &name.replace('-', "_")).replace("NAME", name);
        let text = text.replace("TYPE", &type_name(name));
        write(&path.join(place), &text)?;
    }
    if is_json {
        report::line(&json!({ "created": path, "name": name }));
    } else {
        say!("{}: an operator, its test and a job\n", path.display());
        say!("  cd {}\n  cargo test\n  cofferdam build\n  cofferdam run job.toml", path.display());
    }
    Ok(())
}

/// `clean-up` as the name of a type: `CleanUp`.
fn type_name(name: &str) -> String {
    let pieces = name.split(['-', '_']).filter(|piece| !piece.is_empty());
    pieces.map(|piece| piece[..1].to_uppercase() + &piece[1..]).collect()
}

fn write(path: &Path, text: &str) -> Result<(), Problem> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).and_then(|()| fs::write(path, text)).map_err(|error| {
        Problem::new(Code::ProjectExists, format!("cannot write {}", path.display()))
            .because(&error)
    })
}
