//! The decoder of an AutoencoderKL, as SDXL has it: latent maps to pixels (spec: janusflow.md 5).
//!
//! It lies in a folder of its own, in the layout of diffusers, and is published apart from JanusFlow.

use std::path::{Path, PathBuf};

use backend_onnx::{Activation, Dim, Input, Session, SessionOptions, Value};
use checkpoint::Checkpoint;
use domain::LatentGrid;
use layers::EngineError;
use serde::Deserialize;
use serde_json::Value as Json;

use crate::onnx::{Builder, run_single};
use crate::text_config::Fields;

/// Where the folder is looked for when nobody names one: in that of the model.
const FOLDER: &str = "vae";
/// Colours of the picture that comes out.
const CHANNELS: usize = 3;
/// Added to the variance of every norm.
const EPSILON: f32 = 1e-6;
/// Largest sizes that are believed.
const MOST_UNITS: usize = 1 << 16;
const MOST_LAYERS: usize = 64;

/// The decoder for the latent maps of a model, ready to run. Shared between threads; runs follow one another.
#[derive(Debug)]
pub struct VaeDecoder {
    model: VaeModel,
    session: Session,
}

/// The decoder as its configuration describes it.
#[derive(Debug, Clone, PartialEq)]
struct VaeModel {
    grid: LatentGrid,
    /// Channels of each level in the order of execution: the smallest map first.
    level_channels: Vec<usize>,
    /// Residual blocks of a level.
    blocks: usize,
    groups: usize,
    middle_attention: bool,
    post_quant: bool,
    /// What the encoder's maps are multiplied with, and what is taken from them before that, to have them as the model draws them.
    scaling: f32,
    shift: f32,
}

/// `config.json`; what is absent is as diffusers has it.
#[derive(Debug, Deserialize)]
struct Config {
    block_out_channels: Vec<usize>,
    layers_per_block: Option<usize>,
    latent_channels: Option<usize>,
    norm_num_groups: Option<usize>,
    out_channels: Option<usize>,
    act_fn: Option<String>,
    up_block_types: Option<Vec<String>>,
    scaling_factor: Option<f64>,
    shift_factor: Option<f64>,
    latents_mean: Option<Json>,
    latents_std: Option<Json>,
    use_post_quant_conv: Option<bool>,
    mid_block_add_attention: Option<bool>,
}

/// The VAE folder of the model in `dir`: the one that was `given`, else the one inside. A model that needs it says so in one line.
pub fn vae_folder(dir: &Path, given: Option<&Path>) -> Result<PathBuf, EngineError> {
    let folder = given.map_or_else(|| dir.join(FOLDER), Path::to_path_buf);
    if folder.is_dir() {
        return Ok(folder);
    }
    let remedy = "put the SDXL VAE (config.json and diffusion_pytorch_model.safetensors) there, or name its folder with --vae or as `vae` of the model";
    Err(EngineError::Checkpoint(format!("{}: the VAE folder is missing, without which the model cannot draw: {remedy}", folder.display())))
}

impl VaeDecoder {
    /// Loads the decoder in `checkpoint` for latent maps of this shape.
    pub fn load(checkpoint: &Checkpoint, grid: LatentGrid, options: &SessionOptions) -> Result<Self, EngineError> {
        let model = VaeModel::read(checkpoint, grid)?;
        let session = Session::new(model.build(checkpoint)?.graph, options)?;
        Ok(Self { model, session })
    }

    /// Shape of the latent map.
    pub fn grid(&self) -> LatentGrid {
        self.model.grid
    }

    /// Width and height of a picture, pixels.
    pub fn image_size(&self) -> (usize, usize) {
        let LatentGrid { rows, columns, .. } = self.model.grid;
        (columns * self.model.scale(), rows * self.model.scale())
    }

    /// The graph as an ONNX file for other programs, and the folder that it belongs in.
    pub fn onnx(&self) -> Option<(&[u8], &Path)> {
        self.session.onnx()
    }

    /// A map as a model draws it -> `[3, height, width]`, about -1..=1.
    pub fn decode(&self, z: &[f32]) -> Result<Vec<f32>, EngineError> {
        self.decode_unscaled(&self.unscaled(z))
    }

    /// A map as a model draws it, as the decoder takes it.
    pub fn unscaled(&self, z: &[f32]) -> Vec<f32> {
        z.iter().map(|value| value / self.model.scaling + self.model.shift).collect()
    }

