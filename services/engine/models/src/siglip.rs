//! SigLIP: patches with learned positions, pre-norm blocks with full attention, a final norm (spec: vision.md 2).
//!
//! Written over names and sizes, not over a family: every model here that sees has this tower.

use backend_onnx::{Activation, Value};
use checkpoint::Checkpoint;
use layers::EngineError;
use serde::Deserialize;

use crate::onnx::{Builder, CHANNELS, Normalization, activation};
use crate::text_config::Fields;

/// Largest sizes that are believed, well beyond every published tower.
const MOST_UNITS: usize = 1 << 16;
const MOST_LAYERS: usize = 1 << 10;

/// A tower, every number in range and in agreement with the others.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Siglip {
    /// Sides, pixels.
    pub image_size: usize,
    patch_size: usize,
    /// Values of a token.
    pub hidden_size: usize,
    intermediate_size: usize,
    /// Blocks that are computed.
    layers: usize,
    heads: usize,
    epsilon: f32,
    pub activation: Activation,
    attention_bias: bool,
    /// Where the tower takes pixels in 0..=1 and normalises them itself.
    normalization: Option<Normalization>,
    names: Names,
}

/// How the tensors are called.
#[derive(Debug, Clone, PartialEq)]
struct Names {
    /// With the point at its end.
    prefix: String,
    layout: Layout,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    /// The ports of transformers: q, k and v apart. The name of the projection differs between them.
    Port { projection: &'static str },
    /// The original repositories: one tensor for q, k and v.
    Original,
}

const JANUS_PORT: Layout = Layout::Port { projection: "projection_layer" };

/// What a field that a port's configuration leaves out means.
#[derive(Debug)]
pub(crate) struct Defaults {
    hidden_size: usize,
    /// `None`: four times the hidden size.
    intermediate_size: Option<usize>,
    layers: usize,
    heads: usize,
    image_size: usize,
    activation: &'static str,
}

/// SigLIP-L/16-384, as in the port of Janus.
pub(crate) const LARGE: Defaults =
    Defaults { hidden_size: 1024, intermediate_size: None, layers: 24, heads: 16, image_size: 384, activation: "gelu" };
/// SigLIP-B/16-224, as in the port of SigLIP itself, which the ports of DeepSeek-VL contain.
pub(crate) const BASE: Defaults =
    Defaults { hidden_size: 768, intermediate_size: Some(3072), layers: 12, heads: 12, image_size: 224, activation: "gelu_pytorch_tanh" };

/// `vision_config` of the ports.
#[derive(Debug, Deserialize)]
struct PortConfig {
    image_size: Option<usize>,
    patch_size: Option<usize>,
    num_channels: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    mlp_ratio: Option<f64>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    layer_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    use_qk_norm: Option<bool>,
}

/// `params` of the original configurations. The sizes follow from `model_name` unless they are written out.
#[derive(Debug, Deserialize)]
struct OriginalParams {
    model_name: Option<String>,
    image_size: Option<usize>,
    select_layer: Option<i64>,
    width: Option<usize>,
    layers: Option<usize>,
    heads: Option<usize>,
    patch_size: Option<usize>,
    mlp_ratio: Option<f64>,
    pixel_mean: Option<[f32; CHANNELS]>,
    pixel_std: Option<[f32; CHANNELS]>,
}

impl Siglip {
    /// The tower of a transformers port: sizes from the object `section` of `config.json`, tensors called `prefix...`.
    pub fn read_port(checkpoint: &Checkpoint, section: &str, prefix: &str, defaults: &Defaults) -> Result<Self, EngineError> {
        let config: PortConfig = checkpoint.config_as(&format!("/{section}"))?;
        let at = Fields { checkpoint, path: section };
        if config.num_channels.unwrap_or(CHANNELS) != CHANNELS {
            return Err(at.refuse("num_channels", "only 3 is supported"));
        }
        if config.use_qk_norm == Some(true) {
            return Err(at.refuse("use_qk_norm", "true is not supported"));
        }
        let hidden_size = at.size("hidden_size", config.hidden_size, defaults.hidden_size, MOST_UNITS)?;
        let inner = defaults.intermediate_size.unwrap_or(inner(hidden_size, config.mlp_ratio));
        let projection = format!("{prefix}encoder.layers.0.self_attn.projection_layer.weight");
        let projection = if checkpoint.contains(&projection) { "projection_layer" } else { "out_proj" };
        Self {
            image_size: at.size("image_size", config.image_size, defaults.image_size, MOST_UNITS)?,
            patch_size: at.size("patch_size", config.patch_size, 16, MOST_UNITS)?,
            hidden_size,
            intermediate_size: at.size("intermediate_size", config.intermediate_size, inner, MOST_UNITS)?,
            layers: at.size("num_hidden_layers", config.num_hidden_layers, defaults.layers, MOST_LAYERS)?,
            heads: at.size("num_attention_heads", config.num_attention_heads, defaults.heads, MOST_UNITS)?,
            epsilon: config.layer_norm_eps.unwrap_or(1e-6) as f32,
            activation: activation(&at, config.hidden_act.as_deref().or(Some(defaults.activation)))?,
            attention_bias: config.attention_bias.unwrap_or(true),
            normalization: None,
            names: Names { prefix: prefix.into(), layout: Layout::Port { projection } },
        }
        .checked(&at, "hidden_size")
    }

