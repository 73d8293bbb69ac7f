use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::Failure;
use crate::cli::Cli;
use crate::terminal;

/// Print the completion script of a shell
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  janua completions bash > /etc/bash_completion.d/janua")]
pub struct Completions {
    pub shell: Shell,
}

/// Runs `janua completions`.
pub fn run(flags: &Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(flags.shell, &mut Cli::command(), "janua", &mut script);
    terminal::show(&String::from_utf8_lossy(&script)).map(drop)
}
