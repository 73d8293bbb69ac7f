//! `x = x + y`: the residual stream.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use crate::{Cpu, team::Cost};

impl Cpu {
    /// Adds `y` to `x`, both of the same length. Exact: every kernel gives the same bits.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "addends of one length");
        self.rows(x, 1, Cost::elements(1), |first, x| (self.kernels.add)(x, &y[first..first + x.len()]));
    }
}
