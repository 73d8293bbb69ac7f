//! Which family a checkpoint is of, from `config.json` alone.

use std::sync::Arc;

use backend_native::Native;
use checkpoint::Checkpoint;
use domain::{Canvas, ImageSampling, ModelCard};
use layers::{Backend, EngineError, LanguageModel, MoeShape, RemoteExperts};

use crate::{
    deepseek, deepseek_v2,
    deepseek_vl::{self, DeepSeekVlConfig},
    generation,
    janus::{Janus, JanusConfig, Layout},
    janusflow::{JanusFlow, JanusFlowConfig},
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
    JanusFlow,
}

/// Loads the language side of a checkpoint onto the CPU. Weights stay in the mapped files.
pub fn load_language(checkpoint: &Arc<Checkpoint>, options: &LoadOptions) -> Result<Box<dyn LanguageModel>, EngineError> {
    load_language_around(checkpoint, options, None)
}

/// As [`load_language`], with routed experts that are somewhere else.
pub fn load_language_around(
    checkpoint: &Arc<Checkpoint>,
    options: &LoadOptions,
    remote: Option<&Arc<dyn RemoteExperts>>,
) -> Result<Box<dyn LanguageModel>, EngineError> {
    let native = Arc::new(Native::new(options.threads)?);
    let model = load_on(&native, checkpoint, options, remote)?;
    let (isa, threads) = (native.cpu().isa().name(), native.cpu().threads());
    tracing::info!(family = checkpoint.model_type(), isa, threads, kv_blocks = options.kv_blocks, "language model loaded");
    Ok(model)
}

/// Loads the language side of a checkpoint onto a given backend.
pub fn load_language_on<B: Backend>(
    backend: &Arc<B>,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
) -> Result<Box<dyn LanguageModel>, EngineError> {
    load_on(backend, checkpoint, options, None)
}

fn load_on<B: Backend>(
    backend: &Arc<B>,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    remote: Option<&Arc<dyn RemoteExperts>>,
) -> Result<Box<dyn LanguageModel>, EngineError> {
    let LoadOptions { kv_blocks, threads } = *options;
    if kv_blocks == 0 || u32::try_from(kv_blocks).is_err() {
        return Err(EngineError::Compute(format!("a KV cache of {kv_blocks} blocks cannot be made")));
    }
    let card = card(checkpoint)?;
    let family = Family::of(checkpoint)?;
    Ok(match family {
        Family::Llama | Family::Deepseek | Family::DeepseekV2 => {
            Box::new(Llama::load(backend, checkpoint, family.text(checkpoint)?, card, kv_blocks, remote)?)
        }
        Family::Janus(layout) => Box::new(Janus::load(backend, checkpoint, layout, card, kv_blocks)?),
        Family::DeepSeekVl(layout) => Box::new(deepseek_vl::load(backend, checkpoint, layout, card, kv_blocks)?),
        Family::JanusFlow => Box::new(JanusFlow::load(backend, checkpoint, card, kv_blocks, threads)?),
    })
}

/// What a checkpoint is and can do, without loading weights.
pub fn card(checkpoint: &Checkpoint) -> Result<ModelCard, EngineError> {
    let family = Family::of(checkpoint)?;
    let (text, canvas, image_tokens) = match family {
        Family::Llama | Family::Deepseek | Family::DeepseekV2 => (family.text(checkpoint)?, None, None),
        Family::Janus(layout) => {
            let config = JanusConfig::read(checkpoint, layout)?;
            (config.text, Some(Canvas::Codes(config.grid)), Some(config.image_tokens))
        }
        Family::JanusFlow => {
            let config = JanusFlowConfig::read(checkpoint)?;
            let grid = config.grid();
            (config.text, Some(Canvas::Latent(grid)), Some(config.image_tokens))
        }
        Family::DeepSeekVl(layout) => {
            let config = DeepSeekVlConfig::read(checkpoint, layout)?;
            (config.text, None, Some(config.image_tokens))
        }
    };
    // JanusFlow draws with less guidance (spec: janusflow.md 2).
    let guidance = if matches!(canvas, Some(Canvas::Latent(_))) { 2.0 } else { ImageSampling::default().guidance };
    let drawing = ImageSampling { guidance, ..ImageSampling::default() };
    let (default_sampling, default_image_sampling) = generation::defaults(checkpoint, drawing)?;
    Ok(ModelCard {
        family: checkpoint.model_type().to_owned(),
        context_length: text.max_position_embeddings,
        vocabulary_size: text.vocab_size,
        hidden_size: text.hidden_size,
        canvas,
        tokens_per_image: image_tokens,
        default_sampling,
        default_image_sampling,
    })
}

/// What the images of a checkpoint are made of; `None` where it does not draw, or is of no family that is known here.
pub(crate) fn canvas(checkpoint: &Checkpoint) -> Result<Option<Canvas>, EngineError> {
    Ok(match Family::of(checkpoint)? {
        Family::Llama | Family::Deepseek | Family::DeepseekV2 | Family::DeepSeekVl(_) => None,
        Family::Janus(layout) => Some(Canvas::Codes(JanusConfig::read(checkpoint, layout)?.grid)),
        Family::JanusFlow => Some(Canvas::Latent(JanusFlowConfig::read(checkpoint)?.grid())),
    })
}

/// Bytes that one block of the KV cache takes, without loading weights.
pub fn kv_block_bytes(checkpoint: &Checkpoint) -> Result<usize, EngineError> {
    Ok(decoder(checkpoint)?.kv_block_bytes())
}

/// The layers of experts of a checkpoint; `None` where it has none.
pub(crate) fn expert_layers(checkpoint: &Checkpoint) -> Result<Option<(Vec<usize>, MoeShape)>, EngineError> {
    let text = decoder(checkpoint)?;
    let layers: Vec<_> = (0..text.num_hidden_layers).filter(|&layer| text.experts_of(layer).is_some()).collect();
    Ok(text.experts.filter(|_| !layers.is_empty()).map(|experts| (layers, experts.shape)))
}

/// The decoder of a checkpoint.
pub(crate) fn decoder(checkpoint: &Checkpoint) -> Result<TextConfig, EngineError> {
    Family::of(checkpoint)?.text(checkpoint)
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
            // DeepSeek-VL, Janus and JanusFlow were published under one name; Janus is the one with a VQ tokenizer, JanusFlow the one with an
            // encoder of what it draws (spec: vision.md 1).
            "multi_modality" if has("gen_vision_config") => Ok(Self::Janus(Layout::Original)),
            "multi_modality" if has("vision_gen_enc_config") => Ok(Self::JanusFlow),
            "multi_modality" if has("vision_config") => Ok(Self::DeepSeekVl(deepseek_vl::Layout::Original)),
            other => {
                let known = "llama, deepseek, deepseek_v2, deepseek_vl, deepseek_vl_hybrid, janus, multi_modality with vision_config or vision_gen_enc_config";
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
            Self::JanusFlow => Ok(JanusFlowConfig::read(checkpoint)?.text),
        }
    }
}
