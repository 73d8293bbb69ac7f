//! The SAM tower and the aligner of two towers written out as loops in f64, from the text of the specification (vision.md 3 and 4), under the
//! names of the transformers port.

use super::naive_pixels::{Tensors, add, gelu, linear, norm, normalised, pair};

type Shapes = Vec<(String, Vec<usize>)>;

pub struct Sam {
    pub image: usize,
    pub patch: usize,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub window: usize,
    pub global: Vec<usize>,
    pub channels: usize,
    /// Grid of the tower beside it.
    pub side: usize,
}

const ENCODER: &str = "model.high_res_vision_model.vision_encoder";
const EPSILON: f64 = 1e-6;

impl Sam {
    fn grid(&self) -> usize {
        self.image / self.patch
    }

    pub fn shapes(&self) -> Shapes {
        let (mut shapes, hidden, grid) = (Shapes::new(), self.hidden, self.grid());
        pair(&mut shapes, format!("{ENCODER}.patch_embed.projection"), &[hidden, 3, self.patch, self.patch]);
        shapes.push((format!("{ENCODER}.pos_embed"), vec![1, grid, grid, hidden]));
        for layer in 0..self.layers {
            let root = format!("{ENCODER}.layers.{layer}");
            let side = if self.global.contains(&layer) { grid } else { self.window };
            pair(&mut shapes, format!("{root}.layer_norm1"), &[hidden]);
            pair(&mut shapes, format!("{root}.layer_norm2"), &[hidden]);
            pair(&mut shapes, format!("{root}.attn.qkv"), &[3 * hidden, hidden]);
            pair(&mut shapes, format!("{root}.attn.proj"), &[hidden, hidden]);
            for table in ["rel_pos_h", "rel_pos_w"] {
                shapes.push((format!("{root}.attn.{table}"), vec![2 * side - 1, hidden / self.heads]));
            }
            pair(&mut shapes, format!("{root}.mlp.lin1"), &[self.inner, hidden]);
            pair(&mut shapes, format!("{root}.mlp.lin2"), &[hidden, self.inner]);
        }
        let c = self.channels;
        for neck in [format!("{ENCODER}.neck"), "model.high_res_vision_neck".to_owned()] {
            shapes.push((format!("{neck}.conv1.weight"), vec![c, hidden, 1, 1]));
            pair(&mut shapes, format!("{neck}.layer_norm1"), &[c]);
            shapes.push((format!("{neck}.conv2.weight"), vec![c, c, 3, 3]));
            pair(&mut shapes, format!("{neck}.layer_norm2"), &[c]);
        }
        shapes.push(("model.high_res_vision_proj.conv1.weight".into(), vec![2 * c, c, 3, 3]));
        shapes.push(("model.high_res_vision_proj.conv2.weight".into(), vec![4 * c, 2 * c, 3, 3]));
        shapes.push(("model.high_res_vision_alpha".into(), vec![1]));
        shapes
    }

    /// `pixels [3, image, image]` -> `[side * side, 4 * channels]`
    pub fn run(&self, t: &Tensors, pixels: &[f32]) -> Vec<f64> {
        let hidden = self.hidden;
        let mut x = self.embed(t, pixels); // [g * g, hidden]
        let mut first = None;
        for layer in 0..self.layers {
            let root = format!("{ENCODER}.layers.{layer}");
            let h = norm(&x, hidden, t, &format!("{root}.layer_norm1"), EPSILON);
            let global = self.global.contains(&layer);
            let side = if global { self.grid() } else { self.window };
            x = add(&x, &self.windows(&h, side, |window| self.attention(t, window, side, &format!("{root}.attn"))));
            let h = norm(&x, hidden, t, &format!("{root}.layer_norm2"), EPSILON);
            let h = gelu(linear(&h, hidden, t, &format!("{root}.mlp.lin1")));
            x = add(&x, &linear(&h, self.inner, t, &format!("{root}.mlp.lin2")));
            if layer == self.global[0] {
                first = Some(x.clone());
            }
        }
        let last = self.ending(t, &x, &format!("{ENCODER}.neck"));
        let first = self.ending(t, &first.unwrap(), "model.high_res_vision_neck");
        let alpha = t["model.high_res_vision_alpha"][0];
        let tokens = self.side * self.side;
        let mixed = |i: usize| last[i % (4 * self.channels) * tokens + i / (4 * self.channels)];
        let mixed_first = |i: usize| first[i % (4 * self.channels) * tokens + i / (4 * self.channels)];
        (0..last.len()).map(|i| mixed(i) + alpha * mixed_first(i)).collect()
    }

