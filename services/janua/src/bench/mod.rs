//! `janua bench`: what models of real size cost on this machine.
//!
//! | File | Holds |
//! |---|---|
//! | `families.rs` | `bench families`: a random checkpoint of every family, measured one after the other |
//! | `checkpoint.rs` | `bench checkpoint`: one folder, measured in this process |
//! | `graphs.rs` | `bench graphs`: what ONNX Runtime gets, for comparison with other exporters |
//! | `shards.rs` | `bench shards`: a model whole and with its experts in shards, side by side |
//! | `figures.rs` | what is measured, as a row of the table and as JSON |
//! | `memory.rs` | what the system says about this process |
//! | `recipe.rs` | a checkpoint described: names, shapes, fillings |
//! | `text_recipes.rs`, `image_recipes.rs`, `image_parts.rs` | the families at their published sizes |
//! | `vocabulary.rs` | a tokenizer of real size |
//! | `writer.rs` | recipes to folders |

mod checkpoint;
mod families;
mod figures;
mod graphs;
mod image_parts;
mod image_recipes;
mod memory;
mod recipe;
mod shards;
mod text_recipes;
mod vocabulary;
mod writer;

use clap::{Args, Subcommand};

use crate::Failure;

/// Measure models of real size on this machine
#[derive(Debug, Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Families(families::Families),
    Checkpoint(checkpoint::Checkpoint),
    Graphs(graphs::Graphs),
    Shards(shards::Shards),
}

/// Runs `janua bench`.
pub async fn run(flags: Bench) -> Result<(), Failure> {
    match flags.what {
        What::Families(flags) => families::run(flags).await,
        What::Checkpoint(flags) => checkpoint::run(flags).await,
        What::Graphs(flags) => graphs::run(flags).await,
        What::Shards(flags) => shards::run(flags).await,
    }
}
