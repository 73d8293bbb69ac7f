use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};

use crate::Dtype;
use crate::weights::WeightFile;

/// A tensor in its mapped file. Cheap to copy; lives as long as the [`Checkpoint`](crate::Checkpoint).
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// Row-major, little-endian, as long as shape and dtype say. Not necessarily aligned for the dtype.
    pub data: &'a [u8],
    pub(crate) file: &'a Arc<WeightFile>,
    pub(crate) range: Range<usize>,
}

/// Where a tensor's bytes lie on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location<'a> {
    /// Absolute path with symbolic links resolved.
    pub file: &'a Path,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl<'a> TensorView<'a> {
    /// Every element as f32, row-major. Exact for f16, bf16 and f32; rounded to the nearest for wider types.
    pub fn to_f32(&self) -> Vec<f32> {
        to_f32(self.dtype, self.data)
    }

    /// The same tensor with a life of its own: keeps the file mapped.
    pub fn owned(&self) -> SharedTensor {
        SharedTensor { file: self.file.clone(), range: self.range.clone(), dtype: self.dtype, shape: self.shape.into() }
    }

    /// Where the bytes lie on disk.
    pub fn location(&self) -> Location<'a> {
        Location { file: &self.file.path, offset: self.range.start as u64, len: self.range.len() as u64 }
    }
}

/// A tensor that keeps its file mapped. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SharedTensor {
    file: Arc<WeightFile>,
    range: Range<usize>,
    dtype: Dtype,
    shape: Arc<[usize]>,
}

impl SharedTensor {
    /// Row-major, little-endian. Not necessarily aligned for the dtype.
    pub fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Every element as f32, as [`TensorView::to_f32`].
    pub fn to_f32(&self) -> Vec<f32> {
        to_f32(self.dtype, self.bytes())
    }

    /// Gives back the memory that the tensor takes in this process, for one who has made a copy. It can still be read, from the file anew.
    pub fn release(&self) {
        self.file.release(self.range.start, self.range.end);
    }
}

fn to_f32(dtype: Dtype, data: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::Bool => convert(data, |[byte]| f32::from(byte != 0)),
        Dtype::U8 => convert(data, |[byte]| f32::from(byte)),
        Dtype::I8 => convert(data, |bytes| f32::from(i8::from_le_bytes(bytes))),
        Dtype::U16 => convert(data, |bytes| f32::from(u16::from_le_bytes(bytes))),
        Dtype::I16 => convert(data, |bytes| f32::from(i16::from_le_bytes(bytes))),
        Dtype::F16 => convert(data, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Dtype::BF16 => convert(data, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Dtype::U32 => convert(data, |bytes| u32::from_le_bytes(bytes) as f32),
        Dtype::I32 => convert(data, |bytes| i32::from_le_bytes(bytes) as f32),
        Dtype::F32 => convert(data, f32::from_le_bytes),
        Dtype::U64 => convert(data, |bytes| u64::from_le_bytes(bytes) as f32),
        Dtype::I64 => convert(data, |bytes| i64::from_le_bytes(bytes) as f32),
        Dtype::F64 => convert(data, |bytes| f64::from_le_bytes(bytes) as f32),
    }
}

fn convert<const N: usize>(data: &[u8], element: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    data.as_chunks::<N>().0.iter().map(|&bytes| element(bytes)).collect()
}
