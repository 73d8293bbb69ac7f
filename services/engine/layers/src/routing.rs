//! Which experts a token goes to (spec: moe.md 2). Plain numbers on the host: whoever computes the experts, here or elsewhere, sees only this.

/// How a gate chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gating {
    /// Routed experts.
    pub experts: usize,
    /// Experts per token; at most as many as can be chosen from.
    pub top_k: usize,
    /// `None`: the best of all experts. Otherwise the best of the best groups.
    pub groups: Option<Groups>,
    /// Whether the weights of a token are made to add up to one, instead of being scaled.
    pub norm_topk_prob: bool,
    pub routed_scaling_factor: f32,
}

/// Neighbouring experts form groups of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Divides the number of experts.
    pub count: usize,
    /// How many groups a token may go to.
    pub kept: usize,
}

/// Where the rows of a step go.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    pub top_k: usize,
    /// `[rows, top_k]`, ascending within a row.
    pub experts: Vec<usize>,
    /// `[rows, top_k]`: what each of these experts' output is multiplied with.
    pub weights: Vec<f32>,
}

/// What one expert is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    pub expert: usize,
    /// Rows of the step, ascending.
    pub rows: Vec<usize>,
    /// One per row.
    pub weights: Vec<f32>,
}

impl Gating {
    /// Routes rows by their `logits` `[rows, experts]`. Every row by itself; equal scores go to the lower expert.
    pub fn route(&self, logits: &[f32]) -> Routing {
        let mut routing = Routing { top_k: self.top_k, experts: Vec::new(), weights: Vec::new() };
        for logits in logits.chunks_exact(self.experts) {
            let scores = softmax(logits);
            let mut chosen = best(self.candidates(&scores), self.top_k, |expert| scores[expert]);
            chosen.sort_unstable();
            let weights = self.weights(chosen.iter().map(|&expert| scores[expert]).collect());
            routing.experts.extend(chosen);
            routing.weights.extend(weights);
        }
        routing
    }

    /// The experts that a row may go to: all, or those of the groups with the highest single scores.
    fn candidates(&self, scores: &[f32]) -> Vec<usize> {
        let Some(Groups { count, kept }) = self.groups else { return (0..self.experts).collect() };
        let size = self.experts / count;
        let score = |group: usize| scores[group * size..(group + 1) * size].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut groups = best((0..count).collect(), kept, score);
        groups.sort_unstable();
        groups.into_iter().flat_map(|group| group * size..(group + 1) * size).collect()
    }

    /// Mixing weights from the scores of the chosen.
    fn weights(&self, scores: Vec<f32>) -> Vec<f32> {
        if self.norm_topk_prob && self.top_k > 1 {
            let total = scores.iter().sum::<f32>() + 1e-20;
            return scores.into_iter().map(|score| score / total).collect();
        }
        scores.into_iter().map(|score| score * self.routed_scaling_factor).collect()
    }
}

impl Routing {
    /// The work of every expert that has any, by ascending expert.
    pub fn shares(&self) -> Vec<Share> {
        let mut entries: Vec<_> = (0..self.experts.len()).collect();
        entries.sort_by_key(|&entry| self.experts[entry]); // stable: rows stay in order
        let share = |entries: &[usize]| Share {
            expert: self.experts[entries[0]],
            rows: entries.iter().map(|entry| entry / self.top_k).collect(),
            weights: entries.iter().map(|&entry| self.weights[entry]).collect(),
        };
        entries.chunk_by(|&a, &b| self.experts[a] == self.experts[b]).map(share).collect()
    }
}

