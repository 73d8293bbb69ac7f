//! The pixels' side written out as loops in f64, from the text of the specification.

use std::collections::BTreeMap;

pub type Tensors = BTreeMap<String, Vec<f64>>;

/// Names with shapes, in the layout of the transformers port.
type Shapes = Vec<(String, Vec<usize>)>;

pub struct Tower {
    pub image: usize,
    pub patch: usize,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub width: usize,
    pub depth: usize,
    pub epsilon: f64,
    pub names: TowerNames,
}

/// How the parts are called that the ports name differently.
#[derive(Clone, Copy)]
pub struct TowerNames {
    pub root: &'static str,
    pub projection: &'static str,
}

pub const JANUS: TowerNames = TowerNames { root: "model.vision_model", projection: "projection_layer" };
pub const DEEPSEEK_VL: TowerNames = TowerNames { root: "model.vision_model.vision_model", projection: "out_proj" };

pub struct Vq {
    pub side: usize,
    pub codebook: usize,
    pub code: usize,
    pub latent: usize,
    /// Channels per level, smallest map first.
    pub levels: Vec<usize>,
    pub blocks: usize,
}

pub fn pair(shapes: &mut Shapes, name: impl Into<String>, weight: &[usize]) {
    let name = name.into();
    shapes.push((format!("{name}.weight"), weight.to_vec()));
    shapes.push((format!("{name}.bias"), vec![weight[0]]));
}

impl Tower {
    pub fn shapes(&self) -> Shapes {
        let (mut shapes, hidden) = (Shapes::new(), self.hidden);
        let TowerNames { root, projection } = self.names;
        pair(&mut shapes, format!("{root}.embeddings.patch_embedding"), &[hidden, 3, self.patch, self.patch]);
        shapes.push((format!("{root}.embeddings.position_embedding.weight"), vec![(self.image / self.patch).pow(2), hidden]));
        for layer in 0..self.layers {
            let root = format!("{root}.encoder.layers.{layer}");
            for norm in ["layer_norm1", "layer_norm2"] {
                pair(&mut shapes, format!("{root}.{norm}"), &[hidden]);
            }
            for part in ["q_proj", "k_proj", "v_proj", projection] {
                pair(&mut shapes, format!("{root}.self_attn.{part}"), &[hidden, hidden]);
            }
            pair(&mut shapes, format!("{root}.mlp.fc1"), &[self.inner, hidden]);
            pair(&mut shapes, format!("{root}.mlp.fc2"), &[hidden, self.inner]);
        }
        pair(&mut shapes, format!("{root}.post_layernorm"), &[hidden]);
        shapes
    }

    /// With the aligner of Janus.
    pub fn shapes_with_aligner(&self) -> Shapes {
        let mut shapes = self.shapes();
        pair(&mut shapes, "model.aligner.fc1", &[self.width, self.hidden]);
        for layer in 1..self.depth {
            pair(&mut shapes, format!("model.aligner.hidden_layers.{}", layer - 1), &[self.width, self.width]);
        }
        shapes
    }

    /// The tokens, `[side * side, hidden]`.
    pub fn tokens(&self, t: &Tensors, pixels: &[f32]) -> Vec<f64> {
        let (side, patch, hidden) = (self.image / self.patch, self.patch, self.hidden);
        let TowerNames { root: tower, projection } = self.names;
        let at = |name: &str| &t[&format!("{tower}.embeddings.{name}")];
        let (weight, bias) = (at("patch_embedding.weight"), at("patch_embedding.bias"));
        let positions = at("position_embedding.weight");
        let mut x = Vec::new(); // [tokens, hidden]
        for token in 0..side * side {
            for unit in 0..hidden {
                let mut sum = bias[unit] + positions[token * hidden + unit];
                for (i, w) in weight[unit * 3 * patch * patch..][..3 * patch * patch].iter().enumerate() {
                    let (channel, dy, dx) = (i / patch / patch, i / patch % patch, i % patch);
                    let (y, x) = (token / side * patch + dy, token % side * patch + dx);
                    sum += w * f64::from(pixels[(channel * self.image + y) * self.image + x]);
                }
                x.push(sum);
            }
        }
        for layer in 0..self.layers {
            let root = format!("{tower}.encoder.layers.{layer}");
            let h = norm(&x, hidden, t, &format!("{root}.layer_norm1"), self.epsilon);
            let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|part| linear(&h, hidden, t, &format!("{root}.self_attn.{part}")));
            let h = linear(&attend(&q, &k, &v, hidden, self.heads), hidden, t, &format!("{root}.self_attn.{projection}"));
            x = add(&x, &h);
            let h = norm(&x, hidden, t, &format!("{root}.layer_norm2"), self.epsilon);
            let h = gelu(linear(&h, hidden, t, &format!("{root}.mlp.fc1")));
            x = add(&x, &linear(&h, self.inner, t, &format!("{root}.mlp.fc2")));
        }
        norm(&x, hidden, t, &format!("{tower}.post_layernorm"), self.epsilon)
    }

    /// With the aligner of Janus.
    pub fn run(&self, t: &Tensors, pixels: &[f32]) -> Vec<f32> {
        let mut x = linear(&self.tokens(t, pixels), self.hidden, t, "model.aligner.fc1");
        for layer in 1..self.depth {
            x = linear(&gelu(x), self.width, t, &format!("model.aligner.hidden_layers.{}", layer - 1));
        }
        x.into_iter().map(|value| value as f32).collect()
    }
}

