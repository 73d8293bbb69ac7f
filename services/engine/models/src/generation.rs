//! Sampling defaults of `generation_config.json`.

use checkpoint::{Checkpoint, CheckpointError};
use domain::{ImageSampling, Sampling};
use layers::EngineError;
use serde_json::Value;

const FILE: &str = "generation_config.json";

/// The defaults for text and for images. What the file does not say, or an absent file, is as the reference has it.
///
/// `image` is what the family draws with where the file says nothing.
pub(crate) fn defaults(checkpoint: &Checkpoint, image: ImageSampling) -> Result<(Sampling, ImageSampling), EngineError> {
    let written = Written { checkpoint, json: checkpoint.json(FILE)?.unwrap_or_default() };
    let text = Sampling::default();
    // The reference samples text only where the file says so, and draws images unless the file says no (Janus, `generation_config.json` and its generation script).
    // Without sampling the most likely token is taken: that is what temperature 0 means here.
    let do_sample = written.json.get("do_sample").and_then(Value::as_bool);
    let written_temperature = written.number("temperature", 1.0, 0.0..=100.0)?;
    let temperature = |samples: bool| if samples { written_temperature } else { 0.0 };
    let text = Sampling {
        temperature: temperature(do_sample == Some(true)),
        top_p: written.number("top_p", text.top_p, f32::MIN_POSITIVE..=1.0)?,
        top_k: written.number("top_k", text.top_k as f32, 0.0..=1e6)? as u32,
        min_p: written.number("min_p", text.min_p, 0.0..=1.0)?,
        repetition_penalty: written.number("repetition_penalty", text.repetition_penalty, f32::MIN_POSITIVE..=10.0)?,
        ..text
    };
    let image = ImageSampling {
        temperature: temperature(do_sample != Some(false)),
        guidance: written.number("guidance_scale", image.guidance, 0.0..=100.0)?,
        ..image
    };
    Ok((text, image))
}

struct Written<'a> {
    checkpoint: &'a Checkpoint,
    json: Value,
}

impl Written<'_> {
    /// The number called `field`; `default` when there is none or null.
    fn number(&self, field: &str, default: f32, range: std::ops::RangeInclusive<f32>) -> Result<f32, EngineError> {
        let value = match self.json.get(field) {
            None | Some(Value::Null) => return Ok(default),
            Some(value) => value,
        };
        match value.as_f64().map(|value| value as f32) {
            Some(value) if range.contains(&value) => Ok(value),
            _ => {
                let reason = format!("{value} is not a number from {} to {}", range.start(), range.end());
                let dir = self.checkpoint.dir().to_path_buf();
                Err(CheckpointError::Field { dir, file: FILE.into(), field: field.into(), reason }.into())
            }
        }
    }
}
