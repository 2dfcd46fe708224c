//! Finds the components that tests run, and builds them first.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

use crate::cargo::cargo;

/// The folder of the whole project.
#[must_use]
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the project")
}

/// A component of `tests/guests`.
///
/// # Panics
/// If the guests cannot be built.
#[must_use]
pub fn probe() -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    built(&root().join("tests/guests"), &BUILT).join("probe.wasm")
}

/// The counter of the benchmarks.
///
/// # Panics
/// If the guests cannot be built.
#[must_use]
pub fn counter() -> PathBuf {
    probe().with_file_name("counter.wasm")
}

/// A component of `examples`.
///
/// # Panics
/// If the examples cannot be built.
#[must_use]
pub fn example(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    built(&root().join("examples"), &BUILT).join(format!("{name}.wasm"))
}

/// A command of the program in a directory; what it says to people is piped. A run takes compiled code from
/// the cache of the tests.
#[must_use]
pub fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.current_dir(dir).args(arguments);
    if ["run", "check"].contains(&arguments[0]) {
        command.arg("--cache-dir").arg(root().join("target/tests-cache"));
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Sends a signal such as `INT`. The process may have ended before.
pub fn signal(process: &Child, name: &str) {
    let (name, id) = (format!("-{name}"), process.id().to_string());
    let _ = Command::new("kill").args([name, id]).stderr(Stdio::null()).status();
}

/// The program, as the sources say it is.
///
/// # Panics
/// If it cannot be built.
#[must_use]
pub fn program() -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut build = cargo(root());
        // With the features of the whole workspace, as the tests: nothing is compiled twice.
        build.args(["build", "--quiet", "--workspace", "--bin", "cofferdam"]);
        assert!(build.status().expect("run cargo").success(), "build the program");
    });
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("debug/cofferdam")
}

/// Starts the program with a job in a process of its own; what it tells goes nowhere but to `stdout`.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn start(arguments: &[&str], manifest: &Path, stdout: Stdio) -> Child {
    let mut command = Command::new(program());
    command.args(arguments).arg(manifest).stdout(stdout).stderr(Stdio::null());
    command.spawn().expect("the program runs")
}

fn built(workspace: &Path, once: &OnceLock<()>) -> PathBuf {
    once.get_or_init(|| {
        let status = cargo(workspace)
            .args(["build", "--release", "--quiet", "--target", "wasm32-wasip2"])
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_TARGET_DIR")
            .status()
            .expect("run cargo");
        assert!(status.success(), "build the guests in {}", workspace.display());
    });
    workspace.join("target/wasm32-wasip2/release")
}
