//! The sampler against a plain reference, and its distribution.

#![allow(clippy::unwrap_used)]

use domain::{ImageSampling, Sampling};
use proptest::prelude::*;
use sched::sampler::{self, History, NotFinite, text, uniform};

/// The probability of every id, worked out step by step in f64 as the module's first lines say.
fn probabilities(logits: &[f32], s: &Sampling) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let weight = |id: usize| f64::from((logits[id] - logits[order[0]]) / s.temperature).exp();
    let mut kept: Vec<usize> = order.clone();
    if s.top_k > 0 {
        kept.truncate(s.top_k as usize);
    }
    kept.retain(|&id| weight(id) >= f64::from(s.min_p));
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    let mut sum = 0.0;
    let enough = kept.iter().position(|&id| {
        sum += weight(id) / total;
        sum >= f64::from(s.top_p)
    });
    kept.truncate(enough.map_or(kept.len(), |last| last + 1));
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    (0..logits.len()).map(|id| if kept.contains(&id) { weight(id) / total } else { 0.0 }).collect()
}

fn draw(logits: &[f32], sampling: &Sampling, index: u64) -> u32 {
    text(&mut logits.to_vec(), sampling, &History::default(), index).unwrap().0
}

fn random_logits(seed: u64, count: usize) -> Vec<f32> {
    (0..count as u64).map(|i| (uniform(seed, i) * 12.0 - 6.0) as f32).collect()
}

proptest! {
    /// The draw is the id on which `uniform` falls, up to what f32 weights can shift at a boundary.
    #[test]
    fn draws_as_the_reference_does(
        seed in 0..1000u64,
        count in 1..3000usize,
        temperature in 0.1..3.0f32,
        top_k in prop_oneof![Just(0u32), 1..100u32],
        top_p in prop_oneof![Just(1.0f32), 0.01..1.0f32],
        min_p in prop_oneof![Just(0.0f32), 0.0..1.0f32],
    ) {
        let logits = random_logits(seed, count);
        let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
        let expected = probabilities(&logits, &sampling);
        for index in 0..20 {
            let id = draw(&logits, &sampling, index) as usize;
            let below: f64 = expected[..id].iter().sum();
            let u = uniform(seed, index);
            let slack = 1e-4 + 2.0 * boundary(&logits, &sampling);
            prop_assert!(expected[id] > 0.0 || slack > 1e-3, "{id} is ruled out");
            prop_assert!(u >= below - slack && u <= below + expected[id] + slack, "u {u} is not in {below} + {}", expected[id]);
        }
    }
}

/// Probability of the ids that the reference keeps or drops by less than rounding: such ids may fall on either side.
fn boundary(logits: &[f32], s: &Sampling) -> f64 {
    let nudged =
        |factor: f32| probabilities(logits, &Sampling { top_p: (s.top_p * factor).min(1.0), min_p: s.min_p * factor, ..s.clone() });
    let (low, high) = (nudged(1.0 - 1e-5), nudged(1.0 + 1e-5));
    low.iter().zip(&high).map(|(a, b)| (a - b).abs()).sum()
}

#[test]
fn frequencies_follow_the_probabilities() {
    let logits = random_logits(4, 40);
    let rows = [
        Sampling::default(),
        Sampling { temperature: 0.5, ..Sampling::default() },
        Sampling { temperature: 2.0, top_k: 10, ..Sampling::default() },
        Sampling { top_p: 0.8, ..Sampling::default() },
        Sampling { min_p: 0.1, temperature: 1.5, ..Sampling::default() },
    ];
    const DRAWS: u64 = 40_000;
    for sampling in rows.map(|s| Sampling { seed: 11, ..s }) {
        let expected = probabilities(&logits, &sampling);
        let mut counts = vec![0u32; logits.len()];
        (0..DRAWS).for_each(|index| counts[draw(&logits, &sampling, index) as usize] += 1);
        let (mut chi_square, mut degrees) = (0.0, -1.0f64);
        for (&p, &count) in expected.iter().zip(&counts) {
            let mean = p * DRAWS as f64;
            assert!(p > 0.0 || count == 0);
            if mean >= 5.0 {
                chi_square += (f64::from(count) - mean).powi(2) / mean;
                degrees += 1.0;
            }
        }
        // Mean + 5 standard deviations of the chi-square distribution.
        assert!(chi_square < degrees + 5.0 * (2.0 * degrees).sqrt(), "{sampling:?}: {chi_square} with {degrees} degrees of freedom");
        assert!(degrees >= 3.0);
    }
}

