use clap::Args;
use proto::v1;
use serde_json::json;

use crate::client::{Door, ServerFlags};
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, paint};
use crate::{Failure, events};

/// List the models of a server and what each can do
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  janua models --server http://127.0.0.1:50051 --json")]
pub struct Models {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub server: ServerFlags,
}

/// Runs `janua models`.
pub async fn run(flags: Models) -> Result<(), Failure> {
    let door = Door::open(&flags.server).await?;
    let models = door.models().await?;
    if flags.json {
        terminal::json(&json!({"models": models.iter().map(events::model).collect::<Vec<_>>()}))?;
    } else {
        for model in &models {
            terminal::line(&describe(model))?;
        }
    }
    door.close().await;
    Ok(())
}

/// A model on one line: name, state, family, abilities, context.
pub fn describe(model: &v1::Model) -> String {
    let abilities = [(model.text_output, "writes"), (model.image_input, "sees"), (model.image_output, "draws")];
    let abilities: Vec<_> = abilities.iter().filter(|(can, _)| *can).map(|(_, word)| *word).collect();
    let state = if model.ready { paint(GOOD, "ready") } else { paint(BAD, "not ready") };
    let facts = format!("{} · {} · context {}", model.family, abilities.join(", "), model.context_length);
    format!("{} {state} {}", paint(BOLD, &model.name), paint(DIM, facts))
}
