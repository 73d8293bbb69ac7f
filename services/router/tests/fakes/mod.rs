//! Small implementations of the internal services, whose every answer can be computed by hand, with faults on demand.
//!
//! Token id = byte. The language model answers position i of a sequence with letter `(seed + i) mod 26`, or code `(seed + i) mod 10`.
#![allow(clippy::unwrap_used, dead_code)]

mod messages;

use std::collections::VecDeque;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use domain::{Canvas, CodeGrid, ImageSampling, Invalid, LatentGrid, ModelCard, Sampling};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use mesh::{Channel, Mesh, Routes, Serving, Target};
pub use messages::*;
use process::{Host, Silent};
use proto::v1;
use proto::v1::generate_response::Event;
use proto::v1::images_server::{Images, ImagesServer};
use proto::v1::janua_client::JanuaClient;
use proto::v1::language_response::Event as LanguageEvent;
use proto::v1::language_server::{Language, LanguageServer};
use proto::v1::tokenizer_server::{Tokenizer, TokenizerServer};
use proto::v1::vision_server::{Vision, VisionServer};
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status, Streaming};

pub const MODEL: &str = "tiny";
pub const SERVICES: [&str; 4] = ["tokenizer", "vision", "language", "images"];
/// Longest wait for anything.
pub const LIMIT: Duration = Duration::from_secs(20);
/// Hidden size, and positions per picture.
pub const WIDTH: usize = 4;
pub const ROWS: usize = 3;
/// End of sentence.
pub const EOS: u32 = 0;
/// Padding.
pub const PAD: u32 = 1;

/// What the fakes are told to do and what they saw.
pub struct Script {
    pub card: Mutex<ModelCard>,
    /// Faults of coming calls, one per call, in order: after how many outputs, and how.
    pub language_faults: Mutex<VecDeque<Fault>>,
    pub detokenize_faults: Mutex<VecDeque<Fault>>,
    /// Unary calls of any stage that fail first.
    pub unary_faults: Mutex<VecDeque<Code>>,
    /// Answer with EOS at this position.
    pub eos_at: Mutex<Option<usize>>,
    /// Outputs per stream message.
    pub chunk: AtomicUsize,
    /// Give way to other tasks before every message, as a model that needs its time does.
    pub lonely: AtomicBool,
    /// Outputs may be made while this has permits (every output takes one).
    pub steps: Semaphore,
    /// Image decodings of incomplete code maps wait for this.
    pub previews: Semaphore,
    pub language_requests: Mutex<Vec<v1::LanguageRequest>>,
    pub decode_requests: Mutex<Vec<v1::DecodeImageRequest>>,
    /// Outputs made, and language streams alive.
    pub made: AtomicUsize,
    pub alive: AtomicUsize,
    pub encoded: AtomicUsize,
}

#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub after: usize,
    /// `None`: the stream ends without a word.
    pub code: Option<Code>,
}

impl Script {
    pub fn new() -> Arc<Self> {
        let card = ModelCard {
            family: "fake".to_owned(),
            context_length: 4096,
            vocabulary_size: 256,
            hidden_size: WIDTH,
            canvas: Some(Canvas::Codes(CodeGrid { rows: 3, columns: 4, codebook_size: 10 })),
            tokens_per_image: Some(ROWS),
            default_sampling: Sampling { max_tokens: None, ..Sampling::default() },
            default_image_sampling: ImageSampling::default(),
        };
        Arc::new(Self {
            card: Mutex::new(card),
            language_faults: Mutex::default(),
            detokenize_faults: Mutex::default(),
            unary_faults: Mutex::default(),
            eos_at: Mutex::default(),
            chunk: AtomicUsize::new(1),
            lonely: AtomicBool::new(false),
            steps: Semaphore::new(Semaphore::MAX_PERMITS),
            previews: Semaphore::new(Semaphore::MAX_PERMITS),
            language_requests: Mutex::default(),
            decode_requests: Mutex::default(),
            made: AtomicUsize::new(0),
            alive: AtomicUsize::new(0),
            encoded: AtomicUsize::new(0),
        })
    }

    fn unary(&self) -> Result<(), Status> {
        match self.unary_faults.lock().unwrap().pop_front() {
            Some(code) if code != Code::Ok => Err(Status::new(code, "told to fail")),
            _ => Ok(()),
        }
    }

    pub fn lonely(&self, lonely: bool) {
        self.lonely.store(lonely, Ordering::SeqCst);
    }

    pub fn alive(&self) -> usize {
        self.alive.load(Ordering::SeqCst)
    }

