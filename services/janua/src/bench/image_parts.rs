//! The parts of image models, by name and size (spec: vision.md 2, 3 and 7; janus.md 5 and 6; janusflow.md 1 and 5).

use super::recipe::{Fill, Tensors};

/// Sides, in pixels, of what a SigLIP tower sees, and what it is made of.
#[derive(Debug, Clone, Copy)]
pub struct Tower {
    pub image: usize,
    pub patch: usize,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
}

pub const SIGLIP_L: Tower = Tower { image: 384, patch: 16, hidden: 1024, inner: 4096, layers: 24, heads: 16 };

impl Tower {
    /// Rows that a picture becomes.
    pub fn tokens(&self) -> usize {
        (self.image / self.patch).pow(2)
    }

    /// As the ports of transformers have it, below `root`.
    pub fn port(&self, tensors: &mut Tensors, root: &str, projection: &str) {
        let Self { patch, hidden, inner, .. } = *self;
        tensors.weight(&format!("{root}.embeddings.patch_embedding"), &[hidden, 3, patch, patch], true);
        tensors.table(&format!("{root}.embeddings.position_embedding"), self.tokens(), hidden);
        for layer in 0..self.layers {
            let layer = format!("{root}.encoder.layers.{layer}");
            tensors.norm(&format!("{layer}.layer_norm1"), hidden, true);
            tensors.norm(&format!("{layer}.layer_norm2"), hidden, true);
            for part in ["q_proj", "k_proj", "v_proj", projection] {
                tensors.weight(&format!("{layer}.self_attn.{part}"), &[hidden, hidden], true);
            }
            tensors.weight(&format!("{layer}.mlp.fc1"), &[inner, hidden], true);
            tensors.weight(&format!("{layer}.mlp.fc2"), &[hidden, inner], true);
        }
        tensors.norm(&format!("{root}.post_layernorm"), hidden, true);
    }

    /// As the original repositories have it, with the pooling head that nobody uses.
    pub fn original(&self, tensors: &mut Tensors, root: &str) {
        let Self { patch, hidden, inner, .. } = *self;
        tensors.weight(&format!("{root}.patch_embed.proj"), &[hidden, 3, patch, patch], true);
        tensors.add(format!("{root}.pos_embed"), &[1, self.tokens(), hidden], Fill::Noise(1.0));
        for layer in 0..self.layers {
            let layer = format!("{root}.blocks.{layer}");
            tensors.norm(&format!("{layer}.norm1"), hidden, true);
            tensors.norm(&format!("{layer}.norm2"), hidden, true);
            tensors.weight(&format!("{layer}.attn.qkv"), &[3 * hidden, hidden], true);
            tensors.weight(&format!("{layer}.attn.proj"), &[hidden, hidden], true);
            tensors.weight(&format!("{layer}.mlp.fc1"), &[inner, hidden], true);
            tensors.weight(&format!("{layer}.mlp.fc2"), &[hidden, inner], true);
        }
        tensors.norm(&format!("{root}.norm"), hidden, true);
        let pool = format!("{root}.attn_pool");
        tensors.add(format!("{pool}.latent"), &[1, 1, hidden], Fill::Noise(1.0));
        tensors.norm(&format!("{pool}.norm"), hidden, true);
        for (part, [output, input]) in [
            ("q", [hidden, hidden]),
            ("kv", [2 * hidden, hidden]),
            ("proj", [hidden, hidden]),
            ("mlp.fc1", [inner, hidden]),
            ("mlp.fc2", [hidden, inner]),
        ] {
            tensors.weight(&format!("{pool}.{part}"), &[output, input], true);
        }
    }
}

/// The SAM encoder of the hybrid tower.
#[derive(Debug, Clone, Copy)]
pub struct Sam {
    pub image: usize,
    pub patch: usize,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub window: usize,
    pub global: &'static [usize],
    /// Channels behind the neck.
    pub output: usize,
}

pub const SAM_B: Sam =
    Sam { image: 1024, patch: 16, hidden: 768, inner: 3072, layers: 12, heads: 12, window: 14, global: &[2, 5, 8, 11], output: 256 };

