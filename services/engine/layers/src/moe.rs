use std::sync::Arc;

use crate::{Backend, EngineError, Gating, Linear, Observer, Share, SwiGlu, Weights};

/// A layer of experts: `y = Σ w_e E_e(x) + S(x)`, the sum over the experts that the gate chooses for a token (spec: moe.md 1 and 2).
///
/// Tokens of a step are grouped by expert, so each expert runs once per step. A token's terms are added by ascending expert, whatever else is in
/// the step; gate, mixing weights and sum are f32.
pub struct Moe<B: Backend> {
    backend: Arc<B>,
    shape: MoeShape,
    gate: Linear<B>,
    experts: Box<dyn Experts<B>>,
    /// The shared experts, stored as one: every token passes them, with weight 1.
    shared_experts: Option<SwiGlu<B>>,
}

/// Sizes of a layer of experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeShape {
    pub gating: Gating,
    pub hidden: usize,
    /// Width inside a routed expert; the shared experts have `shared` times this.
    pub inner: usize,
    /// Shared experts; 0: none.
    pub shared: usize,
}

/// Whoever computes routed experts.
pub trait Experts<B: Backend>: Send + Sync {
    /// For every share, the outputs of its expert for its rows of `x` `[rows, hidden]`: `[rows of the share, hidden]`, without their weights.
    ///
    /// What is computed for a row does not depend on the other rows, to the last bit.
    fn forward(&self, x: &B::Tensor, shares: &[Share]) -> Result<Vec<B::Tensor>, EngineError>;
}

impl<B: Backend> Moe<B> {
    /// `gate`, `experts.0`, `experts.1`, ... and `shared_experts`.
    pub fn load(backend: &Arc<B>, weights: &Weights<'_>, shape: MoeShape) -> Result<Self, EngineError> {
        let MoeShape { gating, hidden, inner, shared } = shape;
        let load_shared = || SwiGlu::load(backend, &weights.at("shared_experts"), hidden, shared * inner, false);
        Ok(Self {
            backend: backend.clone(),
            shape,
            gate: Linear::load(backend, weights, "gate", [gating.experts, hidden], false)?,
            experts: Box::new(LocalExperts::load(backend, &weights.at("experts"), &shape)?),
            shared_experts: (shared > 0).then(load_shared).transpose()?,
        })
    }

    /// `x` `[rows, hidden]`, already normed -> `[rows, hidden]`. An observer sees logits and choice of the gate as `router.layer{layer}.*`.
    pub fn forward(&self, x: &B::Tensor, layer: usize, observer: &mut dyn Observer) -> Result<B::Tensor, EngineError> {
        let Gating { experts, top_k, .. } = self.shape.gating;
        let logits = self.backend.download(&self.gate.forward(x)?)?; // [rows, experts]
        let routing = self.shape.gating.route(&logits);
        if observer.active() {
            let ids: Vec<f32> = routing.experts.iter().map(|&expert| expert as f32).collect();
            observer.tensor(&format!("router.layer{layer}.logits"), &logits, experts);
            observer.tensor(&format!("router.layer{layer}.topk_ids"), &ids, top_k);
            observer.tensor(&format!("router.layer{layer}.topk_weights"), &routing.weights, top_k);
        }
        let rows = logits.len() / experts;
        let y = self.routed(x, rows, &routing.shares())?; // [rows, hidden]
        match &self.shared_experts {
            Some(shared) => self.backend.add(y, &shared.forward(x)?),
            None => Ok(y),
        }
    }

    /// The weighted sum of what the experts say, `[rows, hidden]`.
    fn routed(&self, x: &B::Tensor, rows: usize, shares: &[Share]) -> Result<B::Tensor, EngineError> {
        let hidden = self.shape.hidden;
        let mut y = self.backend.upload(vec![0.0; rows * hidden], hidden)?;
        for (share, output) in shares.iter().zip(self.experts.forward(x, shares)?) {
            y = self.backend.scatter_add(y, &share.rows, &share.weights, &output)?;
        }
        Ok(y)
    }
}

/// All experts of a layer, computed here.
pub struct LocalExperts<B: Backend> {
    backend: Arc<B>,
    experts: Vec<SwiGlu<B>>,
}

impl<B: Backend> LocalExperts<B> {
    /// `0`, `1`, ...
    pub fn load(backend: &Arc<B>, weights: &Weights<'_>, shape: &MoeShape) -> Result<Self, EngineError> {
        let expert = |e| SwiGlu::load(backend, &weights.at(e), shape.hidden, shape.inner, false);
        Ok(Self { backend: backend.clone(), experts: (0..shape.gating.experts).map(expert).collect::<Result<_, _>>()? })
    }
}

impl<B: Backend> Experts<B> for LocalExperts<B> {
    fn forward(&self, x: &B::Tensor, shares: &[Share]) -> Result<Vec<B::Tensor>, EngineError> {
        let expert = |share: &Share| self.experts[share.expert].forward(&self.backend.gather(x, &share.rows)?);
        shares.iter().map(expert).collect()
    }
}
