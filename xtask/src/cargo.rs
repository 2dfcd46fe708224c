//! Cargo, as if no other cargo had called it. The tests use this file, too.

use std::{path::Path, process::Command};

/// A cargo command in a folder, without what an outer cargo says of the package that it runs: crates are built again
/// where their build script finds that changed (`ring` for one, and everything above it).
pub(crate) fn cargo(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO"));
    for (name, _) in std::env::vars_os() {
        let of_a_package = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];
        if of_a_package.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command.current_dir(dir);
    command
}
