use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use bytes::Bytes;
use domain::{Canvas, Invalid, ModelCard, OutputKind};
use futures::future::try_join_all;
use futures::stream::{self, FuturesUnordered, StreamExt, TryStreamExt};
use proto::v1;
use proto::v1::generate_response::Event;
use tokio::time::{Instant, timeout_at};
use tonic::Code;
use tracing::Span;
use wire::tokenizer::{Prepared, PreparedSegment};

use crate::RouterConfig;
use crate::admission::{Gate, Place};
use crate::answer::{Events, Spent};
use crate::error::Error;
use crate::language::Outputs;
use crate::models::{Model, Models};
use crate::request::{Request, Task, image_paths};
use crate::stages::{Calls, LANGUAGE, TOKENIZER, VISION};
use crate::{metrics, picture, text};

/// What all requests share.
pub(crate) struct Shared {
    pub(crate) models: Models,
    pub(crate) gate: Gate,
    pub(crate) config: RouterConfig,
}

/// One request on its way: everything that its stages need to know.
pub(crate) struct Call {
    pub(crate) model: Arc<Model>,
    pub(crate) card: Arc<ModelCard>,
    pub(crate) request: Request,
    pub(crate) calls: Calls,
    pub(crate) limits: RouterConfig,
    pub(crate) span: Span,
    ledger: Ledger,
    _place: Place,
}

/// 1. Admit: a place, a known model, a request that is valid for it.
pub(crate) async fn admit(shared: &Shared, message: v1::GenerateRequest, calls: Calls) -> Result<Call, Error> {
    let model = shared.models.find(&message.model)?;
    let mut ledger = Ledger::open(&model.name, &message);
    let admitted = async {
        let place = shared.gate.enter(calls.deadline).await?;
        let card = model.card(&calls).await?;
        let request = Request::parse(message, &card, &shared.config.input_limits(), shared.config.max_tokens)?;
        Ok((place, card, request))
    };
    let (place, card, request) = admitted.await.inspect_err(|error: &Error| ledger.code = error.code())?;
    let span = span(&model.name, &request);
    Ok(Call { model, card, request, calls, limits: shared.config.clone(), span, ledger, _place: place })
}

/// 2. to 6.: the rest of the life of a request, in order.
pub(crate) async fn live(mut call: Call, events: Events) -> Result<(), Error> {
    let deadline = call.calls.deadline;
    let result = timeout_at(deadline, stages(&mut call, &events)).await.unwrap_or(Err(Error::Deadline));
    call.ledger.code = result.as_ref().err().map_or(Code::Ok, Error::code);
    if let Err(error) = &result {
        call.span.record("otel.status_code", "ERROR").record("error.type", format!("{:?}", error.code()));
        tracing::info!(model = call.model.name, %error, "the request failed");
    }
    result
}

async fn stages(call: &mut Call, events: &Events) -> Result<(), Error> {
    // 2. Prepare text and pixels, in parallel. The files are not needed after it.
    let (prepared, pictures) = futures::try_join!(prepare(call), encode(call))?;
    call.request.input = wire::input::without_pixels(&call.request.input);
    let call = &*call;
    // 3. Join them in the client's order.
    let prompt = join(call, prepared, &pictures)?;
    drop(pictures);
    // 4. Hand over: what the language service refuses is refused before the answer begins.
    let sequences = hand_over(call, &prompt).await?;
    // 6. Answer: the request was accepted.
    let (model, prompt_tokens) = (call.model.name.clone(), prompt.positions as u32);
    events.send(Event::Started(v1::Started { model, prompt_tokens, seed: call.request.seed })).await?;
    // 4. and 5. Generate and finish: each choice on its own, each event answered as it comes.
    let spent = generate(call, &prompt, sequences, events).await?;
    // 6. Answer: what it took.
    let usage = v1::Usage {
        prompt_tokens,
        image_tokens: prompt.image_positions as u32,
        output_tokens: spent.output_tokens,
        cached_tokens: spent.cached_tokens,
        degraded_tokens: spent.degraded_tokens,
    };
    account(call, &usage);
    events.send(Event::Completed(v1::Completed { usage: Some(usage) })).await
}

/// 2. The text, as the tokenizer sees it.
async fn prepare(call: &Call) -> Result<Prepared, Error> {
    call.calls.prepare(&call.model, &call.request.input, call.request.output()).await
}

