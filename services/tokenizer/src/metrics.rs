//! Every metric of the tokenizer. Names end in their unit; `_total` marks counters.

use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, gauge, histogram};

/// Bytes of text encoded, by model.
const ENCODED_BYTES: &str = "janua_tokenizer_encoded_bytes_total";
/// Token ids that came out of encoding, by model.
const ENCODED_TOKENS: &str = "janua_tokenizer_encoded_tokens_total";
/// Token ids turned into text, by model.
const DECODED_TOKENS: &str = "janua_tokenizer_decoded_tokens_total";
/// From the arrival of a text to its ids, waiting for a place included, by model.
const ENCODE: &str = "janua_tokenizer_encode_duration_seconds";
/// Detokenising streams that are open.
const STREAMS: &str = "janua_tokenizer_open_streams";

pub(crate) fn encoded(model: &str, bytes: usize, tokens: usize, took: Duration) {
    counter!(ENCODED_BYTES, "model" => model.to_owned()).increment(bytes as u64);
    counter!(ENCODED_TOKENS, "model" => model.to_owned()).increment(tokens as u64);
    histogram!(ENCODE, "model" => model.to_owned()).record(took);
}

pub(crate) fn decoded(model: &str, tokens: usize) {
    counter!(DECODED_TOKENS, "model" => model.to_owned()).increment(tokens as u64);
}

/// Counts a stream as open until it is dropped, and then its tokens: a counter per message would cost more than the message.
pub(crate) struct OpenStream {
    model: Arc<str>,
    pub(crate) tokens: usize,
}

impl OpenStream {
    pub(crate) fn new(model: Arc<str>) -> Self {
        gauge!(STREAMS).increment(1.0);
        Self { model, tokens: 0 }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        gauge!(STREAMS).decrement(1.0);
        decoded(&self.model, self.tokens);
    }
}