    /// A map as the decoder takes it -> `[3, height, width]`, about -1..=1.
    pub fn decode_unscaled(&self, latent: &[f32]) -> Result<Vec<f32>, EngineError> {
        let LatentGrid { channels, rows, columns, .. } = self.model.grid;
        if latent.len() != self.model.grid.len() {
            return Err(EngineError::Step(format!("{} latent values, the image has {channels} x {rows} x {columns}", latent.len())));
        }
        run_single(&self.session, "VAE decoder", &[Input::Floats { shape: &[1, channels, rows, columns], values: latent }])
    }
}

impl VaeModel {
    fn read(checkpoint: &Checkpoint, grid: LatentGrid) -> Result<Self, EngineError> {
        let config: Config = checkpoint.config_as("")?;
        let at = Fields { checkpoint, path: "" };
        config.check(&at)?;
        let groups = at.size("norm_num_groups", config.norm_num_groups, 32, MOST_UNITS)?;
        let latent_channels = at.size("latent_channels", config.latent_channels, 4, MOST_UNITS)?;
        if latent_channels != grid.channels {
            return Err(at.refuse("latent_channels", format!("{latent_channels}, but the model draws maps of {} channels", grid.channels)));
        }
        let scaling = config.scaling_factor.unwrap_or(0.182_15) as f32;
        let shift = config.shift_factor.unwrap_or(0.0) as f32;
        for (field, value, legal) in [("scaling_factor", scaling, scaling != 0.0), ("shift_factor", shift, true)] {
            if !(legal && value.is_finite()) {
                return Err(at.refuse(field, format!("{value} cannot be undone")));
            }
        }
        Ok(Self {
            grid,
            level_channels: levels(&at, &config.block_out_channels, groups)?,
            blocks: at.size("layers_per_block", config.layers_per_block, 1, MOST_LAYERS)? + 1,
            groups,
            middle_attention: config.mid_block_add_attention.unwrap_or(true),
            post_quant: config.use_post_quant_conv.unwrap_or(true),
            scaling,
            shift,
        })
    }

    /// Pixels per value of the map, in each direction.
    fn scale(&self) -> usize {
        1 << (self.level_channels.len() - 1)
    }