    pub fn made(&self) -> usize {
        self.made.load(Ordering::SeqCst)
    }
}

#[derive(Clone)]
pub struct Fake(pub Arc<Script>);

fn ids(parts: &[v1::Part], segments: &mut Vec<v1::PreparedSegment>, images: &mut u32) {
    for part in parts {
        let segment = match part.part.as_ref().unwrap() {
            v1::part::Part::Text(text) => {
                let ids = text.bytes().map(u32::from).collect();
                v1::prepared_segment::Segment::Tokens(v1::TokenIds { ids })
            }
            v1::part::Part::Image(image) => {
                assert!(image.data.is_empty(), "pixels are none of the tokenizer's business");
                *images += 1;
                v1::prepared_segment::Segment::Image(*images - 1)
            }
        };
        segments.push(v1::PreparedSegment { segment: Some(segment) });
    }
}

/// The other half of a guidance pair: the same tokens, and [`PAD`] for pictures.
fn padded(segment: &v1::PreparedSegment) -> v1::PreparedSegment {
    match segment.segment {
        Some(v1::prepared_segment::Segment::Image(image)) => {
            v1::PreparedSegment { segment: Some(v1::prepared_segment::Segment::Padding(v1::ImagePadding { image, id: PAD })) }
        }
        _ => segment.clone(),
    }
}

#[tonic::async_trait]
impl Tokenizer for Fake {
    async fn prepare(&self, request: Request<v1::PrepareRequest>) -> Result<Response<v1::PrepareResponse>, Status> {
        self.0.unary()?;
        let request = request.into_inner();
        let (mut segments, mut images) = (Vec::new(), 0);
        match request.input.unwrap() {
            v1::prepare_request::Input::Chat(chat) => {
                chat.messages.iter().for_each(|message| ids(&message.parts, &mut segments, &mut images));
            }
            v1::prepare_request::Input::Completion(completion) => ids(&completion.parts, &mut segments, &mut images),
            v1::prepare_request::Input::Fim(fim) => {
                let text = format!("{}_{}", fim.prefix, fim.suffix);
                ids(&[text_part(&text)], &mut segments, &mut images);
            }
        }
        let drawing = request.output == v1::OutputKind::Image as i32;
        let unconditional = if drawing { segments.iter().map(padded).collect() } else { Vec::new() };
        Ok(Response::new(v1::PrepareResponse { segments, unconditional, eos_token_ids: vec![EOS] }))
    }

    async fn encode(&self, request: Request<v1::EncodeTextRequest>) -> Result<Response<v1::EncodeTextResponse>, Status> {
        self.0.unary()?;
        Ok(Response::new(v1::EncodeTextResponse { ids: request.into_inner().text.bytes().map(u32::from).collect() }))
    }

    async fn decode(&self, _: Request<v1::DecodeTextRequest>) -> Result<Response<v1::DecodeTextResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    type DetokenizeStream = BoxStream<'static, Result<v1::DetokenizeResponse, Status>>;

    async fn detokenize(&self, request: Request<Streaming<v1::DetokenizeRequest>>) -> Result<Response<Self::DetokenizeStream>, Status> {
        let fault = self.0.detokenize_faults.lock().unwrap().pop_front();
        let state = Detokenizing { requests: request.into_inner(), stop: Vec::new(), text: String::new(), given: 0, answers: 0, fault };
        Ok(Response::new(futures::stream::unfold(state, async |mut state| Some((state.answer().await?, state))).boxed()))
    }
}

struct Detokenizing {
    requests: Streaming<v1::DetokenizeRequest>,
    stop: Vec<String>,
    text: String,
    given: usize,
    answers: usize,
    fault: Option<Fault>,
}

impl Detokenizing {
    /// Text up to the first stop string; without one, all that cannot be the beginning of one.
    async fn answer(&mut self) -> Option<Result<v1::DetokenizeResponse, Status>> {
        loop {
            let tokens = match self.requests.next().await?.unwrap().request.unwrap() {
                v1::detokenize_request::Request::Open(open) => {
                    self.stop = open.stop;
                    continue;
                }
                v1::detokenize_request::Request::Tokens(tokens) => tokens,
            };
            if let Some(fault) = self.fault.filter(|fault| self.answers >= fault.after) {
                return fault.code.map(|code| Err(Status::new(code, "told to fail")));
            }
            self.answers += 1;
            let before = self.text.len();
            self.text.extend(tokens.ids.iter().filter(|id| **id != EOS).map(|id| *id as u8 as char));
            let found = self.stop.iter().filter_map(|stop| self.text.find(stop.as_str())).min();
            let held = (0..self.text.len())
                .find(|&at| !tokens.last && self.stop.iter().any(|stop| stop.starts_with(&self.text[at..])))
                .unwrap_or(self.text.len());
            let end = found.unwrap_or(held).max(self.given);
            let text = self.text[self.given..end].to_owned();
            self.given = end;
            let accepted = found.map_or(tokens.ids.len(), |at| at.saturating_sub(before)) as u32;
            let logprobs = tokens.logprobs.into_iter().map(|mut entry| {
                let chosen = entry.chosen.as_mut().unwrap();
                chosen.bytes = Bytes::from(vec![chosen.token_id as u8]);
                entry
            });
            return Some(Ok(v1::DetokenizeResponse { text, accepted, stopped: found.is_some(), logprobs: logprobs.collect() }));
        }
    }
}

