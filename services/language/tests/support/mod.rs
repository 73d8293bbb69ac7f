//! A language service in the test's own process, jobs of the fixtures, and a model on strings.
#![allow(dead_code)] // each test program uses a part

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use checkpoint::Checkpoint;
use constraint::Grammars;
use domain::{Embeddings, Event, FlowState, ImageSampling, Job, Latent, Mode, ModelCard, Prompt, Sampling, Segment};
use futures::StreamExt;
use layers::{BLOCK_TOKENS, EngineError, Head, LanguageModel, Observer, RowInput, Step, StepOutput};
use mesh::{Channel, MAX_MESSAGE_BYTES, Mesh, Target};
use models::{LoadOptions, load_language};
use process::{Doors, Served};
use proto::v1;
use proto::v1::language_client::LanguageClient;
use safetensors::SafeTensors;
use sched::{Engine, EngineConfig};
use tonic::{Status, Streaming};

/// Limit of everything that is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Service {
    pub client: LanguageClient<Channel>,
    pub channel: Channel,
    pub engine: Arc<Engine>,
    _served: Served,
}

/// An engine over a fixture, offered as the service offers it.
pub async fn serve(fixture: &str) -> Service {
    let model = load_language(&open(fixture), &LoadOptions { kv_blocks: 512, threads: 1 }).unwrap();
    let grammars = Arc::new(Grammars::of(&folder(fixture)));
    serve_engine(Engine::start(model, EngineConfig::default()).with_guides(grammars)).await
}

pub async fn serve_model(model: Box<dyn LanguageModel>, config: EngineConfig) -> Service {
    serve_engine(Engine::start(model, config)).await
}

async fn serve_engine(engine: Engine) -> Service {
    let engine = Arc::new(engine);
    let mesh = Mesh::in_process();
    let offer = language::offer("tiny", engine.clone(), None);
    let served = process::serve(&mesh, &Doors::default(), vec![offer]).await.unwrap();
    let channel = mesh.channel(&Target::new("language", "tiny"));
    Service { client: client(&channel), channel, engine, _served: served }
}

pub fn client(channel: &Channel) -> LanguageClient<Channel> {
    LanguageClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
}

impl Service {
    pub async fn open(&self, job: &Job) -> Result<Streaming<v1::LanguageResponse>, Status> {
        Ok(self.client.clone().generate(wire::language::to_request(job)).await?.into_inner())
    }

    /// Everything that a job says, in messages.
    pub async fn messages(&self, job: &Job) -> Result<Vec<Vec<Event>>, Status> {
        let messages: Vec<_> = self.open(job).await?.collect().await;
        messages.into_iter().map(|message| Ok(wire::language::events(message?).unwrap())).collect()
    }

    pub async fn ids(&self, job: &Job) -> Vec<u32> {
        ids(&self.messages(job).await.unwrap().concat())
    }

    pub async fn wait_until_idle(&self) {
        until("no job is left and all blocks are back", || {
            let stats = self.engine.stats();
            stats.running + stats.waiting == 0 && stats.free_blocks + stats.cached_blocks == stats.blocks
        })
        .await;
    }
}

pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let limit = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < limit, "waited in vain until {what}");
        tokio::task::yield_now().await;
    }
}

pub fn ids(events: &[Event]) -> Vec<u32> {
    events.iter().filter_map(|event| if let Event::Output { id, .. } = event { Some(*id) } else { None }).collect()
}

pub fn open(fixture: &str) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(&folder(fixture)).unwrap())
}

fn folder(fixture: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures")).join(fixture)
}

struct Golden(Vec<u8>);

impl Golden {
    fn open(fixture: &str) -> Self {
        Self(std::fs::read(folder(fixture).join("golden.safetensors")).unwrap())
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.words(name, u32::from_le_bytes)
    }

    fn words<T>(&self, name: &str, word: impl Fn([u8; 4]) -> T) -> Vec<T> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        file.tensor(name).unwrap().data().chunks_exact(4).map(|bytes| word(bytes.try_into().unwrap())).collect()
    }
}

pub fn greedy(prompt: Prompt, count: usize) -> Job {
    let sampling = Sampling { max_tokens: Some(count as u32), ignore_eos: true, ..Sampling::greedy() };
    Job { prompt, mode: Mode::Text { sampling, eos_token_ids: vec![481] }, emitted: Vec::new() }
}

