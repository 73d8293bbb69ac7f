use crate::{Backend, EngineError, Rotation, Slice};

/// Rotary position embedding: the frequencies of one head (spec: language.md 1.3).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// `theta^(-2j / head_dim) / factor`, j = 0 .. head_dim / 2
    frequencies: Vec<f32>,
}

impl Rope {
    /// `factor` stretches positions (linear scaling); 1 leaves them.
    pub fn new(head_dim: usize, theta: f64, factor: f64) -> Self {
        let frequency = |j: usize| (theta.powf(-2.0 * j as f64 / head_dim as f64) / factor) as f32;
        Self { frequencies: (0..head_dim / 2).map(frequency).collect() }
    }

    /// The angles of all rows of a step.
    ///
    /// As in the reference, frequencies and angles are f32: at position 10,000 the rounding of an angle is already a few 1e-4, and a checkpoint
    /// has been trained with it. Their sines and cosines are computed in f64, so nothing is added to that.
    pub fn rotation<B: Backend>(&self, backend: &B, slices: &[Slice]) -> Result<Rotation<B::Tensor>, EngineError> {
        let positions = slices.iter().flat_map(Slice::positions);
        let angles =
            || positions.clone().flat_map(|position| self.frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency)));
        let half = self.frequencies.len();
        Ok(Rotation {
            cos: backend.upload(angles().map(|angle| angle.cos() as f32).collect(), half)?, // [rows, head_dim / 2]
            sin: backend.upload(angles().map(|angle| angle.sin() as f32).collect(), half)?, // [rows, head_dim / 2]
            head_dim: 2 * half,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Rope;

    #[test]
    fn frequencies_fall_from_one_to_almost_one_over_theta() {
        let rope = Rope::new(128, 10_000.0, 1.0);
        assert_eq!(rope.frequencies.len(), 64);
        assert_eq!(rope.frequencies[0], 1.0);
        assert_eq!(rope.frequencies[32], 0.01);
        assert!((rope.frequencies[63] - 1.154_782e-4).abs() < 1e-9);
        assert_eq!(Rope::new(128, 10_000.0, 4.0).frequencies[32], 0.0025);
    }
}
