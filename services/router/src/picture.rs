use std::collections::HashMap;
use std::time::Duration;

use domain::{Canvas, FinishReason, Input};
use futures::FutureExt;
use futures::future::{BoxFuture, Either, select};
use proto::v1;
use proto::v1::generate_response::Event;
use tokio::time::Instant;
use wire::sampling::ImageRequest;

use crate::answer::{Events, Spent};
use crate::error::Error;
use crate::language::{Batch, Ending, Outputs};
use crate::life::{Call, Joined};
use crate::metrics;
use crate::stages::LANGUAGE;

/// Least time between two progress events of an image.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// Up to this many codes or steps every single one is reported.
const SMALL: usize = 64;
/// Longest prompt, in bytes, that is written into the image file.
const MAX_PROMPT_NOTE: usize = 16 << 10;

/// One image, from the prompt to its `GeneratedImage`.
pub(crate) async fn image(call: &Call, prompt: &Joined, image: &ImageRequest, index: u32, events: &Events) -> Result<Spent, Error> {
    let canvas = call.card.canvas.ok_or_else(|| Error::contract(LANGUAGE, "what images are made of is gone"))?;
    let seed = call.seed(index);
    let mut outputs = outputs(call, prompt, image, seed, canvas);
    let mut painting = Painting::new(call, image, index, canvas);
    loop {
        // The drawing is never kept waiting: a preview is finished only while there is nothing else to do.
        let batch = {
            let next = std::pin::pin!(outputs.next());
            match painting.preview.take() {
                None => next.await?,
                Some(preview) => match select(next, preview).await {
                    Either::Left((batch, preview)) => {
                        painting.preview = Some(preview);
                        batch?
                    }
                    Either::Right((preview, next)) => {
                        painting.show(preview, events).await?;
                        next.await?
                    }
                },
            }
        };
        call.first_output();
        let finished = batch.finished.is_some();
        painting.add(batch, events).await?;
        if finished {
            break;
        }
        call.give_way().await;
    }
    let spent = Spent { output_tokens: painting.work.done() as u32, cached_tokens: outputs.cached_tokens(), degraded_tokens: 0 };
    let mut request = painting.finish()?.request();
    request.format = wire::sampling::to_format(image.format).into();
    request.metadata = metadata(call, image, seed, canvas);
    let codes = request.codes.clone();
    let file = call.calls.decode_image(&call.model, request).await?;
    let (v1::DecodeImageResponse { data, media_type, width, height }, image) = (file, index);
    events.send(Event::Image(v1::GeneratedImage { image, media_type, data, width, height, seed, codes })).await?;
    Ok(spent)
}

fn outputs<'a>(call: &'a Call, prompt: &Joined, image: &ImageRequest, seed: u64, canvas: Canvas) -> Outputs<'a> {
    let mut sampling = image.sampling.clone();
    sampling.seed = seed;
    let unconditional = prompt.unconditional.clone();
    let (mode, max_outputs) = match canvas {
        Canvas::Codes(grid) => {
            let sampling = Some(wire::sampling::to_image(&sampling));
            (v1::language_request::Mode::Image(v1::ImageCodeMode { unconditional, sampling }), grid.len())
        }
        Canvas::Latent(_) => {
            let (estimate_every, steps) = (image.preview_every.unwrap_or(0), sampling.steps as usize);
            let sampling = Some(wire::sampling::to_flow(&sampling));
            (v1::language_request::Mode::Flow(v1::FlowMode { unconditional, sampling, estimate_every, from: None }), steps)
        }
    };
    let request = v1::LanguageRequest { prompt: prompt.segments.clone(), mode: Some(mode), emitted: Vec::new() };
    Outputs::new(&call.model, call.calls, request, Ending { eos_token_ids: Vec::new(), max_outputs, at_max: FinishReason::Stop })
}

/// An image in the making.
struct Painting<'a> {
    call: &'a Call,
    index: u32,
    /// Codes or steps.
    total: usize,
    preview_every: Option<usize>,
    work: Work,
    reported: Option<Instant>,
    /// The preview that is being painted.
    preview: Option<BoxFuture<'a, Preview>>,
}

/// What has been drawn so far.
#[derive(Debug, Clone)]
enum Work {
    Codes(Vec<u32>),
    Flow { done: usize, z: Option<v1::Latent> },
}

struct Preview {
    done: u32,
    file: Result<v1::DecodeImageResponse, Error>,
}

impl Work {
    /// Codes drawn or steps taken.
    fn done(&self) -> usize {
        match self {
            Self::Codes(codes) => codes.len(),
            Self::Flow { done, .. } => *done,
        }
    }

    /// To have it decoded.
    fn request(self) -> v1::DecodeImageRequest {
        match self {
            Self::Codes(codes) => v1::DecodeImageRequest { codes, ..v1::DecodeImageRequest::default() },
            Self::Flow { z, .. } => v1::DecodeImageRequest { latent: z, ..v1::DecodeImageRequest::default() },
        }
    }