    /// `latent [1, C, h, w]` -> `pixels [1, 3, height, width]`
    fn build<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Builder<'a>, EngineError> {
        let mut builder = Builder::new(checkpoint, false);
        let b = &mut builder;
        let LatentGrid { channels: latent, rows, columns, .. } = self.grid;
        let mut channels = self.level_channels[0];
        let mut x = b.graph.input("latent", &[1, latent, rows, columns].map(Dim::Fixed));
        if self.post_quant {
            x = b.conv(&x, "post_quant_conv", (latent, latent, 1), 1)?;
        }
        x = b.conv(&x, "decoder.conv_in", (channels, latent, 3), 1)?;
        // 1. the middle
        x = self.residual(b, &x, "decoder.mid_block.resnets.0", (channels, channels))?;
        if self.middle_attention {
            x = self.attention(b, &x, "decoder.mid_block.attentions.0", channels)?;
        }
        x = self.residual(b, &x, "decoder.mid_block.resnets.1", (channels, channels))?; // [1, channels, h, w]
        // 2. up, level by level
        for (level, &width) in self.level_channels.iter().enumerate() {
            let root = format!("decoder.up_blocks.{level}");
            for block in 0..self.blocks {
                x = self.residual(b, &x, &format!("{root}.resnets.{block}"), (width, channels))?;
                channels = width;
            }
            if level + 1 < self.level_channels.len() {
                x = b.upsample_conv(&x, &format!("{root}.upsamplers.0.conv"), channels)?;
            }
        }
        // 3. colours
        let x = b.group_norm(&x, "decoder.conv_norm_out", channels, self.groups, EPSILON)?;
        let x = b.graph.activate(&x, Activation::Silu);
        let pixels = b.conv(&x, "decoder.conv_out", (CHANNELS, channels, 3), 1)?;
        b.graph.output("pixels", &pixels);
        Ok(builder)
    }

    /// `x + conv(silu(norm(conv(silu(norm(x))))))`, with a 1 x 1 convolution on `x` where the number of channels changes.
    fn residual(&self, b: &mut Builder<'_>, x: &Value, name: &str, (output, input): (usize, usize)) -> Result<Value, EngineError> {
        let h = b.group_norm(x, &format!("{name}.norm1"), input, self.groups, EPSILON)?;
        let h = b.graph.activate(&h, Activation::Silu);
        let h = b.conv(&h, &format!("{name}.conv1"), (output, input, 3), 1)?;
        let h = b.group_norm(&h, &format!("{name}.norm2"), output, self.groups, EPSILON)?;
        let h = b.graph.activate(&h, Activation::Silu);
        let h = b.conv(&h, &format!("{name}.conv2"), (output, output, 3), 1)?;
        let short = match output == input {
            true => x.clone(),
            false => b.conv(x, &format!("{name}.conv_shortcut"), (output, input, 1), 1)?,
        };
        Ok(b.graph.add(&short, &h))
    }

    /// Every position of the map looks at every other, one head.
    fn attention(&self, b: &mut Builder<'_>, x: &Value, name: &str, channels: usize) -> Result<Value, EngineError> {
        let names = AttentionNames::of(b.checkpoint(), name);
        let LatentGrid { rows, columns, .. } = self.grid;
        let normal = b.group_norm(x, &format!("{name}.group_norm"), channels, self.groups, EPSILON)?;
        let normal = b.graph.transpose(&normal, &[0, 2, 3, 1]);
        let normal = b.graph.reshape(&normal, &[-1, channels as i64]); // [h * w, channels]
        let mut positions = |part: &str| -> Result<Value, EngineError> {
            let rows = b.pointwise(&normal, &format!("{name}.{part}"), channels)?;
            Ok(b.graph.reshape(&rows, &[1, -1, channels as i64])) // [1, h * w, channels]
        };
        let (q, k, v) = (positions(names.query)?, positions(names.key)?, positions(names.value)?);
        let h = b.graph.attention(&q, &k, &v, 1);
        let h = b.graph.reshape(&h, &[-1, channels as i64]); // [h * w, channels]
        let h = b.pointwise(&h, &format!("{name}.{}", names.output), channels)?;
        let h = b.graph.reshape(&h, &[1, rows as i64, columns as i64, channels as i64]);
        let h = b.graph.transpose(&h, &[0, 3, 1, 2]); // [1, channels, h, w]
        Ok(b.graph.add(x, &h))
    }
}

/// How the parts of an attention are called: newer exports and older ones.
struct AttentionNames {
    query: &'static str,
    key: &'static str,
    value: &'static str,
    output: &'static str,
}

impl AttentionNames {
    fn of(checkpoint: &Checkpoint, root: &str) -> Self {
        match checkpoint.contains(&format!("{root}.query.weight")) {
            true => Self { query: "query", key: "key", value: "value", output: "proj_attn" },
            false => Self { query: "to_q", key: "to_k", value: "to_v", output: "to_out.0" },
        }
    }
}

impl Config {
    /// Refuses what this decoder does not do.
    fn check(&self, at: &Fields<'_>) -> Result<(), EngineError> {
        if self.out_channels.unwrap_or(CHANNELS) != CHANNELS {
            return Err(at.refuse("out_channels", "only 3 is supported"));
        }
        if let Some(other) = self.act_fn.as_deref().filter(|name| !matches!(*name, "silu" | "swish")) {
            return Err(at.refuse("act_fn", format!("{other:?} is not supported, only \"silu\"")));
        }
        if let Some(other) = self.up_block_types.iter().flatten().find(|kind| *kind != "UpDecoderBlock2D") {
            return Err(at.refuse("up_block_types", format!("{other:?} is not supported, only \"UpDecoderBlock2D\"")));
        }
        for (field, value) in [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)] {
            if value.is_some() {
                return Err(at.refuse(field, "only null is supported"));
            }
        }
        Ok(())
    }
}

/// Channels of each level in the order of execution; the configuration begins at the largest map.
fn levels(at: &Fields<'_>, channels: &[usize], groups: usize) -> Result<Vec<usize>, EngineError> {
    let field = "block_out_channels";
    if !(1..=8).contains(&channels.len()) {
        return Err(at.refuse(field, format!("{} levels, 1 to 8 are supported", channels.len())));
    }
    match channels.iter().find(|&&width| width == 0 || width > MOST_UNITS || !width.is_multiple_of(groups)) {
        Some(width) => Err(at.refuse(field, format!("{width} channels cannot be split into {groups} groups"))),
        None => Ok(channels.iter().rev().copied().collect()),
    }
}