    fn embed(&self, t: &Tensors, pixels: &[f32]) -> Vec<f64> {
        let (grid, patch, hidden) = (self.grid(), self.patch, self.hidden);
        let weight = &t[&format!("{ENCODER}.patch_embed.projection.weight")];
        let bias = &t[&format!("{ENCODER}.patch_embed.projection.bias")];
        let positions = &t[&format!("{ENCODER}.pos_embed")];
        let mut out = Vec::new();
        for place in 0..grid * grid {
            for unit in 0..hidden {
                let mut sum = bias[unit] + positions[place * hidden + unit];
                for (i, w) in weight[unit * 3 * patch * patch..][..3 * patch * patch].iter().enumerate() {
                    let (y, x) = (place / grid * patch + i / patch % patch, place % grid * patch + i % patch);
                    sum += w * f64::from(pixels[(i / patch / patch * self.image + y) * self.image + x]);
                }
                out.push(sum);
            }
        }
        out
    }

    /// Applies `inside` to every window of the map, which is padded with zeros below and to the right.
    fn windows(&self, x: &[f64], side: usize, inside: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
        let (grid, hidden) = (self.grid(), self.hidden);
        let mut out = vec![0.0; x.len()];
        for top in (0..grid).step_by(side) {
            for left in (0..grid).step_by(side) {
                let mut window = vec![0.0; side * side * hidden];
                let places: Vec<_> =
                    (0..side * side).map(|i| (i, top + i / side, left + i % side)).filter(|&(_, y, x)| y < grid && x < grid).collect();
                for &(i, row, column) in &places {
                    window[i * hidden..][..hidden].copy_from_slice(&x[(row * grid + column) * hidden..][..hidden]);
                }
                let result = inside(&window);
                for &(i, row, column) in &places {
                    out[(row * grid + column) * hidden..][..hidden].copy_from_slice(&result[i * hidden..][..hidden]);
                }
            }
        }
        out
    }

