//! The decoder's part of a configuration: completed with the defaults of the llama architecture, checked for sense.

use checkpoint::{Checkpoint, CheckpointError};
use layers::{AttentionShape, EngineError, KvEntry, KvShape, LatentShape, MoeShape, Rope, Yarn};
use serde::Deserialize;
use serde_json::Value;

/// A decoder, every number in range and in agreement with the others (spec: language.md 1.1).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TextConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope: Rope,
    pub attention: AttentionConfig,
    /// `None`: the feed-forward part of every layer is one SwiGLU of `intermediate_size`.
    pub experts: Option<ExpertLayers>,
    pub mlp_bias: bool,
    pub tie_word_embeddings: bool,
}

/// How positions look at each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum AttentionConfig {
    Heads(AttentionShape),
    Latent(LatentShape),
}

/// Which layers are layers of experts, and of which kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ExpertLayers {
    pub shape: MoeShape,
    /// Layers before it are dense.
    pub first: usize,
    /// After that, every layer whose number this divides.
    pub every: usize,
}

/// The fields as they may stand in the file. Published configurations of multimodal models leave most of them out.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Written {
    pub hidden_size: Option<usize>,
    pub intermediate_size: Option<usize>,
    pub num_hidden_layers: Option<usize>,
    pub num_attention_heads: Option<usize>,
    pub num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    pub vocab_size: Option<usize>,
    pub max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeScaling>,
    rope_parameters: Option<RopeScaling>,
    pub attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
}

/// `rope_scaling`, or `rope_parameters` as newer exports call it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RopeScaling {
    #[serde(rename = "type")]
    kind: Option<String>,
    rope_type: Option<String>,
    factor: Option<f64>,
    rope_theta: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
}

/// How the rotary embedding turns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Turning {
    pub theta: f64,
    /// How many times longer the context is than without scaling.
    pub factor: f64,
    /// How much sharper attention is over a stretched context; 0: not at all (spec: language.md 2.2).
    pub mscale_all_dim: f64,
    /// `None`: all positions are divided by `factor`.
    pub yarn: Option<Yarn>,
}

/// Largest sizes that are believed: well beyond every published model, and small enough that no product of two overflows.
pub(crate) const MOST_UNITS: usize = 1 << 20;
const MOST_LAYERS: usize = 1 << 12;
const MOST_ROWS: usize = 1 << 26;

impl TextConfig {
    /// Reads a decoder of the llama architecture from the object at `pointer` of `config.json` (`""`, `"/text_config"`, `"/language_config"`).
    /// Errors name the field.
    pub fn read(checkpoint: &Checkpoint, pointer: &str) -> Result<Self, EngineError> {
        let written: Written = checkpoint.config_as(pointer)?;
        let at = Fields { checkpoint, path: pointer.trim_start_matches('/') };
        let hidden = at.size("hidden_size", written.hidden_size, 4096, MOST_UNITS)?;
        let heads = at.size("num_attention_heads", written.num_attention_heads, 32, MOST_UNITS)?;
        let head_dim = at.head_dim(written.head_dim, hidden, heads)?;
        let kv_heads = at.size("num_key_value_heads", written.num_key_value_heads, heads, MOST_UNITS)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(at.refuse("num_key_value_heads", format!("{kv_heads} does not divide num_attention_heads {heads}")));
        }
        let turning = written.turning(&at, &["linear"])?;
        let rope = Rope::new(head_dim, turning.theta, turning.factor);
        let bias = written.attention_bias.unwrap_or(false);
        written.complete(&at, rope, AttentionConfig::Heads(AttentionShape { hidden, heads, kv_heads, head_dim, bias }))
    }

    /// The KV cache of one layer.
    pub fn kv_shape(&self, blocks: usize) -> KvShape {
        let entry = match self.attention {
            AttentionConfig::Heads(shape) => KvEntry::Heads { kv_heads: shape.kv_heads, head_dim: shape.head_dim },
            AttentionConfig::Latent(shape) => KvEntry::Latent { rank: shape.kv_lora_rank, rope: shape.qk_rope_head_dim },
        };
        KvShape { blocks, entry }
    }

    /// Bytes that one block of the KV cache takes, all layers together.
    pub fn kv_block_bytes(&self) -> usize {
        self.kv_shape(1).block_bytes() * self.num_hidden_layers
    }

    /// The experts of layer `layer`, if it has any (spec: moe.md 1).
    pub fn experts_of(&self, layer: usize) -> Option<MoeShape> {
        self.experts.filter(|experts| layer >= experts.first && layer.is_multiple_of(experts.every)).map(|experts| experts.shape)
    }
}

