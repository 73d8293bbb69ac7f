//! Latent attention in its explicit form and layers of experts, as the equations have them: f64, every expert of every token by itself.

use std::f64::consts::PI;

use serde_json::Value;

use super::naive::{Model, dot};

impl Model<'_> {
    /// Keys and values of every head, written out for every position (spec: language.md 2.2); the outputs of the positions from `first` on.
    pub fn latent(&self, x: &[Vec<f64>], name: &str, first: usize) -> Vec<Vec<f64>> {
        let at = |part: &str| format!("{name}.{part}");
        let (heads, rank) = (self.size("num_attention_heads"), self.size("kv_lora_rank"));
        let (nope, rope, v) = (self.size("qk_nope_head_dim"), self.size("qk_rope_head_dim"), self.size("v_head_dim"));
        let q = match self.config["q_lora_rank"].is_null() {
            true => self.linear(x, &at("q_proj")),
            false => self.linear(&self.norm_with(&self.linear(x, &at("q_a_proj")), &at("q_a_layernorm"), 1e-6), &at("q_b_proj")),
        };
        let compressed = self.linear(x, &at("kv_a_proj_with_mqa"));
        let c: Vec<_> = compressed.iter().map(|row| row[..rank].to_vec()).collect();
        let kv = self.linear(&self.norm_with(&c, &at("kv_a_layernorm"), 1e-6), &at("kv_b_proj"));
        let scale = sharpness(self.config).powi(2) / ((nope + rope) as f64).sqrt();
        let mut out = vec![vec![0.0; heads * v]; x.len() - first];
        for head in 0..heads {
            let turned = |own: &[f64], pe: &[f64], t: usize| [own.to_vec(), self.turned(pe, t)].concat();
            let query = |t: usize| {
                let q = &q[t][head * (nope + rope)..(head + 1) * (nope + rope)];
                turned(&q[..nope], &q[nope..], t)
            };
            let key_and_value = |t: usize| kv[t][head * (nope + v)..(head + 1) * (nope + v)].split_at(nope);
            let keys: Vec<_> = (0..x.len()).map(|t| turned(key_and_value(t).0, &compressed[t][rank..], t)).collect();
            for (t, out) in (first..).zip(&mut out) {
                let q = query(t);
                let mut weights: Vec<f64> = (0..=t).map(|s| (dot(&q, &keys[s]) * scale).exp()).collect();
                let sum: f64 = weights.iter().sum();
                weights.iter_mut().for_each(|w| *w /= sum);
                for (s, w) in weights.iter().enumerate() {
                    let value = key_and_value(s).1;
                    out[head * v..(head + 1) * v].iter_mut().zip(value).for_each(|(out, value)| *out += w * value);
                }
            }
        }
        self.linear(&out, &at("o_proj"))
    }

    /// Pairs of neighbours, turned (spec: language.md 2.3 and 2.4).
    fn turned(&self, x: &[f64], position: usize) -> Vec<f64> {
        let (scaling, theta, dim) = (&self.config["rope_scaling"], self.config["rope_theta"].as_f64().unwrap(), x.len() as f64);
        let number = |field: &str| scaling[field].as_f64().unwrap();
        let frequency = |j: usize| {
            let own = theta.powf(-2.0 * j as f64 / dim);
            if scaling.is_null() {
                return own;
            }
            let pair = |beta: f64| dim * (number("original_max_position_embeddings") / (beta * 2.0 * PI)).ln() / (2.0 * theta.ln());
            let (low, high) = (pair(number("beta_fast")).floor().max(0.0), pair(number("beta_slow")).ceil().min(dim - 1.0));
            let slowed = ((j as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            own * (1.0 - slowed) + own / number("factor") * slowed
        };
        let amplitude = match scaling.is_null() {
            true => 1.0,
            false => mscale(number("factor"), number("mscale")) / mscale(number("factor"), number("mscale_all_dim")),
        };
        let pairs = x.chunks(2).enumerate().map(|(j, pair)| {
            // In f32, as the reference has it: far out, the rounding of an angle is part of what a checkpoint was trained with.
            let angle = f64::from(position as f32 * frequency(j) as f32);
            [pair[0] * angle.cos() - pair[1] * angle.sin(), pair[1] * angle.cos() + pair[0] * angle.sin()].map(|x| x * amplitude)
        });
        pairs.flatten().collect()
    }

    /// `Σ w_e E_e(x) + S(x)` (spec: moe.md 2).
    pub fn experts(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let logits = self.linear(x, &format!("{name}.gate"));
        let mut out = vec![vec![0.0; x[0].len()]; x.len()];
        if self.config["n_shared_experts"].as_u64().unwrap_or(0) > 0 {
            out = self.mlp(x, &format!("{name}.shared_experts"));
        }
        for ((x, logits), out) in x.iter().zip(&logits).zip(&mut out) {
            for (expert, weight) in self.choice(logits) {
                let y = self.mlp(std::slice::from_ref(x), &format!("{name}.experts.{expert}")).remove(0);
                out.iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
            }
        }
        out
    }

    /// Experts of one token with their weights.
    fn choice(&self, logits: &[f64]) -> Vec<(usize, f64)> {
        let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
        let scores: Vec<f64> = logits.iter().map(|logit| logit.exp() / total).collect();
        let mut candidates: Vec<usize> = (0..scores.len()).collect();
        if self.config["topk_method"] == "group_limited_greedy" {
            let size = scores.len() / self.size("n_group");
            let best = |group: usize| scores[group * size..(group + 1) * size].iter().copied().fold(0.0, f64::max);
            let mut groups: Vec<_> = (0..self.size("n_group")).collect();
            groups.sort_by(|&a, &b| best(b).total_cmp(&best(a)));
            groups.truncate(self.size("topk_group"));
            candidates.retain(|expert| groups.contains(&(expert / size)));
        }
        candidates.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        candidates.truncate(self.size("num_experts_per_tok"));
        let sum: f64 = candidates.iter().map(|&expert| scores[expert]).sum();
        let factor = match self.config["norm_topk_prob"] == true && candidates.len() > 1 {
            true => 1.0 / sum,
            false => self.config["routed_scaling_factor"].as_f64().unwrap_or(1.0),
        };
        candidates.into_iter().map(|expert| (expert, scores[expert] * factor)).collect()
    }
}

fn sharpness(config: &Value) -> f64 {
    let scaling = &config["rope_scaling"];
    if scaling.is_null() { 1.0 } else { mscale(scaling["factor"].as_f64().unwrap(), scaling["mscale_all_dim"].as_f64().unwrap()) }
}

fn mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}
