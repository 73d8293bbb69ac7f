//! What router, tokenizer and mesh add to the language model, all in one process: per emitted token, and to the first one.
//!
//! The language model is a stand-in that costs nothing; router, mesh and tokenizer are the real ones. The same outputs read
//! straight from the stand-in are the baseline of every figure.
#![allow(clippy::unwrap_used)]

#[path = "../tests/fakes/mod.rs"]
mod fakes;

use std::time::{Duration, Instant};

use fakes::*;
use futures::StreamExt;
use proto::v1;
use proto::v1::generate_response::Event;
use proto::v1::language_server::Language;

/// Limits of the project, checked here.
const PER_TOKEN: Duration = Duration::from_micros(50);
const FIRST_TOKEN: Duration = Duration::from_millis(2);

const TOKENS: u32 = 2000;
const ROUNDS: usize = 20;
const REQUESTS: usize = 200;

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let failed = runtime.block_on(measure());
    std::process::exit(i32::from(failed));
}

async fn measure() -> bool {
    // With spans and metrics as in a process that serves.
    let settings = telemetry::TelemetryConfig { level: "warn".to_owned(), ..telemetry::TelemetryConfig::default() };
    let telemetry = telemetry::init(&settings, "janua").await.unwrap();
    let bench = Bench::with_tokenizer(Script::new(), &testkit::fixture("llama")).await;
    let mut failed = false;
    for (name, lonely) in [("tokens that come one by one", true), ("tokens that come in bulk", false)] {
        bench.script.lonely(lonely);
        let direct = median(ROUNDS, async || timed(read_directly(&bench, TOKENS)).await.1).await;
        let whole = median(ROUNDS, async || timed(read(&bench, TOKENS)).await.1).await;
        failed |= line(name, (whole.saturating_sub(direct)) / TOKENS, PER_TOKEN);
    }
    bench.script.lonely(true);
    let direct = median(REQUESTS, async || read_directly(&bench, 2).await).await;
    let whole = median(REQUESTS, async || read(&bench, 2).await).await;
    failed |= line("first token", whole.saturating_sub(direct), FIRST_TOKEN);
    telemetry.shutdown().await;
    failed
}

fn line(name: &str, took: Duration, limit: Duration) -> bool {
    println!("overhead, {name}: {:.1} us (limit {} us)", took.as_secs_f64() * 1e6, limit.as_micros());
    took > limit
}

async fn median(rounds: usize, mut one: impl AsyncFnMut() -> Duration) -> Duration {
    let mut all = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        all.push(one().await);
    }
    all.sort();
    all[rounds / 2]
}

async fn timed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let start = Instant::now();
    (work.await, start.elapsed())
}

/// Reads a whole answer through the router; returns the time to the first token.
async fn read(bench: &Bench, tokens: u32) -> Duration {
    let start = Instant::now();
    let mut stream = bench.open(chat(vec![text_part("hello")], tokens)).await.unwrap();
    let (mut first, mut count) = (None, 0);
    while let Some(response) = stream.next().await {
        if let Some(Event::Text(delta)) = response.unwrap().event {
            first.get_or_insert_with(|| start.elapsed());
            count += delta.token_ids.len();
        }
    }
    assert_eq!(count, tokens as usize);
    first.unwrap()
}

/// Reads the same outputs from the stand-in itself.
async fn read_directly(bench: &Bench, tokens: u32) -> Duration {
    let start = Instant::now();
    let sampling = v1::Sampling { seed: Some(0), max_tokens: Some(tokens), ..v1::Sampling::default() };
    let mode = v1::TextMode { sampling: Some(sampling), eos_token_ids: vec![EOS] };
    let request = v1::LanguageRequest { mode: Some(v1::language_request::Mode::Text(mode)), ..v1::LanguageRequest::default() };
    let mut stream = Fake(bench.script.clone()).generate(tonic::Request::new(request)).await.unwrap().into_inner();
    let (mut first, mut count) = (None, 0);
    while let Some(response) = stream.next().await {
        if let Some(v1::language_response::Event::Outputs(outputs)) = response.unwrap().event {
            first.get_or_insert_with(|| start.elapsed());
            count += outputs.ids.len();
        }
    }
    assert_eq!(count, tokens as usize);
    first.unwrap()
}
