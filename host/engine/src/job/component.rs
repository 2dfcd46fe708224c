//! Loads the components of a job, and asks each what it is.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use cofferdam_contract::{Description, Port};
use cofferdam_core::failure::os_error;
use cofferdam_files::read_regular;
use cofferdam_sandbox::{
    Component, ComponentError, GuestError, InstanceSetup, Limits, QuietHost, Sandbox, SandboxError,
    SandboxOptions,
};
use cofferdam_settings::{Code, Problem, problem::with_sources};
use cofferdam_spec::OperatorSpec;

use super::read_out::alone;
use crate::EngineOptions;

/// An operator whose component was loaded and asked what it is.
#[derive(Clone)]
pub(super) struct CheckedOperator {
    pub(super) component: Component,
    pub(super) description: Description,
}

/// Sets up the sandbox of a program.
///
/// # Errors
/// Where the engine does not work on this machine, or the cache cannot be made.
pub fn sandbox(options: EngineOptions) -> Result<Sandbox, Problem> {
    let EngineOptions { cache_dir, compiler } = options;
    let options = SandboxOptions { cache_dir, compiler, ..SandboxOptions::default() };
    Sandbox::new(options).map_err(|error| {
        let problem = Problem::new(Code::CannotStart, error.to_string());
        let problem = problem.with_os_error(os_error(&error));
        match error {
            SandboxError::Cache { source, .. } => {
                problem.detail(source).hint("set --cache-dir to a directory of your own")
            }
            _ => problem,
        }
    })
}

pub(super) async fn load(
    sandbox: &Sandbox,
    name: &str,
    spec: &OperatorSpec,
) -> Result<CheckedOperator, Problem> {
    let (sandbox, path, own_name) = (sandbox.clone(), spec.component.clone(), name.to_owned());
    // It may take seconds.
    let loaded = tokio::task::spawn_blocking(move || load_component(&sandbox, &own_name, &path));
    let component = loaded.await.unwrap_or_else(|panic| {
        Err(Problem::new(Code::HostBug, "loading a component panicked").because(&panic))
    })?;
    let description = describe(&component, name, &spec.limits)
        .await
        .map_err(|problem| problem.detail(spec.component.display()))?;
    Ok(CheckedOperator { component, description })
}

/// Asks a component what it is, on a thread of its own.
///
/// # Errors
/// Where it traps or exceeds a limit instead of answering.
pub async fn describe(
    component: &Component,
    name: &str,
    limits: &Limits,
) -> Result<Description, Problem> {
    let setup = InstanceSetup {
        host: Arc::new(QuietHost),
        limits: limits.clone(),
        capabilities: Default::default(),
        seed: 0,
    };
    let asked = component.clone();
    let answer = tokio::task::spawn_blocking(move || alone(asked.describe(setup))).await;
    let answer = answer.unwrap_or_else(|_| Err(GuestError::Host("it panicked".to_owned())));
    let description = answer.map_err(|error| match error {
        GuestError::Unavailable { .. } => {
            Problem::new(Code::CannotStart, format!("operator \"{name}\" cannot be instantiated"))
                .with_os_error(error.os_error())
                .detail(error)
        }
        error => {
            Problem::new(Code::OtherWorld, format!("operator \"{name}\" cannot describe itself"))
                .because(&error)
        }
    })?;
    check_description(&description).map_err(|what| {
        let message = format!("operator \"{name}\" has an invalid description");
        Problem::new(Code::OtherWorld, message)
            .detail(what)
            .hint("build the component with #[operator], which generates a valid description")
    })?;
    Ok(description)
}

/// How many inputs, outputs or states an operator may describe, and how long their names may be.
const DESCRIBED_MAX: usize = 1_024;

const NAME_BYTES_MAX: usize = 256;

const SCHEMA_BYTES_MAX: usize = 64 << 10;

/// What the contract promises of a description holds, whichever compiler made it.
fn check_description(description: &Description) -> Result<(), String> {
    let ports = |ports: &[Port]| ports.iter().map(|port| port.name.clone()).collect::<Vec<_>>();
    let states = &description.states;
    for (what, names) in [
        ("input", ports(&description.inputs)),
        ("output", ports(&description.outputs)),
        ("state", states.iter().map(|state| state.name.clone()).collect()),
    ] {
        if DESCRIBED_MAX < names.len() {
            return Err(format!(
                "it has {} {what}s, but at most {DESCRIBED_MAX} are allowed",
                names.len()
            ));
        }
        let mut known = BTreeSet::new();
        for name in names {
            let is_usable = !name.is_empty()
                && name.len() <= NAME_BYTES_MAX
                && !name.chars().any(|c| c.is_control() || c == '.');
            if !is_usable {
                return Err(format!("{what} cannot be called {name:.64?}"));
            }
            if !known.insert(name.clone()) {
                return Err(format!("two {what}s have the name {name:?}"));
            }
        }
    }
    if description.inputs.is_empty() {
        return Err("it has no input".to_owned());
    }
    let mut origins = BTreeSet::new();
    for state in states {
        if SCHEMA_BYTES_MAX < state.schema.len() {
            return Err(format!("the schema of state {:?} is too long", state.name));
        }
        let Some(origin) = &state.renamed_from else { continue };
        if states.iter().any(|other| other.name == *origin) || !origins.insert(origin) {
            return Err(format!("two states claim the former name {origin:.64?}"));
        }
    }
    Ok(())
}

