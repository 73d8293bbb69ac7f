//! The language models as a process of their own.

use std::process::ExitCode;

fn main() -> ExitCode {
    process::run("language", language::start)
}
