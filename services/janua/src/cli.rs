use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::terminal::{self, BAD, paint};
use crate::{Failure, bench, chat, completions, demo, doctor, failure, fill, image, models, plan, serve, shards, verify};

/// Serve the DeepSeek model family behind one gRPC door: text and images in, text and images out
#[derive(Debug, Parser)]
#[command(
    name = "janua",
    version,
    after_help = "Start here:
  janua serve --model DIR            every service in this process, door on 127.0.0.1:50051
  janua chat \"Why is the sky blue?\"  ask it, from another terminal
  janua doctor --model DIR           what is missing on this machine

Exit codes: 0 done, 1 a comparison or check failed, 64 wrong flag or setting, 65 request refused,
66 unusable file or folder, 69 nobody answers, 70 a defect, 75 try again later."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
    Chat(chat::Chat),
    Fill(fill::Fill),
    Image(image::Image),
    Models(models::Models),
    Verify(verify::Verify),
    Doctor(doctor::Doctor),
    Demo(demo::Demo),
    Bench(bench::Bench),
    Plan(plan::Plan),
    Experts(shards::Experts),
    Completions(completions::Completions),
}

/// The whole program: reads the flags, runs the subcommand, prints what went wrong.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout and are no error; a closed pipe is not worth another one.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(failure::USAGE) } else { ExitCode::SUCCESS };
        }
    };
    let done = match cli.command {
        // A single service lives the life of `process`, runtime included.
        Command::Serve(flags) => match flags.service {
            Some(service) => return serve::one(service, &flags),
            None => on_runtime(serve::all(flags)),
        },
        Command::Chat(flags) => on_runtime(chat::run(flags)),
        Command::Fill(flags) => on_runtime(fill::run(flags)),
        Command::Image(flags) => on_runtime(image::run(flags)),
        Command::Models(flags) => on_runtime(models::run(flags)),
        Command::Verify(flags) => on_runtime(verify::run(flags)),
        Command::Doctor(flags) => on_runtime(doctor::run(flags)),
        Command::Demo(flags) => on_runtime(demo::run(flags)),
        Command::Bench(flags) => on_runtime(bench::run(flags)),
        Command::Plan(flags) => plan::run(&flags),
        Command::Experts(flags) => on_runtime(shards::run(flags)),
        Command::Completions(flags) => completions::run(&flags),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            terminal::remark(&format!("{} {failure}", paint(BAD, "janua:")));
            ExitCode::from(failure.code)
        }
    }
}

fn on_runtime(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::software(format!("cannot start the runtime: {error}")))?;
    let done = runtime.block_on(work);
    // A thread may still wait for a line of the terminal that nobody will type.
    runtime.shutdown_background();
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn flags_are_consistent() {
        Cli::command().debug_assert();
    }
}
