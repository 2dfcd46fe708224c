//! What this version writes, kept for later ones: a state directory of a job that was killed, one of a job
//! that was stopped with a savepoint, each with its component, input and output. `tests/archive` has one of
//! each for every version of the format and of the contract, and each must be resumed from.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    time::{Duration, Instant},
};

use crate::cargo::cargo;

use anyhow::{Context, Result, ensure};
use cofferdam_store::metadata::FORMAT;

use crate::{
    disk::{copy_dir, said},
    guest,
    job::committed,
    keyed,
};

const LINES: u64 = 8_000;
/// So slow that it is not at its end when it is killed.
const RATE: u64 = 10_000;

/// The folder of the archive.
#[must_use]
pub fn folder() -> PathBuf {
    guest::root().join("tests/archive")
}

fn manifest(component: &str, parallelism: u32, snapshot: &str) -> String {
    let source = keyed::source(RATE);
    format!(
        r#"[job]
name = "archived"
parallelism = {parallelism}

[execution.checkpointing]
interval = "30ms"

{source}
[[operator]]
name = "totals"
component = "{component}"
snapshot = "{snapshot}"
inputs = [{{ from = "in", partition = "hash" }}]

[[sink]]
name = "out"
connector = "file"
path = "out"
inputs = ["totals"]
"#
    )
}

/// The component, without the paths of the machine that builds it.
fn component(target: &Path) -> Result<PathBuf> {
    let home =
        std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|it| it + "/.cargo"));
    let remapped = format!(
        "--remap-path-prefix={}=cargo --remap-path-prefix={}=cofferdam",
        home.context("where cargo keeps its sources")?,
        guest::root().display()
    );
    let status = cargo(&guest::root().join("tests/guests"))
        .args(["build", "--release", "--quiet", "--target", "wasm32-wasip2", "--package", "totals"])
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", remapped)
        .env("CARGO_TARGET_DIR", target)
        .status()?;
    ensure!(status.success(), "build the component");
    Ok(target.join("wasm32-wasip2/release/totals.wasm"))
}

/// Writes what this version writes into the archive.
///
/// # Errors
/// Where it is there already, or a job does not do what it should.
pub fn write() -> Result<PathBuf> {
    let folder = folder().join(format!("format-{FORMAT}"));
    ensure!(!folder.exists(), "{} is there already, and stays as it is", folder.display());
    let scratch = tempfile::Builder::new().prefix("cofferdam-archive-").tempdir()?;
    let component = component(&scratch.path().join("target"))?;
    for kind in ["killed", "stopped"] {
        let dir = scratch.path().join(kind);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("in.txt"), keyed::input(LINES))?;
        fs::write(dir.join("job.toml"), manifest("totals.wasm", 2, "both"))?;
        fs::copy(&component, dir.join("totals.wasm"))?;
        let mut run = guest::command(&dir, &["run", "job.toml", "--state-dir", "state"]).spawn()?;
        let began = Instant::now();
        while committed(&dir.join("out")).len() < LINES as usize / 3 {
            ensure!(began.elapsed() < Duration::from_secs(30), "{kind}: nothing is committed");
            std::thread::sleep(Duration::from_millis(10));
        }
        if kind == "killed" {
            run.kill()?;
        } else {
            let stopped = guest::command(&dir, &["stop", "state", "-p", "saved"]).output()?;
            ensure!(stopped.status.success(), "stop: {}", said(&stopped));
        }
        run.wait()?;
        // A socket is no file.
        let _ = fs::remove_dir_all(dir.join("state/control"));
        copy_dir(&dir, &folder.join(kind))?;
    }
    Ok(folder)
}

/// Resumes everything that a version has written: as it was; and with the next version of the component, by
/// what the archived one reads out of its memory or the savepoint holds.
///
/// # Errors
/// Where a job does not finish with the right output.
pub fn check(version: &Path) -> Result<()> {
    let next = guest::probe().with_file_name("totals_next.wasm");
    let next = next.to_str().context("a path")?;
    for kind in ["killed", "stopped"] {
        for (component, parallelism, snapshot) in
            [("totals.wasm", 2, "both"), (next, 3, "declared")]
        {
            let copy = tempfile::tempdir()?;
            let dir = copy.path().join("moved");
            copy_dir(&version.join(kind), &dir)?;
            fs::write(dir.join("job.toml"), manifest(component, parallelism, snapshot))?;
            let mut arguments = vec!["run", "job.toml", "--state-dir", "state", "--log", "info"];
            let savepoint = fs::read_dir(dir.join("saved")).into_iter().flatten().flatten().next();
            let savepoint = savepoint.map(|it| it.path().display().to_string());
            if let Some(savepoint) = &savepoint {
                arguments.extend(["--from", savepoint]);
            }
            let story = format!("{}, {kind}, {component}", version.display());
            let ran: Output = guest::command(&dir, &arguments).output()?;
            ensure!(ran.status.success(), "{story}: {}", said(&ran));
            ensure!(
                said(&ran).contains("from checkpoint"),
                "{story}: it began anew: {}",
                said(&ran)
            );
            let text = fs::read_to_string(dir.join("in.txt"))?;
            keyed::check(&committed(&dir.join("out")), &keyed::totals(&text)).context(story)?;
        }
    }
    Ok(())
}
