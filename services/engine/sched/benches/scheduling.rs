//! What scheduling and sampling cost beside the model.
//!
//! `cargo bench --package sched` prints one JSON object per line: microseconds per step of 64 decoding jobs over a model that computes
//! nothing, and microseconds per token drawn from 102400 logits, the vocabulary of the published models.
#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use domain::{Event, ImageSampling, Job, Mode, ModelCard, Prompt, Sampling};
use futures::{StreamExt, executor::block_on, stream::select_all};
use layers::{EngineError, LanguageModel, Observer, Step, StepOutput};
use sched::sampler::{self, History};
use sched::{Engine, EngineConfig};

const STREAMS: u64 = 64;
const TOKENS: u32 = 2000;
const VOCABULARY: usize = 102_400;
const ROUNDS: usize = 15;

/// Gives the same few logits to everybody.
struct Nothing(ModelCard);

impl LanguageModel for Nothing {
    fn card(&self) -> &ModelCard {
        &self.0
    }

    fn kv_block_bytes(&self) -> usize {
        1
    }

    fn kv_blocks(&self) -> usize {
        1 << 16
    }

    fn forward(&mut self, step: &Step, _observer: &mut dyn Observer) -> Result<StepOutput, EngineError> {
        let logits = step.slices.iter().map(|slice| slice.head.map(|_| vec![0.0, 1.0])).collect();
        Ok(StepOutput { logits, ..StepOutput::default() })
    }
}

fn main() {
    steps();
    let logits: Vec<f32> = (0..VOCABULARY as u64).map(|i| (sampler::uniform(1, i) * 20.0 - 10.0) as f32).collect();
    let rows = [
        ("greedy", Sampling::greedy()),
        ("temperature", Sampling::default()),
        ("top_p 0.95", Sampling { top_p: 0.95, temperature: 0.7, ..Sampling::default() }),
        ("top_k 50, top_p 0.95", Sampling { top_k: 50, top_p: 0.95, ..Sampling::default() }),
        ("min_p 0.05", Sampling { min_p: 0.05, ..Sampling::default() }),
        ("greedy with 20 logprobs", Sampling { top_logprobs: Some(20), ..Sampling::greedy() }),
    ];
    for (name, sampling) in rows {
        let draw = |index| _ = black_box(sampler::text(&mut logits.clone(), &sampling, &History::default(), index));
        report(&format!("draw, {name}"), median(draw));
    }
    let image = ImageSampling::default();
    let codes = &logits[..16_384];
    report("draw, 16384 codes with guidance", median(|index| _ = black_box(sampler::code(&mut codes.to_vec(), codes, &image, index))));
}

/// Whole steps, delivery to readers on another thread included.
fn steps() {
    let card = ModelCard {
        family: "nothing".into(),
        context_length: 1 << 16,
        vocabulary_size: 2,
        hidden_size: 1,
        canvas: None,
        tokens_per_image: None,
        default_sampling: Sampling::default(),
        default_image_sampling: ImageSampling::default(),
    };
    let engine = Engine::start(Box::new(Nothing(card)), EngineConfig::default());
    let sampling = |seed| Sampling { seed, max_tokens: Some(TOKENS), ..Sampling::default() };
    let job = |seed| Job {
        prompt: Prompt::tokens(vec![0; 100]),
        mode: Mode::Text { sampling: sampling(seed), eos_token_ids: Vec::new() },
        emitted: Vec::new(),
    };
    let began = Instant::now();
    let events = select_all((0..STREAMS).map(|seed| engine.submit(job(seed)).unwrap()));
    let outputs = block_on(events.filter(|event| std::future::ready(matches!(event, Ok(Event::Output { .. })))).count());
    assert_eq!(outputs as u64, STREAMS * u64::from(TOKENS));
    report("step of 64 jobs", began.elapsed() / engine.stats().steps as u32);
}

fn median(mut run: impl FnMut(u64)) -> Duration {
    let timed = |round: usize| {
        let began = Instant::now();
        run(round as u64);
        began.elapsed()
    };
    let mut times: Vec<_> = (0..ROUNDS).map(timed).collect();
    times.sort_unstable();
    times[ROUNDS / 2]
}

fn report(case: &str, time: Duration) {
    println!("{{\"case\": \"{case}\", \"microseconds\": {:.1}}}", time.as_secs_f64() * 1e6);
}