#[test]
fn draws_at_different_places_are_independent() {
    // Neighbouring indices and neighbouring seeds: each pair's halves fall into the four quarters evenly.
    for (a, b) in [((7, 0), (7, 1)), ((7, 0), (8, 0u64))] {
        let mut quarters = [0u32; 4];
        for i in 0..20_000u64 {
            let side = |(seed, index)| usize::from(uniform(seed, index + 2 * i) >= 0.5);
            quarters[2 * side(a) + side(b)] += 1;
        }
        assert!(quarters.iter().all(|&count| (4700..5300).contains(&count)), "{quarters:?}");
    }
}

/// Pinned, because a resumed job may run on another version of this program.
#[test]
fn the_draw_of_a_place_never_changes() {
    let draws = [(0, 0), (0, 1), (1, 0), (u64::MAX, 1 << 40)].map(|(seed, index)| uniform(seed, index));
    assert_eq!(draws, PINNED);
}

const PINNED: [f64; 4] = [0.8369197568826472, 0.6314244940665231, 0.381489413238261, 0.015603600986559996];

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let greedy = Sampling::greedy();
    assert_eq!(draw(&[1.0, 3.0, 3.0, 2.0], &greedy, 0), 1);
    assert_eq!(draw(&[-5.0, -5.0], &greedy, 0), 0);
    assert_eq!(draw(&[f32::NEG_INFINITY, -5.0], &greedy, 0), 1);
}

#[test]
fn edges_of_truncation() {
    let logits = [0.0, 2.0, 1.0, 2.0, -1.0];
    let drawn = |sampling: &Sampling| -> Vec<u32> {
        let mut ids: Vec<u32> = (0..400).map(|index| draw(&logits, sampling, index)).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    };
    let base = Sampling { temperature: 2.0, seed: 3, ..Sampling::default() };
    let rows = [
        (base.clone(), vec![0, 1, 2, 3, 4]),
        (Sampling { top_k: 1, ..base.clone() }, vec![1]), // ties: the lowest id is the more likely
        (Sampling { top_k: 2, ..base.clone() }, vec![1, 3]),
        (Sampling { top_k: 5, ..base.clone() }, vec![0, 1, 2, 3, 4]),
        (Sampling { top_k: u32::MAX, ..base.clone() }, vec![0, 1, 2, 3, 4]),
        (Sampling { top_p: 1e-6, ..base.clone() }, vec![1]),
        (Sampling { min_p: 1.0, ..base.clone() }, vec![1, 3]),
        (Sampling { min_p: 0.6, ..base.clone() }, vec![1, 2, 3]),
        // Of the three that top_k leaves (weights 1, 1, 0.61) the first two have a share of 0.77.
        (Sampling { top_k: 3, top_p: 0.76, ..base.clone() }, vec![1, 3]),
        (Sampling { top_k: 3, top_p: 0.78, ..base.clone() }, vec![1, 2, 3]),
        (Sampling { temperature: 1e-30, ..base.clone() }, vec![1, 3]),
        (Sampling { temperature: 100.0, top_k: 4, ..base.clone() }, vec![0, 1, 2, 3]),
    ];
    for (sampling, expected) in rows {
        assert_eq!(drawn(&sampling), expected, "{sampling:?}");
    }
    assert_eq!(draw(&[4.0], &Sampling { top_k: 3, top_p: 0.5, ..base }, 0), 0);
}

#[test]
fn a_large_flat_vocabulary_keeps_a_large_nucleus() {
    let logits = vec![0.0; 10_000];
    let sampling = Sampling { top_p: 0.5, seed: 1, ..Sampling::default() };
    let highest = (0..2000).map(|index| draw(&logits, &sampling, index)).max().unwrap();
    assert!((4_900..5_000).contains(&highest), "ids 0..5000 are the nucleus, {highest} was the highest drawn");
}

