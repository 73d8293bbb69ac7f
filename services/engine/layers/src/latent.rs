use std::sync::Arc;

use crate::{Attend, Backend, EngineError, HeadRows, Linear, RmsNorm, Rotation, Slice, Weights};

/// Multi-head latent attention over a compressed cache (spec: language.md 2.2 and 2.5).
///
/// Keys and values of all heads come from one narrow row per position, `c = norm(kv_a(x))`, and only that row and the rotated part of the key
/// are kept. It is computed in the absorbed form, prefill and decode rows alike, so that a row's bits do not depend on how its prompt was cut:
/// `q_nope · (W_UK c) = (W_UKᵀ q_nope) · c`, and `W_UV` is applied to the weighted sum of the `c`.
pub struct LatentAttention<B: Backend> {
    backend: Arc<B>,
    shape: LatentShape,
    query: Query<B>,
    kv_a_proj: Linear<B>,
    kv_a_layernorm: RmsNorm<B>,
    kv_b_proj: Linear<B>,
    o_proj: Linear<B>,
}

/// Sizes of a latent attention layer, with the names of the configuration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentShape {
    pub hidden: usize,
    pub heads: usize,
    /// `None`: queries come from `x` in one step.
    pub q_lora_rank: Option<usize>,
    pub kv_lora_rank: usize,
    pub qk_nope_head_dim: usize,
    /// Even.
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
    /// Whether the projections from and to the residual stream have biases (a plain `q_proj` never has).
    pub bias: bool,
    /// Factor of the scores.
    pub softmax_scale: f32,
}

/// From `x` to the queries.
enum Query<B: Backend> {
    Plain { q_proj: Linear<B> },
    LowRank { q_a_proj: Linear<B>, q_a_layernorm: RmsNorm<B>, q_b_proj: Linear<B> },
}

/// The two inner norms are built with this whatever `rms_norm_eps` says (spec: language.md 2.2).
const INNER_EPS: f32 = 1e-6;

impl LatentShape {
    /// Width of a query head.
    fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Rows of `kv_b_proj` per head: first those of the key, then those of the value.
    fn kv_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.v_head_dim
    }

    /// `W_UK` `[qk_nope_head_dim, kv_lora_rank]` of every head in `kv_b_proj`.
    fn key_rows(&self) -> HeadRows {
        HeadRows { heads: self.heads, period: self.kv_head_dim(), rows: 0..self.qk_nope_head_dim }
    }

    /// `W_UV` `[v_head_dim, kv_lora_rank]` of every head in `kv_b_proj`.
    fn value_rows(&self) -> HeadRows {
        HeadRows { heads: self.heads, period: self.kv_head_dim(), rows: self.qk_nope_head_dim..self.kv_head_dim() }
    }
}

impl<B: Backend> Query<B> {
    fn load(backend: &Arc<B>, weights: &Weights<'_>, shape: &LatentShape) -> Result<Self, EngineError> {
        let out = shape.heads * shape.qk_head_dim();
        let load = |name, shape, bias| Linear::load(backend, weights, name, shape, bias);
        Ok(match shape.q_lora_rank {
            None => Self::Plain { q_proj: load("q_proj", [out, shape.hidden], false)? },
            Some(rank) => Self::LowRank {
                q_a_proj: load("q_a_proj", [rank, shape.hidden], shape.bias)?,
                q_a_layernorm: RmsNorm::load(backend, weights, "q_a_layernorm", rank, INNER_EPS)?,
                q_b_proj: load("q_b_proj", [out, rank], false)?,
            },
        })
    }

    /// `[rows, hidden]` -> `[rows, heads * qk_head_dim]`
    fn forward(&self, x: &B::Tensor) -> Result<B::Tensor, EngineError> {
        match self {
            Self::Plain { q_proj } => q_proj.forward(x),
            Self::LowRank { q_a_proj, q_a_layernorm, q_b_proj } => q_b_proj.forward(&q_a_layernorm.forward(&q_a_proj.forward(x)?)?),
        }
    }
}

impl<B: Backend> LatentAttention<B> {
    pub fn load(backend: &Arc<B>, weights: &Weights<'_>, shape: LatentShape) -> Result<Self, EngineError> {
        let LatentShape { hidden, heads, kv_lora_rank, qk_rope_head_dim, v_head_dim, bias, .. } = shape;
        let load = |name, shape, bias| Linear::load(backend, weights, name, shape, bias);
        Ok(Self {
            backend: backend.clone(),
            shape,
            query: Query::load(backend, weights, &shape)?,
            kv_a_proj: load("kv_a_proj_with_mqa", [kv_lora_rank + qk_rope_head_dim, hidden], bias)?,
            kv_a_layernorm: RmsNorm::load(backend, weights, "kv_a_layernorm", kv_lora_rank, INNER_EPS)?,
            kv_b_proj: load("kv_b_proj", [heads * shape.kv_head_dim(), kv_lora_rank], false)?,
            o_proj: load("o_proj", [hidden, heads * v_head_dim], bias)?,
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
        let LatentShape { heads, kv_lora_rank: rank, qk_nope_head_dim: nope, .. } = self.shape;
        let b = &self.backend;
        // 1. Queries, of which the last dimensions of every head turn with the position.
        let q = self.query.forward(x)?; // [rows, heads * (nope + rope)]
        let q_nope = b.columns(&q, self.shape.qk_head_dim(), 0..nope)?; // [rows, heads * nope]
        let q_pe = b.rope(b.columns(&q, self.shape.qk_head_dim(), nope..self.shape.qk_head_dim())?, rotation)?; // [rows, heads * rope]
        // 2. What is kept of the positions.
        let c_and_k = self.kv_a_proj.forward(x)?; // [rows, rank + rope]
        let width = rank + self.shape.qk_rope_head_dim;
        let c = self.kv_a_layernorm.forward(&b.columns(&c_and_k, width, 0..rank)?)?; // [rows, rank]
        let k_pe = b.rope(b.columns(&c_and_k, width, rank..width)?, rotation)?; // [rows, rope]
        // 3. Attention in the space of c.
        let q_c = self.kv_b_proj.heads_transposed(&self.shape.key_rows(), &q_nope)?; // [rows, heads * rank]
        let attend = Attend { slices, heads, scale: self.shape.softmax_scale };
        let u = b.latent_attention(&attend, [q_c, q_pe], [c, k_pe], kv)?; // [rows, heads * rank]
        // 4. Values out of it.
        let o = self.kv_b_proj.heads(&self.shape.value_rows(), &u)?; // [rows, heads * v_head_dim]
        self.o_proj.forward(&o) // [rows, hidden]
    }
}
