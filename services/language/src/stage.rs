use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use domain::{Event, FinishReason, Job, Mode, ModelCard};
use futures::stream::ReadyChunks;
use futures::{Stream, StreamExt};
use sched::{Engine, JobError, JobStream};
use tokio::sync::Semaphore;
use tracing::{Instrument, Span, field};

use crate::error::Error;
use crate::experts::Fleet;
use crate::metrics::{self, Summary};

/// Most events that are handed on together when a reader is slower than the engine.
const MAX_EVENTS: usize = 64;

/// Constraints that are compiled at a time: one that takes long must not hold up the others, nor take all cores.
const COMPILERS: usize = 2;
/// Jobs that wait for a compiler; more are refused.
const WAITING: usize = 256;

/// The work of the service for one model. Cheap to clone.
#[derive(Clone)]
pub struct Stage {
    model: Arc<str>,
    engine: Arc<Engine>,
    /// Whoever computes the routed experts, when they are not in the engine.
    fleet: Option<Arc<Fleet>>,
    compilers: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

impl Stage {
    pub fn new(model: &str, engine: Arc<Engine>, fleet: Option<Arc<Fleet>>) -> Self {
        let (compilers, places) = (Arc::new(Semaphore::new(COMPILERS)), Arc::new(Semaphore::new(WAITING)));
        Self { model: model.into(), engine, fleet, compilers, places }
    }

    /// What the model is and can do.
    pub fn card(&self) -> &ModelCard {
        self.engine.card()
    }

    /// Start a generation. Dropping it ends its work within a step.
    pub async fn generate(&self, job: Job) -> Result<Generation, Error> {
        let span = span(&self.model, &job);
        let submitted = match self.fleet.as_ref().filter(|_| !allows_expert_loss(&job)).map_or(Ok(()), |fleet| fleet.check()) {
            Err(missing) => Err(Error::Unavailable(missing)),
            Ok(()) if is_constrained(&job) => self.submit_constrained(job).instrument(span.clone()).await,
            Ok(()) => span.in_scope(|| self.engine.submit(job)).map_err(Error::from),
        };
        let events = submitted.inspect_err(|error| {
            metrics::refused(&self.model);
            tracing::info!(parent: &span, %error, "refused");
        })?;
        Ok(Generation { events: events.ready_chunks(MAX_EVENTS), record: Record::new(self.model.clone(), span) })
    }

    /// Submit a job whose constraint must be compiled first, on a thread that may block.
    async fn submit_constrained(&self, job: Job) -> Result<JobStream, Error> {
        let full = |_| Error::QueueFull(format!("{WAITING} jobs wait for their constraint to be compiled"));
        let _place = self.places.try_acquire().map_err(full)?;
        let stopped = |error: &dyn std::fmt::Display| Error::Unavailable(error.to_string());
        let permit = self.compilers.clone().acquire_owned().await.map_err(|error| stopped(&error))?;
        let (engine, span) = (self.engine.clone(), Span::current());
        let submit = move || {
            let _permit = permit; // given back when the work is done, also when nobody waits for it any more
            span.in_scope(|| engine.submit(job))
        };
        Ok(tokio::task::spawn_blocking(submit).await.map_err(|error| stopped(&error))??)
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
            Event::Degraded(positions) => metrics::degraded(&self.model, positions),
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

fn allows_expert_loss(job: &Job) -> bool {
    matches!(&job.mode, Mode::Text { sampling, .. } if sampling.allow_expert_loss)
}

fn is_constrained(job: &Job) -> bool {
    matches!(&job.mode, Mode::Text { sampling, .. } if sampling.constraint.is_some())
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
