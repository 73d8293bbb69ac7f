use std::f64::consts::PI;

use crate::{Backend, EngineError, Pairs, Rotation, Slice};

/// Rotary position embedding: the frequencies of one head (spec: language.md 1.3).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pairs: Pairs,
    /// `theta^(-2j / head_dim) / factor`, j = 0 .. head_dim / 2
    frequencies: Vec<f32>,
    /// Factor of all cosines and sines.
    amplitude: f32,
}

/// How YaRN stretches a context (spec: language.md 2.4): as `rope_scaling` has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How many times longer the context is than `original_positions`.
    pub factor: f64,
    pub original_positions: usize,
    /// Pairs that turn at least this often within the original context keep their frequency.
    pub beta_fast: f64,
    /// Pairs that turn at most this often are slowed down by `factor`.
    pub beta_slow: f64,
    pub mscale: f64,
    pub mscale_all_dim: f64,
}

impl Yarn {
    /// Which pair of a head turns `beta` times within the original context, not yet rounded to a pair.
    fn pair(&self, head_dim: usize, theta: f64, beta: f64) -> f64 {
        head_dim as f64 * (self.original_positions as f64 / (beta * 2.0 * PI)).ln() / (2.0 * theta.ln())
    }

    /// Frequency of pair `j`: between its own and the slowed one.
    fn frequency(&self, head_dim: usize, theta: f64, j: usize) -> f64 {
        let low = self.pair(head_dim, theta, self.beta_fast).floor().max(0.0);
        let high = self.pair(head_dim, theta, self.beta_slow).ceil().min(head_dim as f64 - 1.0);
        let high = if low == high { high + 0.001 } else { high };
        let own = theta.powf(-2.0 * j as f64 / head_dim as f64);
        let slowed = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
        own / self.factor * slowed + own * (1.0 - slowed)
    }
}

/// `0.1 m ln(factor) + 1`: how much sharper attention has to be over a context `factor` times as long.
pub fn yarn_sharpness(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

impl Rope {
    /// `factor` stretches positions (linear scaling); 1 leaves them.
    pub fn new(head_dim: usize, theta: f64, factor: f64) -> Self {
        let frequency = |j: usize| (theta.powf(-2.0 * j as f64 / head_dim as f64) / factor) as f32;
        Self { pairs: Pairs::Halves, frequencies: (0..head_dim / 2).map(frequency).collect(), amplitude: 1.0 }
    }

    /// Frequencies stretched by YaRN.
    pub fn yarn(head_dim: usize, theta: f64, yarn: &Yarn) -> Self {
        let frequency = |j| yarn.frequency(head_dim, theta, j) as f32;
        let amplitude = yarn_sharpness(yarn.factor, yarn.mscale) / yarn_sharpness(yarn.factor, yarn.mscale_all_dim);
        Self { pairs: Pairs::Halves, frequencies: (0..head_dim / 2).map(frequency).collect(), amplitude: amplitude as f32 }
    }

    /// The same for heads whose pairs are neighbours.
    pub fn neighbours(self) -> Self {
        Self { pairs: Pairs::Neighbours, ..self }
    }

    /// The angles of all rows of a step.
    ///
    /// As in the reference, frequencies and angles are f32: at position 10,000 the rounding of an angle is already a few 1e-4, and a checkpoint
    /// has been trained with it. Their sines and cosines are computed in f64, so nothing is added to that.
    pub fn rotation<B: Backend>(&self, backend: &B, slices: &[Slice]) -> Result<Rotation<B::Tensor>, EngineError> {
        let positions = slices.iter().flat_map(|slice| slice.start..slice.end());
        let angles =
            || positions.clone().flat_map(|position| self.frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency)));
        let half = self.frequencies.len();
        Ok(Rotation {
            pairs: self.pairs,
            cos: backend.upload(angles().map(|angle| angle.cos() as f32 * self.amplitude).collect(), half)?, // [rows, head_dim / 2]
            sin: backend.upload(angles().map(|angle| angle.sin() as f32 * self.amplitude).collect(), half)?, // [rows, head_dim / 2]
            head_dim: 2 * half,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Rope, Yarn, yarn_sharpness};

    #[test]
    fn frequencies_fall_from_one_to_almost_one_over_theta() {
        let rope = Rope::new(128, 10_000.0, 1.0);
        assert_eq!(rope.frequencies.len(), 64);
        assert_eq!(rope.frequencies[0], 1.0);
        assert_eq!(rope.frequencies[32], 0.01);
        assert!((rope.frequencies[63] - 1.154_782e-4).abs() < 1e-9);
        assert_eq!(Rope::new(128, 10_000.0, 4.0).frequencies[32], 0.0025);
    }

    /// The values of spec: language.md 2.4 and 2.2, computed there from the published configuration.
    #[test]
    fn yarn_keeps_fast_pairs_slows_slow_ones_and_blends_between() {
        let yarn = Yarn { factor: 40.0, original_positions: 4096, beta_fast: 32.0, beta_slow: 1.0, mscale: 0.707, mscale_all_dim: 0.707 };
        let rope = Rope::yarn(64, 10_000.0, &yarn);
        assert_eq!((rope.frequencies.len(), rope.amplitude), (32, 1.0));
        for (j, expected) in [
            (0, 1.0),
            (9, 0.074_989_420_933_245_58),
            (10, 0.056_234_132_519_034_91),
            (11, 0.039_006_926_567_143_86),
            (15, 0.008_334_508_951_020_777),
            (16, 0.0055),
            (20, 0.000_790_569_415_042_094_6),
            (22, 0.000_177_827_941_003_892_2),
            (23, 3.333_803_580_408_31e-5),
            (31, 3.333_803_580_408_309_7e-6),
        ] {
            assert_eq!(rope.frequencies[j], expected as f32, "pair {j}");
        }
        assert!((yarn_sharpness(40.0, 0.707).powi(2) - 1.589_626_165_120_873_6).abs() < 1e-12);
        assert_eq!(yarn_sharpness(0.5, 0.707), 1.0);
        let uneven = Rope::yarn(64, 10_000.0, &Yarn { mscale: 1.0, mscale_all_dim: 0.0, ..yarn });
        assert!((f64::from(uneven.amplitude) - 1.368_887_945_411_393_6).abs() < 1e-6);
    }

    #[test]
    fn yarn_over_a_tiny_context_stays_finite() {
        let yarn = Yarn { factor: 8.0, original_positions: 4, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 1.0 };
        let (slowed, plain) = (Rope::yarn(2, 10_000.0, &yarn), Rope::new(2, 10_000.0, 1.0));
        assert!(slowed.frequencies.iter().all(|f| f.is_finite()) && slowed.frequencies[0] <= plain.frequencies[0]);
    }
}
