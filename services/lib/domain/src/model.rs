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
    /// Present when the model can draw.
    pub code_grid: Option<CodeGrid>,
    /// Present when the model can see: positions that one picture takes.
    pub tokens_per_image: Option<usize>,
    /// Defaults of `generation_config.json`.
    pub default_sampling: Sampling,
    pub default_image_sampling: ImageSampling,
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
