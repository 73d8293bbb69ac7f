use std::collections::BTreeMap;

use domain::{ImageSampling, Job, Mode, OutputKind};
use layers::{Head, RowInput};
use models::{OnnxOptions, VqDecoder};
use serde_json::Value;

use super::golden::{Golden, Tensor, Values, ids};
use super::language::{deviation, gap, golden_ids, number, reals};
use super::model::{Parts, is_remark};
use super::report::Report;
use super::runner::{Seen, rows};
use crate::Failure;

/// Compares text-to-image example `i` of a model folder: prompts, codes, guided logits, pixels.
pub async fn compare(parts: &mut Parts, golden: &Golden, i: usize, entry: &Value, report: &mut Report) -> Result<(), Failure> {
    let prefix = format!("t2i{i}.");
    let prepared = parts.prepare(&parts.input(entry)?, OutputKind::Image)?;
    let (cond, uncond) = (parts.ids(&prepared.segments), parts.ids(&prepared.unconditional));
    let guidance = entry.get("cfg_weight").and_then(Value::as_f64).unwrap_or(f64::from(parts.card.default_image_sampling.guidance)) as f32;
    let codes = golden_ids(golden, &format!("{prefix}image_ids"), &entry["image_ids"]);
    let mut tensors = guided(parts, &cond, &uncond, &codes, guidance)?;
    let found = draw(parts, &prepared, guidance).await?;
    let decoder = decoder(parts)?;
    let pixels = decoder.decode(&found).map_err(Failure::software)?;
    tensors.insert("pixels".to_owned(), pixels);

    for (field, found) in [("cond_ids", &cond), ("uncond_ids", &uncond), ("image_ids", &found)] {
        if let Some(expected) = golden.ids(&format!("{prefix}{field}")) {
            report.same(&format!("{prefix}{field}"), found, expected);
        }
    }
    for (name, values) in &tensors {
        let key = format!("{prefix}{name}");
        if let Some(reference) = golden.tensor(&key) {
            report.close(&key, values, reference, parts.tolerances.get(&key));
        }
    }
    let levels = models::pixels_to_rgb(&tensors["pixels"]);
    let near =
        NearStep::of(golden.tensor(&format!("{prefix}pixels")), parts.tolerances.get(&format!("{prefix}pixels")), decoder.image_size());
    let key = format!("{prefix}pixels_u8");
    if let Some(Tensor { values: Values::U8(expected), .. }) = golden.tensor(&key) {
        report.levels(&key, &levels, expected, |i| near.levels(i));
    }
    for (field, value) in entry.as_object().into_iter().flatten() {
        let quantity = format!("text_to_image[{i}].{field}");
        let tolerance = parts.tolerances.get(&format!("{prefix}cfg_logits"));
        match field.as_str() {
            "cond_ids" => report.same(&quantity, &cond, &ids(value).unwrap_or_default()),
            "uncond_ids" => report.same(&quantity, &uncond, &ids(value).unwrap_or_default()),
            "image_ids" => report.same(&quantity, &found, &ids(value).unwrap_or_default()),
            "cfg_logits_std" => report.near(&quantity, deviation(&tensors["cfg_logits"]), number(value), tolerance),
            "top2_cfg_margin" => report.near(&quantity, margin(&tensors["cfg_logits"], codes.len()), number(value), 2.0 * tolerance),
            "pixels_std" => {
                report.near(&quantity, deviation(&tensors["pixels"]), number(value), parts.tolerances.get(&format!("{prefix}pixels")))
            }
            "png" => compare_picture(parts, &quantity, value, &levels, &near, report)?,
            "cfg_weight" => {}
            _ if is_remark(value) => {}
            _ => report.fail(&quantity, "not a quantity that this program knows"),
        }
    }
    Ok(())
}

/// Compares the decode of random codes, with what lies inside the decoder.
pub fn compare_decoder(parts: &Parts, golden: &Golden, report: &mut Report) -> Result<(), Failure> {
    let Some(codes) = golden.ids("vq.ids") else { return Ok(()) };
    for (name, _, values) in decoder(parts)?.probe(codes).map_err(Failure::software)? {
        let key = format!("vq.{name}");
        if let Some(reference) = golden.tensor(&key) {
            report.close(&key, &values, reference, parts.tolerances.get(&key));
        }
    }
    Ok(())
}

fn decoder(parts: &Parts) -> Result<VqDecoder, Failure> {
    let decoder = models::load_vq(&parts.checkpoint, &OnnxOptions::default()).map_err(Failure::input)?;
    decoder.ok_or_else(|| Failure::input("golden.json has drawings of a model that cannot draw"))
}

/// Greedy codes of the pair, through scheduler and sampler.
async fn draw(parts: &Parts, prepared: &text::Prepared, guidance: f32) -> Result<Vec<u32>, Failure> {
    let sampling = ImageSampling { guidance, temperature: 0.0, ..ImageSampling::default() };
    let mode = Mode::Image { unconditional: parts.prompt(&prepared.unconditional, &[])?, sampling };
    parts.generate(Job { prompt: parts.prompt(&prepared.segments, &[])?, mode, emitted: Vec::new() }).await
}

