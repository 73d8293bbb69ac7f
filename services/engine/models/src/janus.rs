//! Janus and Janus-Pro: the llama decoder with a second input (generation embedding and aligner) and a second head for VQ codes (spec: janus.md).
//!
//! The pixels' side, SigLIP in and the VQ decoder out, is not here: pictures come in as embedding rows and leave as codes.

use std::sync::Arc;

use checkpoint::Checkpoint;
use domain::{CodeGrid, ModelCard};
use layers::{Backend, EngineError, Head, LanguageModel, Limits, Linear, Losses, Observer, Projector, Step, StepOutput, Weights};
use serde::Deserialize;

use crate::{
    llama::Decoder,
    text_config::{Fields, TextConfig, flag},
};

/// How the checkpoint is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `model_type: janus`, the port of transformers.
    Port,
    /// `model_type: multi_modality`, as published.
    Original,
}

/// What the configuration says beside the text model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct JanusConfig {
    pub text: TextConfig,
    pub grid: CodeGrid,
    /// Positions that a picture takes in the prompt.
    pub image_tokens: usize,
    /// Width of the generation embedding.
    code_width: usize,
    /// Width between the two layers of the generation head.
    head_width: usize,
    /// Layers of the generation aligner.
    aligner_depth: usize,
}

#[derive(Debug, Deserialize)]
struct VqConfig {
    num_patches: usize,
    #[serde(default = "codebook_size")]
    num_embeddings: usize,
    #[serde(default = "code_width")]
    embed_dim: usize,
    image_token_embed_dim: Option<usize>,
    #[serde(default = "aligner_depth")]
    num_hidden_layers: usize,
}

#[derive(Debug, Deserialize)]
struct VisionConfig {
    num_image_tokens: Option<usize>,
    #[serde(default = "image_size")]
    image_size: usize,
    #[serde(default = "patch_size")]
    patch_size: usize,
}

/// One of the parts of an original configuration: what counts is under `params`.
#[derive(Debug, Deserialize)]
struct Part<T> {
    params: T,
}

#[derive(Debug, Deserialize)]
struct GenVisionParams {
    #[serde(default = "codebook_size")]
    image_token_size: usize,
    #[serde(default = "code_width")]
    n_embed: usize,
}

#[derive(Debug, Deserialize)]
struct GenHeadParams {
    image_token_embed: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct GenAlignerParams {
    #[serde(default = "aligner_depth")]
    depth: usize,
}

// What every published checkpoint has (spec: janus.md 1 and 5).
fn codebook_size() -> usize {
    16_384
}
fn code_width() -> usize {
    8
}
fn aligner_depth() -> usize {
    2
}
fn image_size() -> usize {
    384
}
fn patch_size() -> usize {
    16
}

/// The original VQ decoder doubles the sides of the code map four times.
const VQ_SCALE: usize = 16;

/// Largest sizes that are believed.
const MOST: usize = 1 << 24;

impl JanusConfig {
    pub fn read(checkpoint: &Checkpoint, layout: Layout) -> Result<Self, EngineError> {
        match layout {
            Layout::Port => Self::read_port(checkpoint),
            Layout::Original => Self::read_original(checkpoint),
        }
    }

    fn read_port(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let mut text = TextConfig::read(checkpoint, "/text_config")?;
        text.tie_word_embeddings |= flag(checkpoint, "tie_word_embeddings");
        let vq: VqConfig = checkpoint.config_as("/vq_config")?;
        let vision: VisionConfig = checkpoint.config_as("/vision_config")?;
        let at = Fields { checkpoint, path: "vq_config" };
        let side = at.size("num_patches", Some(vq.num_patches), 0, 1 << 12)?;
        Ok(Self {
            grid: CodeGrid { rows: side, columns: side, codebook_size: at.size("num_embeddings", Some(vq.num_embeddings), 0, MOST)? },
            image_tokens: image_tokens(checkpoint, "vision_config", &vision)?,
            code_width: at.size("embed_dim", Some(vq.embed_dim), 0, MOST)?,
            head_width: at.size("image_token_embed_dim", vq.image_token_embed_dim, text.hidden_size, MOST)?,
            aligner_depth: at.size("num_hidden_layers", Some(vq.num_hidden_layers), 0, 64)?,
            text,
        })
    }

