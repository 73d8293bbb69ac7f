//! From logits to an output: pure functions.
//!
//! Order for text: constraint, penalties (repetition, then frequency and presence), log-probabilities, temperature, top_k, min_p, top_p, draw.
//! A constraint comes first (see [`Guide::mask`](crate::Guide::mask)): it makes logits negative infinity, which no later stage undoes, so
//! log-probabilities and truncation count only what may come next.
//! top_k and min_p keep the same tokens in either order; top_p counts the probabilities of the tokens that those two have left, scaled to
//! add up to one. Between equal logits the lowest id counts as the more likely. For images: guidance, temperature, draw.
//!
//! The draw at output `index` of a job depends on its seed and `index` alone, so neither batching nor resuming a job elsewhere changes it.

use std::{
    cmp::Ordering,
    collections::{HashMap, HashSet},
};

use domain::{ImageSampling, Logprob, Sampling, TokenLogprobs};
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

/// The logits hold a NaN, or no largest finite value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the model's logits are not finite numbers")]
pub struct NotFinite;

/// What penalties need to know of the tokens so far. Stays empty while no penalty is on.
#[derive(Debug, Clone, Default)]
pub struct History {
    prompt: HashSet<u32>,
    /// How often each token stands in the output.
    counts: HashMap<u32, u32>,
}

impl History {
    /// A history that begins with a prompt.
    pub fn new(sampling: &Sampling, prompt: impl IntoIterator<Item = u32>) -> Self {
        let prompt = if penalises(sampling) { prompt.into_iter().collect() } else { HashSet::new() };
        Self { prompt, counts: HashMap::new() }
    }

    /// Count an output.
    pub fn push(&mut self, sampling: &Sampling, id: u32) {
        if penalises(sampling) {
            *self.counts.entry(id).or_default() += 1;
        }
    }
}

/// Draw the text token at output position `index`. `logits` `[vocabulary]` are penalised in place.
pub fn text(logits: &mut [f32], sampling: &Sampling, history: &History, index: u64) -> Result<(u32, Option<TokenLogprobs>), NotFinite> {
    penalise(logits, sampling, history);
    let best = argmax(logits)?;
    let id = if sampling.temperature == 0.0 { best } else { draw(&candidates(logits, best, sampling), uniform(sampling.seed, index)) };
    Ok((id, sampling.top_logprobs.map(|top| logprobs(logits, best, id, top as usize))))
}

/// Draw the code at output position `index`. `conditional` `[codes]` becomes the guided logits.
pub fn code(conditional: &mut [f32], unconditional: &[f32], sampling: &ImageSampling, index: u64) -> Result<u32, NotFinite> {
    for (c, &u) in conditional.iter_mut().zip(unconditional) {
        *c = u + sampling.guidance * (*c - u);
    }
    let best = argmax(conditional)?;
    if sampling.temperature == 0.0 {
        return Ok(best);
    }
    let all: Vec<_> = (0..conditional.len() as u32).map(candidate(conditional, best, sampling.temperature)).collect();
    Ok(draw(&all, uniform(sampling.seed, index)))
}

/// The number in [0, 1) that decides output `index` of a job with this seed.
pub fn uniform(seed: u64, index: u64) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut generator = ChaCha8Rng::from_seed(key);
    generator.set_word_pos(u128::from(index) * 2);
    (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

fn penalises(s: &Sampling) -> bool {
    s.repetition_penalty != 1.0 || s.frequency_penalty != 0.0 || s.presence_penalty != 0.0
}

fn penalise(logits: &mut [f32], sampling: &Sampling, history: &History) {
    let mut repeated = |id: u32| {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit > 0.0 { *logit / sampling.repetition_penalty } else { *logit * sampling.repetition_penalty };
        }
    };
    if sampling.repetition_penalty != 1.0 {
        history.prompt.iter().for_each(|&id| repeated(id));
        history.counts.keys().filter(|id| !history.prompt.contains(id)).for_each(|&id| repeated(id));
    }
    for (&id, &count) in &history.counts {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit -= sampling.frequency_penalty * count as f32 + sampling.presence_penalty;
        }
    }
}

/// The lowest id among the largest logits. Some logits may be negative infinity (ruled out), not all.
fn argmax(logits: &[f32]) -> Result<u32, NotFinite> {
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return Err(NotFinite);
        }
        if logit > largest {
            (best, largest) = (id, logit);
        }
    }
    if largest.is_finite() { Ok(best as u32) } else { Err(NotFinite) }
}

