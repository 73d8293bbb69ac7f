//! Every metric of the image decoder. Names end in their unit; `_total` marks counters.

use std::time::Duration;

use metrics::{counter, histogram};

/// Pictures decoded, by model and kind (`image`, `preview`).
const DECODED: &str = "janua_images_decoded_total";
/// From taking up a code map to the encoded file, by model and kind. Waiting for the decoder is not included.
const DECODE: &str = "janua_images_decode_duration_seconds";
/// Requests refused because too many were waiting, by model.
const REFUSED: &str = "janua_images_refused_total";

pub(crate) fn decoded(model: &str, preview: bool, took: Duration) {
    let kind = if preview { "preview" } else { "image" };
    counter!(DECODED, "model" => model.to_owned(), "kind" => kind).increment(1);
    histogram!(DECODE, "model" => model.to_owned(), "kind" => kind).record(took);
}

pub(crate) fn refused(model: &str) {
    counter!(REFUSED, "model" => model.to_owned()).increment(1);
}
