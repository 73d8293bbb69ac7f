//! Weights as they lie in a checkpoint file.

use std::ops::Range;

use half::{bf16, f16};

/// Storage type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    BF16,
    F16,
}

impl Dtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }
}

/// A weight matrix `[rows, columns]`, row-major, little-endian, at any alignment.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    rows: usize,
    columns: usize,
}

impl<'a> Matrix<'a> {
    /// Panics unless `bytes` is exactly the matrix and neither dimension is zero.
    pub fn new(bytes: &'a [u8], dtype: Dtype, rows: usize, columns: usize) -> Self {
        let expected = rows.checked_mul(columns).and_then(|n| n.checked_mul(dtype.size()));
        assert_eq!(expected, Some(bytes.len()), "a {rows} x {columns} {dtype:?} matrix");
        assert!(rows > 0 && columns > 0, "an empty matrix");
        Self { bytes, dtype, rows, columns }
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The matrix of some of the rows.
    pub fn part(&self, rows: Range<usize>) -> Self {
        let stride = self.columns * self.dtype.size();
        Self::new(&self.bytes[rows.start * stride..rows.end * stride], self.dtype, rows.len(), self.columns)
    }

    /// The bytes of row `row`.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let stride = self.columns * self.dtype.size();
        &self.bytes[row * stride..(row + 1) * stride]
    }
}

/// The elements of `bytes` as f32, each exactly.
pub(crate) fn elements(dtype: Dtype, bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(dtype.size()).map(move |b| match dtype {
        Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        Dtype::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
    })
}
