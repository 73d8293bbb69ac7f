use serde_json::Value;

use super::runner::Seen;

/// How clear the choices of the gates were: the smallest gaps over all tokens and layers. Infinite where nothing was chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Margins {
    /// Between the logits of the last expert that was chosen and the first that was not, among those that could be chosen.
    pub topk_logit: f64,
    /// The same for groups of experts, each as good as its best.
    pub group_logit: f64,
    /// As `topk_logit`, after the softmax.
    pub topk_prob: f64,
}

/// How the checkpoint's gates choose.
#[derive(Debug, Clone, Copy)]
struct Gate {
    experts: usize,
    top_k: usize,
    /// Number of groups and how many of them are kept; one of one where there are none.
    groups: [usize; 2],
}

impl Gate {
    /// From `config.json`; `None` for a model without experts.
    fn of(config: &Value) -> Option<Self> {
        let size = |field: &str| config.get(field)?.as_u64().and_then(|size| usize::try_from(size).ok());
        let limited = config.get("topk_method").and_then(Value::as_str) == Some("group_limited_greedy");
        let groups = if limited { [size("n_group")?, size("topk_group")?] } else { [1, 1] };
        Some(Self { experts: size("n_routed_experts")?, top_k: size("num_experts_per_tok")?, groups })
    }

    fn margins(&self, logits: &[f32]) -> Margins {
        let [count, kept] = self.groups;
        let mut groups: Vec<&[f32]> = logits.chunks(self.experts / count).collect();
        groups.sort_by(|a, b| largest(b).total_cmp(&largest(a)));
        let group_logit = groups.get(kept).map_or(f64::INFINITY, |next| largest(groups[kept - 1]) - largest(next));
        let mut candidates: Vec<f64> = groups[..kept].iter().copied().flatten().map(|&logit| f64::from(logit)).collect();
        candidates.sort_by(|a, b| b.total_cmp(a));
        let gap =
            |of: &dyn Fn(f64) -> f64| candidates.get(self.top_k).map_or(f64::INFINITY, |next| of(candidates[self.top_k - 1]) - of(*next));
        let best = largest(logits);
        let total: f64 = logits.iter().map(|&logit| (f64::from(logit) - best).exp()).sum();
        Margins { topk_logit: gap(&|logit| logit), group_logit, topk_prob: gap(&|logit| (logit - best).exp() / total) }
    }
}

/// The margins of everything that was seen.
pub fn margins(config: &Value, seen: &[&Seen]) -> Margins {
    let none = Margins { topk_logit: f64::INFINITY, group_logit: f64::INFINITY, topk_prob: f64::INFINITY };
    let Some(gate) = Gate::of(config) else { return none };
    let tensors = seen.iter().flat_map(|seen| &seen.tensors).filter(|(name, _)| name.starts_with("router.") && name.ends_with(".logits"));
    tensors.flat_map(|(_, logits)| logits.chunks_exact(gate.experts)).map(|logits| gate.margins(logits)).fold(none, |a, b| Margins {
        topk_logit: a.topk_logit.min(b.topk_logit),
        group_logit: a.group_logit.min(b.group_logit),
        topk_prob: a.topk_prob.min(b.topk_prob),
    })
}

fn largest(logits: &[f32]) -> f64 {
    f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn margins_are_the_smallest_gaps() {
        let mut seen = Seen::default();
        // Groups of two, best first: (4, 0), (3.5, 3), (1, 2).
        seen.tensors.insert("router.layer1.logits".into(), vec![4.0, 0.0, 1.0, 2.0, 3.5, 3.0]);
        seen.tensors.insert("router.layer1.topk_ids".into(), vec![0.0; 2]);
        let config = json!({"n_routed_experts": 6, "num_experts_per_tok": 2});
        let greedy = margins(&config, &[&seen]);
        assert_eq!((greedy.topk_logit, greedy.group_logit), (0.5, f64::INFINITY));
        assert!((greedy.topk_prob - 0.109_581).abs() < 1e-5, "{}", greedy.topk_prob);
        let config =
            json!({"n_routed_experts": 6, "num_experts_per_tok": 2, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1});
        let limited = margins(&config, &[&seen]);
        assert_eq!((limited.topk_logit, limited.group_logit), (f64::INFINITY, 0.5));
        assert_eq!(margins(&json!({}), &[&seen]).topk_logit, f64::INFINITY);
    }
}
