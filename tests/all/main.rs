//! Every test that needs more than one crate, in one binary.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails by a panic"
)]

mod approximate;
mod archive;
mod attack;
mod batch;
mod checkpoints;
mod compile;
mod connectors;
mod dead_letter;
mod disk;
mod engine;
mod exactly_once;
mod failover;
mod grants;
mod limits;
mod neighbours;
mod objects;
mod outside;
mod program;
mod readers;
mod readme;
mod sandbox;
mod soak;
mod state_backend;
mod tidy;
mod ui;
mod unaligned;
mod upgrade;
