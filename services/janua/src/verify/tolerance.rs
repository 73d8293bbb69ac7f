use std::collections::BTreeMap;

use serde_json::Value;

/// How many times the distance between the reference's own f32 and f64 runs an implementation may be away.
const FACTOR: f64 = 20.0;
/// No tensor is held to less.
const LEAST: f64 = 2e-5;

/// The tolerance of every tensor of a model folder, derived from `float32_vs_float64` of its `golden.json`.
///
/// Tensors of one group share one: the largest distance measured in the group, times [`FACTOR`], rounded up to 1, 2 or 5 times a power
/// of ten. A group nobody measured has the tolerance of [`LEAST`].
pub struct Tolerances(BTreeMap<&'static str, f64>);

impl Tolerances {
    /// From `golden.json`.
    pub fn of(golden: &Value) -> Self {
        let mut measured: BTreeMap<&'static str, f64> = BTreeMap::new();
        let entries = golden.get("float32_vs_float64").and_then(Value::as_object);
        for (key, entry) in entries.into_iter().flatten() {
            let distance = entry.get("max_abs").and_then(Value::as_f64).unwrap_or(0.0);
            let largest = measured.entry(group(key)).or_default();
            *largest = largest.max(distance);
        }
        Self(measured)
    }

    /// The largest allowed absolute difference of tensor `key` (`p0.hidden.layer1`, `t2i0.pixels`, ...).
    pub fn get(&self, key: &str) -> f64 {
        round_up((FACTOR * self.0.get(group(key)).copied().unwrap_or(0.0)).max(LEAST))
    }
}

/// Tensors that are judged together. `key` may have the prefix of a prompt.
fn group(key: &str) -> &'static str {
    let name = match key.split_once('.') {
        Some((prompt, rest)) if is_prompt(prompt) => rest,
        _ => key,
    };
    // What is seen while decoding is judged as while prefilling.
    let name = name.strip_prefix("decode.").unwrap_or(name);
    let drawing = name.starts_with("t2i");
    match name {
        _ if drawing && name.ends_with("_logits") => "t2i logits",
        _ if drawing => "t2i other",
        _ if name.starts_with("hidden.") => "hidden",
        _ if name.starts_with("vision.") => "vision",
        _ if name.starts_with("sam.") => "sam",
        _ if name.starts_with("vq.") => "vq",
        _ if name.starts_with("router.") && name.ends_with("weights") => "router weights",
        _ if name.starts_with("router.") => "router logits",
        "image_features" => "image_features",
        "prefill_logits" => "prefill_logits",
        "decode_logits" => "decode_logits",
        "pixel_values" | "high_res_pixel_values" => "pixel_values",
        _ => "other",
    }
}

/// `p0`, `p12`.
fn is_prompt(text: &str) -> bool {
    text.strip_prefix('p').is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// The smallest of 1, 2, 5 times a power of ten that is above `value`, or next to it within rounding.
fn round_up(value: f64) -> f64 {
    // 2e-5 itself has always been rounded up to 5e-5 in the published table, so a step is only taken when it is truly larger.
    let decade = 10f64.powf(value.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| step * decade > value * (1.0 + 1e-9)).unwrap_or(10.0);
    step * decade
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Largest distance measured in a group and the tolerance published for it, with the families this table was taken from.
    #[test]
    fn tolerances_are_those_that_were_published() {
        let published = [
            (5.692e-6, 2e-4), // llama prefill_logits
            (2.614e-6, 1e-4), // llama hidden.*
            (3.535e-6, 1e-4), // llama decode_logits
            (3.479e-6, 1e-4), // llama_gqa prefill_logits
            (2.178e-6, 5e-5), // llama_gqa hidden.*
            (2.341e-6, 5e-5), // llama_gqa decode_logits
            (5.2e-7, 5e-5),   // moe_v1 router weights
            (2.8e-6, 1e-4),   // v2_lite router logits
            (1.1e-5, 5e-4),   // v2_full prefill_logits
            (6.4e-6, 2e-4),   // v2_full decode_logits
            (1.994e-6, 5e-5), // janus image_features
            (2.116e-6, 5e-5), // janus vision.*
            (3.327e-6, 1e-4), // janus hidden.*
            (4.262e-6, 1e-4), // janus prefill_logits
            (2.680e-6, 1e-4), // janus decode_logits
            (3.857e-6, 1e-4), // deepseek_vl vision.*
            (2.393e-6, 5e-5), // deepseek_vl decode_logits
            (3.496e-6, 1e-4), // deepseek_vl_hybrid image_features
            (5.553e-6, 2e-4), // deepseek_vl_hybrid sam.*
            (2.868e-6, 1e-4), // janus t2i other
            (1.717e-5, 5e-4), // janus t2i logits
            (2.171e-6, 5e-5), // janus vq.*
            (2.3e-5, 5e-4),   // janusflow vae.*
        ];
        for (measured, expected) in published {
            let found = round_up((FACTOR * measured).max(LEAST));
            assert!((found - expected).abs() < expected * 1e-6, "{measured}: {found} instead of {expected}");
        }
    }

    #[test]
    fn a_group_shares_its_largest_distance() {
        let golden = json!({"float32_vs_float64": {
            "hidden.embed": {"max_abs": 0.0}, "hidden.layer0": {"max_abs": 2.7e-6}, "t2i0.cfg_logits": {"max_abs": 1.7e-5},
            "t2i0.cond_logits": {"max_abs": 2e-6}, "t2i0.pixels": {"max_abs": 2.8e-6}, "sam.hidden.layer3": {"max_abs": 5.6e-6},
            "router.layer1.logits": {"max_abs": 1e-6}, "decode.router.layer2.logits": {"max_abs": 3.9e-6}, "router.layer1.topk_weights": {"max_abs": 1e-5},
        }});
        let tolerances = Tolerances::of(&golden);
        for (key, expected) in [
            ("p0.hidden.embed", 1e-4),
            ("p11.hidden.final_norm", 1e-4),
            ("t2i3.cond_logits", 5e-4),
            ("t2i0.first_hidden", 1e-4),
            ("vq.pixels", 5e-5),
            ("p0.pixel_values", 5e-5),
            ("p1.router.layer2.logits", 1e-4),
            ("p1.decode.router.layer1.topk_weights", 5e-4),
            ("p1.high_res_pixel_values", 5e-5),
            ("p1.sam.neck", 2e-4),
        ] {
            assert!((tolerances.get(key) - expected).abs() < 1e-9, "{key}: {}", tolerances.get(key));
        }
    }
}
