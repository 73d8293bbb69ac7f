//! JanusFlow: the llama decoder between two shallow networks, which together give the velocity of a flow in latent maps (spec: janusflow.md).
//!
//! The text side is that of llama. A picture is drawn by reading, behind the prompt, the time and the map as rows, and by turning the
//! hidden states of these rows into a velocity; the loop over the time is the scheduler's.

use std::sync::Arc;

use backend_onnx::SessionOptions;
use checkpoint::Checkpoint;
use domain::{LatentGrid, ModelCard};
use layers::{Backend, EngineError, FlowModel, LanguageModel, Observer, Step, StepOutput, Weights};

use crate::{
    llama::{Decoder, Llama},
    siglip::Siglip,
    text_config::{Fields, TextConfig},
    uvit::{FlowNetworks, UVit},
};

/// Where the tower that sees is described, and what its tensors are called.
pub(crate) const TOWER: (&str, &str) = ("vision_und_enc_config", "vision_und_enc_model.vision_tower.");

/// What the configuration says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct JanusFlowConfig {
    pub text: TextConfig,
    /// Positions that a picture takes in the prompt: the begin-of-understanding row, then the patches.
    pub image_tokens: usize,
    networks: UVit,
}

impl JanusFlowConfig {
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let text = TextConfig::read(checkpoint, "/language_config")?;
        // Pictures are drawn on the grid on which they are seen (spec: janusflow.md 6).
        let tower = Siglip::read_original(checkpoint, TOWER.0, TOWER.1)?;
        let networks = UVit::read(checkpoint, &text, tower.side())?;
        if networks.grid.positions >= text.max_position_embeddings {
            let (positions, context) = (networks.grid.positions, text.max_position_embeddings);
            let reason = format!("{context} positions hold no prompt beside an image of {positions}");
            return Err(Fields { checkpoint, path: "language_config" }.refuse("max_position_embeddings", reason));
        }
        Ok(Self { text, image_tokens: tower.tokens() + 1, networks })
    }

    pub fn grid(&self) -> LatentGrid {
        self.networks.grid
    }
}

/// A model that reads text and pictures and draws by a flow.
pub(crate) struct JanusFlow<B: Backend> {
    /// The text side.
    llama: Llama<B>,
    networks: FlowNetworks,
}

impl<B: Backend> JanusFlow<B> {
    pub fn load(backend: &Arc<B>, checkpoint: &Checkpoint, card: ModelCard, kv_blocks: usize, threads: usize) -> Result<Self, EngineError> {
        let JanusFlowConfig { text, networks, .. } = JanusFlowConfig::read(checkpoint)?;
        let root = Weights::new(checkpoint).at("language_model");
        let decoder = Decoder::load(backend, text, &root.at("model"), &root, kv_blocks)?;
        let networks = FlowNetworks::load(checkpoint, networks, &SessionOptions { threads })?;
        Ok(Self { llama: Llama::around(card, decoder), networks })
    }
}

impl<B: Backend> LanguageModel for JanusFlow<B> {
    fn card(&self) -> &ModelCard {
        self.llama.card()
    }

    fn kv_block_bytes(&self) -> usize {
        self.llama.kv_block_bytes()
    }

    fn kv_blocks(&self) -> usize {
        self.llama.kv_blocks()
    }

    fn forward(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<StepOutput, EngineError> {
        self.llama.forward(step, observer)
    }

    fn flow(&self) -> Option<&dyn FlowModel> {
        Some(&self.networks)
    }
}
