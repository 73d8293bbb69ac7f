use domain::{Job, Mode, OutputKind, Prompt, Sampling};
use layers::{Head, RowInput};
use serde_json::Value;

use super::golden::{Golden, Tensor, Values, ids};
use super::model::{Parts, is_remark};
use super::report::Report;
use super::routing::{self, Margins};
use super::runner::{Runner, Seen, rows};
use crate::Failure;

/// Compares prompt `i` of a model folder: ids, pictures, hidden states, logits, and what is generated greedily.
pub async fn compare(parts: &mut Parts, golden: &Golden, i: usize, entry: &Value, report: &mut Report) -> Result<(), Failure> {
    let prefix = format!("p{i}.");
    let input = parts.input(entry)?;
    let prepared = parts.prepare(&input, OutputKind::Text)?;
    let prompt_ids = parts.ids(&prepared.segments);
    let pictures = parts.see(&input, golden, &prefix, report)?;
    let prompt = parts.prompt(&prepared.segments, &pictures)?;
    let generated = golden_ids(golden, &format!("{prefix}generated_ids"), &entry["generated_ids"]);
    let computed = compute(parts, golden, &prefix, &prompt, &generated, report)?;
    let found = generate(parts, &prompt, generated.len()).await?;
    for (field, found) in [("input_ids", &prompt_ids), ("generated_ids", &found)] {
        if let Some(expected) = golden.ids(&format!("{prefix}{field}")) {
            report.same(&format!("{prefix}{field}"), found, expected);
        }
    }
    for (field, value) in entry.as_object().into_iter().flatten() {
        let quantity = format!("prompts[{i}].{field}");
        match field.as_str() {
            "input_ids" => report.same(&quantity, &prompt_ids, &ids(value).unwrap_or_default()),
            "generated_ids" => report.same(&quantity, &found, &ids(value).unwrap_or_default()),
            "generated_text" => report.same(&quantity, &[parts.codec.decode(&found, false)], &text(value)),
            "n_input" => report.same(&quantity, &[prompt_ids.len() as u32], &super::golden::id(value)),
            "text" if entry.get("messages").is_some() => report.same(&quantity, &[rendered(parts, &input)?], &text(value)),
            "logits_std" => report.near(&quantity, computed.logits_std, number(value), computed.tolerance),
            // The gap is a difference of two logits.
            "top2_logit_margin" => report.near(&quantity, computed.margin, number(value), 2.0 * computed.tolerance),
            "topk_logit_margin" if value.is_number() => {
                report.near(&quantity, computed.routing.topk_logit, number(value), 2.0 * parts.tolerances.get("router.logits"))
            }
            "group_logit_margin" if value.is_number() => {
                report.near(&quantity, computed.routing.group_logit, number(value), 2.0 * parts.tolerances.get("router.logits"))
            }
            "topk_prob_margin" if value.is_number() => {
                report.near(&quantity, computed.routing.topk_prob, number(value), 2.0 * probability_tolerance(parts))
            }
            "image_features_std" => {
                let values: Vec<f32> = pictures.iter().flat_map(|picture| picture.values.iter().copied()).collect();
                report.near(&quantity, deviation(&values), number(value), parts.tolerances.get("image_features"));
            }
            // What the reference measured about itself, and what was read above.
            "cached_vs_full_recompute_max_abs" | "messages" | "prompt" | "images" => {}
            _ if is_remark(value) => {}
            _ => report.fail(&quantity, "not a quantity that this program knows"),
        }
    }
    Ok(())
}

/// Facts about the logits of a prompt.
struct Computed {
    logits_std: f64,
    /// Smallest gap between the two largest logits over all greedy steps.
    margin: f64,
    tolerance: f64,
    routing: Margins,
}

/// Runs the model step by step and compares every tensor that the golden files have for this prompt.
fn compute(
    parts: &mut Parts,
    golden: &Golden,
    prefix: &str,
    prompt: &Prompt,
    generated: &[u32],
    report: &mut Report,
) -> Result<Computed, Failure> {
    let rows = rows(prompt);
    let Walk { mut seen, decoded, decode_logits, margin } = walk(&mut parts.runner, &rows, generated)?;
    if let Some(twin) = &mut parts.twin {
        let local = walk(twin, &rows, generated)?;
        let bits = |walks: [&Seen; 2]| -> Vec<u32> {
            walks.iter().flat_map(|seen| seen.tensors.values()).flatten().map(|value| value.to_bits()).collect()
        };
        report.same(&format!("{prefix}remote = local, bit by bit"), &bits([&seen, &decoded]), &bits([&local.seen, &local.decoded]));
    }

    let mut close = |key: &str, found: &[f32]| {
        let key = format!("{prefix}{key}");
        match golden.tensor(&key) {
            // A model shows ids as the numbers they are.
            Some(Tensor { values: Values::Ids(expected), .. }) => {
                report.same(&key, &found.iter().map(|&id| id as u32).collect::<Vec<_>>(), expected);
            }
            Some(reference) => report.close(&key, found, reference, parts.tolerances.get(&key)),
            None => {}
        }
    };
    let routing = routing::margins(parts.checkpoint.config(), &[&seen, &decoded]);
    close("decode_logits", &decode_logits);
    let prefill_logits = seen.tensors.remove("logits").unwrap_or_default();
    close("prefill_logits", &prefill_logits);
    for (name, values) in &seen.tensors {
        close(name, values);
    }
    for (name, values) in decoded.tensors.iter().filter(|(name, _)| name.starts_with("router.")) {
        close(&format!("decode.{name}"), values);
    }
    // The first layer's input under the name that the original repositories give it, and which positions of it are a picture's.
    close("inputs_embeds", seen.tensors.get("hidden.embed").map_or(&[], Vec::as_slice));
    if let Some(Tensor { values: Values::U8(expected), .. }) = golden.tensor(&format!("{prefix}images_seq_mask")) {
        let mask: Vec<u8> = rows.iter().map(|row| u8::from(matches!(row, RowInput::Embedding { .. }))).collect();
        report.same(&format!("{prefix}images_seq_mask"), &mask, expected);
    }
    Ok(Computed { logits_std: deviation(&prefill_logits), margin, tolerance: parts.tolerances.get("prefill_logits"), routing })
}