impl Written {
    /// What all decoders have in common, with the defaults of the llama architecture.
    pub fn complete(&self, at: &Fields<'_>, rope: Rope, attention: AttentionConfig) -> Result<TextConfig, EngineError> {
        match self.hidden_act.as_deref() {
            None | Some("silu" | "swish") => (),
            Some(other) => return Err(at.refuse("hidden_act", format!("{other:?} is not supported, only \"silu\""))),
        }
        Ok(TextConfig {
            hidden_size: at.size("hidden_size", self.hidden_size, 4096, MOST_UNITS)?,
            intermediate_size: at.size("intermediate_size", self.intermediate_size, 11_008, MOST_UNITS)?,
            num_hidden_layers: at.size("num_hidden_layers", self.num_hidden_layers, 32, MOST_LAYERS)?,
            vocab_size: at.size("vocab_size", self.vocab_size, 32_000, MOST_ROWS)?,
            max_position_embeddings: at.size("max_position_embeddings", self.max_position_embeddings, 2048, MOST_ROWS)?,
            rms_norm_eps: at.positive("rms_norm_eps", self.rms_norm_eps, 1e-6)? as f32,
            rope,
            attention,
            experts: None,
            mlp_bias: self.mlp_bias.unwrap_or(false),
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
        })
    }

    /// The rotary embedding, if its kind of scaling is none or one of `kinds`.
    pub fn turning(&self, at: &Fields<'_>, kinds: &[&str]) -> Result<Turning, EngineError> {
        let (name, scaling) = match (&self.rope_scaling, &self.rope_parameters) {
            (Some(scaling), _) => ("rope_scaling", scaling),
            (None, Some(parameters)) => ("rope_parameters", parameters),
            (None, None) => ("rope_scaling", &RopeScaling::default()),
        };
        let theta = at.positive("rope_theta", self.rope_theta.or(scaling.rope_theta), 10_000.0)?;
        let plain = Turning { theta, factor: 1.0, mscale_all_dim: 0.0, yarn: None };
        let kind = match scaling.rope_type.as_deref().or(scaling.kind.as_deref()) {
            None | Some("default") => return Ok(plain),
            Some(kind) => kind,
        };
        if !kinds.contains(&kind) {
            let field = if scaling.rope_type.is_some() { "rope_type" } else { "type" };
            return Err(at.refuse(&format!("{name}.{field}"), format!("{kind:?} is not supported for this family")));
        }
        let factor = at.positive(&format!("{name}.factor"), scaling.factor, f64::NAN)?;
        let mscale_all_dim = at.not_negative(&format!("{name}.mscale_all_dim"), scaling.mscale_all_dim, 0.0)?;
        let yarn = (kind == "yarn").then(|| scaling.yarn(at, name, theta, factor)).transpose()?;
        Ok(Turning { factor, mscale_all_dim, yarn, ..plain })
    }
}

