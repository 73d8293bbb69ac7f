//! llama, the families with experts, and Janus against the reference outputs of the fixtures, at the tolerances of their README.

#![allow(clippy::unwrap_used)]

mod support;

use std::{path::Path, sync::Arc};

use layers::{BlockId, Head, LanguageModel, RowInput};
use support::{
    Recorder, Sequence, WHOLE, advance, argmax, assert_close, fixture, generate_seen, golden::Golden, load, original, prefill, tokens,
    writer,
};

struct Tolerance {
    hidden: f32,
    prefill: f32,
    decode: f32,
    router_logits: f32,
    router_weights: f32,
}

const NO_EXPERTS: Tolerance = Tolerance { hidden: 0.0, prefill: 0.0, decode: 0.0, router_logits: 0.0, router_weights: 0.0 };
const LLAMA: Tolerance = Tolerance { hidden: 1e-4, prefill: 2e-4, decode: 1e-4, ..NO_EXPERTS };
const LLAMA_GQA: Tolerance = Tolerance { hidden: 5e-5, prefill: 1e-4, decode: 5e-5, ..NO_EXPERTS };
const JANUS: Tolerance = Tolerance { hidden: 1e-4, prefill: 1e-4, decode: 1e-4, ..NO_EXPERTS };
const MOE_V1: Tolerance = Tolerance { hidden: 1e-4, prefill: 1e-4, decode: 1e-4, router_logits: 5e-5, router_weights: 5e-5 };
const V2_LITE: Tolerance = Tolerance { hidden: 1e-4, prefill: 1e-4, decode: 1e-4, router_logits: 1e-4, router_weights: 5e-5 };
const V2_FULL: Tolerance = Tolerance { hidden: 5e-4, prefill: 5e-4, decode: 2e-4, router_logits: 1e-4, router_weights: 5e-4 };
const DEEPSEEK_VL: Tolerance = Tolerance { hidden: 1e-4, prefill: 2e-4, decode: 5e-5, ..NO_EXPERTS };
const DEEPSEEK_VL_HYBRID: Tolerance = Tolerance { hidden: 2e-4, prefill: 2e-4, decode: 1e-4, ..NO_EXPERTS };

/// In one piece, in pieces of no power of two, and token by token.
const CHUNKS: [usize; 3] = [WHOLE, 7, 1];

#[test]
fn llama_with_all_heads() {
    for prompt in ["p0", "p1"] {
        check_text(&fixture("llama"), prompt, &LLAMA);
    }
}

#[test]
fn llama_with_grouped_heads_and_bf16_weights() {
    for prompt in ["p0", "p1"] {
        check_text(&fixture("llama_gqa"), prompt, &LLAMA_GQA);
    }
}

#[test]
fn experts() {
    for prompt in ["p0", "p1"] {
        check_text(&fixture("moe_v1"), prompt, &MOE_V1);
    }
}

#[test]
fn latent_attention() {
    for prompt in ["p0", "p1"] {
        check_text(&fixture("v2_lite"), prompt, &V2_LITE);
    }
}

#[test]
fn latent_attention_with_low_rank_queries_and_groups_of_experts() {
    for prompt in ["p0", "p1"] {
        check_text(&fixture("v2_full"), prompt, &V2_FULL);
    }
}

#[test]
fn deepseek_vl_reads_one_picture_and_two() {
    for prompt in ["p0", "p1"] {
        check_text(&fixture("deepseek_vl"), prompt, &DEEPSEEK_VL);
        check_text(&fixture("deepseek_vl_hybrid"), prompt, &DEEPSEEK_VL_HYBRID);
    }
}

/// The same weights under the names and configuration of the published checkpoints.
#[test]
fn deepseek_vl_in_the_original_layout() {
    for (name, tolerance) in [("deepseek_vl", &DEEPSEEK_VL), ("deepseek_vl_hybrid", &DEEPSEEK_VL_HYBRID)] {
        let dir = tempfile::tempdir().unwrap();
        original::deepseek_vl(&fixture(name), dir.path());
        for prompt in ["p0", "p1"] {
            check_text_of(dir.path(), &fixture(name), prompt, tolerance);
        }
    }
}

