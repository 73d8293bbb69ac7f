use std::pin::Pin;

use domain::FinishReason;
use futures::StreamExt;
use proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use wire::sampling::TextRequest;

use crate::answer::{Events, Spent};
use crate::error::Error;
use crate::language::{Batch, Ending, Outputs};
use crate::life::{Call, Joined};
use crate::models::Model;
use crate::stages::{Calls, TOKENIZER};

/// The sequence of one choice, taken by an instance of the language service.
pub(crate) async fn begin<'a>(call: &'a Call, prompt: &Joined, text: &TextRequest, index: u32) -> Result<Outputs<'a>, Error> {
    let mut sampling = text.sampling.clone();
    sampling.seed = call.seed(index);
    // The context holds prompt and output together; without a wish the router's limit holds.
    let left = call.card.context_length.saturating_sub(prompt.positions).max(1);
    let max_tokens = sampling.max_tokens.unwrap_or(u32::MAX).min(call.limits.max_tokens).min(u32::try_from(left).unwrap_or(u32::MAX));
    sampling.max_tokens = Some(max_tokens);
    let ending = Ending {
        eos_token_ids: if sampling.ignore_eos { Vec::new() } else { prompt.eos_token_ids.clone() },
        // Whether a constraint is satisfied at the last token only the language service knows: it is asked again.
        max_outputs: if sampling.constraint.is_some() { usize::MAX } else { max_tokens as usize },
        at_max: FinishReason::Length,
    };
    let mode = v1::TextMode { sampling: Some(wire::sampling::to_text(&sampling)), eos_token_ids: prompt.eos_token_ids.clone() };
    let request =
        v1::LanguageRequest { prompt: prompt.segments.clone(), mode: Some(v1::language_request::Mode::Text(mode)), emitted: Vec::new() };
    let mut outputs = Outputs::new(&call.model, call.calls, request, ending);
    outputs.begin().await?;
    Ok(outputs)
}

/// One choice of a text answer, from its sequence to its `ChoiceFinished`.
pub(crate) async fn choice(call: &Call, mut outputs: Outputs<'_>, text: &TextRequest, index: u32, events: &Events) -> Result<Spent, Error> {
    let mut text = Detokenizer::new(&call.model, call.calls, &text.stop);

    let mut spent = Spent::default();
    // The detokeniser's stream is set up while the model reads the prompt.
    let (first, ()) = futures::future::join(outputs.next(), text.warm_up()).await;
    let mut batch = first?;
    call.first_output();
    loop {
        let finished = batch.finished;
        let delta = text.push(batch, index).await?;
        spent.output_tokens += delta.message.token_ids.len() as u32;
        if !(delta.message.text.is_empty() && delta.message.token_ids.is_empty()) {
            events.send(v1::generate_response::Event::Text(delta.message)).await?;
        }
        // After a stop string the sequence is dropped with `outputs`, which ends its work.
        if let Some(reason) = if delta.stopped { Some(FinishReason::Stop) } else { finished } {
            let reason = wire::language::to_finish_reason(reason).into();
            events.send(v1::generate_response::Event::Finished(v1::ChoiceFinished { choice: index, reason })).await?;
            spent.cached_tokens = outputs.cached_tokens();
            spent.degraded_tokens = outputs.degraded_tokens();
            return Ok(spent);
        }
        call.give_way().await;
        batch = outputs.next().await?;
    }
}

/// A stream to a tokenizer that turns the tokens of one choice into text. When its instance goes away, another one is fed the same tokens.
struct Detokenizer<'a> {
    model: &'a Model,
    calls: Calls,
    stop: &'a [String],
    /// All ids that were answered.
    history: Vec<u32>,
    stream: Option<Duplex>,
    failures: u32,
}

struct Duplex {
    requests: mpsc::Sender<v1::DetokenizeRequest>,
    responses: Pin<Box<Streaming<v1::DetokenizeResponse>>>,
}

struct Delta {
    message: v1::TextDelta,
    stopped: bool,
}

impl<'a> Detokenizer<'a> {
    fn new(model: &'a Model, calls: Calls, stop: &'a [String]) -> Self {
        Self { model, calls, stop, history: Vec::new(), stream: None, failures: 0 }
    }

    /// Opens the stream ahead of need. A failure is left to the first [`Detokenizer::push`], which can try again.
    async fn warm_up(&mut self) {
        self.stream = self.open().await.ok();
    }

    /// The text that `batch` completes.
    async fn push(&mut self, batch: Batch, choice: u32) -> Result<Delta, Error> {
        let tokens = v1::DetokenizeTokens { ids: batch.ids, logprobs: batch.logprobs, last: batch.finished.is_some() };
        let answer = loop {
            match self.exchange(&tokens).await {
                Ok(answer) => break answer,
                Err(status) => {
                    self.stream = None;
                    self.failures += 1;
                    self.calls.again(TOKENIZER, status, self.failures).await?;
                }
            }
        };
        self.failures = 0;
        let (mut token_ids, mut logprobs) = (tokens.ids, answer.logprobs);
        let accepted = answer.accepted as usize;
        if accepted > token_ids.len() || !(logprobs.is_empty() || logprobs.len() >= accepted) {
            return Err(Error::contract(
                TOKENIZER,
                format!("{accepted} of {} tokens accepted, {} log-probabilities", token_ids.len(), logprobs.len()),
            ));
        }
        self.history.extend_from_slice(&token_ids);
        token_ids.truncate(accepted);
        logprobs.truncate(accepted);
        Ok(Delta { message: v1::TextDelta { choice, text: answer.text, token_ids, logprobs }, stopped: answer.stopped })
    }

    async fn exchange(&mut self, tokens: &v1::DetokenizeTokens) -> Result<v1::DetokenizeResponse, Status> {
        if self.stream.is_none() {
            self.stream = Some(self.open().await?);
        }
        match &mut self.stream {
            Some(stream) => stream.ask(tokens.clone()).await,
            None => Err(Status::unavailable("no stream")),
        }
    }

    /// A stream that has seen the history. The text of the history was given out before, so its answer is dropped.
    async fn open(&self) -> Result<Duplex, Status> {
        let (requests, receiver) = mpsc::channel(2);
        let open = v1::DetokenizeOpen { stop: self.stop.to_vec() };
        let message = v1::DetokenizeRequest { request: Some(v1::detokenize_request::Request::Open(open)) };
        requests.try_send(message).map_err(|_| Status::internal("a new channel has room"))?;
        let request = self.calls.request(ReceiverStream::new(receiver));
        let responses = self.model.tokenizer.clone().detokenize(request).await?.into_inner();
        let mut stream = Duplex { requests, responses: Box::pin(responses) };
        if !self.history.is_empty() {
            let history = v1::DetokenizeTokens { ids: self.history.clone(), logprobs: Vec::new(), last: false };
            stream.ask(history).await?;
        }
        Ok(stream)
    }
}

impl Duplex {
    async fn ask(&mut self, tokens: v1::DetokenizeTokens) -> Result<v1::DetokenizeResponse, Status> {
        let message = v1::DetokenizeRequest { request: Some(v1::detokenize_request::Request::Tokens(tokens)) };
        // A call that has ended takes no message; its status is then the next thing to read.
        let _ = self.requests.send(message).await;
        self.responses.next().await.unwrap_or_else(|| Err(Status::unavailable("the stream ended before the text did")))
    }
}
