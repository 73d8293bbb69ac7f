use bytes::Bytes;
use domain::Embeddings;
use models::Planes;
use pixels::{Limits, Processed};

use super::golden::Golden;
use super::model::Parts;
use super::report::Report;
use crate::Failure;

/// The rows for the language model.
const FEATURES: &str = "image_features";

/// Takes the pictures of a prompt through preprocessing, towers and aligner, compares what the golden files have on the way, and returns
/// the rows for the language model.
pub fn compare(parts: &Parts, pictures: &[&Bytes], golden: &Golden, prefix: &str, report: &mut Report) -> Result<Vec<Embeddings>, Failure> {
    let (Some(encoder), Some(processor)) = (&parts.encoder, &parts.processor) else {
        return Err(Failure::input("golden.json shows pictures to a model that cannot see"));
    };
    let mut found = std::collections::BTreeMap::<String, Vec<f32>>::new();
    let mut rows = Vec::new();
    for picture in pictures {
        let picture = pixels::decode(picture, &Limits::default()).map_err(Failure::input)?;
        let Processed { main, high_res } = processor.process(&picture);
        let planes = Planes { main: &main.values, high_res: high_res.as_ref().map(|plane| plane.values.as_slice()) };
        // What the language model gets is the encoder's own output below, not the probe's.
        let probes = encoder.probe(planes).map_err(Failure::software)?.into_iter();
        for (name, _, values) in probes.filter(|(name, ..)| name.as_str() != FEATURES) {
            found.entry(name).or_default().extend(values);
        }
        let features = encoder.encode(planes).map_err(Failure::software)?;
        found.entry(FEATURES.to_owned()).or_default().extend(&features);
        found.entry("pixel_values".to_owned()).or_default().extend(main.values);
        if let Some(plane) = high_res {
            found.entry("high_res_pixel_values".to_owned()).or_default().extend(plane.values);
        }
        rows.push(Embeddings { width: encoder.width(), values: features.into() });
    }
    for (name, values) in &found {
        let key = format!("{prefix}{name}");
        if let Some(reference) = golden.tensor(&key) {
            report.close(&key, values, reference, parts.tolerances.get(&key));
        }
    }
    Ok(rows)
}
