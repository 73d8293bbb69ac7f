use std::sync::Arc;

use crate::{Attend, Backend, EngineError, Linear, Rotation, Slice, Weights};

/// Multi-head or grouped-query attention with rotary positions over a paged cache (spec: language.md 1.2).
pub struct Attention<B: Backend> {
    backend: Arc<B>,
    shape: AttentionShape,
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    o_proj: Linear<B>,
}

/// Sizes of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    pub hidden: usize,
    pub heads: usize,
    /// Divides `heads`.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Whether the four projections have biases.
    pub bias: bool,
}

impl<B: Backend> Attention<B> {
    pub fn load(backend: &Arc<B>, weights: &Weights<'_>, shape: AttentionShape) -> Result<Self, EngineError> {
        let AttentionShape { hidden, heads, kv_heads, head_dim, bias } = shape;
        let load = |name, shape| Linear::load(backend, weights, name, shape, bias);
        Ok(Self {
            backend: backend.clone(),
            shape,
            q_proj: load("q_proj", [heads * head_dim, hidden])?,
            k_proj: load("k_proj", [kv_heads * head_dim, hidden])?,
            v_proj: load("v_proj", [kv_heads * head_dim, hidden])?,
            o_proj: load("o_proj", [hidden, heads * head_dim])?,
        })
    }

    /// `x` `[rows, hidden]`, already normed -> `[rows, hidden]`
    pub fn forward(
        &self,
        x: &B::Tensor,
        slices: &[Slice],
        rotation: &Rotation<B::Tensor>,
        kv: &mut B::Kv,
    ) -> Result<B::Tensor, EngineError> {
        let q = self.backend.rope(self.q_proj.forward(x)?, rotation)?; // [rows, heads * head_dim]
        let k = self.backend.rope(self.k_proj.forward(x)?, rotation)?; // [rows, kv_heads * head_dim]
        let v = self.v_proj.forward(x)?; // [rows, kv_heads * head_dim]
        let attend = Attend { slices, heads: self.shape.heads, scale: 1.0 / (self.shape.head_dim as f32).sqrt() };
        let x = self.backend.attention(&attend, [q, k, v], kv)?; // [rows, heads * head_dim]
        self.o_proj.forward(&x) // [rows, hidden]
    }
}