/// A prompt of the llama fixture and what follows it.
pub fn llama(prompt: usize) -> (Job, Vec<u32>) {
    let golden = Golden::open("llama");
    let expected = golden.ids(&format!("p{prompt}.generated_ids"));
    (greedy(Prompt::tokens(golden.ids(&format!("p{prompt}.input_ids"))), expected.len()), expected)
}

/// The drawing of the janus fixture.
pub fn drawing() -> (Job, Vec<u32>) {
    let golden = Golden::open("janus");
    let unconditional = Prompt::tokens(golden.ids("t2i0.uncond_ids"));
    let sampling = ImageSampling { guidance: 5.0, temperature: 0.0, ..ImageSampling::default() };
    let prompt = Prompt::tokens(golden.ids("t2i0.cond_ids"));
    (Job { prompt, mode: Mode::Image { unconditional, sampling }, emitted: Vec::new() }, golden.ids("t2i0.image_ids"))
}

/// The question about a picture of the janus fixture.
pub fn question() -> (Job, Vec<u32>) {
    let golden = Golden::open("janus");
    let (input, expected) = (golden.ids("p0.input_ids"), golden.ids("p0.generated_ids"));
    let picture = Embeddings { width: 64, values: golden.words("p0.image_features", f32::from_le_bytes).into() };
    let first = input.iter().position(|&id| id == 488).unwrap();
    let rest = Segment::Tokens(input[first + picture.rows()..].to_vec());
    let segments = vec![Segment::Tokens(input[..first].to_vec()), Segment::Embeddings(picture), rest];
    (greedy(Prompt { segments }, expected.len()), expected)
}

/// The flow of the janusflow fixture with this many steps; without `from`, from the noise of seed 0.
pub fn flow(steps: u32, from: Option<FlowState>) -> Job {
    let golden = Golden::open("janusflow");
    let ids = golden.ids("gen.cond_ids");
    let sampling = ImageSampling { guidance: 2.0, steps, ..ImageSampling::default() };
    let mode = Mode::Flow { unconditional: Prompt::tokens(vec![ids[0]]), sampling, estimate_every: Some(2), from };
    Job { prompt: Prompt::tokens(ids[..ids.len() - 1].to_vec()), mode, emitted: Vec::new() }
}

/// The maps of the reference flow, its noise first.
pub fn maps() -> Vec<Latent> {
    let values = Golden::open("janusflow").words("gen.z_trajectory", f32::from_le_bytes);
    values.chunks(4 * 12 * 12).map(|map| Latent { channels: 4, rows: 12, columns: 12, values: map.into() }).collect()
}

/// More outputs than are buffered for a reader: unread, it cannot finish.
pub fn endless() -> Job {
    greedy(llama(0).0.prompt, 4000)
}

/// A model that computes when it is told to, and stumbles over tokens 1 (an error) and 2 (a crash).
pub struct Puppet {
    card: ModelCard,
    strings: Receiver<()>,
}

/// The puppet and what moves it: one step for every message, any number once the sender is gone.
pub fn puppet() -> (Box<Puppet>, SyncSender<()>) {
    let (sender, strings) = sync_channel(1);
    let card = ModelCard { vocabulary_size: 8, context_length: 64, ..models::card(&open("llama")).unwrap() };
    (Box::new(Puppet { card, strings }), sender)
}

impl LanguageModel for Puppet {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn kv_block_bytes(&self) -> usize {
        BLOCK_TOKENS
    }

    fn kv_blocks(&self) -> usize {
        16
    }

    fn forward(&mut self, step: &Step, _observer: &mut dyn Observer) -> Result<StepOutput, EngineError> {
        let _ = self.strings.recv();
        let has = |token| step.rows.iter().any(|row| matches!(row, RowInput::Token(id) if *id == token));
        if has(1) {
            return Err(EngineError::Compute("a string broke".into()));
        }
        assert!(!has(2), "the puppet fell");
        let logits = step.slices.iter().map(|slice| (slice.head == Some(Head::Text)).then(|| vec![0.0; 8]));
        Ok(StepOutput { logits: logits.collect(), ..StepOutput::default() })
    }
}
