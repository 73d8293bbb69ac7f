//! The images service as a process of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    process::run("images", images::start)
}
