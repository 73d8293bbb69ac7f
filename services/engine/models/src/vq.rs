//! The VQ decoder of Janus: codes to pixels (spec: janus.md 5).

use std::path::Path;
use std::sync::Arc;

use backend_onnx::{Activation, Dim, Input, Session, SessionOptions, Value};
use checkpoint::Checkpoint;
use domain::CodeGrid;
use layers::EngineError;
use serde::Deserialize;

use crate::onnx::{Builder, Probe, run_probe, run_single};
use crate::text_config::Fields;

/// Colours of the picture that comes out.
const CHANNELS: usize = 3;
/// Every norm has so many groups, and this added to its variance.
const GROUPS: usize = 32;
const EPSILON: f32 = 1e-6;
/// Largest sizes that are believed.
const MOST: usize = 1 << 24;

/// The decoder of a checkpoint, ready to run. Shared between threads; runs follow one another.
#[derive(Debug)]
pub struct VqDecoder {
    checkpoint: Arc<Checkpoint>,
    options: SessionOptions,
    model: VqModel,
    session: Session,
}

/// The decoder as the configuration describes it.
#[derive(Debug, Clone, PartialEq)]
struct VqModel {
    /// Sides of the code map.
    side: usize,
    codebook_size: usize,
    /// Values of a code.
    code_width: usize,
    /// Channels between the code and the first convolution.
    latent_channels: usize,
    /// Channels of each level, in the order of execution: the smallest map first.
    level_channels: Vec<usize>,
    /// Residual blocks of a level.
    blocks: usize,
    names: Names,
}

/// How the tensors are called.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Names {
    Port,
    Original,
}

#[derive(Debug, Deserialize)]
struct PortConfig {
    num_patches: Option<usize>,
    num_embeddings: Option<usize>,
    embed_dim: Option<usize>,
    latent_channels: Option<usize>,
    base_channels: Option<usize>,
    channel_multiplier: Option<Vec<usize>>,
    num_res_blocks: Option<usize>,
    out_channels: Option<usize>,
}

/// `gen_vision_config.params`. Published files hold the first two; the rest is fixed by the name "VQ-16".
#[derive(Debug, Deserialize)]
struct OriginalParams {
    image_token_size: Option<usize>,
    n_embed: Option<usize>,
    z_channels: Option<usize>,
    ch: Option<usize>,
    decoder_ch_mult: Option<Vec<usize>>,
    num_res_blocks: Option<usize>,
}

/// Loads the VQ decoder of a checkpoint; `None` where it has none.
pub fn load_vq(checkpoint: &Arc<Checkpoint>, options: &SessionOptions) -> Result<Option<VqDecoder>, EngineError> {
    let Some(model) = VqModel::read(checkpoint)? else { return Ok(None) };
    let session = Session::new(model.build(checkpoint, false)?.graph, options)?;
    Ok(Some(VqDecoder { checkpoint: checkpoint.clone(), options: *options, model, session }))
}

impl VqDecoder {
    /// Shape of the code map.
    pub fn grid(&self) -> CodeGrid {
        CodeGrid { rows: self.model.side, columns: self.model.side, codebook_size: self.model.codebook_size }
    }

    /// Width and height of a picture, pixels.
    pub fn image_size(&self) -> (usize, usize) {
        let side = self.model.side * self.model.scale();
        (side, side)
    }

    /// Paints a complete code map, row by row -> `[3, height, width]`, about -1..=1.
    pub fn decode(&self, codes: &[u32]) -> Result<Vec<f32>, EngineError> {
        let ids = self.check(codes)?;
        run_single(&self.session, "VQ decoder", &[Input::Ids { shape: &[1, ids.len()], values: &ids }])
    }

    /// The graph as an ONNX file for other programs, and the folder that it belongs in.
    pub fn onnx(&self) -> Option<(&[u8], &Path)> {
        self.session.onnx()
    }

