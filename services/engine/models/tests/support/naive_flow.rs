//! The networks around a flow and the VAE decoder written out as loops in f64, from the text of the specification.

use super::naive_pixels::{Shapes, Tensors, add, attend, gelu, linear, normalised, pair};

const ENCODER: &str = "vision_gen_enc_model";
const DECODER: &str = "vision_gen_dec_model";

pub struct Networks {
    pub side: usize,
    pub latent: usize,
    pub channels: usize,
    pub decoder: usize,
    pub hidden: usize,
    /// Blocks of the encoder and of the decoder.
    pub layers: [usize; 2],
    pub epsilon: f64,
    /// Epsilon of the norm behind the language model.
    pub hidden_epsilon: f64,
}

impl Networks {
    pub fn shapes(&self) -> Shapes {
        let Self { latent, channels, decoder, hidden, .. } = *self;
        let mut shapes = Shapes::new();
        pair(&mut shapes, format!("{ENCODER}.time_embed.linear_1"), &[hidden, channels]);
        pair(&mut shapes, format!("{ENCODER}.time_embed.linear_2"), &[hidden, hidden]);
        pair(&mut shapes, format!("{ENCODER}.in_conv"), &[channels, latent, 2, 2]);
        pair(&mut shapes, "vision_gen_enc_aligner", &[hidden, channels]);
        shapes.push(("vision_gen_dec_aligner_norm.weight".to_owned(), vec![hidden]));
        pair(&mut shapes, "vision_gen_dec_aligner", &[decoder, hidden]);
        shapes.push((format!("{DECODER}.input_norm.weight"), vec![decoder]));
        let width = decoder + channels;
        shapes.push((format!("{DECODER}.out_convs.0.norm.weight"), vec![width]));
        pair(&mut shapes, format!("{DECODER}.out_convs.0.unpatch_conv"), &[4 * latent, width, 1, 1]);
        for (root, layers, width) in [(ENCODER, self.layers[0], channels), (DECODER, self.layers[1], width)] {
            for layer in 0..layers {
                let root = format!("{root}.mid_block.res_blocks.{layer}");
                pair(&mut shapes, format!("{root}.depthwise"), &[width, 1, 7, 7]);
                shapes.push((format!("{root}.norm.weight"), vec![width]));
                pair(&mut shapes, format!("{root}.channelwise_linear_1"), &[4 * width, width]);
                pair(&mut shapes, format!("{root}.channelwise_linear_2"), &[width, 4 * width]);
                pair(&mut shapes, format!("{root}.cond_embeds_mapper"), &[2 * width, hidden]);
                for part in ["weight", "bias"] {
                    shapes.push((format!("{root}.channelwise_norm.{part}"), vec![1, 1, 1, 4 * width]));
                }
            }
        }
        shapes
    }

    /// `z [latent, 2 side, 2 side]` -> rows for the language model `[1 + side * side, hidden]`, skip `[side * side, channels]`
    pub fn encode(&self, t: &Tensors, z: &[f32], time: f32) -> (Vec<f32>, Vec<f32>) {
        let Self { side, latent, channels, hidden, .. } = *self;
        let half = channels / 2;
        let angle = |k: usize| f64::from(time * (-(10_000f64.ln()) * k as f64 / half as f64).exp() as f32);
        let features: Vec<f64> = (0..channels).map(|i| if i < half { angle(i).cos() } else { angle(i - half).sin() }).collect();
        let emb = linear(&features, channels, t, &format!("{ENCODER}.time_embed.linear_1"));
        let emb = linear(&silu(emb), hidden, t, &format!("{ENCODER}.time_embed.linear_2"));
        let (weight, bias) = (&t[&format!("{ENCODER}.in_conv.weight")], &t[&format!("{ENCODER}.in_conv.bias")]);
        let mut x = Vec::new(); // [side * side, channels]
        for position in 0..side * side {
            for unit in 0..channels {
                let taps = weight[unit * latent * 4..][..latent * 4].iter().enumerate().map(|(i, w)| {
                    let (y, x) = (2 * (position / side) + i / 2 % 2, 2 * (position % side) + i % 2);
                    w * f64::from(z[(i / 4 * 2 * side + y) * 2 * side + x])
                });
                x.push(bias[unit] + taps.sum::<f64>());
            }
        }
        let x = self.middle(t, x, &emb, ENCODER, self.layers[0]);
        let rows = [emb, linear(&x, channels, t, "vision_gen_enc_aligner")].concat();
        (rows.into_iter().map(|v| v as f32).collect(), x.into_iter().map(|v| v as f32).collect())
    }