/// The `count` candidates with the highest scores; of equal ones those that come first.
fn best(mut candidates: Vec<usize>, count: usize, score: impl Fn(usize) -> f32) -> Vec<usize> {
    candidates.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
    candidates.truncate(count);
    candidates
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f32> = logits.iter().map(|logit| (logit - largest).exp()).collect();
    let total: f32 = exponentials.iter().sum();
    exponentials.into_iter().map(|e| e / total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATING: Gating = Gating { experts: 6, top_k: 2, groups: None, norm_topk_prob: false, routed_scaling_factor: 1.0 };

    /// Logits whose softmax is `scores` (which add up to one).
    fn logits(scores: &[f32]) -> Vec<f32> {
        scores.iter().map(|score| score.ln()).collect()
    }

    fn assert_weights(routing: &Routing, expected: &[f32]) {
        assert_eq!(routing.weights.len(), expected.len());
        assert!(routing.weights.iter().zip(expected).all(|(a, e)| (a - e).abs() < 1e-6), "{:?} instead of {expected:?}", routing.weights);
    }

    #[test]
    fn the_best_experts_in_ascending_order_with_their_scores() {
        let rows = [logits(&[0.1, 0.3, 0.05, 0.15, 0.0, 0.4]), logits(&[0.25, 0.05, 0.3, 0.2, 0.1, 0.1])].concat();
        let routing = GATING.route(&rows);
        assert_eq!(routing.experts, [1, 5, 0, 2]);
        assert_weights(&routing, &[0.3, 0.4, 0.25, 0.3]);
        assert_weights(&Gating { routed_scaling_factor: 16.0, ..GATING }.route(&rows), &[4.8, 6.4, 4.0, 4.8]);
        let normed = Gating { norm_topk_prob: true, routed_scaling_factor: 16.0, ..GATING };
        assert_weights(&normed.route(&rows), &[3.0 / 7.0, 4.0 / 7.0, 5.0 / 11.0, 6.0 / 11.0]);
        // One expert is not normed to 1: the gate would have no say.
        assert_weights(&Gating { top_k: 1, ..normed }.route(&rows), &[6.4, 4.8]);
    }

    #[test]
    fn of_equal_scores_the_lower_expert() {
        assert_eq!(GATING.route(&[0.0; 6]).experts, [0, 1]);
        assert_eq!(GATING.route(&[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).experts, [1, 3]);
        let grouped = Gating { groups: Some(Groups { count: 3, kept: 1 }), ..GATING };
        assert_eq!(grouped.route(&[0.0, 1.0, 1.0, 0.5, 0.0, 1.0]).experts, [0, 1]);
    }

    #[test]
    fn a_group_is_as_good_as_its_best_expert() {
        // The second and fourth best experts are in groups that come too late.
        let scores = [0.03, 0.34, 0.2, 0.19, 0.01, 0.23];
        let grouped = |kept| Gating { groups: Some(Groups { count: 3, kept }), ..GATING };
        assert_eq!(grouped(1).route(&logits(&scores)).experts, [0, 1]);
        assert_weights(&grouped(1).route(&logits(&scores)), &[0.03, 0.34]);
        assert_eq!(grouped(2).route(&logits(&scores)).experts, [1, 5]);
        assert_eq!(Gating { top_k: 3, ..grouped(2) }.route(&logits(&scores)).experts, [0, 1, 5]);
        assert_eq!(Gating { top_k: 3, ..grouped(3) }.route(&logits(&scores)).experts, [1, 2, 5]);
    }

    #[test]
    fn shares_hold_every_choice_once() {
        let routing = Routing { top_k: 2, experts: vec![1, 4, 0, 4, 1, 2], weights: vec![0.1, 0.2, 0.3, 0.4, 0.5, 0.6] };
        let share = |expert, rows: &[usize], weights: &[f32]| Share { expert, rows: rows.to_vec(), weights: weights.to_vec() };
        let expected = [share(0, &[1], &[0.3]), share(1, &[0, 2], &[0.1, 0.5]), share(2, &[2], &[0.6]), share(4, &[0, 1], &[0.2, 0.4])];
        assert_eq!(routing.shares(), expected);
        assert!(Routing { top_k: 2, experts: Vec::new(), weights: Vec::new() }.shares().is_empty());
    }

    #[test]
    fn logits_that_are_not_finite_give_weights_that_are_not() {
        let routing = GATING.route(&[0.0, f32::NAN, 0.0, 0.0, 0.0, 0.0]);
        assert!(routing.weights.iter().all(|weight| weight.is_nan()));
        assert_eq!(routing.experts.len(), 2);
    }
}