    /// Takes what is new. Returns what a preview shows now, if it is of a flow: where it seems to lead.
    fn add(&mut self, batch: Batch) -> Result<Option<Work>, Error> {
        let mut estimated = None;
        match self {
            Self::Codes(codes) => codes.extend(batch.ids),
            Self::Flow { done, z } => {
                for step in batch.steps {
                    let state = step.state.unwrap_or_default();
                    if state.done as usize != *done + 1 {
                        return Err(Error::contract(LANGUAGE, format!("step {} follows step {done}", state.done)));
                    }
                    (*done, *z) = (*done + 1, state.z);
                    estimated = step.estimate.map(|estimate| Self::Flow { done: *done, z: Some(estimate) }).or(estimated);
                }
            }
        }
        Ok(estimated)
    }
}

impl<'a> Painting<'a> {
    fn new(call: &'a Call, image: &ImageRequest, index: u32, canvas: Canvas) -> Self {
        let preview_every = image.preview_every.map(|every| every as usize);
        let (work, total) = match canvas {
            Canvas::Codes(grid) => (Work::Codes(Vec::with_capacity(grid.len())), grid.len()),
            Canvas::Latent(_) => (Work::Flow { done: 0, z: None }, image.sampling.steps as usize),
        };
        Self { call, index, total, preview_every, work, reported: None, preview: None }
    }

    /// Takes new codes or steps, reports progress, starts a preview when one is due.
    async fn add(&mut self, batch: Batch, events: &Events) -> Result<(), Error> {
        let before = self.work.done();
        let estimated = self.work.add(batch)?;
        let done = self.work.done();
        if done > self.total {
            return Err(Error::contract(LANGUAGE, format!("{done} codes or steps for an image of {}", self.total)));
        }
        if self.total <= SMALL {
            for done in before + 1..=done {
                self.report(done, events).await?;
            }
        } else if done > before && (done == self.total || self.reported.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY)) {
            self.report(done, events).await?;
        }
        let due = || self.preview_every.is_some_and(|every| done / every > before / every);
        match &self.work {
            _ if done == self.total => {}
            Work::Codes(_) if due() => self.start_preview(self.work.clone()),
            Work::Codes(_) => {}
            Work::Flow { .. } => estimated.into_iter().for_each(|work| self.start_preview(work)),
        }
        Ok(())
    }

    async fn report(&mut self, done: usize, events: &Events) -> Result<(), Error> {
        self.reported = Some(Instant::now());
        let progress = v1::ImageProgress { image: self.index, done: done as u32, total: self.total as u32 };
        events.send(Event::ImageProgress(progress)).await
    }

    fn start_preview(&mut self, work: Work) {
        if self.preview.is_some() {
            metrics::preview_skipped();
            return;
        }
        let (call, done) = (self.call, work.done() as u32);
        let request = v1::DecodeImageRequest { format: v1::ImageFormat::Png.into(), ..work.request() };
        let paint = async move { Preview { done, file: call.calls.decode_image(&call.model, request).await } };
        self.preview = Some(paint.boxed());
    }

    /// Sends a painted preview. One that failed is left out: the image itself may still succeed.
    async fn show(&mut self, preview: Preview, events: &Events) -> Result<(), Error> {
        match preview.file {
            Ok(file) => {
                let message = v1::ImagePreview { image: self.index, done: preview.done, media_type: file.media_type, data: file.data };
                events.send(Event::ImagePreview(message)).await
            }
            Err(error) => {
                tracing::debug!(%error, "a preview failed");
                metrics::preview_skipped();
                Ok(())
            }
        }
    }

    fn finish(self) -> Result<Work, Error> {
        let done = self.work.done();
        if done == self.total {
            Ok(self.work)
        } else {
            Err(Error::contract(LANGUAGE, format!("finished after {done} of {} codes or steps", self.total)))
        }
    }
}

/// What is written into the file, so that the image can be made again.
fn metadata(call: &Call, image: &ImageRequest, seed: u64, canvas: Canvas) -> HashMap<String, String> {
    let sampling = &image.sampling;
    let common = [
        ("prompt", prompt_note(&call.request.input)),
        ("model", call.model.name.clone()),
        ("seed", seed.to_string()),
        ("guidance", sampling.guidance.to_string()),
        ("software", concat!("janua ", env!("CARGO_PKG_VERSION")).to_owned()),
    ];
    let own = match canvas {
        Canvas::Codes(_) => vec![("temperature", sampling.temperature.to_string())],
        Canvas::Latent(_) => vec![("steps", sampling.steps.to_string()), ("solver", sampling.solver.name().to_owned())],
    };
    common.into_iter().chain(own).map(|(key, value)| (key.to_owned(), value)).collect()
}

fn prompt_note(input: &Input) -> String {
    let mut note = input.texts().collect::<Vec<_>>().join("\n");
    note.truncate(note.floor_char_boundary(MAX_PROMPT_NOTE));
    note
}