impl Sam {
    /// As the port of transformers has it: encoder, second neck, down-projections, mixing factor.
    pub fn port(&self, tensors: &mut Tensors) {
        let Self { patch, hidden, inner, output, .. } = *self;
        let (root, grid) = ("model.high_res_vision_model.vision_encoder", self.image / patch);
        tensors.weight(&format!("{root}.patch_embed.projection"), &[hidden, 3, patch, patch], true);
        tensors.add(format!("{root}.pos_embed"), &[1, grid, grid, hidden], Fill::Noise(1.0));
        for layer in 0..self.layers {
            let side = if self.global.contains(&layer) { grid } else { self.window };
            let layer = format!("{root}.layers.{layer}");
            tensors.norm(&format!("{layer}.layer_norm1"), hidden, true);
            tensors.norm(&format!("{layer}.layer_norm2"), hidden, true);
            tensors.weight(&format!("{layer}.attn.qkv"), &[3 * hidden, hidden], true);
            tensors.weight(&format!("{layer}.attn.proj"), &[hidden, hidden], true);
            for direction in ["rel_pos_h", "rel_pos_w"] {
                let relative = [2 * side - 1, hidden / self.heads];
                tensors.add(format!("{layer}.attn.{direction}"), &relative, Fill::Noise(0.1));
            }
            tensors.weight(&format!("{layer}.mlp.lin1"), &[inner, hidden], true);
            tensors.weight(&format!("{layer}.mlp.lin2"), &[hidden, inner], true);
        }
        for neck in [format!("{root}.neck"), "model.high_res_vision_neck".to_owned()] {
            tensors.weight(&format!("{neck}.conv1"), &[output, hidden, 1, 1], false);
            tensors.weight(&format!("{neck}.conv2"), &[output, output, 3, 3], false);
            tensors.norm(&format!("{neck}.layer_norm1"), output, true);
            tensors.norm(&format!("{neck}.layer_norm2"), output, true);
        }
        tensors.weight("model.high_res_vision_proj.conv1", &[2 * output, output, 3, 3], false);
        tensors.weight("model.high_res_vision_proj.conv2", &[4 * output, 2 * output, 3, 3], false);
        tensors.add("model.high_res_vision_alpha", &[1], Fill::Constant(0.5));
    }
}

/// The VQ tokenizer of Janus.
#[derive(Debug, Clone, Copy)]
pub struct Vq {
    /// Sides of the code map.
    pub side: usize,
    pub codebook: usize,
    pub code: usize,
    pub latent: usize,
    pub base: usize,
    /// Channels of each level as multiples of `base`, the largest map first.
    pub multipliers: &'static [usize],
    /// Residual blocks of a level of the encoder; the decoder has one more.
    pub blocks: usize,
}

pub const VQ_16: Vq = Vq { side: 24, codebook: 16_384, code: 8, latent: 256, base: 128, multipliers: &[1, 1, 2, 2, 4], blocks: 2 };

impl Vq {
    /// As the port of transformers has it, below `root`.
    pub fn port(&self, tensors: &mut Tensors, root: &str) {
        self.encoder(tensors, &format!("{root}.encoder"));
        self.decoder(tensors, &format!("{root}.decoder"));
        tensors.table(&format!("{root}.quantize.embedding"), self.codebook, self.code);
        tensors.weight(&format!("{root}.quant_conv"), &[self.code, self.latent, 1, 1], true);
        tensors.weight(&format!("{root}.post_quant_conv"), &[self.latent, self.code, 1, 1], true);
    }

    fn encoder(&self, tensors: &mut Tensors, root: &str) {
        let (mut channels, last) = (self.base, self.multipliers.len() - 1);
        tensors.weight(&format!("{root}.conv_in"), &[channels, 3, 3, 3], true);
        for (level, multiplier) in self.multipliers.iter().enumerate() {
            let (down, width) = (format!("{root}.down.{level}"), self.base * multiplier);
            for block in 0..self.blocks {
                vq_residual(tensors, &format!("{down}.block.{block}"), width, channels);
                channels = width;
                if level == last {
                    vq_attention(tensors, &format!("{down}.attn.{block}"), width);
                }
            }
            if level < last {
                tensors.weight(&format!("{down}.downsample.conv"), &[width, width, 3, 3], true);
            }
        }
        vq_middle(tensors, root, channels);
        tensors.norm(&format!("{root}.norm_out"), channels, true);
        tensors.weight(&format!("{root}.conv_out"), &[self.latent, channels, 3, 3], true);
    }

