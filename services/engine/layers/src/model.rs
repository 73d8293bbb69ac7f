use domain::ModelCard;

use crate::{EngineError, Step, StepOutput};

/// A loaded language model with its KV cache, whatever its family and backend.
pub trait LanguageModel: Send {
    /// What it is and can do.
    fn card(&self) -> &ModelCard;

    /// Bytes that one KV block takes, all layers together.
    fn kv_block_bytes(&self) -> usize;

    /// Number of blocks in the KV cache.
    fn kv_blocks(&self) -> usize;

    /// Compute a step: write the KV cache at the slices' positions and return the logits asked for.
    ///
    /// The result for a sequence does not depend on what else is in the step.
    fn forward(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<StepOutput, EngineError>;
}

/// Sees intermediate tensors of a forward pass; used to compare a checkpoint with reference outputs.
pub trait Observer {
    /// Whether `tensor` wants to be called at all (models skip the copies otherwise).
    fn active(&self) -> bool;

    /// `name` as in the golden files without prompt prefix (`hidden.layer0`, `logits`, ...); `values` row-major `[rows, width]`, ids as the
    /// numbers they are.
    fn tensor(&mut self, name: &str, values: &[f32], width: usize);
}

/// Sees nothing.
#[derive(Debug, Clone, Copy)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn active(&self) -> bool {
        false
    }

    fn tensor(&mut self, _name: &str, _values: &[f32], _width: usize) {}
}
