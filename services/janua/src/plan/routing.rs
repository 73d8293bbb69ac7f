//! Where tokens go under uniform routing: the scores of a token's experts are independent and alike.
//!
//! Then the choice of the gate (spec: moe.md 2) is a sequence of draws. Sort a token's experts by score: every order is equally likely. Greedy
//! choice takes the first `top_k`. Group-limited choice keeps the groups with the best single expert, which are the first `kept` groups to
//! appear in that order, and takes the first `top_k` experts of kept groups. Either way expert after expert is drawn, each time uniformly among
//! those that are *eligible*: not drawn yet and, once `kept` groups have been opened by a draw, in one of these. Greedy choice is the case of
//! one group.

use std::collections::BTreeMap;

use layers::{Gating, Groups};
use placement::ExpertRange;
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

/// The probability that a token has an expert in the shard. Exact.
///
/// `1 - P(none)`, and `P(none)` is the product over the draws of the part of the eligible experts that lies outside of the shard, summed over
/// which groups have been opened so far. Groups with as many experts outside are alike, so how many of each kind are open says enough; a shard
/// is a range and makes at most four kinds. For one group it is `C(experts - shard, top_k) / C(experts, top_k)`.
pub fn reach(gating: &Gating, shard: ExpertRange) -> f64 {
    let Groups { count, kept } = groups(gating);
    let size = gating.experts / count;
    let kinds = kinds(gating, shard);
    let mut states = BTreeMap::from([(vec![0usize; kinds.len()], 1.0f64)]);
    for drawn in 0..gating.top_k {
        let mut next = BTreeMap::new();
        for (opened, probability) in states {
            let is_full = opened.iter().sum::<usize>() == kept;
            let eligible = if is_full { kept * size } else { gating.experts } - drawn;
            let outside = |open: &[usize]| open.iter().zip(&kinds).map(|(open, (outside, _))| open * outside).sum::<usize>();
            let share = |experts: usize| probability * experts as f64 / eligible as f64;
            *next.entry(opened.clone()).or_default() += share(outside(&opened).saturating_sub(drawn));
            for (kind, (outside, groups)) in kinds.iter().enumerate().filter(|_| !is_full) {
                let mut further = opened.clone();
                further[kind] += 1;
                if further[kind] <= *groups {
                    *next.entry(further).or_default() += share((groups - opened[kind]) * outside);
                }
            }
        }
        states = next;
    }
    1.0 - states.values().sum::<f64>()
}

/// How many experts of a group lie outside of the shard, and how many groups have so many. Groups without any cannot be part of `P(none)`.
fn kinds(gating: &Gating, shard: ExpertRange) -> Vec<(usize, usize)> {
    let size = gating.experts / groups(gating).count;
    let mut kinds: BTreeMap<usize, usize> = BTreeMap::new();
    for group in 0..groups(gating).count {
        let (begin, end) = (shard.first.max(group * size), (shard.last + 1).min((group + 1) * size));
        let outside = size - end.saturating_sub(begin);
        *kinds.entry(outside).or_default() += 1;
    }
    kinds.into_iter().filter(|(outside, _)| *outside > 0).collect()
}

fn groups(gating: &Gating) -> Groups {
    gating.groups.unwrap_or(Groups { count: 1, kept: 1 })
}

/// Experts of the shard that at least one of `batch` tokens goes to, expected: each of `s` experts is chosen by a token with probability
/// `top_k / experts` (all are alike, under group-limited choice too), and tokens are independent: `s (1 - (1 - top_k / experts)^batch)`.
pub fn touched(gating: &Gating, shard: ExpertRange, batch: usize) -> f64 {
    let chosen = gating.top_k as f64 / gating.experts as f64;
    shard.experts().count() as f64 * (1.0 - (1.0 - chosen).powf(batch as f64))
}

/// What the shard that a layer waits for has to do: means over the batches of the largest over the shards.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Busiest {
    /// Experts that it computes with.
    pub experts: f64,
    /// Rows that it computes, one for each token and expert.
    pub rows: f64,
}

/// Tokens that are drawn for a mean: one of a few tokens needs many batches to be steady.
const TOKENS: usize = 1 << 15;
const FEWEST_BATCHES: usize = 8;
const SEED: u64 = 16;

/// The expected maximum has no short formula: batches are drawn, always the same ones. The mean is within 2 % or so.
pub fn busiest(gating: &Gating, shards: &[ExpertRange], batch: usize) -> Busiest {
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let batches = (TOKENS / batch).max(FEWEST_BATCHES);
    let (mut experts, mut rows) = (0, 0);
    for _ in 0..batches {
        let mut counts = vec![0usize; gating.experts];
        (0..batch).for_each(|_| draw(gating, &mut random).into_iter().for_each(|expert| counts[expert] += 1));
        let of = |shard: &ExpertRange| &counts[shard.first..=shard.last];
        experts += shards.iter().map(|shard| of(shard).iter().filter(|&&rows| rows > 0).count()).max().unwrap_or(0);
        rows += shards.iter().map(|shard| of(shard).iter().sum::<usize>()).max().unwrap_or(0);
    }
    Busiest { experts: experts as f64 / batches as f64, rows: rows as f64 / batches as f64 }
}