/// An id that may be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    /// Its probability in units of the most likely id's: 0..=1.
    weight: f32,
}

/// The candidate of an id, `best` being the most likely one.
fn candidate(logits: &[f32], best: u32, temperature: f32) -> impl Fn(u32) -> Candidate {
    let largest = logits[best as usize];
    move |id| Candidate { id, weight: ((logits[id as usize] - largest) / temperature).exp() }
}

/// What top_k, min_p and top_p leave, in the order of ids.
fn candidates(logits: &[f32], best: u32, sampling: &Sampling) -> Vec<Candidate> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let top_k = sampling.top_k as usize;
    if (1..ids.len()).contains(&top_k) {
        best_first(&mut ids, top_k, logits);
        ids.truncate(top_k);
        ids.sort_unstable();
    }
    let weighed = ids.into_iter().map(candidate(logits, best, sampling.temperature));
    let mut candidates: Vec<_> = weighed.filter(|candidate| candidate.weight >= sampling.min_p).collect();
    if sampling.top_p < 1.0 {
        nucleus(&mut candidates, sampling.top_p);
    }
    candidates
}

/// Keep the smallest set of the most likely candidates whose share of all weights reaches `top_p`.
///
/// Sorting a vocabulary would cost more than everything else here. Instead the weights are added up by magnitude, and only the candidates
/// of the magnitude at which the share is reached are put in order.
fn nucleus(candidates: &mut Vec<Candidate>, top_p: f32) {
    // Exponent and leading bits of the mantissa: ordered as the weights are, and at most 1.0.
    let magnitude = |candidate: &Candidate| (candidate.weight.to_bits() >> 20) as usize;
    let mut sums = [0.0; (1.0f32.to_bits() >> 20) as usize + 1];
    candidates.iter().for_each(|candidate| sums[magnitude(candidate)] += f64::from(candidate.weight));
    let enough = f64::from(top_p) * sums.iter().sum::<f64>();
    let (mut edge, mut sum) = (sums.len() - 1, 0.0);
    while edge > 0 && sum + sums[edge] < enough {
        sum += sums[edge];
        edge -= 1;
    }
    let mut at_edge: Vec<Candidate> = candidates.iter().filter(|candidate| magnitude(candidate) == edge).copied().collect();
    at_edge.sort_unstable_by(|a, b| b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id)));
    let last = at_edge.iter().find(|candidate| {
        sum += f64::from(candidate.weight);
        sum >= enough
    });
    // Without a last one all of them are needed; rounding can ask for a trifle more than there is.
    let within = |c: &Candidate| last.is_none_or(|last| c.weight > last.weight || (c.weight == last.weight && c.id <= last.id));
    candidates.retain(|candidate| magnitude(candidate) > edge || (magnitude(candidate) == edge && within(candidate)));
}

/// Put the `count` most likely ids first, in order.
fn best_first(ids: &mut [u32], count: usize, logits: &[f32]) {
    let likelier = |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)) };
    if count < ids.len() {
        ids.select_nth_unstable_by(count, likelier);
    }
    ids[..count].sort_unstable_by(likelier);
}

/// The candidate on which `uniform` in [0, 1) falls when the weights are laid end to end.
fn draw(candidates: &[Candidate], uniform: f64) -> u32 {
    let target = uniform * candidates.iter().map(|candidate| f64::from(candidate.weight)).sum::<f64>();
    let (mut sum, mut last) = (0.0, 0);
    for candidate in candidates.iter().filter(|candidate| candidate.weight > 0.0) {
        sum += f64::from(candidate.weight);
        last = candidate.id;
        if sum > target {
            break;
        }
    }
    last
}

/// Log-probabilities of `chosen` and of the `top` most likely ids; `best` is the most likely one.
fn logprobs(logits: &[f32], best: u32, chosen: u32, top: usize) -> TokenLogprobs {
    let largest = f64::from(logits[best as usize]);
    let normaliser = largest + logits.iter().map(|&l| (f64::from(l) - largest).exp()).sum::<f64>().ln();
    let entry = |id: u32| Logprob { token_id: id, logprob: (f64::from(logits[id as usize]) - normaliser) as f32 };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let top = top.min(ids.len());
    best_first(&mut ids, top, logits);
    let possible = ids[..top].iter().take_while(|&&id| logits[id as usize] > f32::NEG_INFINITY);
    TokenLogprobs { chosen: entry(chosen), top: possible.map(|&id| entry(id)).collect() }
}
