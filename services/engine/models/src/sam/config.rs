//! What the configuration says about a SAM tower, and how its tensors are called.

use backend_onnx::Activation;
use checkpoint::Checkpoint;
use layers::EngineError;
use serde::Deserialize;

use crate::onnx::{CHANNELS, Normalization, activation};
use crate::text_config::Fields;

/// Largest sizes that are believed, well beyond every published tower.
const MOST_UNITS: usize = 1 << 16;
const MOST_LAYERS: usize = 1 << 10;
const MOST_PATCHES: usize = 1 << 8;

/// A tower, every number in range and in agreement with the others.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sam {
    /// Sides, pixels.
    pub image_size: usize,
    pub(super) patch_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    /// Sides of a window, patches.
    pub(super) window: usize,
    /// Layers that attend to the whole map.
    pub(super) global: Vec<usize>,
    /// The one of them that feeds the second neck.
    pub(super) second_source: usize,
    pub(super) neck_channels: usize,
    /// Channels behind each of the last two convolutions.
    pub(super) downsample_channels: [usize; 2],
    pub(super) epsilon: f32,
    pub(super) activation: Activation,
    pub(super) attention_bias: bool,
    pub(super) normalization: Option<Normalization>,
    pub(super) names: Names,
}

/// How the tensors are called.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Names {
    Port,
    Original,
}

/// `high_res_vision_config` of the port; what is absent has the value of SAM-B, as there.
#[derive(Debug, Deserialize)]
struct PortConfig {
    image_size: Option<usize>,
    patch_size: Option<usize>,
    num_channels: Option<usize>,
    hidden_size: Option<usize>,
    mlp_dim: Option<usize>,
    mlp_ratio: Option<f64>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    window_size: Option<usize>,
    global_attn_indexes: Option<Vec<usize>>,
    output_channels: Option<usize>,
    layer_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    qkv_bias: Option<bool>,
    use_abs_pos: Option<bool>,
    use_rel_pos: Option<bool>,
}

/// `high_res_cfg` of the original configuration. The sizes follow from `model_name` unless they are written out.
#[derive(Debug, Deserialize)]
struct OriginalParams {
    model_name: Option<String>,
    image_size: Option<usize>,
    width: Option<usize>,
    layers: Option<usize>,
    heads: Option<usize>,
    patch_size: Option<usize>,
    mlp_ratio: Option<f64>,
    window_size: Option<usize>,
    global_attn_indexes: Option<Vec<usize>>,
    prompt_embed_dim: Option<usize>,
    downsample_channels: Option<[usize; 2]>,
    pixel_mean: Option<[f32; CHANNELS]>,
    pixel_std: Option<[f32; CHANNELS]>,
}

impl Sam {
    /// The tower of the transformers port: sizes from the object `section` of `config.json`.
    pub fn read_port(checkpoint: &Checkpoint, section: &str) -> Result<Self, EngineError> {
        let config: PortConfig = checkpoint.config_as(&format!("/{section}"))?;
        let at = Fields { checkpoint, path: section };
        if config.num_channels.unwrap_or(CHANNELS) != CHANNELS {
            return Err(at.refuse("num_channels", "only 3 is supported"));
        }
        for (field, value) in [("use_abs_pos", config.use_abs_pos), ("use_rel_pos", config.use_rel_pos)] {
            if value == Some(false) {
                return Err(at.refuse(field, "false is not supported"));
            }
        }
        let hidden_size = at.size("hidden_size", config.hidden_size, 768, MOST_UNITS)?;
        let neck_channels = at.size("output_channels", config.output_channels, 256, MOST_UNITS)?;
        let global = config.global_attn_indexes.unwrap_or_else(|| vec![2, 5, 8, 11]);
        Self {
            image_size: at.size("image_size", config.image_size, 1024, MOST_UNITS)?,
            patch_size: at.size("patch_size", config.patch_size, 16, MOST_UNITS)?,
            hidden_size,
            intermediate_size: at.size("mlp_dim", config.mlp_dim, inner(hidden_size, config.mlp_ratio), MOST_UNITS)?,
            layers: at.size("num_hidden_layers", config.num_hidden_layers, 12, MOST_LAYERS)?,
            heads: at.size("num_attention_heads", config.num_attention_heads, 12, MOST_UNITS)?,
            window: at.size("window_size", config.window_size, 14, MOST_UNITS)?,
            second_source: global.first().copied().unwrap_or_default(), // as listed
            global,
            neck_channels,
            downsample_channels: [2 * neck_channels, 4 * neck_channels],
            epsilon: config.layer_norm_eps.unwrap_or(1e-6) as f32,
            activation: activation(&at, config.hidden_act.as_deref())?,
            attention_bias: config.qkv_bias.unwrap_or(true),
            normalization: None,
            names: Names::Port,
        }
        .checked(&at, "hidden_size")
    }

