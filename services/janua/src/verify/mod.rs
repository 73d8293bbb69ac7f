//! `janua verify`: a checkpoint beside what independent implementations computed with it.
//!
//! | File | Holds |
//! |---|---|
//! | `golden.rs` | the reference files |
//! | `tolerance.rs` | how far a tensor may be away |
//! | `report.rs` | the table |
//! | `runner.rs` | a model driven step by step, in chunks, on a scattered KV cache |
//! | `model.rs` | what a model folder is made of, and which of its golden keys are notes |
//! | `language.rs`, `routing.rs`, `vision.rs`, `drawing.rs` | the quantities of model folders |
//! | `tokenizer.rs`, `preprocess.rs` | the other kinds of folder |
//! | `wires.rs` | the same prompts through running services |

mod drawing;
mod golden;
mod language;
mod model;
mod preprocess;
mod report;
mod routing;
mod runner;
mod tokenizer;
mod tolerance;
mod vision;
mod wires;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use self::golden::Golden;
use self::report::Report;
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
  janua verify tests/fixtures/tokenizers/llm --json

Exit codes: 0 everything is within its tolerance, 1 something is not or is unknown, 66 the folder cannot be loaded.")]
pub struct Verify {
    /// Folder with the checkpoint and its golden files
    pub dir: PathBuf,
    /// Also send the golden prompts through running services, over this wire
    #[arg(long, value_enum)]
    pub wire: Option<WireName>,
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
    if flags.wire.is_some() && kind != Kind::Model {
        return Err(Failure::usage("--wire needs a model folder: a tokenizer or a set of pictures is not served alone"));
    }
    let mut report = Report::default();
    match kind {
        Kind::Model => Box::pin(model::compare(&flags.dir, &golden, &mut report)).await?,
        Kind::Tokenizer => tokenizer::compare(&flags.dir, &golden, &mut report)?,
        Kind::Preprocess => preprocess::compare(&flags.dir, &golden, &mut report)?,
    }
    if let Some(wire) = flags.wire {
        Box::pin(wires::compare(&flags.dir, wire, &golden, &mut report)).await?;
    }
    print(&flags, kind, &report)
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
