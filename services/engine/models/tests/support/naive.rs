//! A llama decoder as the equations have it: f64, one loop per sum, no cache, nothing shared with the engine.

use serde_json::Value;

use super::writer::Tensors;

/// Logits `[tokens, vocabulary]` of a prompt.
pub fn logits(config: &Value, tensors: &Tensors, ids: &[u32]) -> Vec<Vec<f64>> {
    let model = Model { config, tensors };
    let mut h: Vec<Vec<f64>> = ids.iter().map(|&id| model.rows("model.embed_tokens.weight")[id as usize].clone()).collect();
    for i in 0..model.size("num_hidden_layers") {
        let at = |name: &str| format!("model.layers.{i}.{name}");
        let normed = model.norm(&h, &at("input_layernorm"));
        add(&mut h, &model.attention(&normed, &at("self_attn")));
        let normed = model.norm(&h, &at("post_attention_layernorm"));
        add(&mut h, &model.mlp(&normed, &at("mlp")));
    }
    let h = model.norm(&h, "model.norm");
    let tied = !tensors.contains_key("lm_head.weight");
    model.linear(&h, if tied { "model.embed_tokens" } else { "lm_head" })
}

struct Model<'a> {
    config: &'a Value,
    tensors: &'a Tensors,
}

impl Model<'_> {
    fn size(&self, field: &str) -> usize {
        self.config[field].as_u64().unwrap() as usize
    }

    fn rows(&self, name: &str) -> Vec<Vec<f64>> {
        let (shape, values) = &self.tensors[name];
        values.chunks(shape[1]).map(<[f64]>::to_vec).collect()
    }

    fn linear(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let weight = self.rows(&format!("{name}.weight"));
        let bias = self.tensors.get(&format!("{name}.bias")).map(|(_, values)| values);
        let output = |x: &Vec<f64>| (0..weight.len()).map(|n| dot(x, &weight[n]) + bias.map_or(0.0, |bias| bias[n])).collect();
        x.iter().map(output).collect()
    }

    fn norm(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let weight = &self.tensors[&format!("{name}.weight")].1;
        let eps = self.config["rms_norm_eps"].as_f64().unwrap();
        let one = |x: &Vec<f64>| {
            let scale = 1.0 / (dot(x, x) / x.len() as f64 + eps).sqrt();
            x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
        };
        x.iter().map(one).collect()
    }

    fn mlp(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let mut inner = self.linear(x, &format!("{name}.gate_proj"));
        let up = self.linear(x, &format!("{name}.up_proj"));
        for (inner, up) in inner.iter_mut().flatten().zip(up.iter().flatten()) {
            *inner = *inner / (1.0 + (-*inner).exp()) * up;
        }
        self.linear(&inner, &format!("{name}.down_proj"))
    }

    fn attention(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let (heads, kv_heads) = (self.size("num_attention_heads"), self.size("num_key_value_heads"));
        let q = self.linear(x, &format!("{name}.q_proj"));
        let k = self.linear(x, &format!("{name}.k_proj"));
        let v = self.linear(x, &format!("{name}.v_proj"));
        let dim = q[0].len() / heads;
        let mut out = vec![vec![0.0; heads * dim]; x.len()];
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let query = |t: usize| self.rotated(&q[t][head * dim..(head + 1) * dim], t);
            let key = |t: usize| self.rotated(&k[t][kv_head * dim..(kv_head + 1) * dim], t);
            for (t, out) in out.iter_mut().enumerate() {
                let mut weights: Vec<f64> = (0..=t).map(|s| (dot(&query(t), &key(s)) / (dim as f64).sqrt()).exp()).collect();
                let sum: f64 = weights.iter().sum();
                weights.iter_mut().for_each(|w| *w /= sum);
                for (s, w) in weights.iter().enumerate() {
                    for d in 0..dim {
                        out[head * dim + d] += w * v[s][kv_head * dim + d];
                    }
                }
            }
        }
        self.linear(&out, &format!("{name}.o_proj"))
    }

    fn rotated(&self, x: &[f64], position: usize) -> Vec<f64> {
        let half = x.len() / 2;
        let theta = self.config["rope_theta"].as_f64().unwrap();
        let factor = self.config["rope_scaling"]["factor"].as_f64().unwrap_or(1.0);
        let angle = |j: usize| position as f64 / factor * theta.powf(-((2 * j) as f64) / x.len() as f64);
        let low = (0..half).map(|j| x[j] * angle(j).cos() - x[j + half] * angle(j).sin());
        let high = (0..half).map(|j| x[j + half] * angle(j).cos() + x[j] * angle(j).sin());
        low.chain(high).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [Vec<f64>], y: &[Vec<f64>]) {
    x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
}
