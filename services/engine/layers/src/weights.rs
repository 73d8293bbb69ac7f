use checkpoint::{Checkpoint, Dtype, SharedTensor};

use crate::{Backend, EngineError};

/// Tensors of a checkpoint below a path such as `model.layers.3`.
#[derive(Debug, Clone)]
pub struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    path: String,
}

impl<'a> Weights<'a> {
    /// All tensors of a checkpoint.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, path: String::new() }
    }

    /// The tensors below `name`.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { checkpoint: self.checkpoint, path: self.name(name) }
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(&self.name(name))
    }

    /// The tensor `name`, of exactly this shape and of a type that weights may have.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<SharedTensor, EngineError> {
        let name = self.name(name);
        let tensor = self.checkpoint.tensor_shaped(&name, shape)?;
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let file = tensor.location().file.display();
            return Err(EngineError::Checkpoint(format!(
                "{file}: tensor {name}: weights of type {} cannot be computed with",
                tensor.dtype
            )));
        }
        Ok(tensor.owned())
    }

    /// `{name}.weight` `[out, in]` and, if wanted, `{name}.bias` `[out]`.
    pub fn linear<B: Backend>(&self, backend: &B, name: &str, [out, inner]: [usize; 2], bias: bool) -> Result<B::Linear, EngineError> {
        let at = self.at(name);
        let bias = bias.then(|| at.tensor("bias", &[out])).transpose()?;
        backend.linear(at.tensor("weight", &[out, inner])?, bias)
    }

    fn name(&self, name: impl std::fmt::Display) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }
}
