use std::pin::Pin;
use std::task::Poll;

use domain::FinishReason;
use futures::{StreamExt, poll};
use proto::v1;
use proto::v1::language_request::Mode;
use proto::v1::language_response::Event;
use tonic::{Status, Streaming};

use crate::error::Error;
use crate::models::Model;
use crate::stages::{Calls, LANGUAGE};

/// Most outputs that are handed on together.
const MAX_BATCH: usize = 64;

/// The outputs of one sequence. When the instance that makes them goes away, the request goes on at another one, which is told what has
/// been emitted: the reader notices nothing but a pause.
pub(crate) struct Outputs<'a> {
    model: &'a Model,
    calls: Calls,
    /// `emitted` holds every output received so far; of a flow, `from` holds the state after the last step.
    request: v1::LanguageRequest,
    ending: Ending,
    stream: Option<Pin<Box<Streaming<v1::LanguageResponse>>>>,
    /// A failure seen while looking ahead.
    broken: Option<Status>,
    /// Failures in a row without an output between them.
    failures: u32,
    cached_tokens: Option<u32>,
    degraded_tokens: u32,
}

/// What completes a sequence, for the case that an instance dies between the last output and saying so.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) max_outputs: usize,
    /// Why it ends at `max_outputs`.
    pub(crate) at_max: FinishReason,
}

/// Outputs that were ready together, in order.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// Token ids or codes.
    pub(crate) ids: Vec<u32>,
    /// One per id, or none.
    pub(crate) logprobs: Vec<v1::TokenLogprobs>,
    /// Steps of a flow.
    pub(crate) steps: Vec<v1::FlowStep>,
    /// Set in the last batch.
    pub(crate) finished: Option<FinishReason>,
}

impl Batch {
    fn len(&self) -> usize {
        self.ids.len() + self.steps.len()
    }
}

impl<'a> Outputs<'a> {
    /// Nothing is sent before the first [`Outputs::next`].
    pub(crate) fn new(model: &'a Model, calls: Calls, request: v1::LanguageRequest, ending: Ending) -> Self {
        Self { model, calls, request, ending, stream: None, broken: None, failures: 0, cached_tokens: None, degraded_tokens: 0 }
    }

    /// Hands the sequence to an instance. What the service refuses is refused here.
    pub(crate) async fn begin(&mut self) -> Result<(), Error> {
        while let Err(status) = self.open().await {
            self.failed(status).await?;
        }
        Ok(())
    }

    /// Prompt positions that the first instance found in its prefix cache.
    pub(crate) fn cached_tokens(&self) -> u32 {
        self.cached_tokens.unwrap_or(0)
    }

    /// Positions that were computed without one of their experts.
    pub(crate) fn degraded_tokens(&self) -> u32 {
        self.degraded_tokens
    }

    /// Waits for the next outputs and takes all that are ready. Only a batch that finishes may be empty.
    pub(crate) async fn next(&mut self) -> Result<Batch, Error> {
        let mut batch = Batch::default();
        while batch.len() == 0 && batch.finished.is_none() {
            match self.wait().await? {
                Some(message) => self.take(message, &mut batch)?,
                None => batch.finished = self.ended(),
            }
        }
        while batch.finished.is_none() && batch.len() < MAX_BATCH {
            let Some(stream) = &mut self.stream else { break };
            match poll!(stream.next()) {
                Poll::Ready(Some(Ok(message))) => self.take(message, &mut batch)?,
                Poll::Ready(Some(Err(status))) => self.broken = Some(status),
                Poll::Ready(None) => self.broken = Some(cut_short()),
                Poll::Pending => break,
            }
            if self.broken.is_some() {
                break;
            }
        }
        Ok(batch)
    }

    /// The next message, from another instance if need be; `None` when an instance died but nothing was left to make.
    async fn wait(&mut self) -> Result<Option<v1::LanguageResponse>, Error> {
        loop {
            if let Some(status) = self.broken.take() {
                self.stream = None;
                if self.ended().is_some() {
                    return Ok(None);
                }
                self.failed(status).await?;
            }
            let next = match &mut self.stream {
                Some(stream) => stream.next().await,
                None => match self.open().await {
                    Ok(()) => continue,
                    Err(status) => Some(Err(status)),
                },
            };
            match next {
                Some(Ok(message)) => return Ok(Some(message)),
                Some(Err(status)) => self.broken = Some(status),
                None => self.broken = Some(cut_short()),
            }
        }
    }

    /// Returns when another instance may be tried.
    async fn failed(&mut self, status: Status) -> Result<(), Error> {
        self.failures += 1;
        self.model.forget_card();
        self.calls.again(LANGUAGE, status, self.failures).await
    }

    async fn open(&mut self) -> Result<(), Status> {
        if self.made() > 0 {
            tracing::info!(emitted = self.made(), "carrying the sequence over to another instance");
        }
        let response = self.model.language.clone().generate(self.calls.request(self.request.clone())).await?;
        self.stream = Some(Box::pin(response.into_inner()));
        Ok(())
    }

    fn take(&mut self, message: v1::LanguageResponse, batch: &mut Batch) -> Result<(), Error> {
        match message.event {
            Some(Event::Prefilled(prefilled)) => {
                self.cached_tokens.get_or_insert(prefilled.cached_tokens);
            }
            Some(Event::DegradedPositions(positions)) => self.degraded_tokens = self.degraded_tokens.saturating_add(positions),
            Some(Event::Outputs(outputs)) => {
                if !outputs.logprobs.is_empty() && outputs.logprobs.len() != outputs.ids.len() {
                    return Err(Error::contract(
                        LANGUAGE,
                        format!("{} log-probabilities for {} outputs", outputs.logprobs.len(), outputs.ids.len()),
                    ));
                }
                self.failures = 0;
                self.request.emitted.extend_from_slice(&outputs.ids);
                if batch.ids.is_empty() {
                    (batch.ids, batch.logprobs) = (outputs.ids, outputs.logprobs);
                } else {
                    batch.ids.extend(outputs.ids);
                    batch.logprobs.extend(outputs.logprobs);
                }
            }
            Some(Event::Flow(step)) => {
                let Some(Mode::Flow(mode)) = &mut self.request.mode else {
                    return Err(Error::contract(LANGUAGE, "a step of a flow where none was asked for"));
                };
                self.failures = 0;
                mode.from = step.state.clone();
                batch.steps.push(step);
            }
            Some(Event::Finished(reason)) => {
                batch.finished = Some(wire::language::finish_reason(reason).map_err(|invalid| Error::contract(LANGUAGE, invalid))?);
            }
            None => return Err(Error::contract(LANGUAGE, "a message without an event")),
        }
        Ok(())
    }

    /// Why the sequence is complete, judged by what was emitted.
    fn ended(&self) -> Option<FinishReason> {
        let emitted = &self.request.emitted;
        if emitted.last().is_some_and(|last| self.ending.eos_token_ids.contains(last)) {
            Some(FinishReason::Stop)
        } else if self.made() >= self.ending.max_outputs {
            Some(self.ending.at_max)
        } else {
            None
        }
    }

    /// Outputs so far, or steps of a flow.
    fn made(&self) -> usize {
        match &self.request.mode {
            Some(Mode::Flow(mode)) => mode.from.as_ref().map_or(0, |state| state.done as usize),
            _ => self.request.emitted.len(),
        }
    }
}

fn cut_short() -> Status {
    Status::unavailable("the stream ended before the sequence did")
}