#[tonic::async_trait]
impl Vision for Fake {
    /// Every value of the embedding is the first byte of the picture. Pictures that begin with `?` are refused.
    async fn encode(&self, request: Request<v1::EncodeImageRequest>) -> Result<Response<v1::EncodeImageResponse>, Status> {
        self.0.unary()?;
        self.0.encoded.fetch_add(1, Ordering::SeqCst);
        let data = request.into_inner().image.unwrap().data;
        if data.first() == Some(&b'?') {
            return Err(wire::invalid(&Invalid::new("image.data", "not a picture")));
        }
        let values = [f32::from(data[0]); ROWS * WIDTH];
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into();
        let embeddings = Some(v1::Embeddings { rows: ROWS as u32, width: WIDTH as u32, data });
        Ok(Response::new(v1::EncodeImageResponse { embeddings, cached: false }))
    }
}

#[tonic::async_trait]
impl Images for Fake {
    async fn decode(&self, request: Request<v1::DecodeImageRequest>) -> Result<Response<v1::DecodeImageResponse>, Status> {
        let request = request.into_inner();
        self.0.decode_requests.lock().unwrap().push(request.clone());
        let whole = match self.0.card.lock().unwrap().canvas.unwrap() {
            Canvas::Codes(grid) => request.codes.len() == grid.len(),
            Canvas::Latent(_) => !request.metadata.is_empty(), // nothing is noted about a preview
        };
        if !whole {
            self.0.previews.acquire().await.unwrap().forget();
        } else {
            self.0.unary()?;
        }
        let codes = || Bytes::from(request.codes.iter().map(|code| *code as u8).collect::<Vec<_>>());
        let data = request.latent.as_ref().map_or_else(codes, |latent| latent.data.clone());
        Ok(Response::new(v1::DecodeImageResponse { data, media_type: "image/png".to_owned(), width: 4, height: 3 }))
    }
}

#[tonic::async_trait]
impl Language for Fake {
    type GenerateStream = Sequence;

    async fn generate(&self, request: Request<v1::LanguageRequest>) -> Result<Response<Sequence>, Status> {
        let request = request.into_inner();
        self.0.language_requests.lock().unwrap().push(request.clone());
        let fault = self.0.language_faults.lock().unwrap().pop_front();
        if let Some(Fault { after: 0, code: Some(code) }) = fault {
            return Err(Status::new(code, "told to fail"));
        }
        self.0.alive.fetch_add(1, Ordering::SeqCst);
        let messages = futures::stream::unfold(Making::new(self.0.clone(), request, fault), async |mut making| {
            Some((making.message().await?, making))
        });
        Ok(Response::new(Sequence { script: self.0.clone(), messages: messages.boxed() }))
    }

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        Ok(Response::new(wire::model::to_card(&self.0.card.lock().unwrap())))
    }
}

/// A language stream that is counted while it lives.
pub struct Sequence {
    script: Arc<Script>,
    messages: BoxStream<'static, Result<v1::LanguageResponse, Status>>,
}

impl Stream for Sequence {
    type Item = Result<v1::LanguageResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.messages.poll_next_unpin(context)
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.script.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Making {
    script: Arc<Script>,
    request: v1::LanguageRequest,
    fault: Option<Fault>,
    prefilled: bool,
    /// Outputs of this call.
    made: usize,
    /// Why it is over.
    over: Option<v1::FinishReason>,
    done: bool,
}

impl Making {
    fn new(script: Arc<Script>, request: v1::LanguageRequest, fault: Option<Fault>) -> Self {
        Self { script, request, fault, prefilled: false, made: 0, over: None, done: false }
    }

