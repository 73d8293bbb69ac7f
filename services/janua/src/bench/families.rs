use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use process::Progress;
use serde_json::{Value, json};
use tokio::process::Command;

use super::figures::{self, Figures};
use super::image_parts::{SAM_B, SDXL, SIGLIP_L, VQ_16};
use super::image_recipes::{DECODER_7B, FLOW_WIDTH, janus, janusflow, vl_hybrid};
use super::recipe::Recipe;
use super::text_recipes::{DECODER_1B, EXPERTS_16B, LATENT_LITE, MOE_16B, V2_LITE, llama, moe, v2};
use super::writer;
use crate::Failure;
use crate::failure::COMPARISON;
use crate::terminal::{self, BAD, DIM, paint};

/// Make a random checkpoint of every family at its real dimensions and measure how it loads and answers
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  janua bench families                                   every family: 26 GB are written and removed again, one family at a time
  janua bench families --families janus --keep --json    one family, whose checkpoint stays for the next time

Each checkpoint is measured by a process of its own. Weights are noise: figures of speed and memory mean something, answers do not.")]
pub struct Families {
    /// Which families, in this order
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME,NAME")]
    pub families: Vec<Family>,
    /// Where the checkpoints are written
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub dir: PathBuf,
    /// Leave the checkpoints for the next time; otherwise what this run has written is removed
    #[arg(long)]
    pub keep: bool,
    /// Draw no picture, which takes minutes on a small machine
    #[arg(long)]
    pub no_draw: bool,
    /// Only write the checkpoints
    #[arg(long, requires = "keep")]
    pub no_measure: bool,
    /// Print a line of JSON for each family
    #[arg(long)]
    pub json: bool,
}

/// What there are recipes for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Family {
    Llama,
    Janus,
    Janusflow,
    V2Lite,
    Moe,
    VlHybrid,
}

impl Family {
    /// At the size that was published, or as much of it as fits a small machine.
    fn recipe(self) -> Recipe {
        match self {
            Self::Llama => llama(&DECODER_1B),
            Self::Janus => janus(&DECODER_1B, &SIGLIP_L, &VQ_16),
            Self::Janusflow => janusflow(&DECODER_1B, &SIGLIP_L, FLOW_WIDTH, &SDXL),
            Self::V2Lite => v2(&V2_LITE, &EXPERTS_16B, &LATENT_LITE),
            Self::Moe => moe(&MOE_16B, &EXPERTS_16B),
            Self::VlHybrid => vl_hybrid(&DECODER_7B, &SIGLIP_L, &SAM_B),
        }
    }
}

/// Runs `janua bench families`. A signal ends the process that measures, too.
pub async fn run(flags: Families) -> Result<(), Failure> {
    tokio::select! {
        biased;
        stop = crate::serve::signal() => stop.and(Err(Failure::software("stopped by a signal"))),
        done = all(flags) => done,
    }
}

async fn all(flags: Families) -> Result<(), Failure> {
    let families = if flags.families.is_empty() { Family::value_variants().to_vec() } else { flags.families.clone() };
    std::fs::create_dir_all(&flags.dir).map_err(|error| Failure::input(format!("cannot make {}: {error}", flags.dir.display())))?;
    let progress = process::Bars::or_lines();
    if !flags.json && !flags.no_measure {
        figures::head()?;
    }
    let mut failed = 0;
    for family in families {
        let recipe = family.recipe();
        let (dir, made) = write(&recipe, &flags.dir, &progress).await?;
        if flags.no_measure {
            continue;
        }
        let outcome = measure(&dir, flags.no_draw).await;
        if made && !flags.keep {
            writer::remove(&dir)?;
        }
        failed += usize::from(outcome.is_err());
        print(&recipe, &outcome, flags.json)?;
    }
    if !flags.json && !flags.no_measure {
        figures::legend()?;
    }
    match failed {
        0 => Ok(()),
        failed => Err(Failure::new(COMPARISON, format!("{failed} of the families could not be measured"))),
    }
}

async fn write(recipe: &Recipe, parent: &Path, progress: &Arc<dyn Progress>) -> Result<(PathBuf, bool), Failure> {
    let (recipe, parent, progress) = (recipe.clone(), parent.to_owned(), progress.clone());
    let work = move || writer::folder(&recipe, &parent, progress.as_ref());
    tokio::task::spawn_blocking(work).await.map_err(|error| Failure::software(format!("writing a checkpoint: {error}")))?
}

/// Measures in a process of its own, whose peak memory is then that of this checkpoint.
async fn measure(dir: &Path, no_draw: bool) -> Result<Figures, Failure> {
    let program = std::env::current_exe().map_err(|error| Failure::software(format!("the program cannot be found: {error}")))?;
    let mut command = Command::new(program);
    command.args(["bench", "checkpoint", "--json"]).args(no_draw.then_some("--no-draw")).arg(dir);
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = output.await.map_err(|error| Failure::software(format!("a process cannot be started: {error}")))?;
    if output.status.success() {
        return serde_json::from_slice(&output.stdout).map_err(Failure::software);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure::software(said.lines().last().unwrap_or("it ended without a word")))
}

fn print(recipe: &Recipe, outcome: &Result<Figures, Failure>, as_json: bool) -> Result<(), Failure> {
    match (outcome, as_json) {
        (Ok(figures), false) => figures::row(recipe.name, figures),
        (Err(failure), false) => terminal::line(&format!("{:<10} {}", recipe.name, paint(BAD, failure))).map(drop),
        (Ok(figures), true) => {
            let mut value = serde_json::to_value(figures).map_err(Failure::software)?;
            value["family"] = recipe.name.into();
            value["about"] = recipe.about.into();
            terminal::json(&value).map(drop)
        }
        (Err(failure), true) => {
            let value: Value = json!({"family": recipe.name, "about": recipe.about, "error": failure.to_string()});
            terminal::json(&value).map(drop)
        }
    }?;
    if !as_json {
        terminal::remark(&paint(DIM, format!("{}: {}", recipe.name, recipe.about)));
    }
    Ok(())
}