    /// The intermediate tensors, named as in reference outputs behind `vq.`: `codebook`, `post_quant`, `decoder_mid`, `pixels`.
    pub fn probe(&self, codes: &[u32]) -> Result<Vec<Probe>, EngineError> {
        let ids = self.check(codes)?;
        let graph = self.model.build(&self.checkpoint, true)?.graph;
        run_probe(graph, &self.options, &[Input::Ids { shape: &[1, ids.len()], values: &ids }])
    }

    fn check(&self, codes: &[u32]) -> Result<Vec<i64>, EngineError> {
        let grid = self.grid();
        if codes.len() != grid.len() {
            return Err(EngineError::Step(format!("{} codes, the image has {} x {}", codes.len(), grid.rows, grid.columns)));
        }
        match codes.iter().position(|&code| code as usize >= grid.codebook_size) {
            Some(at) => Err(EngineError::Step(format!("code {at}: {} is not in the codebook of {}", codes[at], grid.codebook_size))),
            None => Ok(codes.iter().map(|&code| i64::from(code)).collect()),
        }
    }
}

/// Decoder output `[3, height, width]` as 8-bit RGB `[height, width, 3]`: from -1..=1 to 0..=255, cut off, not rounded (spec: janus.md 4.2).
pub fn pixels_to_rgb(pixels: &[f32]) -> Vec<u8> {
    let plane = pixels.len() / CHANNELS;
    let level = |value: f32| ((value * 0.5 + 0.5) * 255.0).clamp(0.0, 255.0) as u8;
    (0..plane).flat_map(|at| [0, 1, 2].map(|channel| level(pixels[channel * plane + at]))).collect()
}

impl VqModel {
    /// What the checkpoint's configuration says; `None` for a model that does not draw with a VQ decoder.
    fn read(checkpoint: &Checkpoint) -> Result<Option<Self>, EngineError> {
        let has = |field: &str| checkpoint.config().get(field).is_some();
        match checkpoint.model_type() {
            "janus" => Self::read_port(checkpoint).map(Some),
            "multi_modality" if has("gen_vision_config") => Self::read_original(checkpoint).map(Some),
            _ => Ok(None),
        }
    }

    fn read_port(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let config: PortConfig = checkpoint.config_as("/vq_config")?;
        let at = Fields { checkpoint, path: "vq_config" };
        if config.out_channels.unwrap_or(CHANNELS) != CHANNELS {
            return Err(at.refuse("out_channels", "only 3 is supported"));
        }
        let base = at.size("base_channels", config.base_channels, 128, MOST)?;
        Ok(Self {
            side: at.size("num_patches", config.num_patches, 24, 1 << 12)?,
            codebook_size: at.size("num_embeddings", config.num_embeddings, 16_384, MOST)?,
            code_width: at.size("embed_dim", config.embed_dim, 8, MOST)?,
            latent_channels: at.size("latent_channels", config.latent_channels, 256, MOST)?,
            level_channels: levels(&at, "channel_multiplier", base, config.channel_multiplier)?,
            blocks: at.size("num_res_blocks", config.num_res_blocks, 2, 64)? + 1,
            names: Names::Port,
        })
    }

    fn read_original(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let params: OriginalParams = checkpoint.config_as("/gen_vision_config/params")?;
        let image_size: Option<usize> = checkpoint.config_as("/vision_config/params/image_size").ok();
        let at = Fields { checkpoint, path: "gen_vision_config/params" };
        let base = at.size("ch", params.ch, 128, MOST)?;
        let level_channels = levels(&at, "decoder_ch_mult", base, params.decoder_ch_mult)?;
        // Pictures are drawn at the size at which they are seen.
        let side = image_size.unwrap_or(384) >> (level_channels.len() - 1);
        Ok(Self {
            side: at.size("image_size", Some(side), 0, 1 << 12)?,
            codebook_size: at.size("image_token_size", params.image_token_size, 16_384, MOST)?,
            code_width: at.size("n_embed", params.n_embed, 8, MOST)?,
            latent_channels: at.size("z_channels", params.z_channels, 256, MOST)?,
            level_channels,
            blocks: at.size("num_res_blocks", params.num_res_blocks, 2, 64)? + 1,
            names: Names::Original,
        })
    }