    async fn message(&mut self) -> Option<Result<v1::LanguageResponse, Status>> {
        if self.script.lonely.load(Ordering::SeqCst) {
            // Once to have tonic send what it holds, once for the reader to find nothing more.
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
        }
        let event = if !self.prefilled {
            self.prefilled = true;
            LanguageEvent::Prefilled(v1::Prefilled { prompt_tokens: 0, cached_tokens: 1 })
        } else if let Some(fault) = self.fault.filter(|fault| self.made >= fault.after) {
            return fault.code.map(|code| Err(Status::new(code, "told to fail")));
        } else if let Some(reason) = self.over {
            if self.done {
                return None;
            }
            self.done = true;
            LanguageEvent::Finished(reason.into())
        } else if matches!(self.request.mode, Some(v1::language_request::Mode::Flow(_))) {
            LanguageEvent::Flow(self.step().await)
        } else {
            LanguageEvent::Outputs(self.outputs().await)
        };
        Some(Ok(v1::LanguageResponse { event: Some(event) }))
    }

    async fn outputs(&mut self) -> v1::Outputs {
        let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
        for _ in 0..self.script.chunk.load(Ordering::SeqCst) {
            if self.over.is_some() || self.fault.is_some_and(|fault| self.made >= fault.after) {
                break;
            }
            self.script.steps.acquire().await.unwrap().forget();
            let position = self.request.emitted.len() + self.made;
            let id = self.output(position);
            self.made += 1;
            self.script.made.fetch_add(1, Ordering::SeqCst);
            ids.push(id);
            if self.wants_logprobs() {
                let chosen = Some(v1::Logprob { token_id: id, logprob: -0.5, bytes: Bytes::new() });
                logprobs.push(v1::TokenLogprobs { chosen, top: Vec::new() });
            }
        }
        v1::Outputs { ids, logprobs }
    }

    /// The next step of a flow.
    async fn step(&mut self) -> v1::FlowStep {
        self.script.steps.acquire().await.unwrap().forget();
        let Some(v1::language_request::Mode::Flow(mode)) = &self.request.mode else { unreachable!() };
        let sampling = mode.sampling.as_ref().unwrap();
        let before = mode.from.as_ref().map_or(0, |state| state.done) + self.made as u32;
        let (done, total) = (before + 1, sampling.steps.unwrap());
        self.made += 1;
        self.script.made.fetch_add(1, Ordering::SeqCst);
        if done == total {
            self.over = Some(v1::FinishReason::Stop);
        }
        let due = mode.estimate_every > 0 && done % mode.estimate_every == 0 && done < total;
        let state = v1::FlowState { done, z: Some(map(sampling.seed.unwrap(), done)) };
        v1::FlowStep { state: Some(state), total, estimate: due.then(|| map(sampling.seed.unwrap(), 100 + done)) }
    }

    fn output(&mut self, position: usize) -> u32 {
        match self.request.mode.as_ref().unwrap() {
            v1::language_request::Mode::Text(text) => {
                let sampling = text.sampling.as_ref().unwrap();
                if position + 1 >= sampling.max_tokens.unwrap() as usize {
                    self.over = Some(v1::FinishReason::Length);
                }
                if *self.script.eos_at.lock().unwrap() == Some(position) && !sampling.ignore_eos {
                    self.over = Some(v1::FinishReason::Stop);
                    return EOS;
                }
                letter(sampling.seed.unwrap(), position)
            }
            v1::language_request::Mode::Image(image) => {
                let total = self.script.card.lock().unwrap().code_grid().unwrap().len();
                if position + 1 >= total {
                    self.over = Some(v1::FinishReason::Stop);
                }
                code(image.sampling.as_ref().unwrap().seed.unwrap(), position)
            }
            v1::language_request::Mode::Flow(_) => unreachable!("a flow has steps"),
        }
    }

    fn wants_logprobs(&self) -> bool {
        matches!(&self.request.mode, Some(v1::language_request::Mode::Text(t)) if t.sampling.as_ref().unwrap().top_logprobs.is_some())
    }
}

pub fn letter(seed: u64, position: usize) -> u32 {
    u32::from(b'a') + ((seed as usize).wrapping_add(position) % 26) as u32
}

pub fn code(seed: u64, position: usize) -> u32 {
    ((seed as usize).wrapping_add(position) % 10) as u32
}

/// The map after a step of a flow; that of an estimate is as if 100 more had been taken.
pub fn map(seed: u64, done: u32) -> v1::Latent {
    let values = [seed as f32, done as f32, -1.5, 0.25];
    v1::Latent { channels: 1, rows: 2, columns: 2, data: values.map(f32::to_le_bytes).concat().into() }
}

/// What images of a model are made of that draws by a flow.
pub const FLOW: Canvas = Canvas::Latent(LatentGrid { channels: 1, rows: 2, columns: 2, positions: 5 });

/// The text that the language model answers.
pub fn answer(seed: u64, length: usize) -> String {
    (0..length).map(|position| letter(seed, position) as u8 as char).collect()
}

/// The router in front of the fakes, on an in-process mesh.
pub struct Bench {
    pub script: Arc<Script>,
    pub mesh: Mesh,
    pub client: JanuaClient<Channel>,
    pub serving: Vec<Serving>,
    pub host: Host,
}

impl Bench {
    pub async fn new(script: Arc<Script>) -> Self {
        Self::with(script, &[]).await
    }

