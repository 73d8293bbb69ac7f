use std::sync::Arc;

use crate::LatentGrid;

/// A latent map: what an image of a flow is before it is pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Latent {
    pub channels: usize,
    pub rows: usize,
    pub columns: usize,
    /// `[channels, rows, columns]`, as many as these say.
    pub values: Arc<[f32]>,
}

impl Latent {
    /// A map of this shape.
    pub fn new(grid: LatentGrid, values: impl Into<Arc<[f32]>>) -> Self {
        let LatentGrid { channels, rows, columns, .. } = grid;
        Self { channels, rows, columns, values: values.into() }
    }

    /// Whether this is a map of that shape.
    pub fn fits(&self, grid: LatentGrid) -> bool {
        (self.channels, self.rows, self.columns) == (grid.channels, grid.rows, grid.columns)
    }
}

/// What becomes a picture.
#[derive(Debug, Clone, PartialEq)]
pub enum Drawing {
    /// VQ codes, row by row; some may be missing at the end.
    Codes(Vec<u32>),
    Latent(Latent),
}