    /// Hidden states `[side * side, hidden]` -> velocity `[latent, 2 side, 2 side]`
    pub fn decode(&self, t: &Tensors, states: &[f32], skip: &[f32], emb: &[f32]) -> Vec<f32> {
        let Self { side, latent, channels, decoder, hidden, .. } = *self;
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let x = rms(&wide(states), hidden, t, "vision_gen_dec_aligner_norm", self.hidden_epsilon);
        let x = rms(&linear(&x, hidden, t, "vision_gen_dec_aligner"), decoder, t, &format!("{DECODER}.input_norm"), self.epsilon);
        let skip = wide(skip);
        let x: Vec<f64> = x.chunks(decoder).zip(skip.chunks(channels)).flat_map(|(x, skip)| [x, skip].concat()).collect();
        let x = self.middle(t, x, &wide(emb), DECODER, self.layers[1]);
        let width = decoder + channels;
        let x = rms(&x, width, t, &format!("{DECODER}.out_convs.0.norm"), self.epsilon);
        let x = linear(&x, width, t, &format!("{DECODER}.out_convs.0.unpatch_conv")); // [side * side, 4 latent]
        let mut out = vec![0.0; latent * 4 * side * side];
        for (i, value) in x.into_iter().enumerate() {
            let (position, channel) = (i / (4 * latent), i % (4 * latent));
            let (y, x) = (2 * (position / side) + channel % 4 / 2, 2 * (position % side) + channel % 2);
            out[(channel / 4 * 2 * side + y) * 2 * side + x] = value as f32;
        }
        out
    }

    fn middle(&self, t: &Tensors, mut x: Vec<f64>, emb: &[f64], root: &str, layers: usize) -> Vec<f64> {
        for layer in 0..layers {
            x = self.block(t, &x, emb, &format!("{root}.mid_block.res_blocks.{layer}"));
        }
        x
    }

    /// `x [side * side, width]`
    fn block(&self, t: &Tensors, x: &[f64], emb: &[f64], root: &str) -> Vec<f64> {
        let (side, width) = (self.side as isize, x.len() / self.side / self.side);
        let (weight, bias) = (&t[&format!("{root}.depthwise.weight")], &t[&format!("{root}.depthwise.bias")]);
        let mut h = Vec::new();
        for (position, unit) in (0..side * side).flat_map(|position| (0..width).map(move |unit| (position, unit))) {
            let taps = (0..49isize).filter_map(|tap| {
                let (y, x_) = (position / side + tap / 7 - 3, position % side + tap % 7 - 3);
                let inside = (0..side).contains(&y) && (0..side).contains(&x_);
                inside.then(|| weight[unit * 49 + tap as usize] * x[(y * side + x_) as usize * width + unit])
            });
            h.push(bias[unit] + taps.sum::<f64>());
        }
        let h = rms(&h, width, t, &format!("{root}.norm"), self.epsilon);
        let h = gelu(linear(&h, width, t, &format!("{root}.channelwise_linear_1")));
        let inner = 4 * width;
        let lengths: Vec<f64> = (0..inner).map(|d| h.iter().skip(d).step_by(inner).map(|v| v * v).sum::<f64>().sqrt()).collect();
        let mean = lengths.iter().sum::<f64>() / inner as f64 + 1e-6;
        let (weight, bias) = (&t[&format!("{root}.channelwise_norm.weight")], &t[&format!("{root}.channelwise_norm.bias")]);
        let h: Vec<f64> =
            h.iter().enumerate().map(|(i, v)| bias[i % inner] + (weight[i % inner] * lengths[i % inner] / mean + 1.0) * v).collect();
        let x = add(&linear(&h, inner, t, &format!("{root}.channelwise_linear_2")), x);
        let mapped = linear(&silu(emb.to_vec()), self.hidden, t, &format!("{root}.cond_embeds_mapper"));
        let (scale, shift) = mapped.split_at(width);
        x.iter().enumerate().map(|(i, v)| shift[i % width] + v * (1.0 + scale[i % width])).collect()
    }
}