    /// The tower of an original repository: `params` of the object `section`, tensors called `prefix...`.
    pub fn read_original(checkpoint: &Checkpoint, section: &str, prefix: &str) -> Result<Self, EngineError> {
        Self::read_params(checkpoint, &format!("{section}/params"), prefix)
    }

    /// The same with the object at `path` itself.
    pub fn read_params(checkpoint: &Checkpoint, path: &str, prefix: &str) -> Result<Self, EngineError> {
        let params: OriginalParams = checkpoint.config_as(&format!("/{path}"))?;
        let at = Fields { checkpoint, path };
        let written_out = params.width.is_some() && params.layers.is_some() && params.heads.is_some() && params.patch_size.is_some();
        match params.model_name.as_deref() {
            Some("siglip_large_patch16_384" | "siglip_large_patch16_256") => (),
            _ if written_out => (),
            name => {
                return Err(at.refuse("model_name", format!("{name:?} is not known, and width, layers, heads and patch_size are missing")));
            }
        }
        let hidden_size = at.size("width", params.width, 1024, MOST_UNITS)?;
        let depth = at.size("layers", params.layers, 24, MOST_LAYERS)?;
        let default_side = if params.model_name.as_deref() == Some("siglip_large_patch16_256") { 256 } else { 384 };
        Self {
            image_size: at.size("image_size", params.image_size, default_side, MOST_UNITS)?,
            patch_size: at.size("patch_size", params.patch_size, 16, MOST_UNITS)?,
            hidden_size,
            intermediate_size: inner(hidden_size, params.mlp_ratio),
            layers: at.size("select_layer", Some(selected(depth, params.select_layer.unwrap_or(-1))), 0, MOST_LAYERS)?,
            heads: at.size("heads", params.heads, 16, MOST_UNITS)?,
            epsilon: 1e-6,
            activation: Activation::Gelu,
            attention_bias: true,
            normalization: Normalization::read(&at, params.pixel_mean, params.pixel_std)?,
            names: Names { prefix: prefix.into(), layout: Layout::Original },
        }
        .checked(&at, "width")
    }

    fn checked(self, at: &Fields<'_>, width: &str) -> Result<Self, EngineError> {
        if !self.hidden_size.is_multiple_of(self.heads) {
            return Err(at.refuse(width, format!("{} is not a multiple of {} heads", self.hidden_size, self.heads)));
        }
        if self.image_size < self.patch_size {
            return Err(at.refuse("image_size", format!("{} is below the patch size {}", self.image_size, self.patch_size)));
        }
        if !(self.epsilon.is_finite() && self.epsilon >= 0.0) {
            return Err(at.refuse("layer_norm_eps", "not a positive number"));
        }
        Ok(self)
    }

    /// Patches in a row and in a column.
    pub fn side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Patches, and so tokens, of one picture.
    pub fn tokens(&self) -> usize {
        self.side().pow(2)
    }

    /// `pixels [B, 3, S, S]` -> tokens `[B * N, hidden]`, normalised. Probes: `vision.hidden.*`.
    pub fn build(&self, builder: &mut Builder<'_>, pixels: &Value) -> Result<Value, EngineError> {
        let mut x = self.embed(builder, pixels)?; // [B * N, hidden]
        self.tap(builder, "vision.hidden.embed", &x);
        for layer in 0..self.layers {
            x = self.block(builder, &x, layer)?;
            self.tap(builder, &format!("vision.hidden.layer{layer}"), &x);
        }
        let name = self.names.of("post_layernorm", "norm");
        let normal = builder.layer_norm(&x, &name, self.hidden_size, self.epsilon)?;
        if self.names.layout == JANUS_PORT {
            self.tap_pooled(builder, &normal, &name)?;
        } else {
            self.tap(builder, "vision.hidden.final_norm", &normal);
        }
        Ok(normal)
    }

