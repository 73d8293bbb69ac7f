//! What storing weights as bf16 costs: the f32 fixtures, their weights rounded, beside the outputs of the reference in f32.
//!
//! Rounding moves a weight by at most one part in 512. Where it changes which expert a token goes to, the rest of the text is another
//! computation: positions are compared up to the first such token, and such tokens are counted.
#![allow(clippy::unwrap_used)]

mod support;

use std::{collections::BTreeMap, path::Path};

use checkpoint::Checkpoint;
use half::bf16;
use support::{
    Recorder, Sequence, WHOLE, fixture,
    golden::Golden,
    load, prefill,
    writer::{self, Stored},
};

/// Largest difference of a logit, as a part of the standard deviation of all logits. Measured: 0.03 to 0.06.
const LOGITS: f64 = 0.08;
/// Least part of the choices of experts that stay the same. Measured: 0.97 and more.
const ROUTES: f64 = 0.9;

#[test]
fn dense_models_stay_close() {
    check("llama");
}

#[test]
fn experts_stay_close_where_tokens_go_the_same_way() {
    for name in ["moe_v1", "v2_lite", "v2_full"] {
        check(name);
    }
}

fn check(name: &str) {
    let dir = tempfile::tempdir().unwrap();
    rounded(&fixture(name), dir.path());
    let (mut model, golden) = (load(dir.path()), Golden::open(&fixture(name)));
    let vocabulary = model.card().vocabulary_size;
    for prompt in ["p0", "p1"] {
        let ids = golden.ids(&format!("{prompt}.input_ids"));
        let mut seen = Recorder::default();
        prefill(model.as_mut(), &mut Sequence::tokens(&ids), WHOLE, &mut seen);
        let same = same_way(&golden, prompt, &seen, ids.len());
        let (found, expected) = (&seen.tensors["logits"], golden.values(&format!("{prompt}.prefill_logits")));
        let worst = found.iter().zip(&expected).take(same * vocabulary).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        let share = worst / deviation(&expected);
        assert!((1e-4..LOGITS).contains(&share), "{name} {prompt}: {share:.4} of the deviation over {same} of {} tokens", ids.len());
    }
}

/// Tokens before the first that goes to another expert.
fn same_way(golden: &Golden, prompt: &str, seen: &Recorder, tokens: usize) -> usize {
    let (mut first, mut same, mut all) = (tokens, 0, 0);
    for (key, found) in seen.tensors.iter().filter(|(key, _)| key.ends_with("topk_ids")) {
        let expected = golden.ids(&format!("{prompt}.{key}"));
        let equal: Vec<bool> = found.iter().zip(&expected).map(|(a, b)| *a == *b as f32).collect();
        all += equal.len();
        same += equal.iter().filter(|equal| **equal).count();
        let choices = equal.len() / tokens;
        first = first.min(equal.iter().position(|equal| !equal).map_or(tokens, |at| at / choices));
    }
    assert!(all == 0 || same as f64 >= ROUTES * all as f64, "{prompt}: {same} of {all} choices are the same");
    assert!(first > 0, "{prompt}: the first token goes another way");
    first
}

/// A copy of a checkpoint with every weight rounded to bf16.
fn rounded(source: &Path, dir: &Path) {
    let checkpoint = Checkpoint::open(source).unwrap();
    let tensor = |name: &str| {
        let view = checkpoint.tensor(name).unwrap();
        let bytes = view.to_f32().iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
        (name.to_owned(), (Stored::BF16, view.shape.to_vec(), bytes))
    };
    let tensors: BTreeMap<_, _> = checkpoint.names().map(tensor).collect();
    writer::write(dir, &tensors, checkpoint.config());
}

fn deviation(values: &[f32]) -> f64 {
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
    (values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}