    fn decoder(&self, tensors: &mut Tensors, root: &str) {
        let last = self.multipliers.len() - 1;
        let mut channels = self.base * self.multipliers[last];
        tensors.weight(&format!("{root}.conv_in"), &[channels, self.latent, 3, 3], true);
        vq_middle(tensors, root, channels);
        for (level, multiplier) in self.multipliers.iter().rev().enumerate() {
            let (up, width) = (format!("{root}.up.{level}"), self.base * multiplier);
            for block in 0..=self.blocks {
                vq_residual(tensors, &format!("{up}.block.{block}"), width, channels);
                channels = width;
                if level == 0 {
                    vq_attention(tensors, &format!("{up}.attn.{block}"), width);
                }
            }
            if level < last {
                tensors.weight(&format!("{up}.upsample.conv"), &[width, width, 3, 3], true);
            }
        }
        tensors.norm(&format!("{root}.norm_out"), channels, true);
        tensors.weight(&format!("{root}.conv_out"), &[3, channels, 3, 3], true);
    }
}

fn vq_middle(tensors: &mut Tensors, root: &str, channels: usize) {
    vq_residual(tensors, &format!("{root}.mid.block_1"), channels, channels);
    vq_attention(tensors, &format!("{root}.mid.attn_1"), channels);
    vq_residual(tensors, &format!("{root}.mid.block_2"), channels, channels);
}

fn vq_residual(tensors: &mut Tensors, name: &str, output: usize, input: usize) {
    residual(tensors, name, (output, input), "nin_shortcut");
}

fn vq_attention(tensors: &mut Tensors, name: &str, channels: usize) {
    tensors.norm(&format!("{name}.norm"), channels, true);
    for part in ["q", "k", "v", "proj_out"] {
        tensors.weight(&format!("{name}.{part}"), &[channels, channels, 1, 1], true);
    }
}

/// Two norms with a convolution behind each, and one on the side where the number of channels changes.
fn residual(tensors: &mut Tensors, name: &str, (output, input): (usize, usize), shortcut: &str) {
    tensors.norm(&format!("{name}.norm1"), input, true);
    tensors.weight(&format!("{name}.conv1"), &[output, input, 3, 3], true);
    tensors.norm(&format!("{name}.norm2"), output, true);
    tensors.weight(&format!("{name}.conv2"), &[output, output, 3, 3], true);
    if output != input {
        tensors.weight(&format!("{name}.{shortcut}"), &[output, input, 1, 1], true);
    }
}

/// The autoencoder of JanusFlow.
#[derive(Debug, Clone, Copy)]
pub struct Autoencoder {
    pub latent: usize,
    /// Channels of each level, the largest map first.
    pub channels: &'static [usize],
    pub blocks: usize,
    pub groups: usize,
}

pub const SDXL: Autoencoder = Autoencoder { latent: 4, channels: &[128, 256, 512, 512], blocks: 2, groups: 32 };

impl Autoencoder {
    pub fn tensors(&self, tensors: &mut Tensors) {
        self.encoder(tensors);
        self.decoder(tensors);
        tensors.weight("quant_conv", &[2 * self.latent, 2 * self.latent, 1, 1], true);
        tensors.weight("post_quant_conv", &[self.latent, self.latent, 1, 1], true);
    }

    fn encoder(&self, tensors: &mut Tensors) {
        let (mut channels, last) = (self.channels[0], self.channels.len() - 1);
        tensors.weight("encoder.conv_in", &[channels, 3, 3, 3], true);
        for (level, &width) in self.channels.iter().enumerate() {
            let down = format!("encoder.down_blocks.{level}");
            for block in 0..self.blocks {
                residual(tensors, &format!("{down}.resnets.{block}"), (width, channels), "conv_shortcut");
                channels = width;
            }
            if level < last {
                tensors.weight(&format!("{down}.downsamplers.0.conv"), &[width, width, 3, 3], true);
            }
        }
        vae_middle(tensors, "encoder", channels);
        tensors.weight("encoder.conv_out", &[2 * self.latent, channels, 3, 3], true);
    }

