//! The front door: everything that is done to this project is a verb of `cargo xtask`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it speaks to who runs it")]

mod cargo;
mod checks;
mod demo;
mod steps;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Build, test, show and measure Cofferdam.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Count words, trap once, recover, and compare with the undisturbed run
    Demo,
    /// Everything that must hold: format, lints, docs, tests
    Test,
    /// Build the components of examples and tests
    Guests,
    /// Simulate the core with this many seeds
    Sim {
        /// How many
        seeds: u64,
    },
    /// Replay one seed of the simulation, with its trace
    Seed {
        /// Which one
        seed: u64,
    },
    /// Kill a running job with SIGKILL this many times, and check that nothing is lost or doubled
    Crash {
        /// How often
        rounds: u64,
    },
    /// Live through this many random histories of a job: kills, forks, rescaling, moved files
    World {
        /// How many
        histories: u64,
    },
    /// Make this many calls of the disk fail beneath the program, one a run
    Faults {
        /// How many
        faults: u64,
    },
    /// Cut the power of the disk this often: what was not synced is lost, or any part of it
    Power {
        /// How often
        cuts: u64,
    },
    /// Eight jobs over the flights of a year (fetched from PyPI), rescaled, upgraded, killed and stopped
    Flights {
        /// One of them alone: counts, windows, join, sessions, combine, dedup, top or order
        job: Option<String>,
    },
    /// Attack a host in every known way beside a job that must not notice; BLESS=1 writes the table of docs/security.md
    Attack {
        /// Only those with this in their name
        name: Option<String>,
    },
    /// Write what this version writes into `tests/archive`, once for each version of the format
    Archive,
    /// Check licences, sources and known advisories of what the project depends on
    Deny,
    /// Build with the oldest Rust that the project promises
    Msrv,
    /// Run the core's tests under miri
    Miri,
    /// Look for bytes that break a law: of a manifest, of the store's metadata, of a component
    Fuzz {
        /// Which: manifest, metadata or component
        target: String,
        /// For how many seconds
        #[arg(default_value_t = 60)]
        seconds: u64,
    },
    /// Run a benchmark: call, recovery, checkpoint, failover, hotstate, neighbours, state or wordcount
    Bench {
        /// Which one
        name: String,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().verb {
        Verb::Demo => demo::run(),
        Verb::Test => steps::test(),
        Verb::Guests => steps::guests(),
        Verb::Sim { seeds } => steps::simulate("SIM_SEEDS", seeds),
        Verb::Seed { seed } => steps::simulate("SEED", seed),
        Verb::Crash { rounds } => steps::program("crash", rounds),
        Verb::World { histories } => steps::program("world", histories),
        Verb::Faults { faults } => steps::program("faults", faults),
        Verb::Power { cuts } => steps::program("power", cuts),
        Verb::Flights { job } => steps::flights(job.as_deref()),
        Verb::Attack { name } => steps::attack(name.as_deref()),
        Verb::Archive => steps::archive(),
        Verb::Deny => checks::deny(),
        Verb::Msrv => checks::msrv(),
        Verb::Miri => checks::miri(),
        Verb::Fuzz { target, seconds } => checks::fuzz(&target, seconds),
        Verb::Bench { name } => steps::bench(&name),
    }
}
