use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, paint};

/// Peak memory beside the weights and the KV cache that is still fine, as a part of the weights on disk.
const MEMORY_GOAL: f64 = 1.1;

/// What was measured of one checkpoint. Times in seconds, memory in bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Bytes of all weight files, the autoencoder's included.
    pub weights: u64,
    /// From the start of the services to the first moment at which they take requests.
    pub load: f64,
    /// Resident when loaded.
    pub loaded: u64,
    /// Most resident at any time until loaded.
    pub loading_peak: u64,
    /// Most resident at any time, KV cache included.
    pub peak: u64,
    /// KV cache that the largest request filled, at least.
    pub kv: u64,
    /// `(peak - kv) / weights`.
    pub memory_ratio: f64,
    /// Until the first token of a short question, as the first request after loading.
    pub first_token: f64,
    /// Positions of the long prompt.
    pub prompt_tokens: u32,
    /// Prompt positions per second, from request to first token.
    pub prefill_rate: f64,
    /// Tokens per second behind the first one, one stream.
    pub decode_rate: f64,
    /// To turn a picture into embeddings; absent where the model does not see.
    pub see: Option<f64>,
    /// To draw and paint a picture; absent where the model does not draw.
    pub draw: Option<f64>,
    /// Codes, or steps, of that picture.
    pub draw_steps: Option<u32>,
}

impl Figures {
    /// Fills in what follows from the rest.
    pub fn concluded(mut self) -> Self {
        self.memory_ratio = self.peak.saturating_sub(self.kv) as f64 / self.weights.max(1) as f64;
        self
    }
}

/// Prints the heading of the table.
pub fn head() -> Result<(), Failure> {
    let units = "GB      s    GB    GB    GB   ratio       s   tok/s  tok/s      s        s";
    terminal::line(&paint(
        BOLD,
        format!(
            "{:<10} {:>7} {:>6} {:>5} {:>5} {:>5} {:>7} {:>7} {:>7} {:>6} {:>6} {:>8}",
            "family", "weights", "load", "idle", "peak", "kv", "memory", "first", "prefill", "decode", "see", "draw"
        ),
    ))?;
    terminal::line(&paint(DIM, format!("{:<10}      {units}", ""))).map(drop)
}

/// Prints a row of the table.
pub fn row(name: &str, figures: &Figures) -> Result<(), Failure> {
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let optional = |seconds: Option<f64>| seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.2}"));
    let style = if figures.memory_ratio <= MEMORY_GOAL { GOOD } else { BAD };
    let drawn = figures.draw_steps.map_or_else(String::new, |steps| paint(DIM, format!(" ({steps} steps)")));
    terminal::line(&format!(
        "{:<10} {:>7.2} {:>6.2} {:>5.2} {:>5.2} {:>5.2} {} {:>7.2} {:>7.1} {:>6.2} {:>6} {:>8}{drawn}",
        name,
        gigabytes(figures.weights),
        figures.load,
        gigabytes(figures.loaded),
        gigabytes(figures.peak),
        gigabytes(figures.kv),
        paint(style, format!("{:>7.3}", figures.memory_ratio)),
        figures.first_token,
        figures.prefill_rate,
        figures.decode_rate,
        optional(figures.see),
        optional(figures.draw),
    ))
    .map(drop)
}

/// Says what the columns mean.
pub fn legend() -> Result<(), Failure> {
    for line in [
        format!("memory: (peak - kv) / weights, at most {MEMORY_GOAL} wanted; kv: what the largest request filled at least"),
        "idle: resident when loaded; first: until the first token of the first request; prefill, decode: one stream".to_owned(),
        "see: one picture to embeddings; draw: one picture, guidance included".to_owned(),
    ] {
        terminal::line(&paint(DIM, line))?;
    }
    Ok(())
}
