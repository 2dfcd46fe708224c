//! The verbs that run cargo in one way or another.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

const TARGET: &str = "wasm32-wasip2";

/// The folder of the whole project.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("."))
}

/// A cargo command in a folder of the project, free of what the outer cargo has set.
pub(crate) fn cargo(dir: &str) -> Command {
    let mut command = crate::cargo::cargo(&root().join(dir));
    command.env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("RUSTFLAGS");
    command
}

/// Runs a command and says what it was if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}").replace('"', "");
    let status = command.status().with_context(|| format!("run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// Where cargo puts a program of the workspace.
pub(crate) fn built(name: &str) -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("debug").join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}

/// Says what comes next.
pub(crate) fn announce(step: &str) {
    eprintln!("== {step}");
}

/// Adds the target of components to the toolchain if it is not there.
fn add_target() -> Result<()> {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).current_dir(root()).output();
    let sysroot = sysroot.context("run rustc")?;
    let sysroot = String::from_utf8_lossy(&sysroot.stdout).trim().to_owned();
    if Path::new(&sysroot).join("lib/rustlib").join(TARGET).is_dir() {
        return Ok(());
    }
    announce(&format!("adding the target {TARGET}"));
    let added = run(Command::new("rustup").args(["target", "add", TARGET]).current_dir(root()));
    added.with_context(|| {
        format!(
            "the target {TARGET} is needed to build operators and could not be added; \
             add it by hand: `rustup target add {TARGET}`, or the package of your distribution"
        )
    })
}

/// Builds every component.
pub(crate) fn guests() -> Result<()> {
    components("examples")?;
    components("tests/guests")
}

/// Builds the components of a workspace.
pub(crate) fn components(dir: &str) -> Result<()> {
    add_target()?;
    announce(&format!("building the components in {dir}"));
    // Manifests name components where their own workspace puts them.
    let mut build = cargo(dir);
    build.env_remove("CARGO_TARGET_DIR");
    run(build.args(["build", "--release", "--target", TARGET]))
}

/// Everything that must hold before a change is shared.
pub(crate) fn test() -> Result<()> {
    announce("format");
    run(cargo(".").args(["fmt", "--all", "--check"]))?;
    run(cargo("examples").args(["fmt", "--all", "--check"]))?;
    run(cargo("tests/guests").args(["fmt", "--all", "--check"]))?;
    guests()?;
    announce("lints");
    run(cargo(".").args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    announce("documentation");
    run(cargo(".")
        .args(["doc", "--quiet", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links"))?;
    announce("tests of the examples");
    run(cargo("examples").args(["test", "--quiet"]))?;
    announce("tests");
    // The program that the kill tests run must be the one under test.
    run(cargo(".").args(["build", "--quiet", "--workspace", "--bin", "cofferdam"]))?;
    run(cargo(".").args(["test", "--workspace"]))
}

/// Runs the simulation of the core with a setting in its environment.
pub(crate) fn simulate(setting: &str, value: u64) -> Result<()> {
    let test = if setting == "SEED" { "one_seed" } else { "many_seeds" };
    let package = ["test", "--release", "--quiet", "--package", "cofferdam-core"];
    let mut command = cargo(".");
    command.args(package).args(["--test", "simulation", "--test", "batch_simulation"]);
    command.args(["--", "--nocapture", "--ignored", test]);
    run(command.env(setting, value.to_string()))
}

/// A test that runs the program again and again.
pub(crate) fn program(name: &str, rounds: u64) -> Result<()> {
    run(tests_binary(name)?.arg(rounds.to_string()))
}

/// The jobs over real data.
pub(crate) fn flights(job: Option<&str>) -> Result<()> {
    run(tests_binary("flights")?.args(job))
}

/// All known attacks.
pub(crate) fn attack(name: Option<&str>) -> Result<()> {
    run(tests_binary("attack")?.args(name))
}

/// Writes the archive of this version.
pub(crate) fn archive() -> Result<()> {
    run(&mut tests_binary("archive")?)
}

fn tests_binary(name: &str) -> Result<Command> {
    guests()?;
    // With the features of the whole workspace: those of one package alone would build most of it a second time.
    run(cargo(".").args(["build", "--quiet", "--workspace", "--bin", "cofferdam", "--bin", name]))?;
    let mut command = Command::new(built(name));
    command.current_dir(root());
    Ok(command)
}

/// A benchmark, built for speed.
pub(crate) fn bench(name: &str) -> Result<()> {
    guests()?;
    run(cargo(".").args([
        "run",
        "--release",
        "--quiet",
        "--package",
        "cofferdam-benches",
        "--",
        name,
    ]))
}
