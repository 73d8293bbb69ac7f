//! Which family a checkpoint is of, from `config.json` alone.

use std::sync::Arc;

use backend_native::Native;
use checkpoint::Checkpoint;
use domain::ModelCard;
use layers::{Backend, EngineError, LanguageModel};

use crate::{
    deepseek, deepseek_v2,
    deepseek_vl::{self, DeepSeekVlConfig},
    generation,
    janus::{Janus, JanusConfig, Layout},
    llama::Llama,
    text_config::{Fields, TextConfig},
};

/// How a language model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
    /// Threads that a large operation is spread over; 0: one per core that the process may use.
    pub threads: usize,
}

/// The families there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Deepseek,
    DeepseekV2,
    Janus(Layout),
    DeepSeekVl(deepseek_vl::Layout),
}

/// Loads the language side of a checkpoint onto the CPU. Weights stay in the mapped files.
pub fn load_language(checkpoint: &Arc<Checkpoint>, options: &LoadOptions) -> Result<Box<dyn LanguageModel>, EngineError> {
    let native = Arc::new(Native::new(options.threads)?);
    let model = load_language_on(&native, checkpoint, options.kv_blocks)?;
    let (isa, threads) = (native.cpu().isa().name(), native.cpu().threads());
    tracing::info!(family = checkpoint.model_type(), isa, threads, kv_blocks = options.kv_blocks, "language model loaded");
    Ok(model)
}

/// Loads the language side of a checkpoint onto a given backend, with a KV cache of `kv_blocks` blocks.
pub fn load_language_on<B: Backend>(
    backend: &Arc<B>,
    checkpoint: &Checkpoint,
    kv_blocks: usize,
) -> Result<Box<dyn LanguageModel>, EngineError> {
    if kv_blocks == 0 || u32::try_from(kv_blocks).is_err() {
        return Err(EngineError::Compute(format!("a KV cache of {kv_blocks} blocks cannot be made")));
    }
    let card = card(checkpoint)?;
    let family = Family::of(checkpoint)?;
    Ok(match family {
        Family::Llama | Family::Deepseek | Family::DeepseekV2 => {
            Box::new(Llama::load(backend, checkpoint, family.text(checkpoint)?, card, kv_blocks)?)
        }
        Family::Janus(layout) => Box::new(Janus::load(backend, checkpoint, layout, card, kv_blocks)?),
        Family::DeepSeekVl(layout) => Box::new(deepseek_vl::load(backend, checkpoint, layout, card, kv_blocks)?),
    })
}

/// What a checkpoint is and can do, without loading weights.
pub fn card(checkpoint: &Checkpoint) -> Result<ModelCard, EngineError> {
    let family = Family::of(checkpoint)?;
    let (text, grid, image_tokens) = match family {
        Family::Llama | Family::Deepseek | Family::DeepseekV2 => (family.text(checkpoint)?, None, None),
        Family::Janus(layout) => {
            let config = JanusConfig::read(checkpoint, layout)?;
            (config.text, Some(config.grid), Some(config.image_tokens))
        }
        Family::DeepSeekVl(layout) => {
            let config = DeepSeekVlConfig::read(checkpoint, layout)?;
            (config.text, None, Some(config.image_tokens))
        }
    };
    let (default_sampling, default_image_sampling) = generation::defaults(checkpoint)?;
    Ok(ModelCard {
        family: checkpoint.model_type().to_owned(),
        context_length: text.max_position_embeddings,
        vocabulary_size: text.vocab_size,
        hidden_size: text.hidden_size,
        code_grid: grid,
        tokens_per_image: image_tokens,
        default_sampling,
        default_image_sampling,
    })
}

/// Bytes that one block of the KV cache takes, without loading weights.
pub fn kv_block_bytes(checkpoint: &Checkpoint) -> Result<usize, EngineError> {
    Ok(Family::of(checkpoint)?.text(checkpoint)?.kv_block_bytes())
}

impl Family {
    fn of(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let has = |field| checkpoint.config().get(field).is_some();
        match checkpoint.model_type() {
            "llama" => Ok(Self::Llama),
            // An early revision of V2-Chat has the name of the first family (spec: language.md 2.8).
            "deepseek" if !deepseek_v2::has_ranks(checkpoint) => Ok(Self::Deepseek),
            "deepseek" | "deepseek_v2" => Ok(Self::DeepseekV2),
            "janus" => Ok(Self::Janus(Layout::Port)),
            "deepseek_vl" | "deepseek_vl_hybrid" => Ok(Self::DeepSeekVl(deepseek_vl::Layout::Port)),
            // DeepSeek-VL, Janus and JanusFlow were published under one name; Janus is the one with a VQ tokenizer (spec: vision.md 1).
            "multi_modality" if has("gen_vision_config") => Ok(Self::Janus(Layout::Original)),
            "multi_modality" if has("vision_config") && !has("vision_gen_enc_config") => {
                Ok(Self::DeepSeekVl(deepseek_vl::Layout::Original))
            }
            other => {
                let known = "llama, deepseek, deepseek_v2, deepseek_vl, deepseek_vl_hybrid, janus, multi_modality with vision_config";
                Err(Fields { checkpoint, path: "" }.refuse("model_type", format!("{other:?} is not supported (supported: {known})")))
            }
        }
    }

    /// The configuration of the decoder.
    fn text(self, checkpoint: &Checkpoint) -> Result<TextConfig, EngineError> {
        match self {
            Self::Llama => TextConfig::read(checkpoint, ""),
            Self::Deepseek => deepseek::read(checkpoint),
            Self::DeepseekV2 => deepseek_v2::read(checkpoint),
            Self::Janus(layout) => Ok(JanusConfig::read(checkpoint, layout)?.text),
            Self::DeepSeekVl(layout) => Ok(DeepSeekVlConfig::read(checkpoint, layout)?.text),
        }
    }
}
