//! Real models in the engine: the ids of the fixtures, alone and in company.

#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc};

use checkpoint::Checkpoint;
use domain::{Embeddings, Event, ImageSampling, Job, Mode, Prompt, Sampling, Segment};
use futures::{StreamExt, executor::block_on, future::join_all};
use models::{LoadOptions, load_language};
use safetensors::SafeTensors;
use sched::{Engine, EngineConfig};

/// `image_token_id` of the janus fixture: the places that the picture takes.
const IMAGE_PLACE: u32 = 488;

fn folder(fixture: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures")).join(fixture)
}

struct Golden(Vec<u8>);

impl Golden {
    fn open(fixture: &str) -> Self {
        Self(std::fs::read(folder(fixture).join("golden.safetensors")).unwrap())
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.words(name, u32::from_le_bytes)
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.words(name, f32::from_le_bytes)
    }

    fn words<T>(&self, name: &str, word: impl Fn([u8; 4]) -> T) -> Vec<T> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        file.tensor(name).unwrap().data().chunks_exact(4).map(|bytes| word(bytes.try_into().unwrap())).collect()
    }
}

fn engine(fixture: &str, kv_blocks: usize, config: EngineConfig) -> Engine {
    let checkpoint = Arc::new(Checkpoint::open(&folder(fixture)).unwrap());
    Engine::start(load_language(&checkpoint, &LoadOptions { kv_blocks, threads: 2 }).unwrap(), config)
}

fn continuation(prompt: Prompt, expected: &[u32]) -> Job {
    let sampling = Sampling { max_tokens: Some(expected.len() as u32), ignore_eos: true, ..Sampling::greedy() };
    Job { prompt, mode: Mode::Text { sampling, eos_token_ids: vec![481] }, emitted: Vec::new() }
}

/// Every text prompt of a fixture with the ids that follow it.
fn texts(fixture: &str, prompts: usize) -> Vec<(Job, Vec<u32>)> {
    let golden = Golden::open(fixture);
    let text = |i: usize| {
        let expected = golden.ids(&format!("p{i}.generated_ids"));
        (continuation(Prompt::tokens(golden.ids(&format!("p{i}.input_ids"))), &expected), expected)
    };
    (0..prompts).map(text).collect()
}

/// The picture question of janus, and its drawing: (job, expected).
fn janus() -> Vec<(Job, Vec<u32>)> {
    let golden = Golden::open("janus");
    let ids = golden.ids("p0.input_ids");
    let first = ids.iter().position(|&id| id == IMAGE_PLACE).unwrap();
    let features = golden.values("p0.image_features");
    let picture = Embeddings { width: 64, values: features.into() };
    let after = first + picture.rows();
    let segments = vec![Segment::Tokens(ids[..first].to_vec()), Segment::Embeddings(picture), Segment::Tokens(ids[after..].to_vec())];
    let answer = golden.ids("p0.generated_ids");

    let unconditional = Prompt::tokens(golden.ids("t2i0.uncond_ids"));
    let sampling = ImageSampling { guidance: 5.0, temperature: 0.0, seed: 0 };
    let prompt = Prompt::tokens(golden.ids("t2i0.cond_ids"));
    let drawing = Job { prompt, mode: Mode::Image { unconditional, sampling }, emitted: Vec::new() };
    vec![(continuation(Prompt { segments }, &answer), answer), (drawing, golden.ids("t2i0.image_ids"))]
}

fn outputs(engine: &Engine, jobs: impl IntoIterator<Item = Job>) -> Vec<Vec<u32>> {
    let read = |job| engine.submit(job).unwrap().map(Result::unwrap).collect::<Vec<Event>>();
    let ids =
        |events: Vec<Event>| events.into_iter().filter_map(|e| if let Event::Output { id, .. } = e { Some(id) } else { None }).collect();
    block_on(join_all(jobs.into_iter().map(read))).into_iter().map(ids).collect()
}

/// Alone; sixteen at a time in small steps; again from the prefix cache; and with so few blocks that jobs are preempted.
fn check(fixture: &str, cases: &[(Job, Vec<u32>)]) {
    let quiet = engine(fixture, 64, EngineConfig::default());
    for (job, expected) in cases {
        assert_eq!(outputs(&quiet, [job.clone()]), std::slice::from_ref(expected));
    }
    let mix: Vec<_> = cases.iter().cycle().take(16).cloned().collect();
    let expected: Vec<_> = mix.iter().map(|(_, ids)| ids.clone()).collect();
    let jobs = || mix.iter().map(|(job, _)| job.clone());
    for (kv_blocks, max_batch_tokens, prefix_cache) in [(256, 512, false), (256, 33, true), (256, 7, true), (11, 64, true), (11, 64, false)]
    {
        let busy = engine(fixture, kv_blocks, EngineConfig { max_batch_tokens, prefix_cache, ..EngineConfig::default() });
        assert_eq!(outputs(&busy, jobs()), expected, "{kv_blocks} blocks, {max_batch_tokens} rows per step, prefix cache {prefix_cache}");
        assert_eq!(outputs(&busy, jobs()), expected, "the second time");
    }
    let resumed = |(job, ids): &(Job, Vec<u32>)| Job { emitted: ids[..ids.len() / 2].to_vec(), ..job.clone() };
    let rest: Vec<_> = mix.iter().map(|(_, ids)| ids[ids.len() / 2..].to_vec()).collect();
    assert_eq!(outputs(&quiet, mix.iter().map(resumed)), rest, "resumed in the middle");
}

#[test]
fn llama() {
    check("llama", &texts("llama", 2));
}

#[test]
fn llama_gqa() {
    check("llama_gqa", &texts("llama_gqa", 2));
}

#[test]
fn moe_v1() {
    check("moe_v1", &texts("moe_v1", 2));
}

#[test]
fn v2_lite() {
    check("v2_lite", &texts("v2_lite", 2));
}

#[test]
fn v2_full() {
    check("v2_full", &texts("v2_full", 2));
}

#[test]
fn janus_sees_and_draws() {
    check("janus", &janus());
}