/// A prompt and its continuation, step by step.
struct Walk {
    /// Of the prompt.
    seen: Seen,
    /// Of what follows.
    decoded: Seen,
    decode_logits: Vec<f32>,
    margin: f64,
}

fn walk(runner: &mut Runner, rows: &[RowInput], generated: &[u32]) -> Result<Walk, Failure> {
    let mut sequence = runner.sequence(rows.len() + generated.len()).map_err(Failure::software)?;
    let (mut seen, mut decoded, mut decode_logits) = (Seen::default(), Seen::default(), Vec::new());
    let last = runner.prefill(&mut sequence, rows, Head::Text, &mut seen).map_err(Failure::software)?;
    let mut margin = gap(&last);
    let feed = generated.split_last().map_or(&[][..], |(_, before)| before);
    for &id in feed {
        let step = runner.step(&mut [(&mut sequence, &[RowInput::Token(id)])], Head::Text, &mut decoded);
        let logits = step.map_err(Failure::software)?.pop().unwrap_or_default();
        margin = margin.min(gap(&logits));
        decode_logits.extend(logits);
    }
    runner.release(sequence);
    Ok(Walk { seen, decoded, decode_logits, margin })
}

/// How far the score of an expert may be away: a mixing weight is such a score times the model's factor.
fn probability_tolerance(parts: &Parts) -> f64 {
    let factor = parts.checkpoint.config().get("routed_scaling_factor").and_then(Value::as_f64).unwrap_or(1.0);
    parts.tolerances.get("router.topk_weights") / factor.max(1.0)
}

/// The greedy continuation, through scheduler and sampler.
async fn generate(parts: &Parts, prompt: &Prompt, tokens: usize) -> Result<Vec<u32>, Failure> {
    if tokens == 0 {
        return Ok(Vec::new());
    }
    let sampling = Sampling { max_tokens: Some(tokens as u32), ignore_eos: true, ..Sampling::greedy() };
    let mode = Mode::Text { sampling, eos_token_ids: parts.codec.eos_token_ids().to_vec() };
    parts.generate(Job { prompt: prompt.clone(), mode, emitted: Vec::new() }).await
}

fn rendered(parts: &Parts, input: &domain::Input) -> Result<String, Failure> {
    match input {
        domain::Input::Chat(messages) => parts.codec.render(messages, true).map_err(Failure::input),
        domain::Input::Completion { .. } | domain::Input::Fim { .. } => Err(Failure::software("only conversations are rendered")),
    }
}

/// Ids from the tensor file, or from `golden.json` where there is no such tensor.
pub fn golden_ids(golden: &Golden, key: &str, json: &Value) -> Vec<u32> {
    golden.ids(key).map(<[u32]>::to_vec).or_else(|| ids(json)).unwrap_or_default()
}

/// The gap between the two largest values.
pub fn gap(logits: &[f32]) -> f64 {
    let mut best = [f32::NEG_INFINITY; 2];
    for &value in logits {
        if value > best[0] {
            best = [value, best[0]];
        } else if value > best[1] {
            best[1] = value;
        }
    }
    f64::from(best[0] - best[1])
}

/// Standard deviation with Bessel's correction, as the reference takes it.
pub fn deviation(values: &[f32]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let squares: f64 = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
    (squares / (n - 1.0)).sqrt()
}

/// The reals of a tensor; empty when it holds something else.
pub fn reals(tensor: &Tensor) -> &[f32] {
    match &tensor.values {
        Values::F32(values) => values,
        Values::Ids(_) | Values::U8(_) => &[],
    }
}

pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn text(value: &Value) -> Vec<String> {
    value.as_str().map(str::to_owned).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps() {
        for (values, expected) in [(vec![1.0, 3.0, 2.5], 0.5), (vec![3.0, 3.0], 0.0), (vec![2.0, -1.0], 3.0)] {
            assert!((gap(&values) - expected).abs() < 1e-9, "{values:?}");
        }
    }

    #[test]
    fn deviations() {
        assert!((deviation(&[1.0, 3.0]) - std::f64::consts::SQRT_2).abs() < 1e-9);
    }
}