    fn read_original(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let text = TextConfig::read(checkpoint, "/language_config")?;
        let vision: Part<VisionConfig> = checkpoint.config_as("/vision_config")?;
        let vq: Part<GenVisionParams> = checkpoint.config_as("/gen_vision_config")?;
        let head: Part<GenHeadParams> = checkpoint.config_as("/gen_head_config")?;
        let aligner: Part<GenAlignerParams> = checkpoint.config_as("/gen_aligner_config")?;
        let at = Fields { checkpoint, path: "gen_vision_config/params" };
        // Pictures are drawn at the size at which they are seen.
        let side = at.size("image_size", Some(vision.params.image_size / VQ_SCALE), 0, 1 << 12)?;
        Ok(Self {
            grid: CodeGrid {
                rows: side,
                columns: side,
                codebook_size: at.size("image_token_size", Some(vq.params.image_token_size), 0, MOST)?,
            },
            image_tokens: image_tokens(checkpoint, "vision_config/params", &vision.params)?,
            code_width: at.size("n_embed", Some(vq.params.n_embed), 0, MOST)?,
            head_width: at.size("image_token_embed", head.params.image_token_embed, text.hidden_size, MOST)?,
            aligner_depth: at.size("depth", Some(aligner.params.depth), 0, 64)?,
            text,
        })
    }
}

/// Positions of one picture: as written, or one per patch.
fn image_tokens(checkpoint: &Checkpoint, path: &str, vision: &VisionConfig) -> Result<usize, EngineError> {
    let at = Fields { checkpoint, path };
    let patch = at.size("patch_size", Some(vision.patch_size), 0, 1 << 12)?;
    let side = at.size("image_size", Some(vision.image_size), 0, 1 << 16)? / patch;
    at.size("num_image_tokens", vision.num_image_tokens, side * side, MOST)
}

/// A model that reads text and pictures and draws.
pub(crate) struct Janus<B: Backend> {
    card: ModelCard,
    limits: Limits,
    codebook: usize,
    decoder: Decoder<B>,
    generation_embeddings: Linear<B>,
    generation_aligner: Projector<B>,
    generation_head: Projector<B>,
}

impl<B: Backend> Janus<B> {
    pub fn load(backend: &Arc<B>, checkpoint: &Checkpoint, layout: Layout, card: ModelCard, kv_blocks: usize) -> Result<Self, EngineError> {
        let config = JanusConfig::read(checkpoint, layout)?;
        let names = Names::new(layout, config.aligner_depth);
        let all = Weights::new(checkpoint);
        let (hidden, codebook) = (config.text.hidden_size, config.grid.codebook_size);
        let aligner_widths: Vec<_> = std::iter::once(config.code_width).chain(vec![hidden; config.aligner_depth]).collect();
        let generation = all.at(names.generation);
        let decoder = Decoder::load(backend, config.text, &all.at(names.decoder), &names.head_root(&all), kv_blocks)?;
        Ok(Self {
            card,
            limits: decoder.limits(Some(codebook)),
            codebook,
            decoder,
            generation_embeddings: Linear::load(backend, &generation, names.embedding, [codebook, config.code_width], false)?,
            generation_aligner: Projector::load(backend, &generation.at(names.aligner), &names.aligner_layers, &aligner_widths)?,
            generation_head: Projector::load(
                backend,
                &generation.at(names.head),
                &names.head_layers,
                &[hidden, config.head_width, codebook],
            )?,
        })
    }
}

impl<B: Backend> LanguageModel for Janus<B> {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn kv_block_bytes(&self) -> usize {
        self.decoder.kv_block_bytes()
    }

    fn kv_blocks(&self) -> usize {
        self.limits.kv_blocks
    }

    fn forward(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<StepOutput, EngineError> {
        step.check(&self.limits)?;
        let embed_codes = |codes: &[u32]| self.generation_aligner.forward(self.generation_embeddings.embed(codes)?); // [codes, hidden]
        let x = self.decoder.embed(&step.rows, embed_codes)?; // [rows, hidden]
        let x = self.decoder.forward(x, &step.slices, &mut Losses::of(&step.slices), observer)?; // [rows, hidden]
        let mut output = StepOutput::empty(step);
        self.decoder.text_head(&x, step, observer, &mut output)?;
        let head = |h| self.generation_head.forward(h); // [rows, hidden] -> [rows, codebook]
        self.decoder.head(Head::Image, &x, step, self.codebook, head, &mut output)?;
        Ok(output)
    }
}

/// Where the tensors are (spec: janus.md 6).
struct Names {
    /// Holds `embed_tokens`, `layers`, `norm`.
    decoder: &'static str,
    /// Holds `lm_head`; empty for the top level.
    lm_head: &'static str,
    /// Holds what draws.
    generation: &'static str,
    embedding: &'static str,
    aligner: &'static str,
    aligner_layers: Vec<String>,
    head: &'static str,
    head_layers: [String; 2],
}

impl Names {
    fn new(layout: Layout, aligner_depth: usize) -> Self {
        match layout {
            Layout::Port => Self {
                decoder: "model.language_model",
                lm_head: "",
                generation: "model",
                embedding: "generation_embeddings",
                aligner: "generation_aligner",
                aligner_layers: (0..aligner_depth)
                    .map(|i| if i == 0 { "fc1".into() } else { format!("hidden_layers.{}", i - 1) })
                    .collect(),
                head: "generation_head",
                head_layers: ["proj_out".into(), "vision_head".into()],
            },
            Layout::Original => Self {
                decoder: "language_model.model",
                lm_head: "language_model",
                generation: "",
                embedding: "gen_embed",
                aligner: "gen_aligner",
                aligner_layers: (0..aligner_depth).map(|i| format!("layers.{}", 2 * i)).collect(),
                head: "gen_head",
                head_layers: ["output_mlp_projector".into(), "vision_head".into()],
            },
        }
    }

    fn head_root<'a>(&self, all: &Weights<'a>) -> Weights<'a> {
        all.at(self.lm_head)
    }
}
