use std::sync::Arc;

use crate::{Backend, EngineError, Linear, Weights};

/// `down(silu(gate(x)) * up(x))` (spec: language.md 1.2).
pub struct SwiGlu<B: Backend> {
    backend: Arc<B>,
    gate_proj: Linear<B>,
    up_proj: Linear<B>,
    down_proj: Linear<B>,
}

impl<B: Backend> SwiGlu<B> {
    /// `hidden` -> `inner` -> `hidden`.
    pub fn load(backend: &Arc<B>, weights: &Weights<'_>, hidden: usize, inner: usize, bias: bool) -> Result<Self, EngineError> {
        let load = |name, shape| Linear::load(backend, weights, name, shape, bias);
        Ok(Self {
            backend: backend.clone(),
            gate_proj: load("gate_proj", [inner, hidden])?,
            up_proj: load("up_proj", [inner, hidden])?,
            down_proj: load("down_proj", [hidden, inner])?,
        })
    }

    /// `[rows, hidden]` -> `[rows, hidden]`
    pub fn forward(&self, x: &B::Tensor) -> Result<B::Tensor, EngineError> {
        let gate = self.gate_proj.forward(x)?; // [rows, inner]
        let up = self.up_proj.forward(x)?; // [rows, inner]
        self.down_proj.forward(&self.backend.silu_mul(gate, &up)?) // [rows, hidden]
    }
}

/// Linear layers with biases and exact GELUs between them: aligners, generation heads.
pub struct Projector<B: Backend> {
    backend: Arc<B>,
    layers: Vec<Linear<B>>,
}

impl<B: Backend> Projector<B> {
    /// One layer per name, the first from `widths[0]` to `widths[1]`, and so on.
    pub fn load(backend: &Arc<B>, weights: &Weights<'_>, names: &[String], widths: &[usize]) -> Result<Self, EngineError> {
        let load = |(name, widths): (&String, &[usize])| Linear::load(backend, weights, name, [widths[1], widths[0]], true);
        Ok(Self { backend: backend.clone(), layers: names.iter().zip(widths.windows(2)).map(load).collect::<Result<_, _>>()? })
    }

    /// `[rows, first width]` -> `[rows, last width]`
    pub fn forward(&self, x: B::Tensor) -> Result<B::Tensor, EngineError> {
        let mut x = x;
        for (index, layer) in self.layers.iter().enumerate() {
            let input = if index == 0 { x } else { self.backend.gelu(x)? };
            x = layer.forward(&input)?;
        }
        Ok(x)
    }
}