#[test]
fn penalties_do_what_the_contract_says() {
    let base = Sampling { top_logprobs: Some(0), ..Sampling::greedy() };
    let rows = [
        (base.clone(), [2.0, -1.0, 3.0, 1.0]),
        (Sampling { repetition_penalty: 2.0, ..base.clone() }, [1.0, -2.0, 1.5, 1.0]),
        (Sampling { frequency_penalty: 0.5, ..base.clone() }, [2.0, -1.5, 2.0, 1.0]),
        (Sampling { presence_penalty: 0.5, ..base.clone() }, [2.0, -1.5, 2.5, 1.0]),
        (Sampling { presence_penalty: -1.0, ..base.clone() }, [2.0, 0.0, 4.0, 1.0]),
        (Sampling { repetition_penalty: 2.0, frequency_penalty: 0.5, presence_penalty: 0.25, ..base.clone() }, [1.0, -2.75, 0.25, 1.0]),
    ];
    for (sampling, expected) in rows {
        // Token 0 stands in the prompt, 1 once and 2 twice in the output (and 2 in the prompt too), 3 nowhere.
        let mut history = History::new(&sampling, [0, 2]);
        [1, 2, 2].into_iter().for_each(|id| history.push(&sampling, id));
        let mut logits = [2.0, -1.0, 3.0, 1.0];
        let (id, _) = text(&mut logits, &sampling, &history, 0).unwrap();
        assert_eq!(logits, expected, "{sampling:?}");
        let best = expected.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0))).unwrap().0;
        assert_eq!(id, best as u32);
    }
}

#[test]
fn logprobs_are_taken_after_penalties_and_before_temperature() {
    let logits = [1.0f32, 2.0, 0.0, 2.0];
    let normaliser = logits.iter().map(|l| l.exp()).sum::<f32>().ln();
    let sampling = Sampling { temperature: 0.01, top_k: 1, top_logprobs: Some(3), ..Sampling::default() };
    let (id, logprobs) = text(&mut logits.to_vec(), &sampling, &History::default(), 0).unwrap();
    let logprobs = logprobs.unwrap();
    assert_eq!((id, logprobs.chosen.token_id), (1, 1));
    assert_eq!(logprobs.top.iter().map(|l| l.token_id).collect::<Vec<_>>(), [1, 3, 0]);
    for entry in logprobs.top.iter().chain([&logprobs.chosen]) {
        assert!((entry.logprob - (logits[entry.token_id as usize] - normaliser)).abs() < 1e-6);
    }
    let penalised = Sampling { presence_penalty: 2.0, top_logprobs: Some(20), ..Sampling::greedy() };
    let mut history = History::new(&penalised, []);
    history.push(&penalised, 1);
    let (id, logprobs) = text(&mut logits.to_vec(), &penalised, &history, 0).unwrap();
    let logprobs = logprobs.unwrap();
    assert_eq!((id, logprobs.top.len()), (3, 4), "as many as there are");
    let total: f32 = logprobs.top.iter().map(|l| l.logprob.exp()).sum();
    assert!((total - 1.0).abs() < 1e-5);
    assert!(text(&mut logits.to_vec(), &Sampling::greedy(), &History::default(), 0).unwrap().1.is_none());
}

#[test]
fn logits_that_are_no_numbers_are_refused() {
    let nothing = [f32::NEG_INFINITY; 3];
    for bad in [[0.0, f32::NAN, 1.0], [f32::NAN; 3], [0.0, f32::INFINITY, 1.0], nothing] {
        for sampling in [Sampling::greedy(), Sampling::default(), Sampling { top_p: 0.5, ..Sampling::default() }] {
            assert_eq!(text(&mut bad.to_vec(), &sampling, &History::default(), 0).unwrap_err(), NotFinite);
        }
        let image = ImageSampling { guidance: 1.0, ..ImageSampling::default() };
        assert_eq!(sampler::code(&mut bad.to_vec(), &[0.0; 3], &image, 0), Err(NotFinite));
    }
    assert_eq!(text(&mut [], &Sampling::greedy(), &History::default(), 0).unwrap_err(), NotFinite);
}

#[test]
fn guidance_pulls_away_from_the_unconditional() {
    let (conditional, unconditional) = ([1.0, 2.0, 1.5], [0.0, 2.0, 0.0]);
    for (guidance, expected) in [(0.0, unconditional), (1.0, conditional), (5.0, [5.0, 2.0, 7.5])] {
        let mut logits = conditional;
        let sampling = ImageSampling { guidance, temperature: 0.0, ..ImageSampling::default() };
        let code = sampler::code(&mut logits, &unconditional, &sampling, 0).unwrap();
        assert_eq!(logits, expected);
        assert_eq!(logits[code as usize], logits.iter().copied().fold(f32::MIN, f32::max));
    }
}
