use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use domain::{Canvas, CodeGrid, Drawing, ImageFormat, Invalid};
use models::Painter;
use pixels::Rgb;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::ImagesConfig;
use crate::error::Error;
use crate::metrics;

/// What a part of a preview is painted with whose codes are not there yet.
const GRAY: u8 = 127;
/// Most bytes of metadata, keys and values together: a picture is no place for documents.
const MAX_METADATA_BYTES: usize = 256 << 10;
const CHANNELS: usize = 3;

/// A picture file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    pub data: Bytes,
    pub media_type: &'static str,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
}

/// How many pictures are painted and wait in a process. Clones share the places.
#[derive(Clone)]
pub struct Places {
    at_work: Arc<Semaphore>,
    inside: Arc<Semaphore>,
    queue_limit: usize,
}

impl Places {
    pub fn new(config: &ImagesConfig) -> Self {
        let semaphore = |places| Arc::new(Semaphore::new(places));
        let (parallel, queue_limit) = (config.parallel_images, config.queue_limit);
        Self { at_work: semaphore(parallel), inside: semaphore(parallel + queue_limit), queue_limit }
    }

    /// A place in the queue, at once or not at all; then, in turn, one at work.
    async fn take(&self) -> Result<[OwnedSemaphorePermit; 2], Error> {
        let full = || Error::QueueFull(self.queue_limit);
        let inside = self.inside.clone().try_acquire_owned().map_err(|_| full())?;
        let at_work = self.at_work.clone().acquire_owned().await.map_err(|_| full())?; // never closed
        Ok([inside, at_work])
    }
}

/// The work of the service for one model. Cheap to clone.
#[derive(Clone)]
pub struct Stage {
    model: Arc<str>,
    painter: Arc<Painter>,
    places: Places,
}

impl Stage {
    pub fn new(model: &str, painter: Painter, places: Places) -> Self {
        Self { model: model.into(), painter: Arc::new(painter), places }
    }

    /// What drawings are made of here.
    pub fn canvas(&self) -> Canvas {
        self.painter.canvas()
    }

    /// Paints a drawing that fits the canvas, and writes it with its metadata. Of a code map that ends early, the rest is gray.
    pub async fn decode(&self, drawing: Drawing, format: ImageFormat, metadata: BTreeMap<String, String>) -> Result<Picture, Error> {
        let whole = match (&drawing, self.canvas()) {
            (Drawing::Codes(codes), Canvas::Codes(grid)) => codes.len() == grid.len(),
            _ => true,
        };
        let result = self.paint(drawing, format, metadata).await;
        let outcome = match &result {
            Ok(_) if whole => "finished",
            Ok(_) => "preview",
            Err(Error::Invalid(_) | Error::QueueFull(_)) => "refused",
            Err(Error::Compute(_)) => "failed",
        };
        metrics::image(&self.model, outcome);
        result
    }

    async fn paint(&self, drawing: Drawing, format: ImageFormat, metadata: BTreeMap<String, String>) -> Result<Picture, Error> {
        let bytes: usize = metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
        if bytes > MAX_METADATA_BYTES {
            return Err(Invalid::new("metadata", format!("{bytes} bytes, at most {MAX_METADATA_BYTES} are taken")).into());
        }
        let places = self.places.take().await?;
        let (model, painter, span) = (self.model.clone(), self.painter.clone(), tracing::Span::current());
        let work = move || {
            let _places = places; // kept until the work is done, even if nobody waits for it any more
            span.in_scope(|| draw(&model, &painter, drawing, format, &metadata))
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| Error::Compute(format!("the decoder stopped: {error}")))?
    }
}

/// 1. drawing to pixels; 2. gray over what is missing; 3. pixels to a file.
fn draw(
    model: &str,
    painter: &Painter,
    mut drawing: Drawing,
    format: ImageFormat,
    metadata: &BTreeMap<String, String>,
) -> Result<Picture, Error> {
    let start = Instant::now();
    let known = match (&mut drawing, painter.canvas()) {
        (Drawing::Codes(codes), Canvas::Codes(grid)) => {
            let known = codes.len();
            codes.resize(grid.len(), 0); // some code: what comes of it is painted over
            Some((grid, known))
        }
        _ => None,
    };
    let values = painter.paint(&drawing).map_err(|error| Error::Compute(error.to_string()))?; // [3, height, width]
    let (width, height) = painter.image_size();
    let mut image = Rgb { width: width as u32, height: height as u32, data: models::pixels_to_rgb(&values) };
    if let Some((grid, known)) = known {
        cover(&mut image, grid, known);
    }
    let decoded = start.elapsed();
    let data = pixels::encode(&image, format, metadata).map_err(|error| Error::Compute(error.to_string()))?;
    metrics::painted(model, decoded, start.elapsed() - decoded);
    tracing::debug!(model, bytes = data.len(), "painted");
    Ok(Picture { data: data.into(), media_type: pixels::media_type(format), width: image.width, height: image.height })
}

/// Paints the patches from number `known` on gray.
fn cover(image: &mut Rgb, grid: CodeGrid, known: usize) {
    let (width, height) = (image.width as usize, image.height as usize);
    let (patch_width, patch_height) = (width / grid.columns, height / grid.rows);
    for (y, row) in image.data.chunks_exact_mut(width * CHANNELS).enumerate() {
        let shown = known.saturating_sub(y / patch_height * grid.columns).min(grid.columns); // patches of this row
        row[shown * patch_width * CHANNELS..].fill(GRAY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_gray() {
        let grid = CodeGrid { rows: 2, columns: 3, codebook_size: 1 };
        for known in 0..=6 {
            let mut image = Rgb { width: 6, height: 4, data: vec![1; 6 * 4 * 3] };
            cover(&mut image, grid, known);
            for (index, pixel) in image.data.chunks_exact(3).enumerate() {
                let patch = index / 6 / 2 * 3 + index % 6 / 2;
                assert_eq!(pixel, [if patch < known { 1 } else { GRAY }; 3], "{known} known, pixel {index}");
            }
        }
    }
}
