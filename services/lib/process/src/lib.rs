//! The life of a service process: arguments -> configuration -> telemetry -> checkpoints -> mesh -> serve -> drain -> exit code.
//!
//! A service crate exports `start(&Host) -> Vec<Offer>` and its `main` is [`run`]. The all-in-one process builds one [`Host`] on an
//! in-process mesh and starts every service in it with the same pieces: [`open_models`], [`Host::new`], [`serve`], [`Served::drain`].
//!
//! | File | Holds |
//! |---|---|
//! | `args.rs` | the flags of every service |
//! | `exit.rs` | which error ends with which code |
//! | `host.rs` | what a service finds when it starts |
//! | `life.rs` | the order of it all |
//! | `progress.rs` | bars on a terminal, lines elsewhere |
//! | `serve.rs` | offers, doors, signals, drain |

mod args;
mod exit;
mod host;
mod life;
mod progress;
mod serve;

pub use args::Args;
pub use exit::{BadCheckpoint, Unreachable, exit_code, report};
pub use host::{Host, LoadedModel, open_models};
pub use life::{run, run_with};
pub use progress::{Bar, Bars, Lines, Progress, Silent, Unit};
pub use serve::{Doors, Offer, ProcessConfig, Served, serve, until_signal};
