//! What can be said on the command line. The only place that reads the environment.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

/// Runs stream-processing jobs whose tasks are WebAssembly components, each in a sandbox of its
/// own, exactly once whatever fails.
#[derive(Debug, Parser)]
#[command(name = "cofferdam", version, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    /// Machine-readable output: JSON on standard output, one object a line.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 the job failed, 2 bad usage or manifest, 70 a bug of the host.\n\
Errors have codes; docs/errors.md explains each.";

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Make a crate for a new operator, with a job that runs it
    #[command(
        after_help = "Example:\n  cofferdam new wordcount && cd wordcount && cofferdam build && cofferdam run job.toml"
    )]
    New(NewArguments),
    /// Build an operator crate into a checked component
    #[command(
        after_help = "Examples:\n  cofferdam build\n  cofferdam build split --output job/split.wasm"
    )]
    Build(BuildArguments),
    /// Check a manifest and its components without running anything
    #[command(after_help = "Example:\n  cofferdam check job.toml")]
    Check(CheckArguments),
    /// Run a job, or go on with one that was interrupted
    #[command(
        after_help = "Examples:\n  cofferdam run job.toml\n  cofferdam run job.toml --json | jq -c 'select(.event == \"restarting\")'\n\n\
Ctrl-C takes a last checkpoint and stops; a second one ends at once. What was committed stays\n\
committed, and running the job again goes on from its newest checkpoint."
    )]
    Run(RunArguments),
    /// Print a script that completes the program's arguments in your shell
    #[command(
        after_help = "Example:\n  cofferdam completions bash > ~/.local/share/bash-completion/completions/cofferdam"
    )]
    Completions {
        /// Which shell
        shell: Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct NewArguments {
    /// The directory to make; its last part names the crate
    pub(crate) path: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct BuildArguments {
    /// The crate's directory
    #[arg(default_value = ".")]
    pub(crate) path: PathBuf,
    /// Where the component goes [default: NAME.wasm in the crate's directory]
    #[arg(long, short)]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// The job's manifest
    pub(crate) manifest: PathBuf,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// The job's manifest
    pub(crate) manifest: PathBuf,
    /// Where checkpoints are kept [default: as the manifest says, or JOB.cofferdam beside it]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    /// Show no progress, even on a terminal
    #[arg(long)]
    pub(crate) no_progress: bool,
    /// What is logged: a level, or a filter such as `info,guest=debug`
    #[arg(long, value_name = "FILTER", env = "COFFERDAM_LOG")]
    pub(crate) log: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct CacheArguments {
    /// Where compiled components are kept [default: cofferdam in the user's cache directory]
    #[arg(long, value_name = "DIR", env = "COFFERDAM_CACHE")]
    cache_dir: Option<PathBuf>,
}

impl CacheArguments {
    /// The cache's directory; none where the environment names no home.
    pub(crate) fn dir(&self) -> Option<PathBuf> {
        let user_cache = || {
            let of = |name: &str| {
                std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
            };
            of("XDG_CACHE_HOME").or_else(|| Some(of("HOME")?.join(".cache")))
        };
        self.cache_dir.clone().or_else(|| Some(user_cache()?.join("cofferdam")))
    }
}
