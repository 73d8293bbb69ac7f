//! Every metric of the router. Names end in their unit; `_total` marks counters.

use std::time::Duration;

use metrics::{counter, gauge, histogram};
use tonic::Code;

/// Requests that ended, by model, output kind and gRPC code.
const REQUESTS: &str = "janua_router_requests_total";
/// Requests that are running.
const RUNNING: &str = "janua_router_running_requests";
/// Requests that wait for a place.
const WAITING: &str = "janua_router_waiting_requests";
/// From admission to the last event.
const DURATION: &str = "janua_router_request_duration_seconds";
/// From admission to the first output of the language model.
const FIRST_OUTPUT: &str = "janua_router_time_to_first_output_seconds";
/// Prompt positions, pictures included.
const PROMPT_TOKENS: &str = "janua_router_prompt_tokens_total";
/// Text tokens, image codes and steps of flows made for clients.
const OUTPUT_TOKENS: &str = "janua_router_output_tokens_total";
/// Calls that were tried again, by stage.
const RETRIES: &str = "janua_router_retries_total";
/// Previews left out because the one before was still being painted, or failed.
const PREVIEWS_SKIPPED: &str = "janua_router_previews_skipped_total";

pub(crate) fn running(change: f64) {
    gauge!(RUNNING).increment(change);
}

pub(crate) fn waiting(change: f64) {
    gauge!(WAITING).increment(change);
}

pub(crate) fn ended(model: &str, output: &'static str, code: Code, took: Duration) {
    let code = format!("{code:?}");
    counter!(REQUESTS, "model" => model.to_owned(), "output" => output, "code" => code).increment(1);
    histogram!(DURATION, "model" => model.to_owned(), "output" => output).record(took);
}

pub(crate) fn first_output(model: &str, after: Duration) {
    histogram!(FIRST_OUTPUT, "model" => model.to_owned()).record(after);
}

pub(crate) fn tokens(model: &str, prompt: u32, output: u32) {
    counter!(PROMPT_TOKENS, "model" => model.to_owned()).increment(prompt.into());
    counter!(OUTPUT_TOKENS, "model" => model.to_owned()).increment(output.into());
}

pub(crate) fn retried(stage: &'static str) {
    counter!(RETRIES, "stage" => stage).increment(1);
}

pub(crate) fn preview_skipped() {
    counter!(PREVIEWS_SKIPPED).increment(1);
}