/// 2. Every picture, in order.
async fn encode(call: &Call) -> Result<Vec<v1::Embeddings>, Error> {
    let pictures = call.request.input.images().cloned().zip(image_paths(&call.request.input)).collect::<Vec<_>>();
    let encode = pictures.into_iter().map(|(data, path)| encode_one(call, data, path));
    stream::iter(encode).buffered(call.limits.parallel_images).try_collect().await
}

/// A picture that vision refuses is named as the client knows it.
async fn encode_one(call: &Call, data: Bytes, path: String) -> Result<v1::Embeddings, Error> {
    match call.calls.encode_image(&call.model, &data).await {
        Err(Error::Invalid(invalid)) => Err(Invalid::new(path, invalid.reason).into()),
        Err(Error::Stage { status, .. }) if status.code() == Code::InvalidArgument => Err(Invalid::new(path, status.message()).into()),
        other => other,
    }
}

/// A prompt in the words of the language service.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) segments: Vec<v1::PromptSegment>,
    /// Guidance pair; empty for text.
    pub(crate) unconditional: Vec<v1::PromptSegment>,
    pub(crate) eos_token_ids: Vec<u32>,
    /// Positions of `segments`.
    pub(crate) positions: usize,
    /// The part of them that stands for pictures.
    pub(crate) image_positions: usize,
}

/// 3. Segments in the client's order, pictures in their places; the whole must fit the context.
fn join(call: &Call, prepared: Prepared, pictures: &[v1::Embeddings]) -> Result<Joined, Error> {
    let (segments, positions, image_positions) = joined(prepared.segments, pictures, call.card.hidden_size)?;
    let (unconditional, pair, _) = joined(prepared.unconditional, pictures, call.card.hidden_size)?;
    let pair_fits = match (call.request.output(), call.card.canvas) {
        (OutputKind::Image, Some(Canvas::Latent(_))) => (1..=positions).contains(&pair),
        (OutputKind::Image, _) => pair == positions,
        (OutputKind::Text, _) => true,
    };
    if !pair_fits {
        return Err(Error::contract(TOKENIZER, format!("a guidance pair of {pair} positions for a prompt of {positions}")));
    }
    if positions == 0 {
        return Err(Invalid::new(call.request.field(), "the prompt is empty").into());
    }
    let output = match call.request.output() {
        OutputKind::Text => 1,
        OutputKind::Image => match call.card.canvas {
            Some(Canvas::Codes(grid)) => grid.len(),
            Some(Canvas::Latent(grid)) => grid.positions,
            None => 0,
        },
    };
    let context = call.card.context_length;
    if positions.saturating_add(output) > context {
        let reason = format!("the prompt has {positions} tokens and at least {output} follow, the model's context holds {context}");
        return Err(Invalid::new(call.request.field(), reason).into());
    }
    Ok(Joined { segments, unconditional, eos_token_ids: prepared.eos_token_ids, positions, image_positions })
}

fn joined(
    segments: Vec<PreparedSegment>,
    pictures: &[v1::Embeddings],
    width: usize,
) -> Result<(Vec<v1::PromptSegment>, usize, usize), Error> {
    let (mut joined, mut positions, mut image_positions) = (Vec::with_capacity(segments.len()), 0, 0);
    for segment in segments {
        let segment = match segment {
            PreparedSegment::Tokens(ids) => {
                positions += ids.len();
                v1::prompt_segment::Segment::Tokens(v1::TokenIds { ids })
            }
            PreparedSegment::Image(index) => {
                let picture = embeddings(pictures, index, width)?;
                let rows = picture.rows as usize;
                (positions, image_positions) = (positions + rows, image_positions + rows);
                v1::prompt_segment::Segment::Embeddings(picture.clone())
            }
            PreparedSegment::Padding { image, id } => {
                let rows = embeddings(pictures, image, width)?.rows as usize;
                positions += rows;
                v1::prompt_segment::Segment::Tokens(v1::TokenIds { ids: vec![id; rows] })
            }
        };
        joined.push(v1::PromptSegment { segment: Some(segment) });
    }
    Ok((joined, positions, image_positions))
}

/// Picture `index` of the request, in the model's hidden size.
fn embeddings(pictures: &[v1::Embeddings], index: u32, width: usize) -> Result<&v1::Embeddings, Error> {
    let missing = || Error::contract(TOKENIZER, format!("a place for picture {index} of {}", pictures.len()));
    let picture = pictures.get(index as usize).ok_or_else(missing)?;
    let (rows, found) = (picture.rows as usize, picture.width as usize);
    if rows == 0 || found != width || rows.checked_mul(width * 4) != Some(picture.data.len()) {
        return Err(Error::contract(VISION, format!("{rows} x {found} embeddings for a hidden size of {width}")));
    }
    Ok(picture)
}