    /// Pixels per code, in each direction.
    fn scale(&self) -> usize {
        1 << (self.level_channels.len() - 1)
    }

    /// `codes [1, side * side]` -> `pixels [1, 3, height, width]`
    ///
    /// One picture, as [`VqDecoder::decode`] asks for: when every size is known, the runtime adds residuals inside the convolutions.
    fn build<'a>(&self, checkpoint: &'a Checkpoint, probing: bool) -> Result<Builder<'a>, EngineError> {
        let mut builder = Builder::new(checkpoint, probing);
        let b = &mut builder;
        let codes = b.graph.input_ids("codes", &[Dim::Fixed(1), Dim::Fixed(self.side * self.side)]);
        let latent = self.look_up(b, &codes)?; // [B, latent, side, side]
        let mut channels = self.level_channels[0];
        let mut x = b.conv(&latent, &self.names.of("decoder.conv_in"), (channels, self.latent_channels, 3), 1)?;
        // 1. the middle
        let [first, middle, last] = self.names.mid();
        x = self.residual(b, &x, &first, (channels, channels))?;
        x = self.attention(b, &x, &middle, channels)?;
        x = self.residual(b, &x, &last, (channels, channels))?; // [B, channels, side, side]
        b.tap("decoder_mid", &x);
        // 2. up, level by level; attention on the smallest map only
        for (level, &width) in self.level_channels.iter().enumerate() {
            for block in 0..self.blocks {
                x = self.residual(b, &x, &self.names.block(level, block), (width, channels))?;
                channels = width;
                if level == 0 {
                    x = self.attention(b, &x, &self.names.attention(level, block), channels)?;
                }
            }
            if level + 1 < self.level_channels.len() {
                x = b.upsample_conv(&x, &self.names.upsample(level), channels)?;
            }
        }
        // 3. colours
        let x = b.group_norm(&x, &self.names.of("decoder.norm_out"), channels, GROUPS, EPSILON)?;
        let x = b.graph.activate(&x, Activation::Silu);
        let pixels = b.conv(&x, &self.names.of("decoder.conv_out"), (CHANNELS, channels, 3), 1)?;
        b.graph.output("pixels", &pixels);
        Ok(builder)
    }

    /// Codes to rows of the codebook, each of length 1, as a map of channels.
    fn look_up(&self, b: &mut Builder<'_>, codes: &Value) -> Result<Value, EngineError> {
        let (side, width) = (self.side as i64, self.code_width as i64);
        let table = b.weight(&self.names.of("quantize.embedding.weight"), &[self.codebook_size, self.code_width])?;
        let rows = b.graph.rows(&table, codes); // [B, side * side, code]
        let rows = b.graph.unit_length(&rows);
        let rows = b.graph.reshape(&rows, &[-1, side, side, width]);
        let map = b.graph.transpose(&rows, &[0, 3, 1, 2]); // [B, code, side, side]
        b.tap("codebook", &map);
        let latent = b.conv(&map, &self.names.of("post_quant_conv"), (self.latent_channels, self.code_width, 1), 1)?;
        b.tap("post_quant", &latent);
        Ok(latent)
    }

    /// `x + conv(swish(norm(conv(swish(norm(x))))))`, with a 1 x 1 convolution on `x` where the number of channels changes.
    fn residual(&self, b: &mut Builder<'_>, x: &Value, name: &str, (output, input): (usize, usize)) -> Result<Value, EngineError> {
        let h = b.group_norm(x, &format!("{name}.norm1"), input, GROUPS, EPSILON)?;
        let h = b.graph.activate(&h, Activation::Silu);
        let h = b.conv(&h, &format!("{name}.conv1"), (output, input, 3), 1)?;
        let h = b.group_norm(&h, &format!("{name}.norm2"), output, GROUPS, EPSILON)?;
        let h = b.graph.activate(&h, Activation::Silu);
        let h = b.conv(&h, &format!("{name}.conv2"), (output, output, 3), 1)?;
        let short = match output == input {
            true => x.clone(),
            false => b.conv(x, &format!("{name}.nin_shortcut"), (output, input, 1), 1)?,
        };
        Ok(b.graph.add(&short, &h))
    }

    /// Every position of the map looks at every other, one head.
    fn attention(&self, b: &mut Builder<'_>, x: &Value, name: &str, channels: usize) -> Result<Value, EngineError> {
        let normal = b.group_norm(x, &format!("{name}.norm"), channels, GROUPS, EPSILON)?;
        let mut positions = |part: &str| -> Result<Value, EngineError> {
            let map = b.conv(&normal, &format!("{name}.{part}"), (channels, channels, 1), 1)?;
            let map = b.graph.reshape(&map, &[0, channels as i64, -1]);
            Ok(b.graph.transpose(&map, &[0, 2, 1])) // [B, side * side, channels]
        };
        let (q, k, v) = (positions("q")?, positions("k")?, positions("v")?);
        let h = b.graph.attention(&q, &k, &v, 1);
        let h = b.graph.transpose(&h, &[0, 2, 1]);
        let h = b.graph.reshape(&h, &[0, channels as i64, self.side as i64, self.side as i64]);
        let h = b.conv(&h, &format!("{name}.proj_out"), (channels, channels, 1), 1)?;
        Ok(b.graph.add(x, &h))
    }
}