impl Vq {
    pub fn shapes(&self) -> Shapes {
        let mut shapes = Shapes::new();
        let root = "model.vqmodel";
        shapes.push((format!("{root}.quantize.embedding.weight"), vec![self.codebook, self.code]));
        pair(&mut shapes, format!("{root}.post_quant_conv"), &[self.latent, self.code, 1, 1]);
        let mut channels = self.levels[0];
        pair(&mut shapes, format!("{root}.decoder.conv_in"), &[channels, self.latent, 3, 3]);
        residual_shapes(&mut shapes, &format!("{root}.decoder.mid.block_1"), channels, channels);
        attention_shapes(&mut shapes, &format!("{root}.decoder.mid.attn_1"), channels);
        residual_shapes(&mut shapes, &format!("{root}.decoder.mid.block_2"), channels, channels);
        for (level, &width) in self.levels.iter().enumerate() {
            for block in 0..self.blocks {
                residual_shapes(&mut shapes, &format!("{root}.decoder.up.{level}.block.{block}"), width, channels);
                channels = width;
                if level == 0 {
                    attention_shapes(&mut shapes, &format!("{root}.decoder.up.0.attn.{block}"), channels);
                }
            }
            if level + 1 < self.levels.len() {
                pair(&mut shapes, format!("{root}.decoder.up.{level}.upsample.conv"), &[channels, channels, 3, 3]);
            }
        }
        pair(&mut shapes, format!("{root}.decoder.norm_out"), &[channels]);
        pair(&mut shapes, format!("{root}.decoder.conv_out"), &[3, channels, 3, 3]);
        shapes
    }

    pub fn run(&self, t: &Tensors, codes: &[u32]) -> Vec<f32> {
        let plane = self.side * self.side;
        let mut x = vec![0.0; self.code * plane];
        for (position, &code) in codes.iter().enumerate() {
            let row = &t["model.vqmodel.quantize.embedding.weight"][code as usize * self.code..][..self.code];
            let length = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            row.iter().enumerate().for_each(|(channel, value)| x[channel * plane + position] = value / length);
        }
        let mut map = Map { t, side: self.side, x };
        map.conv("post_quant_conv", 1);
        map.conv("decoder.conv_in", 3);
        map.residual("decoder.mid.block_1");
        map.attention("decoder.mid.attn_1");
        map.residual("decoder.mid.block_2");
        for level in 0..self.levels.len() {
            for block in 0..self.blocks {
                map.residual(&format!("decoder.up.{level}.block.{block}"));
                if level == 0 {
                    map.attention(&format!("decoder.up.0.attn.{block}"));
                }
            }
            if level + 1 < self.levels.len() {
                map.double();
                map.conv(&format!("decoder.up.{level}.upsample.conv"), 3);
            }
        }
        map.group_norm("decoder.norm_out");
        map.swish();
        map.conv("decoder.conv_out", 3);
        map.x.into_iter().map(|value| value as f32).collect()
    }
}

fn residual_shapes(shapes: &mut Shapes, name: &str, output: usize, input: usize) {
    pair(shapes, format!("{name}.norm1"), &[input]);
    pair(shapes, format!("{name}.conv1"), &[output, input, 3, 3]);
    pair(shapes, format!("{name}.norm2"), &[output]);
    pair(shapes, format!("{name}.conv2"), &[output, output, 3, 3]);
    if output != input {
        pair(shapes, format!("{name}.nin_shortcut"), &[output, input, 1, 1]);
    }
}

fn attention_shapes(shapes: &mut Shapes, name: &str, channels: usize) {
    pair(shapes, format!("{name}.norm"), &[channels]);
    for part in ["q", "k", "v", "proj_out"] {
        pair(shapes, format!("{name}.{part}"), &[channels, channels, 1, 1]);
    }
}

/// A map of channels on its way through the decoder: `[channels, side, side]`.
#[derive(Clone)]
struct Map<'a> {
    t: &'a Tensors,
    side: usize,
    x: Vec<f64>,
}

