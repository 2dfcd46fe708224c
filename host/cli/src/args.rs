//! What can be said on the command line. The only place that reads the environment.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use cofferdam_engine::{
    EngineOptions,
    compiler::{CompileLimits, Compiler},
    problem::{Code, Problem},
};
use cofferdam_spec::host::HostSettings;

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
Errors have codes: `cofferdam explain C0020` explains one.";

/// The verb by which the program is its own compiler.
const COMPILE: &str = "compile-component";

/// This program again, for every component. It is started by what it is, as it may have been replaced on disk.
pub(crate) fn compiler() -> Compiler {
    let itself = PathBuf::from("/proc/self/exe");
    // Where its path is not known either, it is looked for like any program.
    let program = match itself.exists() {
        true => itself,
        false => std::env::current_exe().unwrap_or_else(|_| PathBuf::from("cofferdam")),
    };
    let (arguments, limits) = (vec![COMPILE.into()], CompileLimits::default());
    Compiler::Child { program, arguments, limits }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Compile the component on standard input: the program starts itself so
    #[command(name = COMPILE, hide = true)]
    Compile,
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
    #[command(
        after_help = "Examples:\n  cofferdam check job.toml\n  cofferdam check job.toml --from savepoints/savepoint-job-18f\n  cofferdam check job.toml --effective --host-config /etc/flink/flink-conf.yaml"
    )]
    Check(CheckArguments),
    /// Run a job, or resume an interrupted one
    #[command(
        after_help = "Examples:\n  cofferdam run job.toml\n  cofferdam run job.toml --json | jq -c 'select(.event == \"restarting\")'\n\n\
Ctrl-C takes a last checkpoint and stops; a second one ends at once. What was committed stays\n\
committed, and running the job again resumes from its newest checkpoint."
    )]
    Run(RunArguments),
    /// Explain an error, or what runs together, what restarts if a task fails, and when
    #[command(
        after_help = "Examples:\n  cofferdam explain C0020\n  cofferdam explain job.toml\n  cofferdam explain failover job.toml --fail count/1\n  \
cofferdam explain restarts --set restart-strategy.type=failure-rate --failures 0,100,61000"
    )]
    Explain(ExplainArguments),
    /// Print the JSON schema of manifests, for editors
    #[command(after_help = "Example:\n  cofferdam schema > cofferdam.schema.json\n\n\
An editor with a TOML language server takes it from the first line of a manifest:\n\
  #:schema ./cofferdam.schema.json")]
    Schema,
    /// Read declared state from a savepoint, or from the checkpoints of a job that is not running
    #[command(
        after_help = "Examples:\n  cofferdam state savepoints/savepoint-job-18f\n  cofferdam state savepoints/savepoint-job-18f --operator count --key the\n  cofferdam state job.cofferdam --operator count --state counts --json | jq .value\n\n\
Without --operator, --state or --key it lists the states and how much is in them."
    )]
    State(StateArguments),
    /// Look into the checkpoints of a job that is not running, or into a savepoint
    #[command(
        after_help = "Examples:\n  cofferdam checkpoints list job.toml\n  cofferdam checkpoints inspect job.toml\n  cofferdam checkpoints verify savepoints/savepoint-job-18f"
    )]
    Checkpoints {
        #[command(subcommand)]
        verb: CheckpointsVerb,
    },
    /// List the failures of a job and how each was handled
    #[command(after_help = "Example:\n  cofferdam history job.toml --json | jq .message")]
    History {
        #[command(flatten)]
        job: JobArgument,
    },
    /// Write a savepoint of a running job, which keeps running
    #[command(after_help = "Example:\n  cofferdam savepoint job.toml savepoints")]
    Savepoint(SavepointArguments),
    /// Write a savepoint of a running job and end it
    #[command(after_help = "Example:\n  cofferdam stop job.toml --savepoint-path savepoints\n\n\
