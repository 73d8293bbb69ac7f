//! `y = x / sqrt(mean(x²) + eps) * weight`, row by row (spec: language.md 1.2).

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use crate::{Cpu, team::Cost};

/// Normalises the rows of `x` in place: `fn(x, weight, eps)`.
pub(crate) type Kernel = fn(&mut [f32], &[f32], f32);

impl Cpu {
    /// Normalises every row of `x` `[rows, width]` in place and multiplies it with `weight` `[width]`. Tolerance between kernels: 1e-6 relative.
    pub fn rms_norm(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        let cost = Cost::elements(weight.len());
        self.rows(x, weight.len(), cost, |_, rows| (self.kernels.rms_norm)(rows, weight, eps));
    }
}
