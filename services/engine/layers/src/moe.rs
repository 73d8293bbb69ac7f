use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::experts::Elsewhere;
use crate::{
    Backend, EngineError, Experts, Gating, Linear, LocalExperts, Mixture, Observer, RemoteExperts, Share, Slice, SwiGlu, Term, Weights,
};

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

/// Rows of a step that may go without an expert that nobody can compute, and those that did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Losses {
    /// One per row of the step.
    may: Vec<bool>,
    /// Rows that lost an expert in any layer so far.
    rows: BTreeSet<usize>,
}

impl Losses {
    /// Nothing is lost yet.
    pub fn of(slices: &[Slice]) -> Self {
        Self { may: slices.iter().flat_map(|slice| vec![slice.may_lose_experts; slice.rows.len()]).collect(), rows: BTreeSet::new() }
    }

    /// How many of these rows lost an expert.
    pub fn count(&self, rows: Range<usize>) -> usize {
        self.rows.range(rows).count()
    }
}

impl<B: Backend> Moe<B> {
    /// `gate`, `shared_experts` and, unless they are somewhere else, `experts.0`, `experts.1`, ...
    pub fn load(
        backend: &Arc<B>,
        weights: &Weights<'_>,
        shape: MoeShape,
        layer: usize,
        remote: Option<&Arc<dyn RemoteExperts>>,
    ) -> Result<Self, EngineError> {
        let MoeShape { gating, hidden, inner, shared } = shape;
        let load_shared = || SwiGlu::load(backend, &weights.at("shared_experts"), hidden, shared * inner, false);
        let gate = Linear::load(backend, weights, "gate", [gating.experts, hidden], false)?;
        let experts: Box<dyn Experts<B>> = match remote {
            Some(remote) => Box::new(Elsewhere { backend: backend.clone(), remote: remote.clone(), layer, hidden }),
            None => Box::new(LocalExperts::load(backend, &weights.at("experts"), &shape, 0..gating.experts)?),
        };
        Ok(Self { backend: backend.clone(), shape, gate, experts, shared_experts: (shared > 0).then(load_shared).transpose()? })
    }

    /// `x` `[rows, hidden]`, already normed -> `[rows, hidden]`. An observer sees logits and choice of the gate as `router.layer{layer}.*`.
    pub fn forward(&self, x: &B::Tensor, layer: usize, losses: &mut Losses, observer: &mut dyn Observer) -> Result<B::Tensor, EngineError> {
        let Gating { experts, top_k, .. } = self.shape.gating;
        let logits = self.backend.download(&self.gate.forward(x)?)?; // [rows, experts]
        let routing = self.shape.gating.route(&logits);
        if observer.active() {
            let ids: Vec<f32> = routing.experts.iter().map(|&expert| expert as f32).collect();
            observer.tensor(&format!("router.layer{layer}.logits"), &logits, experts);
            observer.tensor(&format!("router.layer{layer}.topk_ids"), &ids, top_k);
            observer.tensor(&format!("router.layer{layer}.topk_weights"), &routing.weights, top_k);
        }
        let shares = routing.shares();
        let combine = self.experts.dispatch(x, &shares, &losses.may)?;
        // While experts elsewhere work.
        let shared = self.shared_experts.as_ref().map(|shared| shared.forward(x)).transpose()?;
        let rows = logits.len() / experts;
        let y = self.combine(rows, &shares, combine()?, losses)?; // [rows, hidden]
        match shared {
            Some(shared) => self.backend.add(y, &shared),
            None => Ok(y),
        }
    }

    /// The weighted sum of what the experts say, `[rows, hidden]`.
    fn combine(&self, rows: usize, shares: &[Share], mixture: Mixture<B::Tensor>, losses: &mut Losses) -> Result<B::Tensor, EngineError> {
        let hidden = self.shape.hidden;
        let kept = losses.kept(shares, &mixture.lost);
        let mut y = self.backend.upload(vec![0.0; rows * hidden], hidden)?;
        for Term { rows, mut weights, values } in mixture.terms {
            for (weight, row) in weights.iter_mut().zip(&rows) {
                *weight /= kept.get(row).unwrap_or(&1.0);
            }
            y = self.backend.scatter_add(y, &rows, &weights, &values)?;
        }
        Ok(y)
    }
}

impl Losses {
    /// For every row that loses a share here, the part of its weights that is left. What is left is made as heavy as the whole was; a row that
    /// loses everything has the shared experts alone.
    fn kept(&mut self, shares: &[Share], lost: &[usize]) -> BTreeMap<usize, f32> {
        let mut sums: BTreeMap<usize, (f32, f32)> = BTreeMap::new(); // row -> weights lost, weights in all
        if lost.is_empty() {
            return BTreeMap::new();
        }
        for (number, share) in shares.iter().enumerate() {
            for (&row, weight) in share.rows.iter().zip(&share.weights) {
                let (gone, total) = sums.entry(row).or_default();
                *total += weight;
                *gone += if lost.contains(&number) { *weight } else { 0.0 };
            }
        }
        sums.retain(|_, (gone, _)| *gone != 0.0);
        self.rows.extend(sums.keys());
        sums.into_iter().map(|(row, (gone, total))| (row, (total - gone) / total)).collect()
    }
}