To resume from it: cofferdam run job.toml --from savepoints/savepoint-...")]
    Stop(StopArguments),
    /// End a running job at once
    #[command(after_help = "Example:\n  cofferdam cancel job.toml\n\n\
Its checkpoints are kept only with externalized-checkpoint-retention = \"RETAIN_ON_CANCELLATION\".")]
    Cancel(CancelArguments),
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

/// Settings for every job of a host.
#[derive(Debug, Args)]
pub(crate) struct HostArguments {
    /// Settings that a manifest may leave out: a TOML file, or Flink's flink-conf.yaml or config.yaml
    /// [default: cofferdam.toml in the working directory, if there is one]
    #[arg(long, value_name = "FILE", env = "COFFERDAM_HOST_CONFIG")]
    host_config: Option<PathBuf>,
    /// Whose job it is: what the host's file grants this tenant counts, too
    #[arg(long, value_name = "NAME", env = "COFFERDAM_TENANT")]
    tenant: Option<String>,
}

impl HostArguments {
    /// The host's settings, if there are any.
    pub(crate) fn read(&self) -> Result<Option<HostSettings>, Problem> {
        let default = PathBuf::from("cofferdam.toml");
        let path = match &self.host_config {
            None if default.is_file() => Some(&default),
            path => path.as_ref(),
        };
        let settings = path.map(|path| HostSettings::read(path)).transpose()?;
        match (settings, &self.tenant) {
            (Some(settings), Some(tenant)) => Ok(Some(settings.for_tenant(tenant.clone()))),
            (None, Some(tenant)) => {
                let message =
                    format!("there is no host's file to say what tenant \"{tenant}\" may do");
                let problem = Problem::new(Code::NotGranted, message);
                Err(problem.hint("name it with --host-config FILE"))
            }
            (settings, None) => Ok(settings),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// The job's manifest
    pub(crate) manifest: PathBuf,
    /// List every setting with its value and where it comes from
    #[arg(long)]
    pub(crate) effective: bool,
    /// Also check whether a run could start from this savepoint or state directory
    #[arg(long, value_name = "DIR", conflicts_with = "effective")]
    pub(crate) from: Option<PathBuf>,
    /// The state directory of that run [default: as the manifest says, or JOB.cofferdam beside it]
    #[arg(long, value_name = "DIR", requires = "from")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Discard state whose operator is not in the manifest
    #[arg(long, requires = "from")]
    pub(crate) ignore_unclaimed_state: bool,
    /// Remove committed output that is newer than the state that the job resumes from
    #[arg(long, requires = "from")]
    pub(crate) discard_output: bool,
    /// Treat output that is neither pending nor committed as taken by a reader, not as lost
    #[arg(long, requires = "from")]
    pub(crate) assume_committed: bool,
    #[command(flatten)]
    pub(crate) host: HostArguments,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
}

/// Flink's `execution.state-recovery.claim-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ClaimMode {
    /// It is copied and then removed
    Claim,
    /// It is copied and never touched
    NoClaim,
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// The job's manifest
    pub(crate) manifest: PathBuf,
    /// Where checkpoints are kept [default: as the manifest says, or JOB.cofferdam beside it]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) host: HostArguments,
    /// Start from this savepoint, or from the newest checkpoint of this state directory
    #[arg(long, value_name = "DIR")]
    pub(crate) from: Option<PathBuf>,
    /// Whether this run takes ownership of it (and removes it), or never changes it
    #[arg(long, value_name = "MODE", requires = "from", default_value = "no-claim")]
    pub(crate) claim_mode: ClaimMode,
    /// Discard state whose operator is not in the manifest
    #[arg(long, requires = "from")]
    pub(crate) ignore_unclaimed_state: bool,
    /// Run a finished job again, from the beginning
    #[arg(long, conflicts_with = "from")]
    pub(crate) again: bool,
    /// Remove committed output that is newer than the state that the job resumes from
    #[arg(long)]
    pub(crate) discard_output: bool,
    /// Treat output that is neither pending nor committed as taken by a reader, not as lost
    #[arg(long)]
    pub(crate) assume_committed: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    /// Show no progress, even on a terminal
    #[arg(long)]
    pub(crate) no_progress: bool,
    /// What is logged: a level, or a filter such as `info,guest=debug`
    #[arg(long, value_name = "FILTER", env = "COFFERDAM_LOG")]
    pub(crate) log: Option<String>,
}

/// A job, by its manifest or its state directory.
#[derive(Debug, Args)]
pub(crate) struct JobArgument {
    /// The job's manifest, or its state directory
    #[arg(value_name = "JOB")]
    pub(crate) job: PathBuf,
    /// Where its checkpoints are, if it was run with --state-dir
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) host: HostArguments,
}

