use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use cache::Cache;
use domain::Invalid;
use models::{Planes, VisionEncoder};
use pixels::{Limits, PixelError, Processor};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::VisionConfig;
use crate::error::Error;
use crate::flights::Flights;
use crate::metrics::{self, Busy};

/// The field of a request that this stage reads.
const FIELD: &str = "image.data";

/// A picture as rows of the language model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    pub rows: usize,
    pub width: usize,
    /// Row-major `[rows, width]`, f32, little endian: as it is cached and as it travels.
    pub data: Bytes,
    /// Whether it was computed for an earlier request.
    pub cached: bool,
}

/// What a model sees with.
pub struct Eye {
    encoder: VisionEncoder,
    processor: Processor,
    /// Digest of everything beside the picture that decides the embeddings.
    fingerprint: String,
}

impl Eye {
    /// Reads every weight of the tower once, for the fingerprint.
    pub fn new(encoder: VisionEncoder, processor: Processor) -> Self {
        let parts = [env!("CARGO_PKG_VERSION"), &encoder.fingerprint(), &processor.fingerprint()];
        let fingerprint = blake3::hash(parts.join("\n").as_bytes()).to_hex().to_string();
        Self { encoder, processor, fingerprint }
    }

    /// Bytes of the embeddings of a picture.
    fn len(&self) -> usize {
        self.encoder.tokens_per_image() * self.encoder.width() * size_of::<f32>()
    }
}

/// How many pictures are worked on and wait in a process. Clones share the places.
#[derive(Clone)]
pub struct Places {
    at_work: Arc<Semaphore>,
    inside: Arc<Semaphore>,
    queue_limit: usize,
}

impl Places {
    pub fn new(config: &VisionConfig) -> Self {
        let (parallel, waiting) = (config.parallel_images.min(1 << 20), config.queue_limit.min(1 << 20));
        let semaphore = |places| Arc::new(Semaphore::new(places));
        Self { at_work: semaphore(parallel), inside: semaphore(parallel + waiting), queue_limit: waiting }
    }

    /// A place in the queue, at once or not at all; then, in turn, one at work.
    async fn take(&self) -> Result<[OwnedSemaphorePermit; 2], Error> {
        let full = || Error::QueueFull(self.queue_limit);
        let inside = self.inside.clone().try_acquire_owned().map_err(|_| full())?;
        let at_work = self.at_work.clone().acquire_owned().await.map_err(|_| full())?; // never closed
        Ok([inside, at_work])
    }
}

/// Embeddings and where they come from: `cached` or `encoded`.
type Flown = Result<(Bytes, &'static str), Error>;

/// The work of the service for one model. Cheap to clone.
#[derive(Clone)]
pub struct Stage {
    model: Arc<str>,
    eye: Arc<Eye>,
    cache: Cache,
    flights: Arc<Flights<Flown>>,
    places: Places,
    limits: Limits,
}

impl Stage {
    pub fn new(model: &str, eye: Eye, cache: Cache, places: Places, config: &VisionConfig) -> Self {
        Self { model: model.into(), eye: Arc::new(eye), cache, flights: Arc::new(Flights::new()), places, limits: config.limits() }
    }

    /// The embeddings of a picture file: from the cache, from a request that is encoding the same picture, or computed.
    pub async fn encode(&self, image: Bytes) -> Result<Encoded, Error> {
        let result = self.find(image).await;
        let outcome = match &result {
            Ok((_, outcome)) => outcome,
            Err(Error::Invalid(_) | Error::QueueFull(_)) => "refused",
            Err(Error::Compute(_)) => "failed",
        };
        metrics::image(&self.model, outcome);
        let (data, outcome) = result?;
        let encoder = &self.eye.encoder;
        Ok(Encoded { rows: encoder.tokens_per_image(), width: encoder.width(), data, cached: outcome == "cached" })
    }

    async fn find(&self, image: Bytes) -> Result<(Bytes, &'static str), Error> {
        if image.is_empty() {
            return Err(Invalid::new(FIELD, "no bytes").into());
        }
        if image.len() > self.limits.max_bytes {
            return Err(refused(&PixelError::TooManyBytes { bytes: image.len(), limit: self.limits.max_bytes }));
        }
        let key = format!("vision:{}:{}", self.eye.fingerprint, blake3::hash(&image).to_hex());
        match self.flights.join(&key, self.clone().look_up_or_compute(key.clone(), image)).await {
            (Ok((data, "encoded")), true) => Ok((data, "joined")),
            (result, _) => result,
        }
    }

    /// A flight ends after its result is in the cache, so nothing falls between a flight and the next one for the same picture.
    async fn look_up_or_compute(self, key: String, image: Bytes) -> Flown {
        if let Some(data) = self.cache.get(&key).await.filter(|data| data.len() == self.eye.len()) {
            return Ok((data, "cached"));
        }
        let data = self.compute(image).await?;
        self.cache.put(&key, data.clone()).await;
        Ok((data, "encoded"))
    }

    async fn compute(&self, image: Bytes) -> Result<Bytes, Error> {
        let _busy = Busy::new(self.model.clone());
        let places = self.places.take().await?;
        let (model, eye, limits, span) = (self.model.clone(), self.eye.clone(), self.limits, tracing::Span::current());
        let work = move || {
            let _places = places; // kept until the work is done, even if nobody waits for it any more
            span.in_scope(|| see(&model, &eye, &image, &limits))
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| Error::Compute(format!("the encoder stopped: {error}")))?
    }
}

/// 1. file to pixels; 2. pixels to the towers' inputs; 3. towers and aligner.
fn see(model: &str, eye: &Eye, image: &Bytes, limits: &Limits) -> Result<Bytes, Error> {
    let start = Instant::now();
    let rgb = pixels::decode(image, limits).map_err(|error| refused(&error))?;
    let (width, height) = (rgb.width, rgb.height);
    let input = eye.processor.process(&rgb);
    drop(rgb);
    let preprocessed = start.elapsed();
    metrics::preprocessed(model, preprocessed);
    let planes = Planes { main: &input.main.values, high_res: input.high_res.as_ref().map(|plane| plane.values.as_slice()) };
    let values = eye.encoder.encode(planes).map_err(|error| Error::Compute(error.to_string()))?; // [rows, width]
    metrics::encoded(model, start.elapsed() - preprocessed);
    tracing::debug!(model, width, height, bytes = image.len(), "encoded");
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

fn refused(error: &PixelError) -> Error {
    Invalid::new(FIELD, error.to_string()).into()
}
