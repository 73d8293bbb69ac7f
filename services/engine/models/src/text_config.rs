//! The llama part of a configuration: completed with the defaults of the architecture, checked for sense.

use checkpoint::{Checkpoint, CheckpointError};
use layers::{AttentionShape, EngineError, KvShape, Rope};
use serde::Deserialize;
use serde_json::Value;

/// A decoder of the llama architecture, every number in range and in agreement with the others (spec: language.md 1.1).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TextConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    /// Positions are divided by this.
    pub rope_factor: f64,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub tie_word_embeddings: bool,
}

/// The fields as they may stand in the file. Published configurations of multimodal models leave most of them out.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Written {
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeScaling>,
    rope_parameters: Option<RopeScaling>,
    attention_bias: Option<bool>,
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
}

/// Largest sizes that are believed: well beyond every published model, and small enough that no product of two overflows.
const MOST_UNITS: usize = 1 << 20;
const MOST_LAYERS: usize = 1 << 12;
const MOST_ROWS: usize = 1 << 26;

impl TextConfig {
    /// Reads the object at `pointer` of `config.json` (`""`, `"/text_config"`, `"/language_config"`). Errors name the field.
    pub fn read(checkpoint: &Checkpoint, pointer: &str) -> Result<Self, EngineError> {
        let written: Written = checkpoint.config_as(pointer)?;
        let at = Fields { checkpoint, path: pointer.trim_start_matches('/') };
        let hidden_size = at.size("hidden_size", written.hidden_size, 4096, MOST_UNITS)?;
        let heads = at.size("num_attention_heads", written.num_attention_heads, 32, MOST_UNITS)?;
        let head_dim = at.head_dim(written.head_dim, hidden_size, heads)?;
        let kv_heads = at.size("num_key_value_heads", written.num_key_value_heads, heads, MOST_UNITS)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(at.refuse("num_key_value_heads", format!("{kv_heads} does not divide num_attention_heads {heads}")));
        }
        let (rope_theta, rope_factor) = at.rope(&written)?;
        match written.hidden_act.as_deref() {
            None | Some("silu" | "swish") => (),
            Some(other) => return Err(at.refuse("hidden_act", format!("{other:?} is not supported, only \"silu\""))),
        }
        Ok(Self {
            hidden_size,
            intermediate_size: at.size("intermediate_size", written.intermediate_size, 11_008, MOST_UNITS)?,
            num_hidden_layers: at.size("num_hidden_layers", written.num_hidden_layers, 32, MOST_LAYERS)?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            vocab_size: at.size("vocab_size", written.vocab_size, 32_000, MOST_ROWS)?,
            max_position_embeddings: at.size("max_position_embeddings", written.max_position_embeddings, 2048, MOST_ROWS)?,
            rms_norm_eps: at.positive("rms_norm_eps", written.rms_norm_eps, 1e-6)? as f32,
            rope_theta,
            rope_factor,
            attention_bias: written.attention_bias.unwrap_or(false),
            mlp_bias: written.mlp_bias.unwrap_or(false),
            tie_word_embeddings: written.tie_word_embeddings.unwrap_or(false),
        })
    }

    pub fn attention(&self) -> AttentionShape {
        AttentionShape {
            hidden: self.hidden_size,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            bias: self.attention_bias,
        }
    }

    pub fn rope(&self) -> Rope {
        Rope::new(self.head_dim, self.rope_theta, self.rope_factor)
    }

    /// The KV cache of one layer.
    pub fn kv_shape(&self, blocks: usize) -> KvShape {
        KvShape { blocks, kv_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }

    /// Bytes that one block of the KV cache takes, all layers together.
    pub fn kv_block_bytes(&self) -> usize {
        self.kv_shape(1).block_bytes() * self.num_hidden_layers
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

    fn positive(&self, field: &str, written: Option<f64>, default: f64) -> Result<f64, EngineError> {
        let value = written.unwrap_or(default);
        let sensible = value > 0.0 && value.is_finite();
        if sensible { Ok(value) } else { Err(self.refuse(field, format!("{value} is not a positive number"))) }
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

    /// Base and position factor of the rotary embedding.
    fn rope(&self, written: &Written) -> Result<(f64, f64), EngineError> {
        let (name, scaling) = match (&written.rope_scaling, &written.rope_parameters) {
            (Some(scaling), _) => ("rope_scaling", scaling),
            (None, Some(parameters)) => ("rope_parameters", parameters),
            (None, None) => ("rope_scaling", &RopeScaling::default()),
        };
        let theta = written.rope_theta.or(scaling.rope_theta);
        let theta = self.positive("rope_theta", theta, 10_000.0)?;
        match scaling.rope_type.as_deref().or(scaling.kind.as_deref()) {
            None | Some("default") => Ok((theta, 1.0)),
            Some("linear") => Ok((theta, self.positive(&format!("{name}.factor"), scaling.factor, f64::NAN)?)),
            Some(other) => {
                let field = if scaling.rope_type.is_some() { "rope_type" } else { "type" };
                Err(self.refuse(&format!("{name}.{field}"), format!("{other:?} is not supported for this family")))
            }
        }
    }
}

/// Whether an optional top-level flag of `config.json` is true.
pub(crate) fn flag(checkpoint: &Checkpoint, field: &str) -> bool {
    checkpoint.config().get(field).and_then(Value::as_bool).unwrap_or(false)
}
