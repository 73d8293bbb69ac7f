//! `x = x / 2 * (1 + erf(x / sqrt 2))`: the exact GELU, not the one with tanh.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use crate::{Cpu, team::Cost};

impl Cpu {
    /// Applies the exact GELU to every element. Tolerance between kernels: 2e-7 of `|x|`, plus 1e-7.
    pub fn gelu(&self, x: &mut [f32]) {
        self.rows(x, 1, Cost::elements(4), |_, x| (self.kernels.gelu)(x));
    }
}
