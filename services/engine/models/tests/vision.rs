//! The pixels' side of a checkpoint against reference outputs, at the tolerances of `tests/fixtures/README.md`.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;

use checkpoint::Checkpoint;
use layers::EngineError;
use models::{OnnxOptions, Planes, Probe, VisionEncoder, VqDecoder, load_vision, load_vq, pixels_to_rgb};
use safetensors::SafeTensors;
use support::{fixture, golden::Golden};

const OPTIONS: OnnxOptions = OnnxOptions { threads: 2 };

fn open(dir: &Path) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir).unwrap())
}

fn encoder(dir: &Path) -> VisionEncoder {
    load_vision(&open(dir), &OPTIONS).unwrap().unwrap()
}

fn decoder(dir: &Path) -> VqDecoder {
    load_vq(&open(dir), &OPTIONS).unwrap().unwrap()
}

fn assert_close(name: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{name}: {worst:e} of {tolerance:e}");
    assert!(worst <= tolerance, "{name}: off by {worst}, {tolerance} allowed");
}

/// Compares every golden tensor called `prefix...` that `probes` have, and returns how many there were.
fn compare(golden: &Golden, prefix: &str, probes: &[Probe], tolerance: f32) -> usize {
    for (name, shape, values) in probes {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        assert_close(name, values, &golden.values(&format!("{prefix}{name}")), tolerance);
    }
    probes.len()
}

#[test]
fn tower_and_aligner_equal_the_reference() {
    let dir = fixture("janus");
    let (encoder, golden) = (encoder(&dir), Golden::open(&dir));
    assert_eq!((encoder.tokens_per_image(), encoder.width(), encoder.image_size()), (36, 64, 48));
    let pixels = golden.values("p0.pixel_values");
    let probes = encoder.probe(&pixels).unwrap();
    assert_eq!(compare(&golden, "p0.", &probes, 5e-5), golden.names("p0.vision.hidden.").len() + 1);
    let features = encoder.encode(&pixels).unwrap();
    assert_close("image_features", &features, &golden.values("p0.image_features"), 5e-5);
}

#[test]
fn one_tower_of_deepseek_vl_equals_the_reference() {
    let dir = fixture("deepseek_vl");
    let (encoder, golden) = (encoder(&dir), Golden::open(&dir));
    assert_eq!((encoder.tokens_per_image(), encoder.width(), encoder.image_size(), encoder.high_res_size()), (36, 64, 48, None));
    let pixels = golden.values("p0.pixel_values");
    let probes = encoder.probe(&pixels).unwrap();
    let (features, tower) = probes.split_last().unwrap();
    assert_eq!(compare(&golden, "p0.", tower, 1e-4), golden.names("p0.vision.hidden.").len());
    assert_close("p0.image_features", &features.2, &golden.values("p0.image_features"), 5e-5);
    let both = encoder.encode(&golden.values("p1.pixel_values")).unwrap();
    assert_close("p1.image_features", &both, &golden.values("p1.image_features"), 5e-5);
}

#[test]
fn both_towers_of_deepseek_vl_equal_the_reference() {
    let dir = fixture("deepseek_vl_hybrid");
    let (encoder, golden) = (encoder(&dir), Golden::open(&dir));
    assert_eq!((encoder.tokens_per_image(), encoder.width(), encoder.image_size(), encoder.high_res_size()), (36, 64, 48, Some(96)));
    for prompt in ["p0.", "p1."] {
        let planes = ["pixel_values", "high_res_pixel_values"].map(|name| golden.values(&format!("{prompt}{name}")));
        let planes = Planes { main: &planes[0], high_res: Some(&planes[1]) };
        let probes = encoder.probe(planes).unwrap();
        let (sam, others): (Vec<_>, Vec<_>) = probes.into_iter().partition(|probe| probe.0.starts_with("sam."));
        assert_eq!(compare(&golden, prompt, &sam, 2e-4), golden.names(&format!("{prompt}sam.")).len());
        assert_eq!(compare(&golden, prompt, &others, 1e-4), golden.names(&format!("{prompt}vision.hidden.")).len() + 1);
        assert_close("image_features", &encoder.encode(planes).unwrap(), &golden.values(&format!("{prompt}image_features")), 1e-4);
    }
}

