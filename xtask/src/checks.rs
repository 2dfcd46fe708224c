//! Checks that need a tool or a toolchain of their own, and so are not part of `cargo xtask test`.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::steps::{announce, cargo, root, run};

/// The toolchain of miri and of the fuzzer.
const NIGHTLY: &str = "nightly";

/// Licences, sources and advisories: `deny.toml` says what is allowed.
pub(crate) fn deny() -> Result<()> {
    need(&["cargo", "deny", "--version"], "cargo install cargo-deny --locked")?;
    announce("licences, sources and advisories");
    run(cargo(".").args(["deny", "check"]))
}

/// Everything must build with the `rust-version` of Cargo.toml.
pub(crate) fn msrv() -> Result<()> {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).context("read Cargo.toml")?;
    let version = manifest.lines().find_map(|line| line.strip_prefix("rust-version = "));
    let version = version.context("Cargo.toml has no rust-version")?.trim_matches('"');
    let toolchain = toolchain(version)?;
    need(&["rustup", "run", &toolchain, "rustc", "--version"], &install(&toolchain, ""))?;
    announce(&format!("building with Rust {version}"));
    let check = ["run", &toolchain, "cargo", "check", "--workspace", "--all-targets", "--locked"];
    run(Command::new("rustup").args(check).current_dir(root()))
}

/// A version of two numbers names a toolchain by its first release.
fn toolchain(version: &str) -> Result<String> {
    match version.split('.').count() {
        2 => Ok(format!("{version}.0")),
        3 => Ok(version.to_owned()),
        _ => bail!("rust-version = \"{version}\" is no version"),
    }
}

/// The core has no unsafe code and no dependencies: an interpreter that knows the rules of the language holds it to that.
pub(crate) fn miri() -> Result<()> {
    let probe = ["rustup", "run", NIGHTLY, "cargo", "miri", "--version"];
    need(&probe, &install(NIGHTLY, " --component miri,rust-src"))?;
    announce("the core's tests under miri");
    let test = ["run", NIGHTLY, "cargo", "miri", "test", "--package", "cofferdam-core", "--lib"];
    run(Command::new("rustup").args(test).current_dir(root()))
}

/// Looks for new inputs, from what the corpus has; those that it finds go into the corpus.
pub(crate) fn fuzz(target: &str, seconds: u64) -> Result<()> {
    need(&["rustup", "run", NIGHTLY, "rustc", "--version"], &install(NIGHTLY, ""))?;
    need(&["cargo", "fuzz", "--version"], "cargo install cargo-fuzz --locked")?;
    let corpus = root().join("tests/fuzz/corpus").join(target);
    if !corpus.is_dir() {
        bail!("there is no law of \"{target}\": name manifest, metadata or component");
    }
    announce(&format!("looking for {seconds} s for bytes that break the law of a {target}"));
    let dir = ["fuzz", "run", "--fuzz-dir", "tests/fuzz/libfuzzer", target];
    let mut command = Command::new("rustup");
    command.args(["run", NIGHTLY, "cargo"]).args(dir).arg(corpus).current_dir(root());
    run(command.arg("--").arg(format!("-max_total_time={seconds}")))
}

fn install(toolchain: &str, components: &str) -> String {
    format!("rustup toolchain install {toolchain}{components}")
}

/// Says how to install what is missing.
fn need(probe: &[&str], install: &str) -> Result<()> {
    let (program, arguments) = probe.split_first().context("a command")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(root()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        _ => bail!("`{}` does not run: install it with `{install}`", probe.join(" ")),
    }
}