impl Map<'_> {
    fn tensor(&self, name: &str) -> &[f64] {
        &self.t[&format!("model.vqmodel.{name}")]
    }

    fn channels(&self) -> usize {
        self.x.len() / self.side / self.side
    }

    fn conv(&mut self, name: &str, size: usize) {
        let (weight, bias) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")));
        let (side, input, reach) = (self.side as isize, self.channels(), size as isize / 2);
        let mut out = Vec::new();
        for (unit, start) in bias.iter().enumerate() {
            for position in 0..side * side {
                let mut sum = *start;
                for (i, w) in weight[unit * input * size * size..][..input * size * size].iter().enumerate() {
                    let y = position / side + (i / size % size) as isize - reach;
                    let x = position % side + (i % size) as isize - reach;
                    if (0..side).contains(&y) && (0..side).contains(&x) {
                        sum += w * self.x[i / size / size * (side * side) as usize + (y * side + x) as usize];
                    }
                }
                out.push(sum);
            }
        }
        self.x = out;
    }

    fn group_norm(&mut self, name: &str) {
        let (channels, plane) = (self.channels(), self.side * self.side);
        let mut out = Vec::new();
        for group in self.x.chunks(channels / 32 * plane) {
            out.extend(normalised(group, 1e-6));
        }
        let (weight, bias) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")));
        self.x = out.into_iter().enumerate().map(|(i, value)| value * weight[i / plane] + bias[i / plane]).collect();
    }

    fn swish(&mut self) {
        self.x.iter_mut().for_each(|value| *value /= 1.0 + (-*value).exp());
    }

    fn residual(&mut self, name: &str) {
        let mut short = self.clone();
        for step in ["1", "2"] {
            self.group_norm(&format!("{name}.norm{step}"));
            self.swish();
            self.conv(&format!("{name}.conv{step}"), 3);
        }
        if self.x.len() != short.x.len() {
            short.conv(&format!("{name}.nin_shortcut"), 1);
        }
        self.x = add(&short.x, &self.x);
    }

    fn attention(&mut self, name: &str) {
        let mut normal = self.clone();
        normal.group_norm(&format!("{name}.norm"));
        let (channels, plane) = (self.channels(), self.side * self.side);
        let rows = |x: &[f64]| (0..x.len()).map(|i| x[i % channels * plane + i / channels]).collect::<Vec<_>>();
        let [q, k, v] = ["q", "k", "v"].map(|part| {
            let mut map = normal.clone();
            map.conv(&format!("{name}.{part}"), 1);
            rows(&map.x)
        });
        let h = attend(&q, &k, &v, channels, 1); // [positions, channels]
        normal.x = (0..h.len()).map(|i| h[i % plane * channels + i / plane]).collect();
        normal.conv(&format!("{name}.proj_out"), 1);
        self.x = add(&self.x, &normal.x);
    }

    fn double(&mut self) {
        let (channels, side) = (self.channels(), self.side);
        let wide = 2 * side;
        self.x = (0..channels * wide * wide)
            .map(|i| self.x[i / wide / wide * side * side + i / wide % wide / 2 * side + i % wide / 2])
            .collect();
        self.side = wide;
    }
}

pub fn normalised(values: &[f64], epsilon: f64) -> Vec<f64> {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
    values.iter().map(|v| (v - mean) / (variance + epsilon).sqrt()).collect()
}

pub fn norm(x: &[f64], width: usize, t: &Tensors, name: &str, epsilon: f64) -> Vec<f64> {
    let (weight, bias) = (&t[&format!("{name}.weight")], &t[&format!("{name}.bias")]);
    x.chunks(width).flat_map(|row| normalised(row, epsilon)).enumerate().map(|(i, v)| v * weight[i % width] + bias[i % width]).collect()
}

pub fn linear(x: &[f64], input: usize, t: &Tensors, name: &str) -> Vec<f64> {
    let (weight, bias) = (&t[&format!("{name}.weight")], &t[&format!("{name}.bias")]);
    let product = |row: &[f64], weights: &[f64]| row.iter().zip(weights).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(input)
        .flat_map(|row| weight.chunks(input).zip(bias).map(|(weights, bias)| product(row, weights) + bias).collect::<Vec<_>>())
        .collect()
}

fn attend(q: &[f64], k: &[f64], v: &[f64], width: usize, heads: usize) -> Vec<f64> {
    let (rows, size) = (q.len() / width, width / heads);
    let mut out = vec![0.0; q.len()];
    for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
        let part = |x: &[f64], row: usize| x[row * width + head * size..][..size].to_vec();
        let score = |other| part(q, row).iter().zip(part(k, other)).map(|(a, b)| a * b).sum::<f64>() / (size as f64).sqrt();
        let weights: Vec<f64> = (0..rows).map(|other| f64::exp(score(other))).collect();
        let total: f64 = weights.iter().sum();
        for (other, weight) in weights.iter().enumerate() {
            part(v, other).iter().enumerate().for_each(|(i, value)| out[row * width + head * size + i] += weight / total * value);
        }
    }
    out
}

pub fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// With the error function as its Taylor series, which converges well where it is used here (|x| < 6).
pub fn gelu(x: Vec<f64>) -> Vec<f64> {
    let erf = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    };
    x.into_iter().map(|x| if x.abs() > 6.0 { x.max(0.0) } else { x * 0.5 * (1.0 + erf(x / 2f64.sqrt())) }).collect()
}