/// 4. One sequence for each choice of a text. An image is handed over when its turn comes: nothing in it is left to refuse.
async fn hand_over<'a>(call: &'a Call, prompt: &Joined) -> Result<Vec<Outputs<'a>>, Error> {
    match &call.request.task {
        Task::Text(text) => try_join_all((0..text.n).map(|index| text::begin(call, prompt, text, index))).await,
        Task::Image(_) => Ok(Vec::new()),
    }
}

/// 4. and 5. All choices at once; the first that fails ends the others.
async fn generate(call: &Call, prompt: &Joined, sequences: Vec<Outputs<'_>>, events: &Events) -> Result<Spent, Error> {
    let mut sequences = sequences.into_iter();
    let mut choices: FuturesUnordered<_> =
        (0..call.request.choices()).map(|index| choice(call, prompt, sequences.next(), index, events)).collect();
    let mut total = Spent::default();
    while let Some((index, spent)) = choices.try_next().await? {
        total.output_tokens += spent.output_tokens;
        total.degraded_tokens += spent.degraded_tokens;
        // The prompt is counted once, so its cached part is, too.
        if index == 0 {
            total.cached_tokens = spent.cached_tokens;
        }
    }
    Ok(total)
}

/// 4. and 5. One choice or image, with its index.
async fn choice(call: &Call, prompt: &Joined, sequence: Option<Outputs<'_>>, index: u32, events: &Events) -> Result<(u32, Spent), Error> {
    let spent = match (&call.request.task, sequence) {
        (Task::Text(text), Some(sequence)) => text::choice(call, sequence, text, index, events).await?,
        (Task::Image(image), None) => picture::image(call, prompt, image, index, events).await?,
        (Task::Text(_), None) | (Task::Image(_), Some(_)) => return Err(Error::contract(LANGUAGE, "a sequence of the wrong kind")),
    };
    Ok((index, spent))
}

impl Call {
    /// The seed of choice or image `index`.
    pub(crate) fn seed(&self, index: u32) -> u64 {
        self.request.seed.wrapping_add(index.into())
    }

    /// Lets the other choices of the request go on. All of them share one task: one whose outputs are always ready would run alone.
    pub(crate) async fn give_way(&self) {
        let mut given = self.request.choices() == 1;
        poll_fn(|context| {
            if std::mem::replace(&mut given, true) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// Notes the time of the first output, once.
    pub(crate) fn first_output(&self) {
        if !self.ledger.first_output.swap(true, Ordering::Relaxed) {
            let after = self.ledger.began.elapsed();
            metrics::first_output(&self.model.name, after);
            self.span.record("gen_ai.response.time_to_first_chunk", after.as_secs_f64());
        }
    }
}

fn span(model: &str, request: &Request) -> Span {
    let (operation, output) = match (&request.task, request.field()) {
        (Task::Image(_), _) => ("generate_content", "image"),
        (Task::Text(_), "chat") => ("chat", "text"),
        (Task::Text(_), _) => ("text_completion", "text"),
    };
    let span = telemetry::request_span(telemetry::RequestFacts { operation, model, output, choices: request.choices() });
    span.record("gen_ai.request.seed", request.seed);
    span
}

fn account(call: &Call, usage: &v1::Usage) {
    metrics::tokens(&call.model.name, usage.prompt_tokens, usage.output_tokens);
    call.span
        .record("gen_ai.usage.input_tokens", usage.prompt_tokens)
        .record("gen_ai.usage.output_tokens", usage.output_tokens)
        .record("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens);
}

/// Counts a request when it is over, however it ends: dropped halfway, it was cancelled.
struct Ledger {
    model: String,
    output: &'static str,
    began: Instant,
    code: Code,
    first_output: AtomicBool,
}

impl Ledger {
    fn open(model: &str, message: &v1::GenerateRequest) -> Self {
        let output = if message.output == v1::OutputKind::Image as i32 { "image" } else { "text" };
        Self { model: model.to_owned(), output, began: Instant::now(), code: Code::Cancelled, first_output: AtomicBool::new(false) }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        metrics::ended(&self.model, self.output, self.code, self.began.elapsed());
    }
}
