//! `janua verify`: a checkpoint beside what independent implementations computed with it.
//!
//! | File | Holds |
//! |---|---|
//! | `golden.rs` | the reference files |
//! | `tolerance.rs` | how far a tensor may be away |
//! | `report.rs` | the table |
//! | `runner.rs` | a model driven step by step, in chunks, on a scattered KV cache |
//! | `model.rs` | what a model folder is made of, and which of its golden keys are notes |
//! | `language.rs`, `routing.rs`, `vision.rs`, `drawing.rs`, `flow.rs` | the quantities of model folders |
//! | `tokenizer.rs`, `preprocess.rs` | the other kinds of folder |
//! | `wires.rs` | the same prompts through running services |
//! | `shards.rs` | experts in services of their own |

mod drawing;
mod flow;
mod golden;
mod language;
mod model;
mod preprocess;
mod report;
mod routing;
mod runner;
mod shards;
mod tokenizer;
mod tolerance;
mod vision;
mod wires;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use self::golden::Golden;
use self::report::Report;
use self::shards::Shards;
use self::wires::Transport;
use crate::Failure;
use crate::failure::COMPARISON;
use crate::terminal::{self, DIM, paint};

/// Compare a checkpoint with the golden outputs beside it
#[derive(Debug, Args)]
#[command(after_help = "DIR is a model folder with golden.json and golden.safetensors, a folder with a tokenizer and golden.json,
or a folder of pictures with golden.json. Every quantity in the golden files is computed anew and compared.

Examples:
  janua verify tests/fixtures/janus
  janua verify tests/fixtures/llama --wire nats     (also through running services over a nats-server of its own)
  janua verify tests/fixtures/moe_v1 --shards 3 --wire direct   (experts in three services)
  janua verify tests/fixtures/tokenizers/llm --json

Exit codes: 0 everything is within its tolerance, 1 something is not or is unknown, 66 the folder cannot be loaded.")]
pub struct Verify {
    /// Folder with the checkpoint and its golden files
    pub dir: PathBuf,
    /// Also send the golden prompts through running services, over this wire
    #[arg(long, value_enum)]
    pub wire: Option<WireName>,
    /// Have the routed experts computed by so many shards, each a service of its own, over the same wire
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    pub shards: Option<u16>,
    /// The VAE folder of a model that draws by a flow, when it is not the folder vae in DIR
    #[arg(long, value_name = "DIR")]
    pub vae: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How services talk to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WireName {
    InProcess,
    /// Starts a nats-server for as long as it is needed
    Nats,
    /// Starts a nats-server for as long as it is needed
    Direct,
}

/// What kind of folder the golden files belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Model,
    Tokenizer,
    Preprocess,
}

/// Runs `janua verify`.
pub async fn run(flags: Verify) -> Result<(), Failure> {
    let golden = Golden::read(&flags.dir)?;
    let kind = kind(&flags.dir, &golden)?;
    if (flags.wire.is_some() || flags.shards.is_some()) && kind != Kind::Model {
        return Err(Failure::usage("--wire and --shards need a model folder: a tokenizer or a set of pictures is not served alone"));
    }
    let mut report = Report::default();
    match kind {
        Kind::Model => Box::pin(compare_model(&flags, &golden, &mut report)).await?,
        Kind::Tokenizer => tokenizer::compare(&flags.dir, &golden, &mut report)?,
        Kind::Preprocess => preprocess::compare(&flags.dir, &golden, &mut report)?,
    }
    print(&flags, kind, &report)
}

/// In this process, then through services over a wire.
async fn compare_model(flags: &Verify, golden: &Golden, report: &mut Report) -> Result<(), Failure> {
    let wire = flags.wire.or(flags.shards.map(|_| WireName::InProcess));
    let transport = match wire {
        Some(wire) => Some(Transport::start(wire).await?),
        None => None,
    };
    let (dir, vae) = (&flags.dir, flags.vae.as_deref());
    match (&transport, flags.shards) {
        (Some(transport), Some(count)) => {
            let shards = Shards::start(dir, transport, count).await?;
            model::compare(dir, vae, Some(&shards.remote()), golden, report).await?;
            shards.drain().await;
        }
        _ => model::compare(dir, vae, None, golden, report).await?,
    }
    match &transport {
        Some(transport) => wires::compare(flags, transport, golden, report).await,
        None => Ok(()),
    }
}

fn print(flags: &Verify, kind: Kind, report: &Report) -> Result<(), Failure> {
    let name = format!("{kind:?}").to_lowercase();
    if flags.json {
        terminal::json(&report.to_json(json!({"dir": flags.dir.display().to_string(), "kind": name})))?;
    } else {
        terminal::line(&paint(DIM, format!("{} ({name})", flags.dir.display())))?;
        report.print()?;
    }
    if report.passed() {
        return Ok(());
    }
    let why = "differs from its reference, see the rows marked FAIL";
    Err(Failure::new(COMPARISON, format!("{} {why}", flags.dir.display())))
}

fn kind(dir: &Path, golden: &Golden) -> Result<Kind, Failure> {
    let has = |key: &str| golden.json.get(key).is_some();
    match () {
        () if dir.join("config.json").is_file() => Ok(Kind::Model),
        () if has("strings") => Ok(Kind::Tokenizer),
        () if has("images") => Ok(Kind::Preprocess),
        () => Err(Failure::input(format!("{}: no config.json, and golden.json is of no known kind", dir.display()))),
    }
}
