//! Real models in the engine: the ids of the fixtures, alone and in company.

#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc};

use checkpoint::Checkpoint;
use domain::{Embeddings, Event, FlowState, ImageSampling, Job, Latent, Mode, Prompt, Sampling, Segment, Solver};
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
    let sampling = ImageSampling { guidance: 5.0, temperature: 0.0, ..ImageSampling::default() };
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

/// The flow of the fixture from the reference's noise, and others from noise of their own.
fn flows(engine: &Engine) -> Vec<Job> {
    let golden = Golden::open("janusflow");
    let grid = engine.card().latent_grid().unwrap();
    let ids = golden.ids("gen.cond_ids");
    let flow = |sampling, from| {
        let unconditional = Prompt::tokens(golden.ids("gen.uncond_ids")[..1].to_vec());
        let prompt = Prompt::tokens(ids[..ids.len() - 1].to_vec()); // the time stands where the last token does
        Job { prompt, mode: Mode::Flow { unconditional, sampling, estimate_every: None, from }, emitted: Vec::new() }
    };
    let sampling = ImageSampling { guidance: 2.0, steps: 4, ..ImageSampling::default() };
    let from = FlowState { done: 0, z: Latent::new(grid, golden.values("gen.z0")) };
    let other = |seed, solver| flow(ImageSampling { seed, solver, steps: 3, ..sampling.clone() }, None);
    vec![flow(sampling.clone(), Some(from)), other(1, Solver::Euler), other(2, Solver::Heun), other(3, Solver::Midpoint)]
}

/// The map after every step of each job.
fn maps(engine: &Engine, jobs: &[Job]) -> Vec<Vec<Vec<f32>>> {
    let read = |job: &Job| engine.submit(job.clone()).unwrap().map(Result::unwrap).collect::<Vec<Event>>();
    let map = |event| if let Event::Flow { state, .. } = event { Some(state.z.values.to_vec()) } else { None };
    block_on(join_all(jobs.iter().map(read))).into_iter().map(|events| events.into_iter().filter_map(map).collect()).collect()
}

/// Alone; sixteen jobs at a time, texts among them, in small steps; again from the prefix cache; and with so few blocks that jobs are
/// preempted. Maps are equal to the last bit whatever the company.
#[test]
fn janusflow_draws() {
    let quiet = engine("janusflow", 64, EngineConfig::default());
    let jobs = flows(&quiet);
    let alone: Vec<_> = jobs.iter().map(|job| maps(&quiet, std::slice::from_ref(job)).remove(0)).collect();
    let expected = Golden::open("janusflow").values("gen.z_trajectory");
    let found = alone[0].concat();
    let start = expected.len() - found.len();
    let worst = found.iter().zip(&expected[start..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-4, "off by {worst:e}");

    let golden = Golden::open("janusflow");
    let answer = golden.ids("p0.generated_ids");
    let first = golden.ids("p0.input_ids").iter().position(|&id| id == IMAGE_PLACE).unwrap() - 1; // begins with a row of its own
    let picture = Embeddings { width: 64, values: golden.values("p0.inputs_embeds")[first * 64..(first + 37) * 64].into() };
    let ids = golden.ids("p0.input_ids");
    let segments = vec![Segment::Tokens(ids[..first].to_vec()), Segment::Embeddings(picture), Segment::Tokens(ids[first + 37..].to_vec())];
    let question = continuation(Prompt { segments }, &answer);
    assert_eq!(outputs(&quiet, [question.clone()]), std::slice::from_ref(&answer));

    let mix: Vec<Job> = jobs.iter().cycle().take(12).cloned().collect();
    let expected: Vec<_> = alone.iter().cycle().take(12).cloned().collect();
    for (kv_blocks, max_batch_tokens, prefix_cache) in
        [(256, 512, false), (256, 33, true), (256, 16, true), (12, 64, true), (12, 64, false)]
    {
        let busy = engine("janusflow", kv_blocks, EngineConfig { max_batch_tokens, prefix_cache, ..EngineConfig::default() });
        for round in ["first", "second"] {
            let beside: Vec<_> = (0..4).map(|_| busy.submit(question.clone()).unwrap()).collect();
            assert!(
                maps(&busy, &mix) == expected,
                "{kv_blocks} blocks, {max_batch_tokens} rows, prefix cache {prefix_cache}, {round} time"
            );
            for stream in beside {
                let ids = block_on(
                    stream
                        .filter_map(async |event| if let Event::Output { id, .. } = event.unwrap() { Some(id) } else { None })
                        .collect::<Vec<_>>(),
                );
                assert_eq!(ids, answer);
            }
        }
    }
}
