//! The program as a user runs it: child processes, flags, exit codes, signals.
#![allow(clippy::unwrap_used)]

mod bad_checkpoints;
mod child;
mod commands;
mod experts;
mod plan;
mod processes;
mod verify;