#[derive(Debug, Args)]
pub(crate) struct SavepointArguments {
    #[command(flatten)]
    pub(crate) job: JobArgument,
    /// The directory or URL to make it in [default: execution.checkpointing.savepoint-dir]
    pub(crate) target: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct StopArguments {
    #[command(flatten)]
    pub(crate) job: JobArgument,
    /// The directory or URL to make it in [default: execution.checkpointing.savepoint-dir]
    #[arg(long, short = 'p', value_name = "DIR")]
    pub(crate) savepoint_path: Option<PathBuf>,
    /// End the sources first, then process and emit all records in flight
    #[arg(long, short)]
    pub(crate) drain: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CancelArguments {
    #[command(flatten)]
    pub(crate) job: JobArgument,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointsVerb {
    /// Every checkpoint that is kept
    List {
        #[command(flatten)]
        job: JobArgument,
    },
    /// What a checkpoint consists of, task by task
    Inspect {
        #[command(flatten)]
        job: JobArgument,
        /// Which [default: the newest]
        #[arg(long)]
        id: Option<u64>,
    },
    /// Read everything and compare it with its checksums
    Verify {
        #[command(flatten)]
        job: JobArgument,
    },
    /// Remove a checkpoint
    Delete {
        #[command(flatten)]
        job: JobArgument,
        /// Which
        #[arg(long)]
        id: u64,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArguments {
    #[command(subcommand)]
    pub(crate) verb: Option<ExplainVerb>,
    /// The job's manifest, or the code of an error, such as C0020
    #[arg(value_name = "MANIFEST|CODE")]
    pub(crate) manifest: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) host: HostArguments,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ExplainVerb {
    /// Which tasks restart if one fails
    #[command(
        after_help = "Example:\n  cofferdam explain failover job.toml --fail out/0 --lost 'count/1->out' --state in/0=FINISHED"
    )]
    Failover(FailoverArguments),
    /// How the restart strategy handles failures at these times
    #[command(
        after_help = "Example:\n  cofferdam explain restarts --set restart-strategy.type=fixed-delay --failures 0,10,20 --json"
    )]
    Restarts(RestartsArguments),
}

#[derive(Debug, Args)]
pub(crate) struct FailoverArguments {
    /// The job's manifest; its components need not exist
    pub(crate) manifest: PathBuf,
    #[command(flatten)]
    pub(crate) host: HostArguments,
    /// The task that fails, for example count/1
    #[arg(long, value_name = "TASK")]
    pub(crate) fail: String,
    /// A result partition that the failure names as lost, for example 'count/1->out'
    #[arg(long, value_name = "PARTITION")]
    pub(crate) lost: Vec<String>,
    /// A result partition that is not tracked any more
    #[arg(long, value_name = "PARTITION")]
    pub(crate) unavailable: Vec<String>,
    /// The execution state of a task, for example count/1=CREATED [default: RUNNING]
    #[arg(long, value_name = "TASK=STATE")]
    pub(crate) state: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RestartsArguments {
    /// The job's manifest
    #[arg(required_unless_present = "set", conflicts_with = "set")]
    pub(crate) manifest: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) host: HostArguments,
    /// A setting, for example restart-strategy.fixed-delay.attempts=3
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    pub(crate) set: Vec<(String, String)>,
    /// When failures happen, in milliseconds since the start, ascending
    #[arg(long, value_name = "MS,MS,...", value_delimiter = ',', required = true)]
    pub(crate) failures: Vec<u64>,
    /// Seeds the jitter
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a setting is KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

#[derive(Debug, Args)]
pub(crate) struct StateArguments {
    #[command(flatten)]
    pub(crate) job: JobArgument,
    /// Which checkpoint [default: the newest]
    #[arg(long)]
    pub(crate) id: Option<u64>,
    /// The state of this operator alone
    #[arg(long, value_name = "NAME")]
    pub(crate) operator: Option<String>,
    /// The entries of this state alone
    #[arg(long, value_name = "NAME")]
    pub(crate) state: Option<String>,
    /// The entries of this record key alone: text, or 0x and hexadecimal digits
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
}

#[derive(Debug, Args)]
pub(crate) struct CacheArguments {
    /// Where compiled components are kept [default: cofferdam in the user's cache directory]
    #[arg(long, value_name = "DIR", env = "COFFERDAM_CACHE")]
    cache_dir: Option<PathBuf>,
}

impl CacheArguments {
    /// An engine with that cache, which compiles in children of its own.
    pub(crate) fn engine(&self) -> EngineOptions {
        EngineOptions { cache_dir: self.dir(), compiler: compiler() }
    }

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

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, error::ErrorKind};

