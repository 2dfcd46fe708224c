//! `cofferdam build`: an operator crate becomes a checked component.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use cofferdam_engine::{
    EngineOptions, job,
    problem::{Code, Problem},
};
use cofferdam_sandbox::Limits;
use serde_json::{Value, json};

use crate::{
    args::{BuildArguments, compiler},
    report,
};

const TARGET: &str = "wasm32-wasip2";

pub(crate) async fn run(arguments: BuildArguments, is_json: bool) -> Result<(), Problem> {
    let built = cargo_build(&arguments.path)?;
    let output = arguments
        .output
        .unwrap_or_else(|| arguments.path.join(built.file_name().unwrap_or_default()));
    let name = built.file_stem().and_then(|stem| stem.to_str()).unwrap_or("operator").to_owned();
    let options = EngineOptions { compiler: compiler(), ..EngineOptions::default() };
    let sandbox = job::sandbox(options)?;
    let component = job::load_component(&sandbox, &name, &built)?;
    let description = job::describe(&component, &name, &Limits::default()).await?;
    std::fs::copy(&built, &output).map_err(|error| {
        Problem::new(
            Code::BuildFailed,
            format!("cannot write the component to {}", output.display()),
        )
        .because(&error)
    })?;
    let digest = component.digest();
    if is_json {
        report::line(&json!({
            "component": output,
            "digest": digest.to_string(),
            "operator": description.name,
        }));
    } else {
        let size = std::fs::metadata(&output).map_or(0, |metadata| metadata.len());
        say!("{}: operator {}, {}", output.display(), description.name, report::bytes(size));
        say!("  digest {digest}");
    }
    Ok(())
}

fn failed(message: impl Into<String>) -> Problem {
    Problem::new(Code::BuildFailed, message)
}

/// Runs cargo and gives the component it made.
fn cargo_build(path: &Path) -> Result<PathBuf, Problem> {
    if !path.join("Cargo.toml").is_file() {
        return Err(failed(format!("{} is not a crate", path.display()))
            .detail("there is no Cargo.toml")
            .hint("name the operator's directory: `cofferdam build DIR`, or make one: `cofferdam new NAME`"));
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "build",
            "--release",
            "--target",
            TARGET,
            "--message-format",
            "json-render-diagnostics",
        ])
        .current_dir(path)
        .env_remove("RUSTFLAGS")
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| {
            failed("cannot run cargo")
                .because(&error)
                .hint("install Rust with rustup, then `rustup target add wasm32-wasip2`")
        })?;
    if !output.status.success() {
        return Err(failed(format!("cargo could not build {}", path.display())).hint(
            "what cargo says stands above; if the target is missing: `rustup target add wasm32-wasip2`",
        ));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let components = messages.lines().rev().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let files = message.get("filenames")?.as_array()?;
        files
            .iter()
            .filter_map(Value::as_str)
            .find(|file| file.ends_with(".wasm"))
            .map(PathBuf::from)
    });
    components.into_iter().next().ok_or_else(|| {
        failed(format!("{} makes no component", path.display()))
            .hint("its Cargo.toml needs [lib] crate-type = [\"cdylib\", \"rlib\"]")
    })
}
