//! The command line of Janua, and all services in one process.
//!
//! Larger than a service, because it is eleven small programs: each subcommand can be read without the others, and a third of it is
//! `verify`, which knows every quantity of the golden files.
//!
//! | File | Holds |
//! |---|---|
//! | `cli.rs` | the subcommands and how the program ends |
//! | `serve.rs`, `chat.rs`, `fill.rs`, `image.rs`, `models.rs`, `demo.rs`, `verify/`, `doctor/`, `bench/`, `plan/`, `shards/` (`janua experts`), `completions.rs` | one subcommand each |
//! | `local.rs` | all five services started inside this process, over any wire |
//! | `broker.rs` | a nats-server child for as long as it is needed |
//! | `client.rs` | the public gRPC door, seen from outside |
//! | `request.rs` | requests made from flags and files |
//! | `events.rs` | the answer's events for scripts |
//! | `repl.rs` | the conversation of `chat` on a terminal |
//! | `failure.rs` | the one line that a failure prints, and its exit code |
//! | `terminal.rs` | colour, progress bars and JSON lines |

mod bench;
mod broker;
mod chat;
mod cli;
mod client;
mod completions;
mod demo;
mod doctor;
mod events;
mod failure;
mod fill;
mod hosts;
mod image;
pub mod local;
mod models;
mod plan;
mod repl;
mod request;
mod serve;
mod shards;
mod terminal;
mod verify;

pub use cli::run;
pub use failure::Failure;
