//! DeepSeek-VL 1.3B and 7B: the llama decoder with pictures in its prompt (spec: vision.md).
//!
//! The towers are not here: pictures come in as embedding rows.

use std::sync::Arc;

use checkpoint::Checkpoint;
use domain::ModelCard;
use layers::{Backend, EngineError, Weights};

use crate::{
    llama::{Decoder, Llama},
    text_config::{Fields, TextConfig, flag},
    vision::VisionModel,
};

/// How the checkpoint is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `model_type: deepseek_vl` and `deepseek_vl_hybrid`, the ports of transformers.
    Port,
    /// `model_type: multi_modality`, as published.
    Original,
}

/// What the configuration says about the text side.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DeepSeekVlConfig {
    pub text: TextConfig,
    /// Positions that a picture takes in the prompt.
    pub image_tokens: usize,
}

impl DeepSeekVlConfig {
    pub fn read(checkpoint: &Checkpoint, layout: Layout) -> Result<Self, EngineError> {
        let text = match layout {
            Layout::Port => {
                let mut text = TextConfig::read(checkpoint, "/text_config")?;
                text.tie_word_embeddings |= flag(checkpoint, "tie_word_embeddings");
                text
            }
            Layout::Original => TextConfig::read(checkpoint, "/language_config")?,
        };
        let at = Fields { checkpoint, path: "" };
        let vision = VisionModel::read(checkpoint)?.ok_or_else(|| at.refuse("vision_config", "missing"))?;
        if vision.width() != text.hidden_size {
            let reason =
                format!("pictures become rows of {}, the hidden size of the language model is {}", vision.width(), text.hidden_size);
            return Err(at.refuse("aligner_config.params.n_embed", reason));
        }
        Ok(Self { image_tokens: vision.tokens(), text })
    }
}

/// The text side: tensors `model.language_model.*` and `lm_head`, or `language_model.model.*` and `language_model.lm_head`.
pub(crate) fn load<B: Backend>(
    backend: &Arc<B>,
    checkpoint: &Checkpoint,
    layout: Layout,
    card: ModelCard,
    kv_blocks: usize,
) -> Result<Llama<B>, EngineError> {
    let config = DeepSeekVlConfig::read(checkpoint, layout)?;
    let (decoder, head) = match layout {
        Layout::Port => ("model.language_model", ""),
        Layout::Original => ("language_model.model", "language_model"),
    };
    let all = Weights::new(checkpoint);
    Ok(Llama::around(card, Decoder::load(backend, config.text, &all.at(decoder), &all.at(head), kv_blocks)?))
}
