//! What the services cost beside the engine: the same greedy request to `sched::Engine` itself, through the embedded services (router,
//! tokenizer, language over the in-process wire), and through the HTTP/2 door; and how fairly 64 streams share one model.
//!
//! `cargo bench --package tests` prints a table, then one JSON object per line. Rounds of the three ways alternate, so that whatever else
//! the machine does meets all of them; medians are compared.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use checkpoint::Checkpoint;
use domain::{Event, Job, Mode, Prompt, Sampling};
use futures::StreamExt;
use models::LoadOptions;
use proto::v1;
use proto::v1::generate_response::Event as Answered;
use proto::v1::janua_client::JanuaClient;
use sched::{Engine, EngineConfig};
use serde_json::json;
use tests::{Wire, World, request};
use text::TextCodec;

const PROMPT: &str = "The quick river compiles a small theorem.";
/// Tokens per request.
const TOKENS: u32 = 512;
const ROUNDS: usize = 21;
const STREAMS: usize = 64;
const FAIRNESS_TIME: Duration = Duration::from_secs(10);
/// Tokens per request of these streams.
const SHORT: u32 = 700;
const LONG: u32 = 2048;
/// Bytes of a KV cache that holds about half of the long streams.
const SMALL_KV_CACHE: &str = "100000000";

/// Goals: overhead per token, overhead until the first token, most to least tokens of a stream.
const PER_TOKEN_GOAL_US: f64 = 50.0;
const FIRST_TOKEN_GOAL_MS: f64 = 2.0;
const FAIRNESS_GOAL: f64 = 1.5;

/// How long one request took.
#[derive(Debug, Clone, Copy)]
struct Timing {
    first_token: Duration,
    /// From the first token to the last.
    rest: Duration,
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (engine, prompt) = direct();
    let world = runtime.block_on(World::start(Wire::InProcess, &["llama"]));
    let embedded = || embedded(&world);
    let mut timings: [Vec<Timing>; 3] = Default::default();
    for round in 0..=ROUNDS {
        // Each way is the first of a round as often as the others.
        for way in (0..3).map(|i| (i + round) % 3) {
            let timing = match way {
                0 => runtime.block_on(run_direct(&engine, &prompt)),
                1 => runtime.block_on(run_client(embedded())),
                _ => runtime.block_on(run_client(world.client())),
            };
            // The first round warms caches and pools.
            if round > 0 {
                timings[way].push(timing);
            }
        }
    }
    let [direct, embedded, door] = timings.map(|list| (median(&list, |t| t.first_token), median(&list, |t| t.rest)));
    let per_token = |way: (Duration, Duration)| micros(way.1) / f64::from(TOKENS - 1);
    let alone = runtime.block_on(crowd(&engine, &prompt));
    let short = runtime.block_on(fairness(&world, SHORT));
    let long = runtime.block_on(fairness(&world, LONG));
    let crowded = runtime.block_on(async {
        let world = World::start_with(Wire::InProcess, &["llama"], &[("language.kv_cache_bytes", SMALL_KV_CACHE)]).await;
        let counts = fairness(&world, LONG).await;
        world.stop().await;
        counts
    });
    let spread = |counts: &[u64]| *counts.iter().max().unwrap() as f64 / (*counts.iter().min().unwrap()).max(1) as f64;

    let mut rows = Vec::new();
    for (way, timing, goals) in [("embedded", embedded, true), ("HTTP/2 door", door, false)] {
        let token = per_token(timing) - per_token(direct);
        rows.push(Row::new(&format!("{way}: overhead per token"), token, "us", goals.then_some(PER_TOKEN_GOAL_US)));
        let first = (micros(timing.0) - micros(direct.0)) / 1e3;
        rows.push(Row::new(&format!("{way}: overhead to first token"), first, "ms", goals.then_some(FIRST_TOKEN_GOAL_MS)));
    }
    rows.push(Row::new("engine alone: per token", per_token(direct), "us", None));
    rows.push(Row::new("engine alone: to first token", micros(direct.0) / 1e3, "ms", None));
    for (tokens, counts) in [(SHORT, &short), (LONG, &long)] {
        rows.push(Row::new(&format!("{STREAMS} streams of {tokens}: most / least tokens"), spread(counts), "x", Some(FAIRNESS_GOAL)));
    }
    rows.push(Row::new(&format!("{STREAMS} streams, KV cache too small: most / least"), spread(&crowded), "x", None));
    let per_second = short.iter().sum::<u64>() as f64 / FAIRNESS_TIME.as_secs_f64();
    rows.push(Row::new(&format!("{STREAMS} streams: tokens per second"), per_second, "/s", None));
    rows.push(Row::new(&format!("engine alone: {STREAMS} jobs, tokens per second"), alone, "/s", None));
    runtime.block_on(world.stop());
    rows.iter().for_each(Row::print);
    rows.iter().for_each(|row| println!("{}", row.json()));
}

/// The engine as the language service starts it, and the prompt's ids.
fn direct() -> (Engine, Vec<u32>) {
    let checkpoint = Arc::new(Checkpoint::open(&testkit::fixture("llama")).unwrap());
    let prompt = TextCodec::load(&checkpoint).unwrap().encode(PROMPT, true);
    let model = models::load_language(&checkpoint, &LoadOptions { kv_blocks: 1024, threads: 0 }).unwrap();
    (Engine::start(model, EngineConfig::default()), prompt)
}