pub struct Vae {
    pub side: usize,
    pub latent: usize,
    /// Channels per level, smallest map first.
    pub levels: Vec<usize>,
    pub blocks: usize,
    pub groups: usize,
}

impl Vae {
    pub fn shapes(&self) -> Shapes {
        let (mut shapes, mut channels) = (Shapes::new(), self.levels[0]);
        pair(&mut shapes, "post_quant_conv", &[self.latent, self.latent, 1, 1]);
        pair(&mut shapes, "decoder.conv_in", &[channels, self.latent, 3, 3]);
        let residual = |name: String, output: usize, input: usize| {
            let mut shapes = Shapes::new();
            pair(&mut shapes, format!("{name}.norm1"), &[input]);
            pair(&mut shapes, format!("{name}.conv1"), &[output, input, 3, 3]);
            pair(&mut shapes, format!("{name}.norm2"), &[output]);
            pair(&mut shapes, format!("{name}.conv2"), &[output, output, 3, 3]);
            if output != input {
                pair(&mut shapes, format!("{name}.conv_shortcut"), &[output, input, 1, 1]);
            }
            shapes
        };
        for part in [0, 1] {
            shapes.extend(residual(format!("decoder.mid_block.resnets.{part}"), channels, channels));
        }
        let attention = "decoder.mid_block.attentions.0";
        pair(&mut shapes, format!("{attention}.group_norm"), &[channels]);
        for part in ["to_q", "to_k", "to_v", "to_out.0"] {
            pair(&mut shapes, format!("{attention}.{part}"), &[channels, channels]);
        }
        for (level, &width) in self.levels.iter().enumerate() {
            for block in 0..self.blocks {
                shapes.extend(residual(format!("decoder.up_blocks.{level}.resnets.{block}"), width, channels));
                channels = width;
            }
            if level + 1 < self.levels.len() {
                pair(&mut shapes, format!("decoder.up_blocks.{level}.upsamplers.0.conv"), &[channels, channels, 3, 3]);
            }
        }
        pair(&mut shapes, "decoder.conv_norm_out", &[channels]);
        pair(&mut shapes, "decoder.conv_out", &[3, channels, 3, 3]);
        shapes
    }

    /// `[latent, side, side]` -> `[3, height, width]`
    pub fn run(&self, t: &Tensors, latent: &[f32]) -> Vec<f32> {
        let x = latent.iter().map(|&v| f64::from(v)).collect();
        let mut map = Map { t, groups: self.groups, side: self.side, x };
        map.conv("post_quant_conv", 1);
        map.conv("decoder.conv_in", 3);
        map.residual("decoder.mid_block.resnets.0");
        map.attention("decoder.mid_block.attentions.0");
        map.residual("decoder.mid_block.resnets.1");
        for level in 0..self.levels.len() {
            for block in 0..self.blocks {
                map.residual(&format!("decoder.up_blocks.{level}.resnets.{block}"));
            }
            if level + 1 < self.levels.len() {
                map.double();
                map.conv(&format!("decoder.up_blocks.{level}.upsamplers.0.conv"), 3);
            }
        }
        map.group_norm("decoder.conv_norm_out");
        map.x = silu(map.x);
        map.conv("decoder.conv_out", 3);
        map.x.into_iter().map(|value| value as f32).collect()
    }
}

