use std::collections::HashMap;
use std::time::Duration;

use domain::{CodeGrid, FinishReason, Input};
use futures::FutureExt;
use futures::future::{BoxFuture, Either, select};
use proto::v1;
use proto::v1::generate_response::Event;
use tokio::time::Instant;
use wire::sampling::ImageRequest;

use crate::answer::{Events, Spent};
use crate::error::Error;
use crate::language::{Ending, Outputs};
use crate::life::{Call, Joined};
use crate::metrics;
use crate::stages::LANGUAGE;

/// Least time between two progress events of an image.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// Up to this many codes every single one is reported.
const SMALL: usize = 64;
/// Longest prompt, in bytes, that is written into the image file.
const MAX_PROMPT_NOTE: usize = 16 << 10;

/// One image, from the prompt to its `GeneratedImage`.
pub(crate) async fn image(call: &Call, prompt: &Joined, image: &ImageRequest, index: u32, events: &Events) -> Result<Spent, Error> {
    let grid = call.card.code_grid.ok_or_else(|| Error::contract(LANGUAGE, "the code grid is gone"))?;
    let seed = call.seed(index);
    let mut outputs = outputs(call, prompt, image, seed, grid);
    let mut painting = Painting::new(call, image, index, grid);
    loop {
        // The codes are never kept waiting: a preview is finished only while there is nothing else to do.
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
        painting.add(batch.ids, events).await?;
        if batch.finished.is_some() {
            break;
        }
        call.give_way().await;
    }
    let spent = Spent { output_tokens: painting.codes.len() as u32, cached_tokens: outputs.cached_tokens() };
    let codes = painting.finish()?;
    let request = v1::DecodeImageRequest {
        codes: codes.clone(),
        format: wire::sampling::to_format(image.format).into(),
        metadata: metadata(call, image, seed),
    };
    let file = call.calls.decode_image(&call.model, request).await?;
    let (v1::DecodeImageResponse { data, media_type, width, height }, image) = (file, index);
    events.send(Event::Image(v1::GeneratedImage { image, media_type, data, width, height, seed, codes })).await?;
    Ok(spent)
}

fn outputs<'a>(call: &'a Call, prompt: &Joined, image: &ImageRequest, seed: u64, grid: CodeGrid) -> Outputs<'a> {
    let mut sampling = image.sampling.clone();
    sampling.seed = seed;
    let mode = v1::ImageCodeMode { unconditional: prompt.unconditional.clone(), sampling: Some(wire::sampling::to_image(&sampling)) };
    let request =
        v1::LanguageRequest { prompt: prompt.segments.clone(), mode: Some(v1::language_request::Mode::Image(mode)), emitted: Vec::new() };
    let ending = Ending { eos_token_ids: Vec::new(), max_outputs: grid.len(), at_max: FinishReason::Stop };
    Outputs::new(&call.model, call.calls, request, ending)
}

/// An image in the making.
struct Painting<'a> {
    call: &'a Call,
    index: u32,
    total: usize,
    preview_every: Option<usize>,
    codes: Vec<u32>,
    reported: Option<Instant>,
    /// The preview that is being painted.
    preview: Option<BoxFuture<'a, Preview>>,
}

struct Preview {
    done: u32,
    file: Result<v1::DecodeImageResponse, Error>,
}

impl<'a> Painting<'a> {
    fn new(call: &'a Call, image: &ImageRequest, index: u32, grid: CodeGrid) -> Self {
        let preview_every = image.preview_every.map(|every| every as usize);
        Self { call, index, total: grid.len(), preview_every, codes: Vec::with_capacity(grid.len()), reported: None, preview: None }
    }

    /// Takes new codes, reports progress, starts a preview when one is due.
    async fn add(&mut self, ids: Vec<u32>, events: &Events) -> Result<(), Error> {
        let before = self.codes.len();
        self.codes.extend(ids);
        let done = self.codes.len();
        if done > self.total {
            return Err(Error::contract(LANGUAGE, format!("{done} codes for an image of {}", self.total)));
        }
        if self.total <= SMALL {
            for done in before + 1..=done {
                self.report(done, events).await?;
            }
        } else if done > before && (done == self.total || self.reported.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY)) {
            self.report(done, events).await?;
        }
        if self.preview_every.is_some_and(|every| done / every > before / every) && done < self.total {
            self.start_preview();
        }
        Ok(())
    }

    async fn report(&mut self, done: usize, events: &Events) -> Result<(), Error> {
        self.reported = Some(Instant::now());
        let progress = v1::ImageProgress { image: self.index, done: done as u32, total: self.total as u32 };
        events.send(Event::ImageProgress(progress)).await
    }

    fn start_preview(&mut self) {
        if self.preview.is_some() {
            metrics::preview_skipped();
            return;
        }
        let (call, done) = (self.call, self.codes.len() as u32);
        let request = v1::DecodeImageRequest { codes: self.codes.clone(), format: v1::ImageFormat::Png.into(), metadata: HashMap::new() };
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

    fn finish(self) -> Result<Vec<u32>, Error> {
        if self.codes.len() == self.total {
            Ok(self.codes)
        } else {
            Err(Error::contract(LANGUAGE, format!("finished after {} of {} codes", self.codes.len(), self.total)))
        }
    }
}

/// What is written into the file, so that the image can be made again.
fn metadata(call: &Call, image: &ImageRequest, seed: u64) -> HashMap<String, String> {
    [
        ("prompt", prompt_note(&call.request.input)),
        ("model", call.model.name.clone()),
        ("seed", seed.to_string()),
        ("guidance", image.sampling.guidance.to_string()),
        ("temperature", image.sampling.temperature.to_string()),
        ("software", concat!("janua ", env!("CARGO_PKG_VERSION")).to_owned()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

fn prompt_note(input: &Input) -> String {
    let mut note = input.texts().collect::<Vec<_>>().join("\n");
    note.truncate(note.floor_char_boundary(MAX_PROMPT_NOTE));
    note
}