async fn run_direct(engine: &Engine, prompt: &[u32]) -> Timing {
    let sampling = Sampling { max_tokens: Some(TOKENS), ignore_eos: true, ..Sampling::greedy() };
    let mode = Mode::Text { sampling, eos_token_ids: Vec::new() };
    let begun = Instant::now();
    let mut stream = engine.submit(Job { prompt: Prompt::tokens(prompt.to_vec()), mode, emitted: Vec::new() }).unwrap();
    let mut clock = Clock::start(begun);
    while let Some(event) = stream.next().await {
        if let Event::Output { .. } = event.unwrap() {
            clock.tokens(1);
        }
    }
    clock.timing()
}

/// Tokens per second of [`STREAMS`] jobs at once.
async fn crowd(engine: &Engine, prompt: &[u32]) -> f64 {
    let begun = Instant::now();
    futures::future::join_all((0..STREAMS).map(|_| run_direct(engine, prompt))).await;
    STREAMS as f64 * f64::from(TOKENS) / begun.elapsed().as_secs_f64()
}

/// A client on the in-process wire.
fn embedded(world: &World) -> JanuaClient<mesh::Channel> {
    JanuaClient::new(world.router())
}

async fn run_client<T>(mut client: JanuaClient<T>) -> Timing
where
    T: tonic::client::GrpcService<tonic::body::Body>,
    T::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    T::ResponseBody: tonic::codegen::Body<Data = bytes::Bytes> + Send + 'static,
    <T::ResponseBody as tonic::codegen::Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let message = request::for_text("llama", request::completion(vec![request::text(PROMPT)]), request::greedy(TOKENS));
    let begun = Instant::now();
    let mut stream = client.generate(message).await.unwrap().into_inner();
    let mut clock = Clock::start(begun);
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Answered::Text(delta)) = message.event {
            clock.tokens(delta.token_ids.len() as u32);
        }
    }
    clock.timing()
}

/// Notes when the first and the last token came.
struct Clock {
    begun: Instant,
    first: Option<Instant>,
    last: Instant,
    count: u32,
}

impl Clock {
    fn start(begun: Instant) -> Self {
        Self { begun, first: None, last: begun, count: 0 }
    }

    fn tokens(&mut self, count: u32) {
        if count > 0 {
            self.last = Instant::now();
            self.first.get_or_insert(self.last);
            self.count += count;
        }
    }

    fn timing(self) -> Timing {
        assert_eq!(self.count, TOKENS, "every request is answered in full");
        let first = self.first.unwrap();
        Timing { first_token: first - self.begun, rest: self.last - first }
    }
}

/// Tokens of each of [`STREAMS`] clients within [`FAIRNESS_TIME`], in requests of `tokens`. A client whose request ends sends the next one.
async fn fairness(world: &World, tokens: u32) -> Vec<u64> {
    let counts: Arc<Vec<AtomicU64>> = Arc::new((0..STREAMS).map(|_| AtomicU64::new(0)).collect());
    let (counting, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    // Nobody waits for the others with a backlog growing behind: all read on, and counting begins when all have begun.
    let started = Arc::new(tokio::sync::Semaphore::new(0));
    let clients: Vec<_> = (0..STREAMS)
        .map(|i| {
            let (mut client, counts, counting, over, started) =
                (world.client(), counts.clone(), counting.clone(), over.clone(), started.clone());
            tokio::spawn(async move {
                let mut first = true;
                while !over.load(Ordering::Relaxed) {
                    let input = request::completion(vec![request::text(&format!("Stream {i}: {PROMPT}"))]);
                    let mut stream =
                        client.generate(request::for_text("llama", input, request::greedy(tokens))).await.unwrap().into_inner();
                    while let Some(v1::GenerateResponse { event }) = stream.message().await.unwrap() {
                        let Some(Answered::Text(delta)) = event else { continue };
                        if std::mem::take(&mut first) {
                            started.add_permits(1);
                        }
                        if counting.load(Ordering::Relaxed) {
                            counts[i].fetch_add(delta.token_ids.len() as u64, Ordering::Relaxed);
                        }
                        if over.load(Ordering::Relaxed) {
                            return;
                        }
                    }
                }
            })
        })
        .collect();
    started.acquire_many(STREAMS as u32).await.unwrap().forget();
    counting.store(true, Ordering::Relaxed);
    tokio::time::sleep(FAIRNESS_TIME).await;
    counting.store(false, Ordering::Relaxed);
    over.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    counts.iter().map(|count| count.load(Ordering::Relaxed)).collect()
}

/// One measured number beside its goal.
struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    goal: Option<f64>,
}

impl Row {
    fn new(name: &str, value: f64, unit: &'static str, goal: Option<f64>) -> Self {
        Self { name: name.to_owned(), value, unit, goal }
    }

    fn met(&self) -> Option<bool> {
        self.goal.map(|goal| self.value <= goal)
    }

    fn print(&self) {
        let goal = self.goal.map_or(String::new(), |goal| format!("<= {goal} {}", self.unit));
        let verdict = match self.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        };
        println!("{:48} {:>10.2} {:3} {goal:14} {verdict}", self.name, self.value, self.unit);
    }

    fn json(&self) -> serde_json::Value {
        json!({"bench": "overhead", "name": self.name, "value": self.value, "unit": self.unit, "goal": self.goal, "met": self.met()})
    }
}

fn median(timings: &[Timing], of: impl Fn(&Timing) -> Duration) -> Duration {
    let mut values: Vec<Duration> = timings.iter().map(of).collect();
    values.sort();
    values[values.len() / 2]
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