/// The experts of one token, as said above.
fn draw(gating: &Gating, random: &mut ChaCha8Rng) -> Vec<usize> {
    let Groups { count, kept } = groups(gating);
    let size = gating.experts / count;
    let (mut chosen, mut open): (Vec<usize>, Vec<usize>) = (Vec::with_capacity(gating.top_k), Vec::with_capacity(kept));
    while chosen.len() < gating.top_k {
        // The top bits scaled to the range: even enough, ranges are small.
        let expert = ((u64::from(random.next_u32()) * gating.experts as u64) >> 32) as usize;
        let group = expert / size;
        let is_open = open.contains(&group);
        if chosen.contains(&expert) || (open.len() == kept && !is_open) {
            continue;
        }
        chosen.push(expert);
        if !is_open {
            open.push(group);
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::plan::samples::{moe_16b, v2};
    use crate::plan::shape::split;

    fn close(a: f64, b: f64, within: f64) {
        assert!((a - b).abs() <= within, "{a} is not {b}");
    }

    #[test]
    fn greedy_choice_is_the_hypergeometric_one() {
        let gating = *moe_16b().gating();
        // One half of 64 experts: C(32, 6) / C(64, 6) = 906192 / 74974368.
        close(reach(&gating, ExpertRange { first: 0, last: 31 }), 1.0 - 906_192.0 / 74_974_368.0, 1e-12);
        close(reach(&gating, ExpertRange { first: 7, last: 7 }), 6.0 / 64.0, 1e-12);
        close(reach(&gating, ExpertRange { first: 0, last: 63 }), 1.0, 1e-12);
    }

    #[test]
    fn a_single_expert_is_chosen_as_often_as_any_other() {
        let gating = *v2().gating();
        close(reach(&gating, ExpertRange { first: 33, last: 33 }), 6.0 / 160.0, 1e-12);
    }

    /// With a shard per group, a token goes to at most as many shards as groups are kept.
    #[test]
    fn groups_limit_the_shards_of_a_token() {
        let gating = *v2().gating();
        let by_group = split(160, Some(8), &[]).unwrap();
        let sum: f64 = by_group.iter().map(|&shard| reach(&gating, shard)).sum();
        assert!(sum < 3.0 && sum > 2.8, "{sum}");
        // Six draws among eight open groups would reach 8 (1 - C(140, 6) / C(160, 6)).
        let greedy = Gating { groups: None, ..gating };
        let sum: f64 = by_group.iter().map(|&shard| reach(&greedy, shard)).sum();
        assert!(sum > 4.4, "{sum}");
    }

    #[test]
    fn formulas_agree_with_draws_and_with_the_gate() {
        let gating = *v2().gating();
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let (draws, shards) = (20_000u32, split(160, Some(7), &[]).unwrap());
        let (mut drawn, mut routed) = (vec![0u32; shards.len()], vec![0u32; shards.len()]);
        for _ in 0..draws {
            let scores: Vec<f32> = (0..160).map(|_| random.next_u32() as f32 / u32::MAX as f32).collect();
            let experts = gating.route(&scores).experts;
            let ours = draw(&gating, &mut random);
            for (at, shard) in shards.iter().enumerate() {
                drawn[at] += u32::from(ours.iter().any(|&expert| shard.contains(expert)));
                routed[at] += u32::from(experts.iter().any(|&expert| shard.contains(expert)));
            }
        }
        for (at, &shard) in shards.iter().enumerate() {
            let exact = reach(&gating, shard);
            close(f64::from(drawn[at]) / f64::from(draws), exact, 0.02);
            close(f64::from(routed[at]) / f64::from(draws), exact, 0.02);
        }
    }

    #[test]
    fn the_busiest_shard_lies_between_its_bounds() {
        for gating in [*moe_16b().gating(), *v2().gating()] {
            for (nodes, batch) in [(1, 1), (2, 1), (5, 8), (64, 1), (64, 32)] {
                let shards = split(gating.experts, Some(nodes), &[]).unwrap();
                let busiest = busiest(&gating, &shards, batch);
                let mean = touched(&gating, shards[0], batch);
                assert!(busiest.experts >= mean * 0.98 && busiest.experts <= shards[0].experts().count() as f64, "{busiest:?}, {mean}");
                assert!(busiest.rows >= 1.0 && busiest.rows <= (batch * gating.top_k) as f64);
            }
            let alone = busiest(&gating, &[ExpertRange { first: 0, last: gating.experts - 1 }], 1);
            assert_eq!(alone, Busiest { experts: 6.0, rows: 6.0 });
        }
    }
}