    /// With settings of section `router`.
    pub async fn with(script: Arc<Script>, settings: &[(&str, &str)]) -> Self {
        Self::empty(Mesh::in_process(), script, settings, Path::new("unused")).served().await
    }

    /// On a mesh of the caller's.
    pub async fn on(mesh: Mesh, script: Arc<Script>) -> Self {
        Self::empty(mesh, script, &[], Path::new("unused")).served().await
    }

    /// On an in-process mesh with nothing served yet.
    pub fn bare(script: Arc<Script>) -> Self {
        Self::empty(Mesh::in_process(), script, &[], Path::new("unused"))
    }

    async fn served(mut self) -> Self {
        for service in SERVICES {
            self.serve(service).await;
        }
        self.open_door().await;
        self
    }

    /// With the real tokenizer of a checkpoint in front of the language model that is made up.
    pub async fn with_tokenizer(script: Arc<Script>, dir: &Path) -> Self {
        let mut bench = Self::empty(Mesh::in_process(), script, &[], dir);
        bench.serve("language").await;
        bench.host.models = process::open_models(&bench.host.config, &bench.host.progress, false).await.unwrap();
        for offer in tokenizer::start(&bench.host).await.unwrap() {
            bench.serving.push(bench.mesh.serve(offer.target, offer.routes).await.unwrap());
        }
        bench.open_door().await;
        bench
    }

    fn empty(mesh: Mesh, script: Arc<Script>, settings: &[(&str, &str)], dir: &Path) -> Self {
        let settings: Vec<_> = settings.iter().map(|(key, value)| (format!("router.{key}"), (*value).to_owned())).collect();
        let mut config = config::Config::resolve(None, [], &settings).unwrap();
        config.add_model(&format!("tiny={}", dir.display())).unwrap();
        let host = Host::new(config, mesh.clone(), Vec::new(), Arc::new(Silent));
        Self { client: JanuaClient::new(mesh.channel(&Target::new("router", "janua"))), script, mesh, serving: Vec::new(), host }
    }

    async fn open_door(&mut self) {
        let offer = self.mesh.serve(Target::new("router", "janua"), router::routes(&self.host).unwrap()).await.unwrap();
        self.serving.push(offer);
    }

    async fn serve(&mut self, service: &str) {
        let serving = self.mesh.serve(Target::new(service, MODEL), self.routes(service)).await.unwrap();
        self.serving.push(serving);
    }

    /// The fake of one service.
    pub fn routes(&self, service: &str) -> Routes {
        let fake = Fake(self.script.clone());
        match service {
            "tokenizer" => Routes::new().service(TokenizerServer::new(fake)),
            "vision" => Routes::new().service(VisionServer::new(fake)),
            "language" => Routes::new().service(LanguageServer::new(fake)),
            _ => Routes::new().service(ImagesServer::new(fake)),
        }
    }

    pub async fn open(&self, request: v1::GenerateRequest) -> Result<Streaming<v1::GenerateResponse>, Status> {
        Ok(self.client.clone().generate(request).await?.into_inner())
    }

    /// Everything that the client sees.
    pub async fn ask(&self, request: v1::GenerateRequest) -> Result<Vec<Event>, Status> {
        let mut stream = self.open(request).await?;
        let mut events = Vec::new();
        while let Some(response) = stream.next().await {
            events.push(response?.event.unwrap());
        }
        Ok(events)
    }
}

/// Reads on until an event `is` what is waited for.
pub async fn until(stream: &mut Streaming<v1::GenerateResponse>, is: impl Fn(&Event) -> bool) -> Event {
    let found = async {
        while let Some(response) = stream.next().await {
            let event = response.unwrap().event.unwrap();
            if is(&event) {
                return event;
            }
        }
        panic!("the stream ended before the event came");
    };
    tokio::time::timeout(LIMIT, found).await.expect("the event never came")
}
