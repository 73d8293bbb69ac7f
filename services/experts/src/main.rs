//! The experts service as a process of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    process::run("experts", experts::start)
}
