//! Reference.

use std::ops::Range;

use super::{BLOCK_K, Job, Kernel};
use crate::matrix::elements;

pub(crate) const KERNEL: Kernel = Kernel { pack: |_, _| Vec::new(), columns };

/// # Safety
/// As `Kernel::columns`.
unsafe fn columns(job: &Job<'_>, columns: Range<usize>) {
    let k = job.w.columns();
    let mut w = vec![0.0; k];
    for n in columns {
        w.iter_mut().zip(elements(job.w.dtype(), job.w.row(n))).for_each(|(w, value)| *w = value);
        for m in 0..job.rows {
            let sum = dot(&job.x[m * k..(m + 1) * k], &w) + job.bias.map_or(0.0, |bias| bias[n]);
            // SAFETY: `m < rows`, and the caller owns the columns.
            unsafe { *job.row(m).add(n) = sum }
        }
    }
}

/// Dot product: eight running sums within a block of `k`, the blocks added in order.
pub(crate) fn dot(x: &[f32], w: &[f32]) -> f32 {
    let mut total = 0.0;
    for (x, w) in x.chunks(BLOCK_K).zip(w.chunks(BLOCK_K)) {
        let mut sums = [0.0; 8];
        for (x, w) in x.chunks(8).zip(w.chunks(8)) {
            x.iter().zip(w).zip(&mut sums).for_each(|((x, w), sum)| *sum += x * w);
        }
        let [a, b, c, d, e, f, g, h] = sums;
        total += ((a + b) + (c + d)) + ((e + f) + (g + h));
    }
    total
}
