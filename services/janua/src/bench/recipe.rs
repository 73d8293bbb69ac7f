use serde_json::{Value, json};

/// A checkpoint to make: every file of the folder, tensors described rather than held.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Name of the folder, and of the row in the table.
    pub name: &'static str,
    /// What it is and what was left out to make it fit.
    pub about: &'static str,
    /// Which of the tokenizers in the repository it speaks with.
    pub tokenizer: Voice,
    /// Rows of the embedding table; the tokenizer is filled up to nearly as many.
    pub vocabulary: usize,
    /// The small JSON files by name.
    pub json: Vec<(&'static str, Value)>,
    /// `model.safetensors`, or its shards.
    pub tensors: Tensors,
    /// A folder beside the weights with an autoencoder.
    pub vae: Option<Vae>,
}

/// The tokenizer of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voice {
    Llm,
    V2,
    Vl,
    Janus,
}

/// The image decoder of JanusFlow, which is published by itself.
#[derive(Debug, Clone)]
pub struct Vae {
    pub config: Value,
    pub tensors: Tensors,
}

/// What a tensor is filled with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fill {
    /// Uniform, centred on zero, with this standard deviation.
    Noise(f32),
    /// Everywhere the same.
    Constant(f32),
}

/// A tensor to write.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub fill: Fill,
}

impl Tensor {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Deviation of biases: small beside activations, but not nothing.
const BIAS: f32 = 0.02;

/// Tensors in the order in which they are written.
///
/// Weights have variance 1 / fan-in and norms are one, so that activations keep the size of their inputs through any number of layers:
/// neither do they overflow, nor does a model of noise say the same whatever it is asked.
#[derive(Debug, Clone, Default)]
pub struct Tensors {
    list: Vec<Tensor>,
}

impl Tensors {
    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        self.list.iter()
    }

    /// Bytes of all tensors with values of `size` bytes.
    pub fn bytes(&self, size: usize) -> u64 {
        self.list.iter().map(|tensor| (tensor.len() * size) as u64).sum()
    }

    /// Any tensor.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], fill: Fill) {
        self.list.push(Tensor { name: name.into(), shape: shape.to_vec(), fill });
    }

    /// `{name}.weight [out, in, ...]` for inputs of variance 1, and `{name}.bias [out]` unless there is none.
    pub fn weight(&mut self, name: &str, shape: &[usize], bias: bool) {
        let fan_in: usize = shape[1..].iter().product();
        self.add(format!("{name}.weight"), shape, Fill::Noise((fan_in as f32).sqrt().recip()));
        if bias {
            self.add(format!("{name}.bias"), &shape[..1], Fill::Noise(BIAS));
        }
    }

    /// `{name}.weight [rows, width]` of variance 1.
    pub fn table(&mut self, name: &str, rows: usize, width: usize) {
        self.add(format!("{name}.weight"), &[rows, width], Fill::Noise(1.0));
    }

    /// `{name}.weight [width]`: ones, and `{name}.bias` unless there is none.
    pub fn norm(&mut self, name: &str, width: usize, bias: bool) {
        self.add(format!("{name}.weight"), &[width], Fill::Constant(1.0));
        if bias {
            self.add(format!("{name}.bias"), &[width], Fill::Noise(BIAS));
        }
    }
}

impl Recipe {
    /// Bytes of the weights on disk, bf16 but for the autoencoder, which is published in f32.
    pub fn bytes(&self) -> u64 {
        self.tensors.bytes(2) + self.vae.as_ref().map_or(0, |vae| vae.tensors.bytes(4))
    }

    /// A digest of everything that decides the files.
    pub fn stamp(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?} {} {}", self.tokenizer, self.vocabulary, env!("CARGO_PKG_VERSION")).as_bytes());
        for (name, value) in &self.json {
            hasher.update(json!([name, value]).to_string().as_bytes());
        }
        for tensor in self.tensors.iter() {
            hasher.update(format!("{tensor:?}").as_bytes());
        }
        if let Some(vae) = &self.vae {
            hasher.update(vae.config.to_string().as_bytes());
            for tensor in vae.tensors.iter() {
                hasher.update(format!("{tensor:?}").as_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
pub mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::bench::image_parts::{Autoencoder, Sam, Tower, Vq};
    use crate::bench::image_recipes::{janus, janusflow, vl_hybrid};
    use crate::bench::text_recipes::{Decoder, Experts, Latent, llama, moe, v2};

    const DECODER: Decoder = Decoder { hidden: 64, inner: 160, layers: 2, heads: 4, vocabulary: 496, context: 16_384 };
    const DEEPER: Decoder = Decoder { layers: 3, context: 4096, ..DECODER };
    const TOWER: Tower = Tower { image: 48, patch: 8, hidden: 48, inner: 192, layers: 3, heads: 4 };
    const VQ: Vq = Vq { side: 6, codebook: 96, code: 8, latent: 16, base: 32, multipliers: &[2, 1], blocks: 1 };
    const VAE: Autoencoder = Autoencoder { latent: 4, channels: &[16, 32], blocks: 1, groups: 8 };
    const SAM: Sam = Sam { image: 96, patch: 16, hidden: 32, inner: 128, layers: 4, heads: 4, window: 4, global: &[1, 3], output: 16 };

    /// Janus at the size of its fixture.
    pub fn small_janus() -> Recipe {
        janus(&DECODER, &TOWER, &VQ)
    }

    /// JanusFlow at the size of its fixture.
    pub fn small_janusflow() -> Recipe {
        janusflow(&DECODER, &TOWER, 32, &VAE)
    }

    /// Names and shapes of a safetensors file.
    fn shapes(path: &Path) -> BTreeMap<String, Vec<usize>> {
        let data = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = safetensors::SafeTensors::deserialize(&data).unwrap();
        file.tensors().into_iter().map(|(name, tensor)| (name, tensor.shape().to_vec())).collect()
    }

    fn same(fixture: &str, tensors: &Tensors) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(fixture);
        let planned: BTreeMap<_, _> = tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
        assert_eq!(planned, shapes(&path), "{fixture}");
    }

    #[test]
    fn recipes_at_the_size_of_the_fixtures_have_the_same_tensors() {
        let experts = |routed, per_token, inner| Experts { routed, shared: 2, per_token, inner };
        same("llama/model.safetensors", &llama(&Decoder { inner: 176, layers: 3, ..DECODER }).tensors);
        same("janus/model.safetensors", &small_janus().tensors);
        same("moe_v1/model.safetensors", &moe(&DEEPER, &experts(16, 6, 20)).tensors);
        let latent = Latent { kv_rank: 32, nope: 16, rope: 16, value: 16 };
        same("v2_lite/model.safetensors", &v2(&DEEPER, &experts(12, 4, 24), &latent).tensors);
        let flow = small_janusflow();
        same("janusflow/model.safetensors", &flow.tensors);
        same("janusflow/vae/diffusion_pytorch_model.safetensors", &flow.vae.unwrap().tensors);
        let tower = Tower { layers: 2, ..TOWER };
        same("deepseek_vl_hybrid/model.safetensors", &vl_hybrid(&DECODER, &tower, &SAM).tensors);
    }
}