impl Names {
    fn of(self, name: &str) -> String {
        match self {
            Self::Port => format!("model.vqmodel.{name}"),
            Self::Original => format!("gen_vision_model.{name}"),
        }
    }

    /// Residual block, attention, residual block.
    fn mid(self) -> [String; 3] {
        match self {
            Self::Port => ["block_1", "attn_1", "block_2"],
            Self::Original => ["0", "1", "2"],
        }
        .map(|part| self.of(&format!("decoder.mid.{part}")))
    }

    fn block(self, level: usize, block: usize) -> String {
        match self {
            Self::Port => self.of(&format!("decoder.up.{level}.block.{block}")),
            Self::Original => self.of(&format!("decoder.conv_blocks.{level}.res.{block}")),
        }
    }

    fn attention(self, level: usize, block: usize) -> String {
        self.of(&format!("decoder.{}.{level}.attn.{block}", self.level()))
    }

    fn upsample(self, level: usize) -> String {
        self.of(&format!("decoder.{}.{level}.upsample.conv", self.level()))
    }

    fn level(self) -> &'static str {
        match self {
            Self::Port => "up",
            Self::Original => "conv_blocks",
        }
    }
}

/// Channels of each level in the order of execution; the configuration begins at the largest map.
fn levels(at: &Fields<'_>, field: &str, base: usize, multipliers: Option<Vec<usize>>) -> Result<Vec<usize>, EngineError> {
    let multipliers = multipliers.unwrap_or_else(|| vec![1, 1, 2, 2, 4]);
    if !(1..=8).contains(&multipliers.len()) {
        return Err(at.refuse(field, format!("{} levels, 1 to 8 are supported", multipliers.len())));
    }
    let channels: Vec<usize> = multipliers.iter().rev().map(|&multiplier| base.saturating_mul(multiplier)).collect();
    match channels.iter().find(|&&width| width == 0 || width > MOST || !width.is_multiple_of(GROUPS)) {
        Some(width) => Err(at.refuse(field, format!("{width} channels cannot be split into {GROUPS} groups"))),
        None => Ok(channels),
    }
}