#[test]
fn janus_reads_a_picture() {
    check_text(&fixture("janus"), "p0", &JANUS);
}

#[test]
fn janus_draws() {
    check_drawing(&fixture("janus"), &fixture("janus"));
}

/// The same weights under the names and configuration of the published checkpoints.
#[test]
fn janus_in_the_original_layout() {
    let dir = tempfile::tempdir().unwrap();
    writer::janus_original(&fixture("janus"), dir.path());
    check_drawing(dir.path(), &fixture("janus"));
    check_text_of(dir.path(), &fixture("janus"), "p0", &JANUS);
}

fn check_text(dir: &Path, prompt: &str, tolerance: &Tolerance) {
    check_text_of(dir, dir, prompt, tolerance);
}

/// Hidden states and logits at all prompt positions, then a greedy continuation.
fn check_text_of(dir: &Path, golden_dir: &Path, prompt: &str, tolerance: &Tolerance) {
    let golden = Golden::open(golden_dir);
    let mut model = load(dir);
    let inputs = inputs(golden_dir, &golden, prompt);
    let expected_ids = golden.ids(&format!("{prompt}.generated_ids"));
    for chunk in CHUNKS {
        let mut recorder = Recorder::default();
        let mut sequence = Sequence::new(inputs.clone(), scattered(0), Head::Text);
        let last = prefill(model.as_mut(), &mut sequence, chunk, &mut recorder);
        for name in golden.names(&format!("{prompt}.hidden.")) {
            let actual = &recorder.tensors[&format!("hidden.{name}")];
            assert_close(&name, actual, &golden.values(&format!("{prompt}.hidden.{name}")), tolerance.hidden);
        }
        let expected = golden.values(&format!("{prompt}.prefill_logits"));
        assert_close("prefill_logits", &recorder.tensors["logits"], &expected, tolerance.prefill);
        assert_eq!(last, expected_rows_end(&recorder.tensors["logits"], last.len()), "the last row is what the step returns");

        check_routing(&golden, &format!("{prompt}.router."), &recorder, tolerance);

        let (mut sequence, mut recorder) = (Sequence::new(inputs.clone(), scattered(1), Head::Text), Recorder::default());
        let (ids, logits) = generate_seen(model.as_mut(), &mut sequence, chunk, expected_ids.len() - 1, &mut recorder);
        assert_eq!(ids, expected_ids);
        assert_close("decode_logits", &logits, &golden.values(&format!("{prompt}.decode_logits")), tolerance.decode);
        check_routing(&golden, &format!("{prompt}.decode.router."), &recorder, tolerance);
    }
}

/// What the gates saw and chose; nothing where the golden files have no such tensors.
fn check_routing(golden: &Golden, prefix: &str, recorder: &Recorder, tolerance: &Tolerance) {
    let names = golden.names(prefix);
    let seen = recorder.tensors.keys().filter(|name| name.starts_with("router."));
    assert_eq!(seen.count(), names.len(), "{prefix}* seen and expected");
    for name in names {
        let (key, actual) = (format!("{prefix}{name}"), &recorder.tensors[&format!("router.{name}")]);
        match name.rsplit_once('.').unwrap().1 {
            "logits" => assert_close(&key, actual, &golden.values(&key), tolerance.router_logits),
            "topk_weights" => assert_close(&key, actual, &golden.values(&key), tolerance.router_weights),
            _ => assert_eq!(actual.iter().map(|&id| id as u32).collect::<Vec<_>>(), golden.ids(&key), "{key}"),
        }
    }
}

fn expected_rows_end(rows: &[f32], width: usize) -> &[f32] {
    &rows[rows.len() - width..]
}

