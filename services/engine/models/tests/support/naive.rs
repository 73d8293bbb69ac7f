//! A decoder as the equations have it, keys and values of every head written out: f64, one loop per sum, no cache, nothing shared with the engine.

use serde_json::Value;

use super::{writer::Tensors, writer_deepseek::is_moe};

/// Logits `[tokens, vocabulary]` of a prompt.
pub fn logits(config: &Value, tensors: &Tensors, ids: &[u32]) -> Vec<Vec<f64>> {
    let model = Model { config, tensors };
    let table = model.rows("model.embed_tokens.weight");
    let mut h: Vec<Vec<f64>> = ids.iter().map(|&id| table[id as usize].clone()).collect();
    for i in 0..model.size("num_hidden_layers") {
        let at = |name: &str| format!("model.layers.{i}.{name}");
        let normed = model.norm(&h, &at("input_layernorm"));
        let latent = !config["kv_lora_rank"].is_null();
        let attended = if latent { model.latent(&normed, &at("self_attn"), 0) } else { model.attention(&normed, &at("self_attn")) };
        add(&mut h, &attended);
        let normed = model.norm(&h, &at("post_attention_layernorm"));
        let experts = is_moe(config, i);
        add(&mut h, &if experts { model.experts(&normed, &at("mlp")) } else { model.mlp(&normed, &at("mlp")) });
    }
    model.head(&h)
}

/// Logits after a long prompt, for a `deepseek_v2` configuration with one layer: the last position is computed alone.
pub fn last_logits(config: &Value, tensors: &Tensors, ids: &[u32]) -> Vec<f64> {
    assert_eq!(config["num_hidden_layers"], 1);
    let model = Model { config, tensors };
    let table = model.rows("model.embed_tokens.weight");
    let h: Vec<Vec<f64>> = ids.iter().map(|&id| table[id as usize].clone()).collect();
    let normed = model.norm(&h, "model.layers.0.input_layernorm");
    let mut last = vec![h[ids.len() - 1].clone()];
    add(&mut last, &model.latent(&normed, "model.layers.0.self_attn", ids.len() - 1));
    let normed = model.norm(&last, "model.layers.0.post_attention_layernorm");
    add(&mut last, &model.experts(&normed, "model.layers.0.mlp"));
    model.head(&last).remove(0)
}

pub struct Model<'a> {
    pub config: &'a Value,
    pub tensors: &'a Tensors,
}

impl Model<'_> {
    pub fn size(&self, field: &str) -> usize {
        self.config[field].as_u64().unwrap() as usize
    }

    pub fn rows(&self, name: &str) -> Vec<Vec<f64>> {
        let (shape, values) = &self.tensors[name];
        values.chunks(shape[1]).map(<[f64]>::to_vec).collect()
    }

    pub fn linear(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let weight = self.rows(&format!("{name}.weight"));
        let bias = self.tensors.get(&format!("{name}.bias")).map(|(_, values)| values);
        let output = |x: &Vec<f64>| (0..weight.len()).map(|n| dot(x, &weight[n]) + bias.map_or(0.0, |bias| bias[n])).collect();
        x.iter().map(output).collect()
    }

    fn norm(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        self.norm_with(x, name, self.config["rms_norm_eps"].as_f64().unwrap())
    }

    pub fn norm_with(&self, x: &[Vec<f64>], name: &str, eps: f64) -> Vec<Vec<f64>> {
        let weight = &self.tensors[&format!("{name}.weight")].1;
        let one = |x: &Vec<f64>| {
            let scale = 1.0 / (dot(x, x) / x.len() as f64 + eps).sqrt();
            x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
        };
        x.iter().map(one).collect()
    }

    pub fn mlp(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let mut inner = self.linear(x, &format!("{name}.gate_proj"));
        let up = self.linear(x, &format!("{name}.up_proj"));
        for (inner, up) in inner.iter_mut().flatten().zip(up.iter().flatten()) {
            *inner = *inner / (1.0 + (-*inner).exp()) * up;
        }
        self.linear(&inner, &format!("{name}.down_proj"))
    }

    /// Logits from the residual stream.
    fn head(&self, h: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let h = self.norm(h, "model.norm");
        let tied = !self.tensors.contains_key("lm_head.weight");
        self.linear(&h, if tied { "model.embed_tokens" } else { "lm_head" })
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

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [Vec<f64>], y: &[Vec<f64>]) {
    x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
}
