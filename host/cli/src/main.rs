//! The program `cofferdam`: runs stream-processing jobs whose tasks are WebAssembly components.

#[macro_use]
mod report;

mod args;
mod build;
mod check;
mod checkpoints;
mod control;
mod explain;
mod lines;
mod new;
mod run;
mod state;
mod watch;

use std::{io::Write, process::ExitCode};

use clap::{CommandFactory, Parser};
use cofferdam_engine::{compiler, problem::Problem};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Arguments, Verb};

/// What one thread allocates another one frees here, batch by batch and entry by entry. The usual
/// allocator keeps three times as much memory of that for itself, and is half as fast at state on disk.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// sled panics where its disk fails or its files are damaged. That is caught and answered as an error of
/// the store, so nobody has to read of a panic.
fn hide_panics_of_sled() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        match panic.location().filter(|location| location.file().contains("/sled-")) {
            Some(location) => tracing::debug!(%location, "sled panicked"),
            None => usual(panic),
        }
    }));
}

/// Each task has some open files. What the system allows at most costs nothing until it is used; what a shell allows by
/// default is for programs that wait for many files at a time in an old way.
fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    // Where it may not be raised, it is what it is.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn main() -> ExitCode {
    hide_panics_of_sled();
    allow_many_files();
    let arguments = Arguments::parse();
    let is_json = arguments.json;
    let exit_code = |result: Result<(), Problem>| match result {
        Ok(()) => 0,
        Err(problem) => {
            report::problem(&problem, is_json);
            problem.code.exit_code()
        }
    };
    let result = match arguments.verb {
        Verb::New(arguments) => new::run(&arguments, is_json),
        Verb::Build(arguments) => with_runtime(build::run(arguments, is_json)),
        Verb::Check(arguments) => with_runtime(check::run(arguments, is_json)),
        Verb::Run(arguments) => {
            let code = with_runtime(async {
                let code = exit_code(run::run(arguments, is_json).await);
                // Its reader may be slow, or gone; the next signal ends the wait.
                run::end_at_next_signal();
                report::drain();
                Ok(code)
            });
            return ExitCode::from(code.unwrap_or_else(|problem| exit_code(Err(problem))));
        }
        Verb::Compile => return compiler::serve(),
        Verb::Explain(arguments) => explain::run(&arguments, is_json),
        Verb::Schema => {
            say!("{:#}", cofferdam_spec::tables::json_schema(&cofferdam_connectors::builtin()));
            Ok(())
        }
        Verb::Checkpoints { verb } => checkpoints::run(&verb, is_json),
        Verb::State(arguments) => state::run(&arguments, is_json),
        Verb::History { job } => control::history(&job, is_json),
        Verb::Savepoint(arguments) => with_runtime(control::savepoint(&arguments, is_json)),
        Verb::Stop(arguments) => with_runtime(control::stop(&arguments, is_json)),
        Verb::Cancel(arguments) => with_runtime(control::cancel(&arguments, is_json)),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "cofferdam", &mut script);
            let _ = std::io::stdout().write_all(&script);
            Ok(())
        }
    };
    ExitCode::from(exit_code(result))
}

fn with_runtime<T>(future: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        Problem::new(cofferdam_engine::problem::Code::CannotStart, "cannot start the runtime")
            .because(&error)
    })?;
    let result = runtime.block_on(async {
        // A file that may not grow is an error of its write, and not the end of the process. SIGXFSZ.
        let _too_large = signal(SignalKind::from_raw(25));
        future.await
    });
    // What still blocks then (a read of standard input, a slow disk) must not hold the exit up.
    runtime.shutdown_background();
    result
}
