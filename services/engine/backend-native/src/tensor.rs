use std::ops::Range;

/// Activations, row-major `[rows, width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub(crate) values: Vec<f32>,
    pub(crate) width: usize,
}

impl Tensor {
    /// `values` in rows of `width`.
    pub(crate) fn new(values: Vec<f32>, width: usize) -> Self {
        assert!(width > 0 && values.len().is_multiple_of(width), "{} values in rows of {width}", values.len());
        Self { values, width }
    }

    /// Zeros.
    pub(crate) fn zeros(rows: usize, width: usize) -> Self {
        Self { values: vec![0.0; rows * width], width }
    }

    pub(crate) fn rows(&self) -> usize {
        self.values.len() / self.width
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.width..(row + 1) * self.width]
    }

    /// The places of `part` of every `period` neighbours.
    pub(crate) fn columns(&self, period: usize, part: Range<usize>) -> Self {
        assert!(self.width.is_multiple_of(period), "rows of {} in parts of {period}", self.width);
        let values = self.values.chunks_exact(period).flat_map(|values| &values[part.clone()]).copied().collect();
        Self::new(values, self.width / period * part.len())
    }
}