/// A picture in two sizes is one picture, or none.
#[test]
fn planes_that_do_not_belong_together_are_refused() {
    let (one, two) = (encoder(&fixture("deepseek_vl")), encoder(&fixture("deepseek_vl_hybrid")));
    let (low, high) = (vec![0.0; 3 * 48 * 48], vec![0.0; 3 * 96 * 96]);
    let twice = [&high[..], &high].concat();
    let rows = [
        (&one, Planes { main: &low, high_res: Some(&high) }, "does not take"),
        (&two, Planes { main: &low, high_res: None }, "96 x 96"),
        (&two, Planes { main: &low, high_res: Some(&low) }, "make a picture of 96 x 96"),
        (&two, Planes { main: &high, high_res: Some(&twice) }, "4 pictures, 2 of high resolution"),
    ];
    for (encoder, planes, expected) in rows {
        match encoder.encode(planes) {
            Err(EngineError::Step(reason)) => assert!(reason.contains(expected), "{reason}"),
            other => panic!("{expected}: {other:?}"),
        }
    }
    assert!(two.encode(Planes { main: &low, high_res: Some(&high) }).is_ok());
}

#[test]
fn several_pictures_at_once_equal_one_after_the_other() {
    let encoder = encoder(&fixture("janus"));
    let first = Golden::open(&fixture("janus")).values("p0.pixel_values");
    let second: Vec<f32> = first.iter().rev().copied().collect();
    let both = encoder.encode(&[first.clone(), second.clone()].concat()).unwrap();
    let apart = [encoder.encode(&first).unwrap(), encoder.encode(&second).unwrap()].concat();
    assert_close("both", &both, &apart, 1e-5);
}

#[test]
fn decoder_equals_the_reference() {
    let dir = fixture("janus");
    let (decoder, golden) = (decoder(&dir), Golden::open(&dir));
    let grid = decoder.grid();
    assert_eq!((grid.rows, grid.columns, grid.codebook_size, decoder.image_size()), (6, 6, 96, (12, 12)));
    let codes = golden.ids("vq.ids");
    let probes = decoder.probe(&codes).unwrap();
    assert_eq!(compare(&golden, "vq.", &probes, 5e-5), 4);
    assert_close("pixels", &decoder.decode(&codes).unwrap(), &golden.values("vq.pixels"), 5e-5);
    assert_close("t2i pixels", &decoder.decode(&golden.ids("t2i0.image_ids")).unwrap(), &golden.values("t2i0.pixels"), 1e-4);
}

#[test]
fn levels_are_cut_off_not_rounded() {
    let file = std::fs::read(fixture("janus").join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let expected = golden.tensor("t2i0.pixels_u8").unwrap();
    assert_eq!(pixels_to_rgb(&Golden::open(&fixture("janus")).values("t2i0.pixels")), expected.data());
    assert_eq!(pixels_to_rgb(&[-3.0, 3.0, 0.999, 0.0, 1.0, f32::NAN]), [0, 254, 255, 255, 127, 0]);
}

#[test]
fn wrong_codes_are_refused() {
    let decoder = decoder(&fixture("janus"));
    let mut codes = vec![0; 36];
    codes[7] = 96;
    assert_eq!(decoder.decode(&codes).unwrap_err(), EngineError::Step("code 7: 96 is not in the codebook of 96".into()));
    assert_eq!(decoder.decode(&codes[..35]).unwrap_err(), EngineError::Step("35 codes, the image has 6 x 6".into()));
    assert!(matches!(encoder(&fixture("janus")).encode(&[0.0; 100]), Err(EngineError::Step(_))));
    assert!(matches!(encoder(&fixture("janus")).encode(&[]), Err(EngineError::Step(_))));
}

#[test]
fn a_text_model_neither_sees_nor_draws() {
    let checkpoint = open(&fixture("llama"));
    assert!(load_vision(&checkpoint, &OPTIONS).unwrap().is_none());
    assert!(load_vq(&checkpoint, &OPTIONS).unwrap().is_none());
}

#[test]
fn what_goes_in_decides_the_fingerprint() {
    let dir = fixture("janus");
    assert_eq!(encoder(&dir).fingerprint(), encoder(&dir).fingerprint());
    assert_eq!(encoder(&dir).fingerprint().len(), 64);
}
