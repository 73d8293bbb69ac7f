use std::ops::Range;

use checkpoint::SharedTensor;

use crate::{BLOCK_TOKENS, EngineError, Slice};

/// The operations that models are made of, on one kind of device.
///
/// Every operation keeps rows apart: what it computes for a row does not depend on the other rows, to the last bit.
pub trait Backend: Send + Sync + 'static {
    /// Activations, row-major `[rows, width]`, f32.
    type Tensor: Send + Sync;
    /// A weight matrix `[out, in]` as it lies in the checkpoint, with its bias if it has one.
    type Linear: Send + Sync;
    /// The paged cache of one layer.
    type Kv: Send;

    /// Takes a matrix `[out, in]` of f32, bf16 or f16, and a bias `[out]`, without copying what it need not copy.
    fn linear(&self, weight: SharedTensor, bias: Option<SharedTensor>) -> Result<Self::Linear, EngineError>;
    /// Takes a vector `[width]` as one row.
    fn vector(&self, values: SharedTensor) -> Result<Self::Tensor, EngineError>;
    /// An empty cache.
    fn kv(&self, shape: &KvShape) -> Result<Self::Kv, EngineError>;

    /// Rows of `width` values from the host.
    fn upload(&self, values: Vec<f32>, width: usize) -> Result<Self::Tensor, EngineError>;
    /// All values, to the host.
    fn download(&self, x: &Self::Tensor) -> Result<Vec<f32>, EngineError>;
    /// All values of a tensor that is needed no more, to the host.
    fn give_up(&self, x: Self::Tensor) -> Result<Vec<f32>, EngineError> {
        self.download(&x)
    }

    /// Rows `ids` of the matrix `[out, in]`: `[ids, in]`. Every id is a row.
    fn embed(&self, table: &Self::Linear, ids: &[u32]) -> Result<Self::Tensor, EngineError>;
    /// `x · wᵀ + b`: `[rows, in]` -> `[rows, out]`.
    fn apply(&self, linear: &Self::Linear, x: &Self::Tensor) -> Result<Self::Tensor, EngineError>;
    /// Every head through its rows of the matrix: `[rows, heads * in]` -> `[rows, heads * out]`.
    fn apply_heads(&self, linear: &Self::Linear, heads: &HeadRows, x: &Self::Tensor) -> Result<Self::Tensor, EngineError>;
    /// Every head through the transpose of its rows of the matrix: `[rows, heads * out]` -> `[rows, heads * in]`.
    fn apply_heads_transposed(&self, linear: &Self::Linear, heads: &HeadRows, x: &Self::Tensor) -> Result<Self::Tensor, EngineError>;
    /// `x / sqrt(mean(x²) + eps) * weight`, by rows.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Tensor, eps: f32) -> Result<Self::Tensor, EngineError>;
    /// `silu(gate) * up`.
    fn silu_mul(&self, gate: Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor, EngineError>;
    /// The exact GELU.
    fn gelu(&self, x: Self::Tensor) -> Result<Self::Tensor, EngineError>;
    /// `x + y`.
    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor, EngineError>;
    /// Rotates every head of every row by the row's angles.
    fn rope(&self, x: Self::Tensor, rotation: &Rotation<Self::Tensor>) -> Result<Self::Tensor, EngineError>;
    /// Writes `k` and `v` `[rows, kv_heads * head_dim]` to the cache, then attends from `q` `[rows, heads * head_dim]`; shaped as `q`.
    fn attention(&self, attend: &Attend<'_>, qkv: [Self::Tensor; 3], kv: &mut Self::Kv) -> Result<Self::Tensor, EngineError>;
    /// Writes the new positions to a compressed cache, then attends from the queries: `[rows, heads * rank]` (spec: language.md 2.5).
    fn latent_attention(
        &self,
        attend: &Attend<'_>,
        queries: [Self::Tensor; 2],
        keys: [Self::Tensor; 2],
        kv: &mut Self::Kv,
    ) -> Result<Self::Tensor, EngineError>;
    /// Of every `period` neighbours in a row, those in `part`: `[rows, n * period]` -> `[rows, n * part.len()]`.
    fn columns(&self, x: &Self::Tensor, period: usize, part: Range<usize>) -> Result<Self::Tensor, EngineError>;
    /// The rows `rows` of `x`, in that order.
    fn gather(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor, EngineError>;
    /// Overwrites the rows `rows` of `x` with those of `y`.
    fn scatter(&self, x: Self::Tensor, rows: &[usize], y: &Self::Tensor) -> Result<Self::Tensor, EngineError>;
    /// Adds row `i` of `y`, times `weights[i]`, to row `rows[i]` of `x`.
    fn scatter_add(&self, x: Self::Tensor, rows: &[usize], weights: &[f32], y: &Self::Tensor) -> Result<Self::Tensor, EngineError>;
}

/// Size of the cache of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub blocks: usize,
    pub entry: KvEntry,
}

/// What is kept of one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvEntry {
    /// A key and a value per head.
    Heads { kv_heads: usize, head_dim: usize },
    /// What keys and values of all heads are made of: `c` of `rank` values and the rotated `k_pe` of `rope` values.
    Latent { rank: usize, rope: usize },
}

impl KvShape {
    /// Bytes of one block in f32.
    pub fn block_bytes(&self) -> usize {
        BLOCK_TOKENS * self.entry.values() * size_of::<f32>()
    }
}

impl KvEntry {
    /// Numbers per position.
    pub fn values(&self) -> usize {
        match *self {
            Self::Heads { kv_heads, head_dim } => 2 * kv_heads * head_dim,
            Self::Latent { rank, rope } => rank + rope,
        }
    }
}

/// Whose rows of a matrix are whose: head `h` has the rows `h * period + rows.start .. h * period + rows.end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadRows {
    pub heads: usize,
    pub period: usize,
    pub rows: Range<usize>,
}

/// Which two dimensions of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// `(x[j], x[j + head_dim / 2])` (spec: language.md 1.3).
    Halves,
    /// `(x[2j], x[2j + 1])` (spec: language.md 2.3).
    Neighbours,
}

/// Angles of the rows of a step: two tensors `[rows, head_dim / 2]`.
#[derive(Debug, Clone)]
pub struct Rotation<T> {
    pub pairs: Pairs,
    pub cos: T,
    pub sin: T,
    pub head_dim: usize,
}

/// What one attention is over.
#[derive(Debug, Clone, Copy)]
pub struct Attend<'a> {
    pub slices: &'a [Slice],
    /// Query heads.
    pub heads: usize,
    /// Factor of `q · k`.
    pub scale: f32,
}
