//! Every metric of the vision service. Names end in their unit; `_total` marks counters. All are by model.

use std::time::Duration;

use metrics::{counter, gauge, histogram};

/// Pictures asked for, by outcome: `cached`, `encoded`, `joined` (another request was encoding the same), `refused`, `failed`.
const IMAGES: &str = "janua_vision_images_total";
/// From bytes to pixels of the right size.
const PREPROCESS: &str = "janua_vision_preprocess_duration_seconds";
/// From pixels to embeddings.
const ENCODE: &str = "janua_vision_encode_duration_seconds";
/// Pictures that wait or are being encoded.
const BUSY: &str = "janua_vision_busy_images";

pub(crate) fn image(model: &str, outcome: &'static str) {
    counter!(IMAGES, "model" => model.to_owned(), "outcome" => outcome).increment(1);
}

pub(crate) fn preprocessed(model: &str, took: Duration) {
    histogram!(PREPROCESS, "model" => model.to_owned()).record(took);
}

pub(crate) fn encoded(model: &str, took: Duration) {
    histogram!(ENCODE, "model" => model.to_owned()).record(took);
}

/// Counts a picture as busy until it is dropped.
pub(crate) struct Busy(std::sync::Arc<str>);

impl Busy {
    pub(crate) fn new(model: std::sync::Arc<str>) -> Self {
        gauge!(BUSY, "model" => model.to_string()).increment(1.0);
        Self(model)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        gauge!(BUSY, "model" => self.0.to_string()).decrement(1.0);
    }
}