impl RopeScaling {
    fn yarn(&self, at: &Fields<'_>, name: &str, theta: f64, factor: f64) -> Result<Yarn, EngineError> {
        let field = |field: &str| format!("{name}.{field}");
        let yarn = Yarn {
            factor,
            original_positions: at.size(&field("original_max_position_embeddings"), self.original_max_position_embeddings, 0, MOST_ROWS)?,
            beta_fast: at.positive(&field("beta_fast"), self.beta_fast, 32.0)?,
            beta_slow: at.positive(&field("beta_slow"), self.beta_slow, 1.0)?,
            mscale: at.not_negative(&field("mscale"), self.mscale, 1.0)?,
            mscale_all_dim: at.not_negative(&field("mscale_all_dim"), self.mscale_all_dim, 0.0)?,
        };
        if yarn.beta_fast < yarn.beta_slow {
            return Err(at.refuse(&field("beta_fast"), format!("{} is less than beta_slow {}", yarn.beta_fast, yarn.beta_slow)));
        }
        if theta <= 1.0 {
            return Err(at.refuse("rope_theta", format!("{theta} leaves no frequencies to stretch")));
        }
        Ok(yarn)
    }
}

/// Names fields in errors, and checks one at a time. Used for other parts of the configuration, too.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub checkpoint: &'a Checkpoint,
    /// Path of the object that holds the fields; empty for the whole file.
    pub path: &'a str,
}

impl Fields<'_> {
    pub fn refuse(&self, field: &str, reason: impl Into<String>) -> EngineError {
        let field = if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path.replace('/', ".")) };
        let dir = self.checkpoint.dir().to_path_buf();
        CheckpointError::Field { dir, file: "config.json".into(), field, reason: reason.into() }.into()
    }

    /// A size from 1 to `most`.
    pub fn size(&self, field: &str, written: Option<usize>, default: usize, most: usize) -> Result<usize, EngineError> {
        match written.unwrap_or(default) {
            0 => Err(self.refuse(field, "0 makes no model")),
            size if size > most => Err(self.refuse(field, format!("{size} is beyond the limit of {most}"))),
            size => Ok(size),
        }
    }

    pub fn positive(&self, field: &str, written: Option<f64>, default: f64) -> Result<f64, EngineError> {
        let value = written.unwrap_or(default);
        let sensible = value > 0.0 && value.is_finite();
        if sensible { Ok(value) } else { Err(self.refuse(field, format!("{value} is not a positive number"))) }
    }

    pub fn not_negative(&self, field: &str, written: Option<f64>, default: f64) -> Result<f64, EngineError> {
        let value = written.unwrap_or(default);
        let sensible = value >= 0.0 && value.is_finite();
        if sensible { Ok(value) } else { Err(self.refuse(field, format!("{value} is not zero or a positive number"))) }
    }

    /// A field that has no default.
    pub fn required<T>(&self, field: &str, written: Option<T>) -> Result<T, EngineError> {
        written.ok_or_else(|| self.refuse(field, "missing"))
    }

    fn head_dim(&self, written: Option<usize>, hidden: usize, heads: usize) -> Result<usize, EngineError> {
        if written.is_none() && !hidden.is_multiple_of(heads) {
            return Err(
                self.refuse("num_attention_heads", format!("{heads} does not divide hidden_size {hidden}, and there is no head_dim"))
            );
        }
        let head_dim = self.size("head_dim", written, hidden / heads, MOST_UNITS)?;
        if !head_dim.is_multiple_of(2) {
            return Err(self.refuse(
                if written.is_some() { "head_dim" } else { "num_attention_heads" },
                format!("heads of {head_dim} dimensions cannot be rotated in pairs"),
            ));
        }
        if head_dim * heads > MOST_UNITS {
            return Err(self.refuse("num_attention_heads", format!("{heads} heads of {head_dim} are beyond the limit of {MOST_UNITS}")));
        }
        Ok(head_dim)
    }
}

/// Whether an optional top-level flag of `config.json` is true.
pub(crate) fn flag(checkpoint: &Checkpoint, field: &str) -> bool {
    checkpoint.config().get(field).and_then(Value::as_bool).unwrap_or(false)
}
