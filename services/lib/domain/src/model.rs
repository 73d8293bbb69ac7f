use crate::{ImageSampling, Sampling};

/// What a loaded checkpoint is and can do.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelCard {
    /// `model_type` of the checkpoint.
    pub family: String,
    /// Positions the model may see, prompt and output together.
    pub context_length: usize,
    /// Rows of the output head (at least the tokenizer's size).
    pub vocabulary_size: usize,
    pub hidden_size: usize,
    /// Present when the model can draw: what its images are made of.
    pub canvas: Option<Canvas>,
    /// Present when the model can see: positions that one picture takes.
    pub tokens_per_image: Option<usize>,
    /// Defaults of `generation_config.json`.
    pub default_sampling: Sampling,
    pub default_image_sampling: ImageSampling,
}

/// What an image is before it is pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Canvas {
    /// A map of VQ codes, drawn one after the other.
    Codes(CodeGrid),
    /// A map of real numbers, reached from noise by a flow.
    Latent(LatentGrid),
}

impl ModelCard {
    /// The code map of a model that draws codes.
    pub fn code_grid(&self) -> Option<CodeGrid> {
        match self.canvas {
            Some(Canvas::Codes(grid)) => Some(grid),
            Some(Canvas::Latent(_)) | None => None,
        }
    }

    /// The latent map of a model that draws by a flow.
    pub fn latent_grid(&self) -> Option<LatentGrid> {
        match self.canvas {
            Some(Canvas::Latent(grid)) => Some(grid),
            Some(Canvas::Codes(_)) | None => None,
        }
    }
}

/// Shape of the VQ code map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeGrid {
    pub rows: usize,
    pub columns: usize,
    pub codebook_size: usize,
}

impl CodeGrid {
    /// Number of codes in an image.
    pub fn len(&self) -> usize {
        self.rows * self.columns
    }

    /// Whether the grid has no cell.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Shape of a latent map, and of the rows by which the language model sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentGrid {
    pub channels: usize,
    pub rows: usize,
    pub columns: usize,
    /// Positions that the map takes in a sequence, that of its time included.
    pub positions: usize,
}

impl LatentGrid {
    /// Number of values `[channels, rows, columns]`.
    pub fn len(&self) -> usize {
        self.channels * self.rows * self.columns
    }

    /// Whether the map has no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
