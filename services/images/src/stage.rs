use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use domain::{CodeGrid, ImageFormat};
use models::VqDecoder;
use pixels::Rgb;
use tokio::sync::Semaphore;

use crate::ImagesConfig;
use crate::error::Error;
use crate::metrics;

/// What is not drawn yet is mid-grey in previews.
const GREY: u8 = 127;

/// The work of the service for one model. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stage {
    model: Arc<str>,
    decoder: Arc<VqDecoder>,
    /// Places in the queue, the one that is being decoded included.
    places: Arc<Semaphore>,
    queue_limit: usize,
    /// One at a time: a decoding uses all threads it is given.
    turn: Arc<Semaphore>,
}

/// An encoded picture.
#[derive(Debug)]
pub struct Picture {
    pub data: Vec<u8>,
    pub width: u32,
    pub height: u32,
}

impl Stage {
    pub fn new(model: &str, decoder: VqDecoder, config: &ImagesConfig) -> Self {
        Self {
            model: model.into(),
            decoder: Arc::new(decoder),
            places: Arc::new(Semaphore::new(config.queue_limit + 1)),
            queue_limit: config.queue_limit,
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    /// Shape of the code maps that the model draws.
    pub fn grid(&self) -> CodeGrid {
        self.decoder.grid()
    }

    /// The picture of a code map, or a preview of one that is not complete. `codes` lie in the codebook and are no more than the grid's.
    pub async fn decode(&self, codes: Vec<u32>, format: ImageFormat, metadata: BTreeMap<String, String>) -> Result<Picture, Error> {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            metrics::refused(&self.model);
            return Err(Error::Busy(self.queue_limit));
        };
        let turn = self.turn.clone().acquire_owned().await.map_err(|closed| Error::Stopped(closed.to_string()))?;
        let (model, decoder, span) = (self.model.clone(), self.decoder.clone(), tracing::Span::current());
        let work = move || {
            // A client that leaves meanwhile does not free the decoder early: these go when the work is done.
            let _held = (place, turn);
            let _entered = span.enter();
            let began = Instant::now();
            let preview = codes.len() < decoder.grid().len();
            let picture = draw(&decoder, codes, format, &metadata)?;
            metrics::decoded(&model, preview, began.elapsed());
            Ok(picture)
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(Error::Stopped(error.to_string())))
    }
}

fn draw(decoder: &VqDecoder, mut codes: Vec<u32>, format: ImageFormat, metadata: &BTreeMap<String, String>) -> Result<Picture, Error> {
    let grid = decoder.grid();
    let drawn = codes.len();
    codes.resize(grid.len(), 0);
    let pixels = decoder.decode(&codes)?; // [3, height, width]
    let (height, width) = decoder.image_size();
    let mut image = Rgb { width: width as u32, height: height as u32, data: models::pixels_to_rgb(&pixels) };
    paint_missing(&mut image, grid, drawn);
    let data = pixels::encode(&image, format, metadata)?;
    Ok(Picture { data, width: image.width, height: image.height })
}

/// Paints the cells from `drawn` on grey.
fn paint_missing(image: &mut Rgb, grid: CodeGrid, drawn: usize) {
    let (width, height) = (image.width as usize, image.height as usize);
    let (cell_width, cell_height) = (width / grid.columns, height / grid.rows);
    for cell in drawn..grid.len() {
        let (top, left) = (cell / grid.columns * cell_height, cell % grid.columns * cell_width);
        for y in top..top + cell_height {
            let begin = (y * width + left) * 3;
            image.data[begin..begin + cell_width * 3].fill(GREY);
        }
    }
}
