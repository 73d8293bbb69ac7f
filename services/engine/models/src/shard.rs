//! Some of a checkpoint's routed experts by themselves, without the rest of the model (spec: moe.md 1.2).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use backend_native::Native;
use checkpoint::Checkpoint;
use layers::{Backend, EngineError, LocalExperts, MoeShape, Share, Weights};

use crate::registry::expert_layers;

/// The routed experts of a checkpoint, all together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertShape {
    /// Layers of the decoder that have experts, ascending.
    pub layers: Vec<usize>,
    /// Experts of each such layer.
    pub experts: usize,
    /// Experts that a token goes to.
    pub top_k: usize,
    pub hidden: usize,
    /// Width inside an expert.
    pub inner: usize,
    /// Shared experts, which are no routed ones.
    pub shared: usize,
}

/// The experts of some numbers, in every layer of experts.
pub struct Shard {
    backend: Arc<Native>,
    checkpoint: Arc<Checkpoint>,
    shape: ExpertShape,
    moe: MoeShape,
    held: BTreeSet<usize>,
    layers: BTreeMap<usize, LocalExperts<Native>>,
}

/// The routed experts that a checkpoint has, from its configuration alone; `None` where it has none.
pub fn expert_shape(checkpoint: &Checkpoint) -> Result<Option<ExpertShape>, EngineError> {
    Ok(expert_layers(checkpoint)?.map(|(layers, moe)| shape(layers, &moe)))
}

fn shape(layers: Vec<usize>, moe: &MoeShape) -> ExpertShape {
    let MoeShape { gating, hidden, inner, shared } = *moe;
    ExpertShape { layers, experts: gating.experts, top_k: gating.top_k, hidden, inner, shared }
}

/// Which routed expert a tensor belongs to, by its name.
pub fn expert_of(tensor: &str) -> Option<usize> {
    tensor.split_once(".mlp.experts.")?.1.split('.').next()?.parse().ok()
}

/// Loads the experts `held` of every layer onto the CPU, with `threads` threads (0: one per core that the process may use). Weights stay in
/// the mapped files.
pub fn load_shard(checkpoint: &Arc<Checkpoint>, held: impl IntoIterator<Item = usize>, threads: usize) -> Result<Shard, EngineError> {
    let Some((layers, moe)) = expert_layers(checkpoint)? else {
        return Err(EngineError::Checkpoint(format!(
            "{}: config.json: n_routed_experts: missing, the model has no experts",
            checkpoint.dir().display()
        )));
    };
    let backend = Arc::new(Native::new(threads)?);
    let (shape, none) = (shape(layers, &moe), BTreeSet::new());
    Shard { backend, checkpoint: checkpoint.clone(), shape, moe, held: none, layers: BTreeMap::new() }.holding(held)
}

impl Shard {
    pub fn shape(&self) -> &ExpertShape {
        &self.shape
    }

    /// The experts that are here.
    pub fn held(&self) -> &BTreeSet<usize> {
        &self.held
    }

    /// The same with other experts. Takes no time: what is read is read when it is computed with.
    pub fn holding(&self, held: impl IntoIterator<Item = usize>) -> Result<Self, EngineError> {
        let held: BTreeSet<usize> = held.into_iter().collect();
        if let Some(expert) = held.iter().find(|&&expert| expert >= self.shape.experts) {
            return Err(EngineError::Checkpoint(format!("expert {expert}: the model has {}", self.shape.experts)));
        }
        let weights = Weights::new(&self.checkpoint).at("model.layers");
        let load = |&layer: &usize| {
            let experts = weights.at(layer).at("mlp.experts");
            Ok((layer, LocalExperts::load(&self.backend, &experts, &self.moe, held.iter().copied())?))
        };
        let layers = self.shape.layers.iter().map(load).collect::<Result<_, EngineError>>()?;
        Ok(Self {
            backend: self.backend.clone(),
            checkpoint: self.checkpoint.clone(),
            shape: self.shape.clone(),
            moe: self.moe,
            held,
            layers,
        })
    }

    /// Bytes of the weights of the experts that are here.
    pub fn weight_bytes(&self) -> u64 {
        let here = |name: &&str| expert_of(name).is_some_and(|expert| self.held.contains(&expert));
        let names = self.checkpoint.names().filter(here);
        names.filter_map(|name| self.checkpoint.tensor(name).ok()).map(|tensor| tensor.data.len() as u64).sum()
    }

    /// Begins with rows `x` `[rows, hidden]` for experts of layer `layer`.
    pub fn begin(&self, layer: usize, x: Vec<f32>) -> Result<Computation<'_>, EngineError> {
        let missing = || EngineError::Step(format!("layer {layer} has no experts"));
        let experts = self.layers.get(&layer).ok_or_else(missing)?;
        Ok(Computation { backend: &self.backend, experts, x: self.backend.upload(x, self.shape.hidden)? })
    }

    /// For every share, the outputs of its expert of layer `layer` for its rows of `x` `[rows, hidden]`: `[rows of the share, hidden]`, without
    /// their weights.
    pub fn compute(&self, layer: usize, x: Vec<f32>, shares: &[Share]) -> Result<Vec<Vec<f32>>, EngineError> {
        let computation = self.begin(layer, x)?;
        shares.iter().map(|share| computation.share(share)).collect()
    }
}

/// Rows of a step, and the experts of a layer that they go to.
pub struct Computation<'a> {
    backend: &'a Native,
    experts: &'a LocalExperts<Native>,
    x: <Native as Backend>::Tensor,
}

impl Computation<'_> {
    /// The outputs of the share's expert for its rows: `[rows of the share, hidden]`, without their weights.
    pub fn share(&self, share: &Share) -> Result<Vec<f32>, EngineError> {
        self.backend.give_up(self.experts.compute(&self.x, share)?)
    }
}
