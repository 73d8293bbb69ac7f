use std::sync::Arc;

use crate::{Backend, EngineError, Weights};

/// Root-mean-square norm.
pub struct RmsNorm<B: Backend> {
    backend: Arc<B>,
    weight: B::Tensor,
    eps: f32,
}

impl<B: Backend> RmsNorm<B> {
    /// `{name}.weight` `[width]`.
    pub fn load(backend: &Arc<B>, weights: &Weights<'_>, name: &str, width: usize, eps: f32) -> Result<Self, EngineError> {
        let weight = backend.vector(weights.at(name).tensor("weight", &[width])?)?;
        Ok(Self { backend: backend.clone(), weight, eps })
    }

    /// `[rows, width]` -> the same shape
    pub fn forward(&self, x: &B::Tensor) -> Result<B::Tensor, EngineError> {
        self.backend.rms_norm(x, &self.weight, self.eps)
    }
}