    /// 1. patches, row by row; 2. a learned position is added to each.
    fn embed(&self, builder: &mut Builder<'_>, pixels: &Value) -> Result<Value, EngineError> {
        let (hidden, tokens) = (self.hidden_size, self.tokens());
        let pixels = builder.normalize(pixels, self.normalization.as_ref());
        let name = self.names.of("embeddings.patch_embedding", "patch_embed.proj");
        let patches = builder.conv(&pixels, &name, (hidden, CHANNELS, self.patch_size), self.patch_size)?; // [B, hidden, side, side]
        let patches = builder.graph.reshape(&patches, &[0, hidden as i64, -1]); // [B, hidden, N]
        let patches = builder.graph.transpose(&patches, &[0, 2, 1]); // [B, N, hidden]
        let name = self.names.of("embeddings.position_embedding.weight", "pos_embed");
        let positions = match self.names.layout {
            Layout::Port { .. } => builder.weight(&name, &[tokens, hidden])?,
            Layout::Original => builder.weight(&name, &[1, tokens, hidden])?,
        };
        let x = builder.graph.add(&patches, &positions);
        Ok(builder.graph.reshape(&x, &[-1, hidden as i64]))
    }

    fn block(&self, builder: &mut Builder<'_>, x: &Value, layer: usize) -> Result<Value, EngineError> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let root = self.names.of(&format!("encoder.layers.{layer}."), &format!("blocks.{layer}."));
        let (norm1, norm2) = self.names.pick(("layer_norm1", "layer_norm2"), ("norm1", "norm2"));
        // 1. x += attention(norm1(x))
        let h = builder.layer_norm(x, &format!("{root}{norm1}"), hidden, self.epsilon)?;
        let h = self.attention(builder, &h, &root)?;
        let x = builder.graph.add(x, &h);
        // 2. x += mlp(norm2(x))
        let h = builder.layer_norm(&x, &format!("{root}{norm2}"), hidden, self.epsilon)?;
        let h = builder.linear(&h, &format!("{root}mlp.fc1"), [inner, hidden], true)?; // [B * N, inner]
        let h = builder.graph.activate(&h, self.activation);
        let h = builder.linear(&h, &format!("{root}mlp.fc2"), [hidden, inner], true)?;
        Ok(builder.graph.add(&x, &h))
    }

    /// `x [B * N, hidden]` -> the same shape.
    fn attention(&self, builder: &mut Builder<'_>, x: &Value, root: &str) -> Result<Value, EngineError> {
        let (hidden, bias) = (self.hidden_size, self.attention_bias);
        let ([q, k, v], projection) = match self.names.layout {
            Layout::Port { projection } => {
                let mut part = |name: &str| builder.linear(x, &format!("{root}self_attn.{name}"), [hidden, hidden], bias);
                ([part("q_proj")?, part("k_proj")?, part("v_proj")?], format!("self_attn.{projection}"))
            }
            Layout::Original => {
                let fused = builder.linear(x, &format!("{root}attn.qkv"), [3 * hidden, hidden], bias)?; // [B * N, 3 * hidden]
                (builder.graph.thirds(&fused), "attn.proj".to_owned())
            }
        };
        let images = [-1, self.tokens() as i64, hidden as i64];
        let [q, k, v] = [q, k, v].map(|rows| builder.graph.reshape(&rows, &images)); // [B, N, hidden]
        let h = builder.graph.attention(&q, &k, &v, self.heads);
        let h = builder.graph.reshape(&h, &[-1, hidden as i64]); // [B * N, hidden]
        builder.linear(&h, &format!("{root}{projection}"), [hidden, hidden], bias)
    }

    /// The Janus port also normalises the first token a second time, as a pooled output that nothing uses. Its reference outputs hold that
    /// row under the name of the final norm.
    fn tap_pooled(&self, builder: &mut Builder<'_>, normal: &Value, norm: &str) -> Result<(), EngineError> {
        if builder.probing() {
            let images = builder.graph.reshape(normal, &[-1, self.tokens() as i64, self.hidden_size as i64]);
            let first = builder.graph.first_row(&images); // [B, hidden]
            let pooled = builder.layer_norm(&first, norm, self.hidden_size, self.epsilon)?;
            builder.tap("vision.hidden.final_norm", &pooled);
        }
        Ok(())
    }

    fn tap(&self, builder: &mut Builder<'_>, name: &str, rows: &Value) {
        if builder.probing() {
            let images = builder.graph.reshape(rows, &[-1, self.tokens() as i64, self.hidden_size as i64]);
            builder.tap(name, &images);
        }
    }
}

impl Names {
    fn of(&self, port: &str, original: &str) -> String {
        format!("{}{}", self.prefix, self.pick(port, original))
    }

    fn pick<T>(&self, port: T, original: T) -> T {
        match self.layout {
            Layout::Port { .. } => port,
            Layout::Original => original,
        }
    }
}

/// Width between the two layers of the MLP.
fn inner(hidden_size: usize, ratio: Option<f64>) -> usize {
    (hidden_size as f64 * ratio.unwrap_or(4.0)) as usize
}

/// Blocks that feature selection leaves of `depth`: -1 all, -2 all but the last, and so on; a positive number counts from the front.
fn selected(depth: usize, select_layer: i64) -> usize {
    let wanted = if select_layer <= 0 { depth as i64 + select_layer + 1 } else { select_layer };
    usize::try_from(wanted).unwrap_or(0).min(depth)
}
