use std::sync::Arc;

use crate::{Backend, EngineError, HeadRows, Weights};

/// A weight matrix with its backend: `y = x · wᵀ + b`.
pub struct Linear<B: Backend> {
    backend: Arc<B>,
    weight: B::Linear,
}

impl<B: Backend> Linear<B> {
    /// `{name}.weight` `[out, in]` and, if wanted, `{name}.bias` `[out]`.
    pub fn load(backend: &Arc<B>, weights: &Weights<'_>, name: &str, shape: [usize; 2], bias: bool) -> Result<Self, EngineError> {
        Ok(Self { backend: backend.clone(), weight: weights.linear(backend.as_ref(), name, shape, bias)? })
    }

    /// `[rows, in]` -> `[rows, out]`
    pub fn forward(&self, x: &B::Tensor) -> Result<B::Tensor, EngineError> {
        self.backend.apply(&self.weight, x)
    }

    /// Every head through its rows of the matrix: `[rows, heads * in]` -> `[rows, heads * out]`
    pub fn heads(&self, heads: &HeadRows, x: &B::Tensor) -> Result<B::Tensor, EngineError> {
        self.backend.apply_heads(&self.weight, heads, x)
    }

    /// Every head through the transpose of its rows: `[rows, heads * out]` -> `[rows, heads * in]`
    pub fn heads_transposed(&self, heads: &HeadRows, x: &B::Tensor) -> Result<B::Tensor, EngineError> {
        self.backend.apply_heads_transposed(&self.weight, heads, x)
    }

    /// The matrix as a table: rows `ids` of it, `[ids, in]`.
    pub fn embed(&self, ids: &[u32]) -> Result<B::Tensor, EngineError> {
        self.backend.embed(&self.weight, ids)
    }
}