    /// The tower of the original repository: the object at `path` of `config.json`.
    pub fn read_original(checkpoint: &Checkpoint, path: &str) -> Result<Self, EngineError> {
        let params: OriginalParams = checkpoint.config_as(&format!("/{path}"))?;
        let at = Fields { checkpoint, path };
        let written_out = params.width.is_some() && params.layers.is_some() && params.heads.is_some() && params.patch_size.is_some();
        match params.model_name.as_deref() {
            Some("sam_b_downsample") => (),
            _ if written_out => (),
            name => {
                return Err(at.refuse("model_name", format!("{name:?} is not known, and width, layers, heads and patch_size are missing")));
            }
        }
        let hidden_size = at.size("width", params.width, 768, MOST_UNITS)?;
        let global = params.global_attn_indexes.unwrap_or_else(|| vec![2, 5, 8, 11]);
        let [first, second] = params.downsample_channels.unwrap_or([512, 1024]);
        Self {
            image_size: at.size("image_size", params.image_size, 1024, MOST_UNITS)?,
            patch_size: at.size("patch_size", params.patch_size, 16, MOST_UNITS)?,
            hidden_size,
            intermediate_size: at.size("mlp_ratio", Some(inner(hidden_size, params.mlp_ratio)), 0, MOST_UNITS)?,
            layers: at.size("layers", params.layers, 12, MOST_LAYERS)?,
            heads: at.size("heads", params.heads, 12, MOST_UNITS)?,
            window: at.size("window_size", params.window_size, 14, MOST_UNITS)?,
            second_source: global.iter().min().copied().unwrap_or_default(), // as they are computed
            global,
            neck_channels: at.size("prompt_embed_dim", params.prompt_embed_dim, 256, MOST_UNITS)?,
            downsample_channels: [
                at.size("downsample_channels", Some(first), 0, MOST_UNITS)?,
                at.size("downsample_channels", Some(second), 0, MOST_UNITS)?,
            ],
            epsilon: 1e-6,
            activation: Activation::Gelu,
            attention_bias: true,
            normalization: Normalization::read(&at, params.pixel_mean, params.pixel_std)?,
            names: Names::Original,
        }
        .checked(&at, "width")
    }

    fn checked(self, at: &Fields<'_>, width: &str) -> Result<Self, EngineError> {
        if !self.hidden_size.is_multiple_of(self.heads) {
            return Err(at.refuse(width, format!("{} is not a multiple of {} heads", self.hidden_size, self.heads)));
        }
        if self.image_size < self.patch_size || self.grid() > MOST_PATCHES {
            let reason = format!("{} with patches of {} is not 1 to {MOST_PATCHES} patches a side", self.image_size, self.patch_size);
            return Err(at.refuse("image_size", reason));
        }
        if self.window > MOST_PATCHES {
            return Err(at.refuse("window_size", format!("{} is beyond the limit of {MOST_PATCHES}", self.window)));
        }
        if self.global.is_empty() {
            return Err(at.refuse("global_attn_indexes", "empty, but the first one feeds the second neck"));
        }
        if let Some(layer) = self.global.iter().find(|&&layer| layer >= self.layers) {
            return Err(at.refuse("global_attn_indexes", format!("{layer} is not one of {} layers", self.layers)));
        }
        if !(self.epsilon.is_finite() && self.epsilon >= 0.0) {
            return Err(at.refuse("layer_norm_eps", "not a positive number"));
        }
        Ok(self)
    }

    /// Values of a token that comes out.
    pub fn width(&self) -> usize {
        self.downsample_channels[1]
    }

    /// g: patches in a row and in a column.
    pub(super) fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }
}

impl Names {
    const PORT: &str = "model.high_res_vision_model.vision_encoder.";
    const ORIGINAL: &str = "vision_model.vision_tower_high.vision_tower.";

    pub fn of(self, port: &str, original: &str) -> String {
        match self {
            Self::Port => format!("{}{port}", Self::PORT),
            Self::Original => format!("{}{original}", Self::ORIGINAL),
        }
    }

    pub fn neck(self) -> [String; 4] {
        match self {
            Self::Port => ["conv1", "layer_norm1", "conv2", "layer_norm2"].map(|part| format!("{}neck.{part}", Self::PORT)),
            Self::Original => [0, 1, 2, 3].map(|part| format!("{}neck.{part}", Self::ORIGINAL)),
        }
    }

    pub fn second_neck(self) -> [String; 4] {
        match self {
            Self::Port => ["conv1", "layer_norm1", "conv2", "layer_norm2"].map(|part| format!("model.high_res_vision_neck.{part}")),
            Self::Original => [0, 1, 2, 3].map(|part| format!("{}neck_hd.{part}", Self::ORIGINAL)),
        }
    }

    pub fn downsamples(self) -> [&'static str; 2] {
        match self {
            Self::Port => ["model.high_res_vision_proj.conv1", "model.high_res_vision_proj.conv2"],
            Self::Original => {
                ["vision_model.vision_tower_high.vision_tower.downsamples.0", "vision_model.vision_tower_high.vision_tower.downsamples.1"]
            }
        }
    }

    pub fn alpha(self) -> &'static str {
        match self {
            Self::Port => "model.high_res_vision_alpha",
            Self::Original => "vision_model.vision_tower_high.vision_tower.hd_alpha_downsamples",
        }
    }
}

/// Width between the two layers of the MLP.
fn inner(hidden_size: usize, ratio: Option<f64>) -> usize {
    (hidden_size as f64 * ratio.unwrap_or(4.0)) as usize
}
