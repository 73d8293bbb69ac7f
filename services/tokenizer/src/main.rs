//! The tokenizer as a process of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    process::run("tokenizer", tokenizer::start)
}
