//! Preprocessing against the reference outputs in `tests/fixtures/preprocess`.
#![allow(clippy::unwrap_used)]

use std::fs;

use pixels::{Limits, Plane, Processor, decode};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures/preprocess/");

fn read(name: &str) -> Value {
    serde_json::from_slice(&fs::read(format!("{FIXTURES}{name}")).unwrap()).unwrap()
}

fn processor(name: &str) -> Processor {
    match name {
        "janus_original" => Processor::janus_original(48),
        _ => Processor::from_config(&read(&format!("preprocessor_config.{name}.json"))).unwrap(),
    }
}

fn compare(golden: &SafeTensors<'_>, key: &str, plane: &Plane) {
    let expected = golden.tensor(&format!("{key}.u8")).unwrap();
    assert_eq!(expected.shape(), [3, plane.size, plane.size], "{key}");
    let worst = plane.levels.iter().zip(expected.data()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert_eq!(worst, 0, "{key}: differs by {worst} levels");
    if let Ok(values) = golden.tensor(key) {
        let expected: Vec<f32> = values.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(plane.values, expected, "{key}");
    }
}

/// The files of the original repositories: one size, cut off instead of rounded, and pixels that the tower normalises by itself.
#[test]
fn original_processors_of_deepseek_vl() {
    let config = json!({
        "background_color": [122, 116, 104], "do_normalize": false, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "VLMImageProcessor", "image_size": 48, "image_std": [0.26862954, 0.26130258, 0.27577711],
        "min_size": 14, "rescale_factor": 1.0 / 255.0,
    });
    let processor = Processor::from_config(&config).unwrap();
    assert_eq!((processor.size(), processor.size_field(), processor.high_res_size()), (48, "image_size", None));
    // 31 x 77 becomes 19.3 x 48, and 200 x 30 becomes 48 x 7.2, which is below the smallest side.
    for (name, filled) in [("img2_31x77_RGB.png", (19, 48)), ("img3_200x30_RGB.png", (48, 14))] {
        let rgb = decode(&fs::read(format!("{FIXTURES}{name}")).unwrap(), &Limits::default()).unwrap();
        let plane = processor.process(&rgb).main;
        let background = |x: usize, y: usize| (0..3).all(|c| plane.levels[(c * 48 + y) * 48 + x] == [122, 116, 104][c]);
        let columns = (0..48).filter(|&x| !(0..48).all(|y| background(x, y))).count();
        let rows = (0..48).filter(|&y| !(0..48).all(|x| background(x, y))).count();
        assert_eq!((columns, rows), filled, "{name}");
        let expected: Vec<f32> = plane.levels.iter().map(|&level| (f64::from(level) * (1.0 / 255.0)) as f32).collect();
        assert_eq!(plane.values, expected, "{name}");
    }
}

#[test]
fn settings_of_the_second_input_are_refused_under_their_own_names() {
    for (field, value, expected) in [
        ("high_res_size", json!({"height": 96, "width": 95}), "field high_res_size: 96 x 95 is not square"),
        ("high_res_size", json!({"height": 0, "width": 0}), "field high_res_size: 0 is not in"),
        ("high_res_size", json!({"height": 13, "width": 13}), "field high_res_size: 13 is below min_size 14"),
        ("high_res_resample", json!(1), "field high_res_resample: 1 is not supported"),
        ("high_res_image_mean", json!([0.5]), "field high_res_image_mean: three finite numbers expected"),
        ("high_res_image_mean", Value::Null, "field high_res_image_std: high_res_image_mean and high_res_image_std belong together"),
        ("high_res_image_std", json!([0.5, 0.0, 0.5]), "field high_res_image_std: needed (and not zero)"),
        ("resample", json!(1), "field resample: 1 is not supported"),
        ("image_std", json!([0.5, 0.0, 0.5]), "field image_std: needed (and not zero)"),
    ] {
        let mut config = read("preprocessor_config.hybrid.json");
        config[field] = value;
        let error = Processor::from_config(&config).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}\nshould name: {expected}");
    }
}

#[test]
fn every_picture_through_every_processor() {
    let file = fs::read(format!("{FIXTURES}golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let images = read("golden.json")["images"].as_array().unwrap().clone();
    let mut compared = 0;
    for image in &images {
        let name = image["file"].as_str().unwrap();
        let rgb = decode(&fs::read(format!("{FIXTURES}{name}")).unwrap(), &Limits::default()).unwrap();
        for kind in ["vl", "hybrid", "janus", "janus_original"] {
            let processed = processor(kind).process(&rgb);
            for (output, key) in image[kind].as_object().unwrap() {
                let plane = if output == "high_res_pixel_values" { processed.high_res.as_ref().unwrap() } else { &processed.main };
                compare(&golden, key.as_str().unwrap(), plane);
                compared += 1;
            }
        }
    }
    assert_eq!((images.len(), compared), (12, 12 * 5));
}