    use super::*;

    #[test]
    fn the_command_line_is_sound_and_every_verb_and_argument_explains_itself() {
        let mut command = Arguments::command();
        command.build();
        command.clone().debug_assert();
        let mut waiting = vec![command];
        while let Some(command) = waiting.pop() {
            let name = command.get_name().to_owned();
            assert!(command.get_about().is_some(), "{name} says nothing about itself");
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{name}: {} has no help", argument.get_id());
            }
            let is_leaf = !command.has_subcommands();
            assert!(
                !is_leaf || name == "help" || is_example_given(&command),
                "{name} gives no example"
            );
            let shown = command.get_subcommands().filter(|it| it.get_name() != "help");
            waiting.extend(shown.filter(|it| !it.is_hide_set()).cloned());
        }
    }

    /// The verbs below `checkpoints` and `explain` have theirs there.
    fn is_example_given(command: &clap::Command) -> bool {
        let is_below = ["list", "inspect", "verify", "delete"].contains(&command.get_name());
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        is_below || help.contains("cofferdam ")
    }

    #[test]
    fn arguments_that_contradict_each_other_are_refused() {
        let conflict = ErrorKind::ArgumentConflict;
        let missing = ErrorKind::MissingRequiredArgument;
        for (line, expected) in [
            ("run job.toml --again --from save", conflict),
            ("run job.toml --claim-mode claim", missing),
            ("run job.toml --ignore-unclaimed-state", missing),
            ("check job.toml --from save --effective", conflict),
            ("check job.toml --discard-output", missing),
            ("run", missing),
            ("run job.toml --no-such-thing", ErrorKind::UnknownArgument),
        ] {
            let words = std::iter::once("cofferdam").chain(line.split(' '));
            let error = Arguments::try_parse_from(words).expect_err(line);
            assert_eq!(error.kind(), expected, "{line}");
        }
        let words = "cofferdam run job.toml --from save --claim-mode claim --json".split(' ');
        let arguments = Arguments::try_parse_from(words).expect("this is fine");
        assert!(arguments.json, "it may stand anywhere");
        let Verb::Run(run) = arguments.verb else { panic!("another verb") };
        assert_eq!(run.claim_mode, ClaimMode::Claim);
    }
}