/// No component is larger than this, however much its compiler may use.
const COMPONENT_BYTES_MAX: u64 = 256 << 20;

/// Reads and checks one component.
///
/// # Errors
/// What is wrong with the file, with a code for each kind.
pub fn load_component(sandbox: &Sandbox, name: &str, path: &Path) -> Result<Component, Problem> {
    let bytes = read_regular(path, COMPONENT_BYTES_MAX).map_err(|error| {
        Problem::new(Code::ComponentUnreadable, format!("cannot read the component of operator \"{name}\""))
            .with_os_error(os_error(&error))
            .detail(format!("{}: {error}", path.display()))
            .hint("build it first: `cofferdam build DIR`; relative paths begin at the manifest's directory")
    })?;
    sandbox.load(&bytes).map_err(|error| {
        let (code, hint) = match &error {
            ComponentError::NotWasm { .. } | ComponentError::Malformed { .. } => {
                (Code::NotAComponent, "build it again: `cofferdam build DIR`")
            }
            ComponentError::CoreModule => {
                (Code::NotAComponent, "build it for wasm32-wasip2, which makes components: `cofferdam build DIR`")
            }
            ComponentError::Unsound(_) => (
                Code::CannotCheckpoint,
                "a snapshot holds only linear memory and numeric globals; see `cofferdam explain C0014`",
            ),
            ComponentError::Import { .. } => {
                (Code::OtherWorld, "an operator gets logging, metrics, clocks, randomness and standard output: no files, no network")
            }
            ComponentError::Limit(_) | ComponentError::Crashed { .. } => (
                Code::CompileLimit,
                "split large functions, or leave out what the operator does not use",
            ),
            ComponentError::NoCompiler(_) => {
                (Code::CannotStart, "the host starts itself again to compile: it needs a free process")
            }
            _ => (Code::OtherWorld, "an operator is a crate with one #[operator]; see `cofferdam new`"),
        };
        let (message, os_error) = (with_sources(&error), os_error(&error));
        Problem::new(code, format!("the component of operator \"{name}\" cannot be used: {message}"))
            .with_os_error(os_error)
            .detail(path.display())
            .hint(hint)
    })
}

#[cfg(test)]
mod tests {
    use cofferdam_contract::{Format, StateDeclaration, StateKind};

    use super::*;

    #[test]
    fn a_description_keeps_what_the_contract_promises() {
        let port = |name: &str| Port { name: name.to_owned(), key: None, value: Format::Bytes };
        let state = |name: &str, renamed_from: Option<&str>| StateDeclaration {
            name: name.to_owned(),
            renamed_from: renamed_from.map(str::to_owned),
            kind: StateKind::Value,
            schema: "u64".to_owned(),
        };
        let good = Description {
            name: "count".to_owned(),
            inputs: vec![port("left"), port("right")],
            outputs: vec![port("out")],
            states: vec![state("counts", Some("totals")), state("seen", None)],
        };
        assert_eq!(check_description(&good), Ok(()));
        let says = |change: &dyn Fn(&mut Description)| {
            let mut description = good.clone();
            change(&mut description);
            check_description(&description).err().unwrap_or_default()
        };
        assert_eq!(says(&|it| it.inputs.clear()), "it has no input");
        assert!(says(&|it| it.inputs.push(port("left"))).contains("two inputs"));
        assert!(says(&|it| it.outputs.push(port("out"))).contains("two outputs"));
        assert!(says(&|it| it.outputs.push(port("a\u{1b}[2J"))).contains("cannot be called"));
        assert!(says(&|it| it.outputs.push(port(""))).contains("cannot be called"));
        assert!(says(&|it| it.states.push(state("seen", None))).contains("two states"));
        assert!(says(&|it| it.states.push(state("x", Some("seen")))).contains("claim"));
        assert!(says(&|it| it.states.push(state("x", Some("totals")))).contains("claim"));
        assert!(says(&|it| it.outputs = vec![port("x"); 2_000]).contains("2000 outputs"));
        assert!(says(&|it| it.states[0].schema = "x".repeat(1 << 17)).contains("too long"));
    }
}
