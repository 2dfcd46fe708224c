//! Components that are made to break a compiler: it is a child process with limits, and costs nobody else anything.

use std::time::{Duration, Instant};

use cofferdam_sandbox::{
    ComponentError, Sandbox, SandboxOptions,
    compiler::{CompileLimit, CompileLimits, Compiler},
};
use cofferdam_tests::guest;

/// The limits of these tests: an operator of the SDK stays within them in a build without optimisation, too.
fn limits() -> CompileLimits {
    CompileLimits {
        component_bytes_max: 16 << 20,
        memory_bytes_max: 512 << 20,
        code_bytes_max: 64 << 20,
        processor_max: Duration::from_secs(30),
        wall_max: Duration::from_secs(60),
    }
}

fn sandbox(limits: CompileLimits) -> Sandbox {
    let arguments = vec!["compile-component".into()];
    let compiler = Compiler::Child { program: guest::program(), arguments, limits };
    let options = SandboxOptions { compiler, ..SandboxOptions::default() };
    Sandbox::new(options).expect("a sandbox")
}

/// A component with a core module of one function.
fn component(function: &str) -> Vec<u8> {
    let text = format!("(component (core module (memory 1) (func {function})))");
    wat::parse_str(text).expect("a component")
}

/// Loops in loops, with many locals: 33 KB that kept a compiler busy for more than a minute.
fn nested_loops(depth: usize, locals: usize) -> Vec<u8> {
    let locals = format!("(local {})", "i32 ".repeat(locals));
    component(&format!("{locals} {} {}", "loop ".repeat(depth), "end ".repeat(depth)))
}

fn refused(sandbox: &Sandbox, bytes: &[u8]) -> ComponentError {
    match sandbox.load(bytes) {
        Err(error) => error,
        Ok(_) => panic!("it was accepted"),
    }
}

#[test]
fn an_operator_that_a_child_has_compiled_runs_like_any_other() {
    let bytes = std::fs::read(guest::counter()).expect("a component");
    let component = sandbox(limits()).load(&bytes).expect("an operator");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let described = runtime.expect("a runtime").block_on(async {
        let setup = cofferdam_sandbox::InstanceSetup {
            host: std::sync::Arc::new(cofferdam_sandbox::QuietHost),
            limits: cofferdam_sandbox::Limits::default(),
            capabilities: Default::default(),
            seed: 1,
        };
        component.describe(setup).await
    });
    assert!(!described.expect("it describes itself").inputs.is_empty());
}

#[test]
fn a_compile_bomb_is_ended_at_its_limit_and_others_compile_meanwhile() {
    let limits = CompileLimits { processor_max: Duration::from_secs(2), ..limits() };
    let bomb = nested_loops(2_000, 1_000);
    let sandbox = sandbox(limits);
    let began = Instant::now();
    let error = refused(&sandbox, &bomb);
    assert!(
        matches!(
            error,
            ComponentError::Limit(CompileLimit::Processor { .. } | CompileLimit::Memory { .. })
        ),
        "{error}"
    );
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let good = component("i32.const 1 drop");
    let error = refused(&sandbox, &good);
    assert!(
        matches!(error, ComponentError::OtherWorld { .. }),
        "compiled, and no operator: {error}"
    );
}

#[test]
fn each_limit_of_a_compiler_is_named() {
    let bytes = nested_loops(2_000, 1_000);
    let small = CompileLimits { component_bytes_max: 1_000, ..limits() };
    let error = refused(&sandbox(small), &bytes);
    assert!(matches!(error, ComponentError::Limit(CompileLimit::Component { .. })), "{error}");
    let short = CompileLimits { wall_max: Duration::from_millis(300), ..limits() };
    let error = refused(&sandbox(short), &bytes);
    assert!(matches!(error, ComponentError::Limit(CompileLimit::Wall { .. })), "{error}");
    let terse = CompileLimits { code_bytes_max: 100, ..limits() };
    let error = refused(&sandbox(terse), &component("i32.const 1 drop"));
    assert!(matches!(error, ComponentError::Limit(CompileLimit::Code { .. })), "{error}");
    // Thousands of functions of thousands of values each.
    let body = "i32.const 1 i32.const 2 i32.add drop ".repeat(2_000);
    let functions = format!("(func {body})").repeat(400);
    let text = format!("(component (core module (memory 1) {functions}))");
    let narrow = CompileLimits { memory_bytes_max: 48 << 20, ..limits() };
    let error = refused(&sandbox(narrow), &wat::parse_str(text).expect("a component"));
    assert!(matches!(error, ComponentError::Limit(CompileLimit::Memory { .. })), "{error}");
}

#[test]
fn what_a_child_refuses_is_refused_in_its_words() {
    let sandbox = sandbox(limits());
    assert!(
        matches!(refused(&sandbox, b"#!/bin/sh"), ComponentError::NotWasm { begins_with } if begins_with == "#!/bin/s")
    );
    let module = wat::parse_str("(module)").expect("a module");
    assert!(matches!(refused(&sandbox, &module), ComponentError::CoreModule));
    assert!(matches!(
        refused(&sandbox, b"\0asm\x0d\0\x01\0garbage"),
        ComponentError::Malformed { .. }
    ));
    let shared = wat::parse_str("(component (core module (memory 1 1 shared)))").expect("text");
    assert!(matches!(refused(&sandbox, &shared), ComponentError::Unsound(_)));
    // Gigabytes of types without a line of code, where they are not in the way of each other.
    let nested = format!("(component {})", "(component)".repeat(30_000));
    let nested = wat::parse_str(nested).expect("a component");
    let error = refused(&sandbox, &nested);
    assert!(matches!(error, ComponentError::Malformed { .. }), "{error}");
}

#[test]
fn without_a_compiler_nothing_is_compiled() {
    let compiler = Compiler::Child {
        program: "/nowhere/cofferdam".into(),
        arguments: Vec::new(),
        limits: limits(),
    };
    let sandbox = Sandbox::new(SandboxOptions { compiler, ..SandboxOptions::default() });
    let error = refused(&sandbox.expect("a sandbox"), &component(""));
    assert!(matches!(error, ComponentError::NoCompiler(_)), "{error}");
    // A program that says something else is none.
    let compiler = Compiler::Child {
        program: "/bin/echo".into(),
        arguments: vec!["hello".into()],
        limits: limits(),
    };
    let sandbox = Sandbox::new(SandboxOptions { compiler, ..SandboxOptions::default() });
    let error = refused(&sandbox.expect("a sandbox"), &component(""));
    assert!(matches!(error, ComponentError::Crashed { .. }), "{error}");
}
