//! `gate = silu(gate) * up` with `silu(x) = x / (1 + e^-x)`: the middle of a SwiGLU block.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use crate::{Cpu, team::Cost};

impl Cpu {
    /// Replaces `gate` by `silu(gate) * up`, both of the same length. Tolerance between kernels: 1e-6 relative.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up of one length");
        self.rows(gate, 1, Cost::elements(1), |first, gate| (self.kernels.silu_mul)(gate, &up[first..first + gate.len()]));
    }
}
