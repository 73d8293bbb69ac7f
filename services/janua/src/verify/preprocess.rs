use std::path::Path;

use pixels::{Limits, Plane, Processor};
use serde_json::Value;

use super::golden::{Golden, Tensor, Values};
use super::report::Report;
use super::tokenizer::unknown_fields;
use crate::Failure;

/// Keys of `golden.json` that describe how it was made.
const NOTES: [&str; 4] = ["case", "backend", "torchvision_backend_max_u8_difference", "note"];
/// Fields of an image entry that are not the name of a processor.
const FACTS: [&str; 4] = ["file", "width", "height", "mode"];
/// The processor that has no `preprocessor_config.json` of its own.
const ORIGINAL: &str = "janus_original";
/// How far an 8-bit value may be from Pillow's.
const LEVELS: u8 = 1;
/// Rescaling and normalising in f32 against f64: a few units in the last place of a value of at most 2.7.
const NORMALISED: f64 = 2e-6;

/// Compares a folder of pictures and the tensors that processors make of them.
pub fn compare(dir: &Path, golden: &Golden, report: &mut Report) -> Result<(), Failure> {
    for (i, entry) in golden.list("images").iter().enumerate() {
        let file = dir.join(entry["file"].as_str().unwrap_or_default());
        let bytes = std::fs::read(&file).map_err(|error| Failure::input(format!("{}: {error}", file.display())))?;
        let picture = pixels::decode(&bytes, &Limits::default()).map_err(|error| Failure::input(format!("{}: {error}", file.display())))?;
        for facts in [("width", picture.width), ("height", picture.height)] {
            report.same(&format!("images[{i}].{}", facts.0), &[Value::from(facts.1)], std::slice::from_ref(&entry[facts.0]));
        }
        let processors = entry.as_object().into_iter().flatten().filter(|(key, _)| !FACTS.contains(&key.as_str()));
        for (name, planes) in processors {
            let processed = processor(dir, name, golden, planes)?.process(&picture);
            for (plane, key) in planes.as_object().into_iter().flatten() {
                let key = key.as_str().unwrap_or_default();
                match (plane.as_str(), &processed.high_res) {
                    ("pixel_values", _) => compare_plane(golden, key, &processed.main, report),
                    ("high_res_pixel_values", Some(high_res)) => compare_plane(golden, key, high_res, report),
                    _ => report.fail(key, "this processor makes no such tensor"),
                }
            }
        }
    }
    let known = [&NOTES[..], &["images"]].concat();
    unknown_fields("golden.json", std::slice::from_ref(&golden.json), &known, report);
    golden.unasked().into_iter().for_each(|key| report.fail(key, "not a quantity that this program knows"));
    Ok(())
}

/// `key` itself (the tensor that the model gets), and `key.u8` (what it is before rescaling), whichever are there.
fn compare_plane(golden: &Golden, key: &str, plane: &Plane, report: &mut Report) {
    let bytes = format!("{key}.u8");
    match golden.tensor(&bytes) {
        Some(Tensor { values: Values::U8(expected), .. }) => report.levels(&bytes, &plane.levels, expected, |_| LEVELS),
        Some(_) => report.fail(&bytes, "the reference is not a tensor of bytes"),
        None if golden.tensor(key).is_none() => report.fail(key, "golden.safetensors holds neither the tensor nor its bytes"),
        None => {}
    }
    if let Some(reference) = golden.tensor(key) {
        report.close(key, &plane.values, reference, NORMALISED);
    }
}

/// The processor called `name`. The original one of JanusFlow has its size in the code; here it is that of its reference.
fn processor(dir: &Path, name: &str, golden: &Golden, planes: &Value) -> Result<Processor, Failure> {
    if name == ORIGINAL {
        let key = format!("{}.u8", planes["pixel_values"].as_str().unwrap_or_default());
        let side = golden.tensor(&key).and_then(|tensor| u32::try_from(*tensor.shape.last()?).ok());
        return Ok(Processor::janus_original(side.ok_or_else(|| Failure::input(format!("golden.safetensors: no tensor {key}")))?));
    }
    let file = dir.join(format!("preprocessor_config.{name}.json"));
    let unusable = |error: &dyn std::fmt::Display| Failure::input(format!("{}: {error}", file.display()));
    let config: Value = serde_json::from_slice(&std::fs::read(&file).map_err(|e| unusable(&e))?).map_err(|e| unusable(&e))?;
    Processor::from_config(&config).map_err(|error| unusable(&error))
}
