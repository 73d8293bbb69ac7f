//! Who computes routed experts: this process, or others.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Backend, EngineError, MoeShape, Share, SwiGlu, Weights};

/// Whoever computes routed experts.
pub trait Experts<B: Backend>: Send + Sync {
    /// Sends every share of a step on its way. The rows of shares are rows of `x` `[rows, hidden]`; what is returned waits for the outputs.
    ///
    /// What is computed for a row does not depend on the other rows, to the last bit.
    fn dispatch<'a>(&'a self, x: &'a B::Tensor, shares: &'a [Share], may_lose: &'a [bool]) -> Result<Combine<'a, B::Tensor>, EngineError>;
}

/// Waits for what was dispatched.
pub type Combine<'a, T> = Box<dyn FnOnce() -> Result<Mixture<T>, EngineError> + 'a>;

/// What experts have computed for a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture<T> {
    /// In the order in which they are added, which depends on the shares alone.
    pub terms: Vec<Term<T>>,
    /// Shares, by their number, that nobody could compute. Only rows that may lose an expert are in them.
    pub lost: Vec<usize>,
}

/// Row `i` of `values` `[rows of the term, hidden]`, times `weights[i]`, is added to row `rows[i]` of the step.
#[derive(Debug, Clone, PartialEq)]
pub struct Term<T> {
    pub rows: Vec<usize>,
    pub weights: Vec<f32>,
    pub values: T,
}

/// Experts of a layer that are computed here: all of them, or those of a shard.
pub struct LocalExperts<B: Backend> {
    backend: Arc<B>,
    experts: BTreeMap<usize, SwiGlu<B>>,
}

impl<B: Backend> LocalExperts<B> {
    /// `0`, `1`, ..., as far as they are among `held`.
    pub fn load(
        backend: &Arc<B>,
        weights: &Weights<'_>,
        shape: &MoeShape,
        held: impl IntoIterator<Item = usize>,
    ) -> Result<Self, EngineError> {
        let expert = |e| Ok((e, SwiGlu::load(backend, &weights.at(e), shape.hidden, shape.inner, false)?));
        Ok(Self { backend: backend.clone(), experts: held.into_iter().map(expert).collect::<Result<_, EngineError>>()? })
    }

    /// The output of the share's expert for its rows of `x` `[rows, hidden]`: `[rows of the share, hidden]`, without their weights.
    pub fn compute(&self, x: &B::Tensor, share: &Share) -> Result<B::Tensor, EngineError> {
        let missing = || EngineError::Step(format!("expert {} is not here", share.expert));
        self.experts.get(&share.expert).ok_or_else(missing)?.forward(&self.backend.gather(x, &share.rows)?)
    }
}

impl<B: Backend> Experts<B> for LocalExperts<B> {
    fn dispatch<'a>(&'a self, x: &'a B::Tensor, shares: &'a [Share], _may_lose: &'a [bool]) -> Result<Combine<'a, B::Tensor>, EngineError> {
        let term = move |share: &Share| {
            let values = self.compute(x, share)?;
            Ok(Term { rows: share.rows.clone(), weights: share.weights.clone(), values })
        };
        Ok(Box::new(move || Ok(Mixture { terms: shares.iter().map(term).collect::<Result<_, EngineError>>()?, lost: Vec::new() })))
    }
}

/// Routed experts that are not in this process.
pub trait RemoteExperts: Send + Sync {
    /// As [`Experts::dispatch`], for experts of layer `layer` and with rows `x` of `width` numbers. A share that nobody can compute is an
    /// [`EngineError::Unavailable`], unless every row in it may lose an expert.
    fn dispatch<'a>(&'a self, layer: usize, x: Rows, shares: &'a [Share], may_lose: &[bool]) -> Result<Combine<'a, Vec<f32>>, EngineError>;
}

/// Numbers on the host, row-major.
#[derive(Debug, Clone)]
pub struct Rows {
    pub values: Vec<f32>,
    pub width: usize,
}

/// The experts of one layer, computed elsewhere.
pub(crate) struct Elsewhere<B: Backend> {
    pub backend: Arc<B>,
    pub remote: Arc<dyn RemoteExperts>,
    pub layer: usize,
    pub hidden: usize,
}

impl<B: Backend> Experts<B> for Elsewhere<B> {
    fn dispatch<'a>(&'a self, x: &'a B::Tensor, shares: &'a [Share], may_lose: &'a [bool]) -> Result<Combine<'a, B::Tensor>, EngineError> {
        let values = self.backend.download(x)?;
        let combine = self.remote.dispatch(self.layer, Rows { values, width: self.hidden }, shares, may_lose)?;
        Ok(Box::new(move || {
            let Mixture { terms, lost } = combine()?;
            let upload = |Term { rows, weights, values }| Ok(Term { rows, weights, values: self.backend.upload(values, self.hidden)? });
            Ok(Mixture { terms: terms.into_iter().map(upload).collect::<Result<_, EngineError>>()?, lost })
        }))
    }
}