/// A map of channels on its way through the decoder: `[channels, side, side]`.
#[derive(Clone)]
struct Map<'a> {
    t: &'a Tensors,
    groups: usize,
    side: usize,
    x: Vec<f64>,
}

impl Map<'_> {
    fn channels(&self) -> usize {
        self.x.len() / self.side / self.side
    }

    fn conv(&mut self, name: &str, size: usize) {
        let (weight, bias) = (&self.t[&format!("{name}.weight")], &self.t[&format!("{name}.bias")]);
        let (side, input, reach) = (self.side as isize, self.channels(), size as isize / 2);
        let mut out = Vec::new();
        for (unit, position) in (0..bias.len()).flat_map(|unit| (0..side * side).map(move |position| (unit, position))) {
            let taps = weight[unit * input * size * size..][..input * size * size].iter().enumerate().filter_map(|(i, w)| {
                let (y, x) = (position / side + (i / size % size) as isize - reach, position % side + (i % size) as isize - reach);
                let inside = (0..side).contains(&y) && (0..side).contains(&x);
                inside.then(|| w * self.x[i / size / size * (side * side) as usize + (y * side + x) as usize])
            });
            out.push(bias[unit] + taps.sum::<f64>());
        }
        self.x = out;
    }

    fn group_norm(&mut self, name: &str) {
        let (channels, plane) = (self.channels(), self.side * self.side);
        let normal = self.x.chunks(channels / self.groups * plane).flat_map(|group| normalised(group, 1e-6));
        let (weight, bias) = (&self.t[&format!("{name}.weight")], &self.t[&format!("{name}.bias")]);
        self.x = normal.enumerate().map(|(i, value)| value * weight[i / plane] + bias[i / plane]).collect();
    }

    fn residual(&mut self, name: &str) {
        let mut short = self.clone();
        for step in ["1", "2"] {
            self.group_norm(&format!("{name}.norm{step}"));
            self.x = silu(std::mem::take(&mut self.x));
            self.conv(&format!("{name}.conv{step}"), 3);
        }
        if self.x.len() != short.x.len() {
            short.conv(&format!("{name}.conv_shortcut"), 1);
        }
        self.x = add(&short.x, &self.x);
    }

    fn attention(&mut self, name: &str) {
        let mut normal = self.clone();
        normal.group_norm(&format!("{name}.group_norm"));
        let (channels, plane) = (self.channels(), self.side * self.side);
        let rows: Vec<f64> = (0..normal.x.len()).map(|i| normal.x[i % channels * plane + i / channels]).collect();
        let [q, k, v] = ["to_q", "to_k", "to_v"].map(|part| linear(&rows, channels, self.t, &format!("{name}.{part}")));
        let h = linear(&attend(&q, &k, &v, channels, 1), channels, self.t, &format!("{name}.to_out.0"));
        let h: Vec<f64> = (0..h.len()).map(|i| h[i % plane * channels + i / plane]).collect();
        self.x = add(&self.x, &h);
    }

    fn double(&mut self) {
        let (channels, side) = (self.channels(), self.side);
        let wide = 2 * side;
        let from = |i: usize| i / wide / wide * side * side + i / wide % wide / 2 * side + i % wide / 2;
        self.x = (0..channels * wide * wide).map(|i| self.x[from(i)]).collect();
        self.side = wide;
    }
}

fn silu(x: Vec<f64>) -> Vec<f64> {
    x.into_iter().map(|v| v / (1.0 + (-v).exp())).collect()
}

fn rms(x: &[f64], width: usize, t: &Tensors, name: &str, epsilon: f64) -> Vec<f64> {
    let weight = &t[&format!("{name}.weight")];
    let row = |row: &[f64]| {
        let scale = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / width as f64 + epsilon).sqrt();
        row.iter().zip(weight).map(|(v, w)| v * scale * w).collect::<Vec<_>>()
    };
    x.chunks(width).flat_map(row).collect()
}
