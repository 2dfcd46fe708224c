//! Every test that needs more than one crate, in one binary.

mod exactly_once;
mod sandbox;
mod tidy;
mod ui;