    fn decoder(&self, tensors: &mut Tensors) {
        let last = self.channels.len() - 1;
        let mut channels = self.channels[last];
        tensors.weight("decoder.conv_in", &[channels, self.latent, 3, 3], true);
        let bottom = channels;
        for (level, &width) in self.channels.iter().rev().enumerate() {
            let up = format!("decoder.up_blocks.{level}");
            for block in 0..=self.blocks {
                residual(tensors, &format!("{up}.resnets.{block}"), (width, channels), "conv_shortcut");
                channels = width;
            }
            if level < last {
                tensors.weight(&format!("{up}.upsamplers.0.conv"), &[width, width, 3, 3], true);
            }
        }
        vae_middle_of(tensors, "decoder", bottom, channels);
        tensors.weight("decoder.conv_out", &[3, channels, 3, 3], true);
    }
}

fn vae_middle(tensors: &mut Tensors, root: &str, channels: usize) {
    vae_middle_of(tensors, root, channels, channels);
}

/// The blocks on the smallest map, and the last norm, which in the decoder is over the channels of the largest.
fn vae_middle_of(tensors: &mut Tensors, root: &str, channels: usize, last: usize) {
    for block in ["resnets.0", "resnets.1"] {
        residual(tensors, &format!("{root}.mid_block.{block}"), (channels, channels), "conv_shortcut");
    }
    let attention = format!("{root}.mid_block.attentions.0");
    tensors.norm(&format!("{attention}.group_norm"), channels, true);
    for part in ["to_q", "to_k", "to_v", "to_out.0"] {
        tensors.weight(&format!("{attention}.{part}"), &[channels, channels], true);
    }
    tensors.norm(&format!("{root}.conv_norm_out"), last, true);
}

/// What draws around the language model of JanusFlow: `width` channels on the side of the latents, `hidden` on that of the model.
pub fn flow(tensors: &mut Tensors, width: usize, hidden: usize, latent: usize) {
    let encoder = "vision_gen_enc_model";
    tensors.weight(&format!("{encoder}.in_conv"), &[width, latent, 2, 2], true);
    tensors.weight(&format!("{encoder}.time_embed.linear_1"), &[hidden, width], true);
    tensors.weight(&format!("{encoder}.time_embed.linear_2"), &[hidden, hidden], true);
    conv_next(tensors, encoder, width, hidden);
    tensors.weight("vision_gen_enc_aligner", &[hidden, width], true);
    tensors.norm("vision_gen_dec_aligner_norm", hidden, false);
    tensors.weight("vision_gen_dec_aligner", &[width, hidden], true);
    let decoder = "vision_gen_dec_model";
    tensors.norm(&format!("{decoder}.input_norm"), width, false);
    conv_next(tensors, decoder, 2 * width, hidden);
    tensors.norm(&format!("{decoder}.out_convs.0.norm"), 2 * width, false);
    tensors.weight(&format!("{decoder}.out_convs.0.unpatch_conv"), &[4 * latent, 2 * width, 1, 1], true);
}

/// Two ConvNeXt blocks of `channels`, modulated by `hidden` values of the time.
fn conv_next(tensors: &mut Tensors, root: &str, channels: usize, hidden: usize) {
    for block in 0..2 {
        let block = format!("{root}.mid_block.res_blocks.{block}");
        tensors.weight(&format!("{block}.depthwise"), &[channels, 1, 7, 7], true);
        tensors.norm(&format!("{block}.norm"), channels, false);
        tensors.weight(&format!("{block}.channelwise_linear_1"), &[4 * channels, channels], true);
        for part in ["weight", "bias"] {
            tensors.add(format!("{block}.channelwise_norm.{part}"), &[1, 1, 1, 4 * channels], Fill::Noise(0.1));
        }
        tensors.weight(&format!("{block}.channelwise_linear_2"), &[channels, 4 * channels], true);
        tensors.weight(&format!("{block}.cond_embeds_mapper"), &[2 * channels, hidden], true);
    }
}
