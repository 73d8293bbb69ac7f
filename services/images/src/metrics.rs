//! Every metric of the images service. Names end in their unit; `_total` marks counters. All are by model.

use std::time::Duration;

use metrics::{counter, histogram};

/// Pictures asked for, by outcome: `finished`, `preview` (some codes missing), `refused`, `failed`.
const IMAGES: &str = "janua_images_images_total";
/// From codes or a latent map to pixels.
const DECODE: &str = "janua_images_decode_duration_seconds";
/// From pixels to a file.
const WRITE: &str = "janua_images_write_duration_seconds";

pub(crate) fn image(model: &str, outcome: &'static str) {
    counter!(IMAGES, "model" => model.to_owned(), "outcome" => outcome).increment(1);
}

pub(crate) fn painted(model: &str, decode: Duration, write: Duration) {
    histogram!(DECODE, "model" => model.to_owned()).record(decode);
    histogram!(WRITE, "model" => model.to_owned()).record(write);
}
