use std::sync::Arc;

use checkpoint::Checkpoint;
use config::ModelConfig;
use text::TextCodec;

use super::Finding;

/// Opens every checkpoint as the services would, without keeping it. Returns what was found and the bytes of all weights together.
pub fn check(models: &[ModelConfig]) -> (Vec<Finding>, u64) {
    if models.is_empty() {
        return (vec![Finding::fine("models", "none configured; add --model DIR to check one")], 0);
    }
    let (findings, bytes): (Vec<_>, Vec<_>) = models.iter().map(examine).unzip();
    (findings, bytes.into_iter().sum())
}

fn examine(model: &ModelConfig) -> (Finding, u64) {
    let subject = format!("model {}", model.name);
    match look(model) {
        Ok((fact, bytes)) => (Finding::fine(subject, fact), bytes),
        Err((reason, remedy)) => (Finding::problem(subject, reason, remedy), 0),
    }
}

/// A sentence about the checkpoint and the size of its weights, or a reason and a remedy.
fn look(model: &ModelConfig) -> Result<(String, u64), (String, &'static str)> {
    let damaged = "copy the folder again, complete with its JSON files";
    let checkpoint = Arc::new(Checkpoint::open(&model.path).map_err(|error| (error.to_string(), damaged))?);
    checkpoint.scan(&mut |_| {}).map_err(|error| (error.to_string(), damaged))?;
    let card = models::card(&checkpoint).map_err(|error| (error.to_string(), "see the table of model families in README.md"))?;
    TextCodec::load(&checkpoint).map_err(|error| (error.to_string(), damaged))?;
    // One block is enough to bind every tensor.
    let options = models::LoadOptions { kv_blocks: 1, threads: 0 };
    models::load_language(&checkpoint, &options).map_err(|error| (error.to_string(), damaged))?;
    if card.latent_grid().is_some() {
        let painter = models::load_painter(&checkpoint, model.vae.as_deref(), &models::OnnxOptions::default());
        painter.map_err(|error| (error.to_string(), "put the VAE where the model looks for it, or name its folder with --vae"))?;
    }
    let mut abilities = vec!["writes"];
    abilities.extend(card.tokens_per_image.map(|_| "sees"));
    abilities.extend(card.canvas.map(|_| "draws"));
    let bytes = checkpoint.total_bytes();
    let tensors = checkpoint.names().count();
    Ok((format!("{} · {} · {tensors} tensors, {}", card.family, abilities.join(", "), super::machine::size(bytes)), bytes))
}