    fn attention(&self, t: &Tensors, x: &[f64], side: usize, root: &str) -> Vec<f64> {
        let (hidden, size) = (self.hidden, self.hidden / self.heads);
        let qkv = linear(x, hidden, t, &format!("{root}.qkv"));
        let (down, right) = (&t[&format!("{root}.rel_pos_h")], &t[&format!("{root}.rel_pos_w")]);
        let vector = |place: usize, part: usize, head: usize| &qkv[place * 3 * hidden + part * hidden + head * size..][..size];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut out = vec![0.0; x.len()];
        for query in 0..side * side {
            for head in 0..self.heads {
                let q = vector(query, 0, head);
                let weights: Vec<f64> = (0..side * side)
                    .map(|key| {
                        let (dy, dx) = (query / side + side - 1 - key / side, query % side + side - 1 - key % side);
                        let bias = dot(q, &down[dy * size..][..size]) + dot(q, &right[dx * size..][..size]);
                        (dot(q, vector(key, 1, head)) / (size as f64).sqrt() + bias).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for (key, weight) in weights.iter().enumerate() {
                    for (i, value) in vector(key, 2, head).iter().enumerate() {
                        out[query * hidden + head * size + i] += weight / total * value;
                    }
                }
            }
        }
        linear(&out, hidden, t, &format!("{root}.proj"))
    }

    /// Neck, enlargement, two convolutions: `[g * g, hidden]` -> `[4 * channels, side, side]`
    fn ending(&self, t: &Tensors, x: &[f64], neck: &str) -> Vec<f64> {
        let (grid, c) = (self.grid(), self.channels);
        let planes = (0..x.len()).map(|i| x[i % (grid * grid) * self.hidden + i / (grid * grid)]).collect::<Vec<_>>();
        let map = convolve(&planes, grid, &t[&format!("{neck}.conv1.weight")], c, 1, 1);
        let map = channel_norm(&map, grid, c, t, &format!("{neck}.layer_norm1"));
        let map = convolve(&map, grid, &t[&format!("{neck}.conv2.weight")], c, 3, 1);
        let map = channel_norm(&map, grid, c, t, &format!("{neck}.layer_norm2"));
        let map = resize(&map, grid, 4 * self.side, false);
        let map = convolve(&map, 4 * self.side, &t["model.high_res_vision_proj.conv1.weight"], 2 * c, 3, 2);
        convolve(&map, 2 * self.side, &t["model.high_res_vision_proj.conv2.weight"], 4 * c, 3, 2)
    }
}

/// Both towers' tokens through the aligner of the hybrid model: high resolution first.
pub fn align(t: &Tensors, high: &[f64], high_width: usize, low: &[f64], low_width: usize, width: usize) -> Vec<f32> {
    let high = linear(high, high_width, t, "model.aligner.high_res_vision_proj");
    let low = linear(low, low_width, t, "model.aligner.vision_proj");
    let rows = high.chunks(width / 2).zip(low.chunks(width / 2)).flat_map(|(high, low)| [high, low].concat()).collect();
    linear(&gelu(rows), width, t, "model.aligner.proj").into_iter().map(|value| value as f32).collect()
}

/// Planes of `from` x `from` to `to` x `to`, linear between the centres of pixels. With `antialias` the weights reach over all source pixels
/// that a target pixel covers.
pub fn resize(map: &[f64], from: usize, to: usize, antialias: bool) -> Vec<f64> {
    let scale = from as f64 / to as f64;
    let reach = if antialias { scale.max(1.0) } else { 1.0 };
    // Weight of every source pixel, for each target pixel.
    let weights: Vec<Vec<f64>> = (0..to)
        .map(|target| {
            let center = (target as f64 + 0.5) * scale - 0.5;
            let center = if antialias { center } else { center.clamp(0.0, from as f64 - 1.0) };
            let row: Vec<f64> = (0..from).map(|source| (1.0 - (source as f64 - center).abs() / reach).max(0.0)).collect();
            let total: f64 = row.iter().sum();
            row.into_iter().map(|weight| weight / total).collect()
        })
        .collect();
    let blend =
        |row: &[f64], values: &dyn Fn(usize) -> f64| row.iter().enumerate().map(|(i, w)| if *w == 0.0 { 0.0 } else { w * values(i) }).sum();
    let mut out = Vec::new();
    for plane in map.chunks(from * from) {
        let narrow: Vec<f64> = (0..from * to).map(|i| blend(&weights[i % to], &|x| plane[i / to * from + x])).collect(); // [from, to]
        out.extend((0..to * to).map(|i| -> f64 { blend(&weights[i / to], &|y| narrow[y * to + i % to]) }));
    }
    out
}

/// Without bias, framed with zeros.
fn convolve(map: &[f64], side: usize, weight: &[f64], output: usize, size: usize, stride: usize) -> Vec<f64> {
    let (input, reach, target) = (map.len() / side / side, size as isize / 2, side.div_ceil(stride));
    let mut out = Vec::new();
    for unit in 0..output {
        for place in 0..target * target {
            let mut sum = 0.0;
            for (i, w) in weight[unit * input * size * size..][..input * size * size].iter().enumerate() {
                let y = (place / target * stride) as isize + (i / size % size) as isize - reach;
                let x = (place % target * stride) as isize + (i % size) as isize - reach;
                if (0..side as isize).contains(&y) && (0..side as isize).contains(&x) {
                    sum += w * map[i / size / size * side * side + y as usize * side + x as usize];
                }
            }
            out.push(sum);
        }
    }
    out
}

fn channel_norm(map: &[f64], side: usize, channels: usize, t: &Tensors, name: &str) -> Vec<f64> {
    let (weight, bias, plane) = (&t[&format!("{name}.weight")], &t[&format!("{name}.bias")], side * side);
    let mut out = vec![0.0; map.len()];
    for place in 0..plane {
        let column: Vec<f64> = (0..channels).map(|channel| map[channel * plane + place]).collect();
        for (channel, value) in normalised(&column, EPSILON).into_iter().enumerate() {
            out[channel * plane + place] = value * weight[channel] + bias[channel];
        }
    }
    out
}
