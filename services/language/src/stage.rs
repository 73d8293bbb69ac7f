use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use domain::{Event, FinishReason, Job, Mode, ModelCard};
use futures::stream::ReadyChunks;
use futures::{Stream, StreamExt};
use sched::{Engine, JobError, JobStream};
use tracing::{Span, field};

use crate::error::Error;
use crate::metrics::{self, Summary};

/// Most events that are handed on together when a reader is slower than the engine.
const MAX_EVENTS: usize = 64;

/// The work of the service for one model. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stage {
    model: Arc<str>,
    engine: Arc<Engine>,
}

impl Stage {
    pub fn new(model: &str, engine: Arc<Engine>) -> Self {
        Self { model: model.into(), engine }
    }

    /// What the model is and can do.
    pub fn card(&self) -> &ModelCard {
        self.engine.card()
    }

    /// Start a generation. Dropping it ends its work within a step.
    pub fn generate(&self, job: Job) -> Result<Generation, Error> {
        let span = span(&self.model, &job);
        let events = self.engine.submit(job).inspect_err(|error| {
            metrics::refused(&self.model);
            tracing::info!(parent: &span, %error, "refused");
        })?;
        Ok(Generation { events: events.ready_chunks(MAX_EVENTS), record: Record::new(self.model.clone(), span) })
    }
}

/// The events of one generation, in groups of what is ready.
#[derive(Debug)]
pub struct Generation {
    events: ReadyChunks<JobStream>,
    record: Record,
}

impl Stream for Generation {
    type Item = Result<Vec<Event>, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(error) = self.record.error.take() {
            return Poll::Ready(Some(Err(error.into())));
        }
        let Some(chunk) = ready!(self.events.poll_next_unpin(cx)) else { return Poll::Ready(None) };
        let mut events = Vec::with_capacity(chunk.len());
        for event in chunk {
            match event {
                Ok(event) => {
                    self.record.event(&event);
                    events.push(event);
                }
                Err(error) => self.record.failed(error),
            }
        }
        match self.record.error.take_if(|_| events.is_empty()) {
            Some(error) => Poll::Ready(Some(Err(error.into()))),
            None => Poll::Ready(Some(Ok(events))),
        }
    }
}

/// What a generation leaves behind when it ends: a span with a child for each phase, and the metrics.
#[derive(Debug)]
struct Record {
    model: Arc<str>,
    span: Span,
    /// Of the phase that is going on: prefill, then decode.
    phase: Span,
    began: Instant,
    first_output: Option<Instant>,
    /// Comes after the events that were ready with it.
    error: Option<JobError>,
    summary: Summary,
}

impl Record {
    fn new(model: Arc<str>, span: Span) -> Self {
        let phase = tracing::info_span!(parent: &span, "language.prefill");
        let summary = Summary { outcome: "cancelled", prompt_tokens: 0, cached_tokens: 0, output_tokens: 0, prefill: None, decode: None };
        Self { model, span, phase, began: Instant::now(), first_output: None, error: None, summary }
    }

    fn event(&mut self, event: &Event) {
        match *event {
            Event::Prefilled { prompt_tokens, cached_tokens } => {
                (self.summary.prompt_tokens, self.summary.cached_tokens) = (prompt_tokens, cached_tokens);
                self.summary.prefill = Some(self.began.elapsed());
                self.first_output = Some(Instant::now());
                self.phase = tracing::info_span!(parent: &self.span, "language.decode");
            }
            Event::Output { .. } | Event::Flow { .. } => self.summary.output_tokens += 1,
            Event::Finished(reason) => {
                self.summary.outcome = match reason {
                    FinishReason::Stop => "stop",
                    FinishReason::Length => "length",
                };
            }
        }
    }

    fn failed(&mut self, error: JobError) {
        self.summary.outcome = "failed";
        tracing::warn!(parent: &self.span, %error, "a generation failed");
        self.error = Some(error);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.summary.decode = self.first_output.map(|first| first.elapsed());
        let Summary { outcome, prompt_tokens, cached_tokens, output_tokens, .. } = self.summary;
        self.span.record("janua.prompt_tokens", prompt_tokens);
        self.span.record("janua.cached_tokens", cached_tokens);
        self.span.record("janua.output_tokens", output_tokens);
        self.span.record("janua.outcome", outcome);
        metrics::ended(&self.model, &self.summary);
    }
}

fn span(model: &str, job: &Job) -> Span {
    let resumed = match &job.mode {
        Mode::Flow { from, .. } => from.as_ref().map_or(0, |state| state.done as usize),
        Mode::Text { .. } | Mode::Image { .. } => job.emitted.len(),
    };
    let output = match job.mode {
        Mode::Text { .. } => "text",
        Mode::Image { .. } | Mode::Flow { .. } => "image",
    };
    tracing::info_span!(
        "language.generate",
        janua.model = model,
        janua.output = output,
        janua.resumed_tokens = resumed,
        janua.prompt_tokens = field::Empty,
        janua.cached_tokens = field::Empty,
        janua.output_tokens = field::Empty,
        janua.outcome = field::Empty,
    )
}
