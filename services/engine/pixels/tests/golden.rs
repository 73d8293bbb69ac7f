//! Preprocessing against the reference outputs in `tests/fixtures/preprocess`.
#![allow(clippy::unwrap_used)]

use std::fs;

use pixels::{Limits, Plane, Processor, decode};
use safetensors::SafeTensors;
use serde_json::Value;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures/preprocess/");

fn json(name: &str) -> Value {
    serde_json::from_slice(&fs::read(format!("{FIXTURES}{name}")).unwrap()).unwrap()
}

fn processor(name: &str) -> Processor {
    match name {
        "janus_original" => Processor::janus_original(48),
        _ => Processor::from_config(&json(&format!("preprocessor_config.{name}.json"))).unwrap(),
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

#[test]
fn every_picture_through_every_processor() {
    let file = fs::read(format!("{FIXTURES}golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let images = json("golden.json")["images"].as_array().unwrap().clone();
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