/// The prompt's tokens, picture embeddings in the place of image tokens.
fn inputs(dir: &Path, golden: &Golden, prompt: &str) -> Vec<RowInput> {
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let image_token = config.get("image_token_id").map(|id| id.as_u64().unwrap() as u32);
    let features: Arc<[f32]> = image_token.map_or_else(|| Vec::new().into(), |_| golden.values(&format!("{prompt}.image_features")).into());
    let mut rows = 0..;
    let input = |id| match Some(id) == image_token {
        true => RowInput::Embedding { values: features.clone(), row: rows.next().unwrap() },
        false => RowInput::Token(id),
    };
    golden.ids(&format!("{prompt}.input_ids")).into_iter().map(input).collect()
}

/// A block table in no order.
fn scattered(offset: BlockId) -> Vec<BlockId> {
    (0..16).map(|i| (i * 23 + 5 + offset * 7) % 64).collect()
}

/// Two sequences in lockstep with guidance, as a scheduler draws a picture.
fn check_drawing(dir: &Path, golden_dir: &Path) {
    const TOLERANCE: f32 = 5e-4;
    const OTHER_TOLERANCE: f32 = 1e-4;
    let golden = Golden::open(golden_dir);
    let mut model = load(dir);
    let guidance = model.card().default_image_sampling.guidance;
    assert_eq!(guidance, 5.0);
    let codes = golden.ids("t2i0.image_ids");
    let prompt = |side| tokens(&golden.ids(&format!("t2i0.{side}_ids")));
    let mut cond = Sequence::new(prompt("cond"), vec![5, 28, 51, 10], Head::Image);
    let mut uncond = Sequence::new(prompt("uncond"), vec![6, 1, 63, 40], Head::Image);
    let mut seen = [Vec::new(), Vec::new(), Vec::new()];
    for (i, &expected) in codes.iter().enumerate() {
        let mut recorder = Recorder::default();
        let output = draw_step(model.as_mut(), &mut cond, &mut uncond, &mut recorder);
        if i == 0 {
            assert_close("first_hidden", &last_rows(&recorder, &cond, 64), &golden.values("t2i0.first_hidden"), OTHER_TOLERANCE);
        } else if i == 1 {
            let embed = &recorder.tensors["hidden.embed"][..64];
            assert_close("first_token_embed", embed, &golden.values("t2i0.first_token_embed"), OTHER_TOLERANCE);
        }
        let guided: Vec<_> = output[0].iter().zip(&output[1]).map(|(c, u)| u + guidance * (c - u)).collect();
        assert_eq!(argmax(&guided), expected, "code {i}");
        for (seen, row) in seen.iter_mut().zip([&output[0], &output[1], &guided]) {
            seen.extend_from_slice(row);
        }
        cond.inputs.push(RowInput::Code(expected));
        uncond.inputs.push(RowInput::Code(expected));
    }
    for (seen, name) in seen.iter().zip(["cond_logits", "uncond_logits", "cfg_logits"]) {
        assert_close(name, seen, &golden.values(&format!("t2i0.{name}")), TOLERANCE);
    }
}

/// One step of both sequences over all that is new; their logits.
fn draw_step(model: &mut dyn LanguageModel, cond: &mut Sequence, uncond: &mut Sequence, recorder: &mut Recorder) -> [Vec<f32>; 2] {
    let mut output = advance(model, &mut [(cond, WHOLE), (uncond, WHOLE)], recorder);
    [output.logits[0].take().unwrap(), output.logits[1].take().unwrap()]
}

/// The normed hidden states at the last position of two prompts of one length, one after the other.
fn last_rows(recorder: &Recorder, cond: &Sequence, width: usize) -> Vec<f32> {
    let hidden = &recorder.tensors["hidden.final_norm"]; // [2 * prompt, width]
    let prompt = cond.inputs.len();
    assert_eq!(hidden.len(), 2 * prompt * width);
    [prompt - 1, 2 * prompt - 1].iter().flat_map(|row| hidden[row * width..(row + 1) * width].to_vec()).collect()
}
