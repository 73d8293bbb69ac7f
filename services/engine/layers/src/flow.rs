use std::sync::Arc;

use crate::{EngineError, Observer};

/// What surrounds a language model that draws by a flow: a latent map in front of it, a velocity behind it.
///
/// One velocity is: [`FlowModel::encode`], the language model over the rows behind a prompt, [`FlowModel::decode`] of its hidden states.
/// Both depend on their arguments alone, to the last bit.
pub trait FlowModel {
    /// The map `z` `[channels, rows, columns]` at network time `time` (0 noise, 1000 picture).
    /// An observer sees `z_enc`, `t_emb` and `z_aligned`.
    fn encode(&self, z: &[f32], time: f32, observer: &mut dyn Observer) -> Result<FlowInput, EngineError>;

    /// The velocity `[channels, rows, columns]` that `hidden` means: the language model's hidden states after its last norm, one row per
    /// row of `input` but the first, `[positions - 1, hidden]`.
    /// An observer sees `dec_input`.
    fn decode(&self, hidden: &[f32], input: &FlowInput, observer: &mut dyn Observer) -> Result<Vec<f32>, EngineError>;
}

/// An encoded map.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowInput {
    /// What the language model reads behind the prompt: the embedding of the time, then the positions of the map, row by row.
    /// `[positions, hidden]`
    pub rows: Arc<[f32]>,
    /// What decoding needs of the encoder beside the time.
    pub skip: Vec<f32>,
}