/// The logits of both halves of the pair at every code, fed with `codes`, and what the golden files have around the first one.
fn guided(parts: &mut Parts, cond: &[u32], uncond: &[u32], codes: &[u32], guidance: f32) -> Result<BTreeMap<String, Vec<f32>>, Failure> {
    let tokens = |ids: &[u32]| rows(&domain::Prompt::tokens(ids.to_vec()));
    let mut tensors: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    let mut add = |key: &str, values: &[f32]| tensors.entry(key.to_owned()).or_default().extend_from_slice(values);
    let runner = &mut parts.runner;
    let mut sequences = Vec::new();
    let mut logits = Vec::new(); // of cond and uncond
    for ids in [cond, uncond] {
        let mut sequence = runner.sequence(ids.len() + codes.len()).map_err(Failure::software)?;
        let mut seen = Seen::default();
        logits.push(runner.prefill(&mut sequence, &tokens(ids), Head::Image, &mut seen).map_err(Failure::software)?);
        let hidden = seen.tensors.remove("hidden.final_norm").unwrap_or_default();
        add("first_hidden", hidden.get(hidden.len() - hidden.len() / ids.len()..).unwrap_or_default());
        sequences.push(sequence);
    }
    for (step, &code) in codes.iter().enumerate() {
        add("cond_logits", &logits[0]);
        add("uncond_logits", &logits[1]);
        let pair = logits[0].iter().zip(&logits[1]).map(|(cond, uncond)| uncond + guidance * (cond - uncond));
        add("cfg_logits", &pair.collect::<Vec<f32>>());
        if step + 1 == codes.len() {
            break;
        }
        let mut seen = Seen::default();
        let row = [RowInput::Code(code)];
        let mut work: Vec<_> = sequences.iter_mut().map(|sequence| (sequence, &row[..])).collect();
        logits = runner.step(&mut work, Head::Image, &mut seen).map_err(Failure::software)?;
        if step == 0 {
            let embedded = seen.tensors.remove("hidden.embed").unwrap_or_default(); // [2, H], both rows the same
            add("first_token_embed", &embedded[..embedded.len() / 2]);
        }
    }
    sequences.into_iter().for_each(|sequence| runner.release(sequence));
    Ok(tensors)
}

/// The picture that the reference saved.
pub fn compare_picture(
    parts: &Parts,
    quantity: &str,
    name: &Value,
    levels: &[u8],
    near: &NearStep,
    report: &mut Report,
) -> Result<(), Failure> {
    let file = parts.dir.join(name.as_str().unwrap_or_default());
    let bytes = std::fs::read(&file).map_err(|error| Failure::input(format!("{}: {error}", file.display())))?;
    let picture =
        pixels::decode(&bytes, &pixels::Limits::default()).map_err(|error| Failure::input(format!("{}: {error}", file.display())))?;
    report.levels(quantity, levels, &picture.data, |i| near.levels(i));
    Ok(())
}

/// Smallest gap over all steps.
fn margin(logits: &[f32], steps: usize) -> f64 {
    let width = (logits.len() / steps.max(1)).max(1);
    logits.chunks(width).map(gap).fold(f64::INFINITY, f64::min)
}

/// Which 8-bit values may be one level away: those whose real value lies within its tolerance of a rounding step.
pub struct NearStep(Vec<bool>);

impl NearStep {
    /// `pixels` is `[3, height, width]`; the levels are `[height, width, 3]`.
    pub fn of(pixels: Option<&Tensor>, tolerance: f64, (height, width): (usize, usize)) -> Self {
        let Some(values) = pixels.map(reals).filter(|values| values.len() == 3 * height * width) else { return Self(Vec::new()) };
        let plane = height * width;
        let near = (0..3 * plane).map(|i| {
            let level = (f64::from(values[(i % 3) * plane + i / 3]) * 0.5 + 0.5) * 255.0;
            (level - level.round()).abs() <= tolerance * 127.5
        });
        Self(near.collect())
    }

    /// How many levels value `i` may be away.
    pub fn levels(&self, i: usize) -> u8 {
        u8::from(self.0.get(i).copied().unwrap_or(false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_values_at_a_step_may_differ() {
        let at_step = 20.0 / 127.5 - 1.0; // level 20 exactly
        let between = 20.5 / 127.5 - 1.0;
        let pixels = Tensor { shape: vec![3, 1, 2], values: Values::F32(vec![at_step, between, between, at_step, between, between]) };
        let near = NearStep::of(Some(&pixels), 1e-4, (1, 2));
        assert_eq!((0..6).map(|i| near.levels(i)).collect::<Vec<_>>(), [1, 0, 0, 0, 1, 0]);
    }
}
