//! `x = e^(x - max) / sum`: over one row; the only caller with many rows is attention, which calls the kernel itself.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use crate::{Cpu, team::Cost};

impl Cpu {
    /// Replaces every row of `x` `[rows, width]` by its softmax. Tolerance between kernels: 2e-7 absolute plus 1e-6 relative.
    pub fn softmax(&self, x: &mut [f32], width: usize) {
        self.rows(x, width, Cost::elements(3 * width), |_, rows| rows.chunks_exact_mut(width).for_each(self.kernels.softmax));
    }
}
