//! Eight pairs at a time.

use std::arch::x86_64::*;

use crate::avx2::{read, write};

pub(crate) fn rope(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features.
    unsafe { rope_eights(row, cos, sin) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rope_eights(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    for head in row.chunks_exact_mut(2 * cos.len()) {
        let (low, high) = head.split_at_mut(cos.len());
        for (((low, high), cos), sin) in low.chunks_mut(8).zip(high.chunks_mut(8)).zip(cos.chunks(8)).zip(sin.chunks(8)) {
            let (a, b, cos, sin) = (read(low), read(high), read(cos), read(sin));
            write(low, _mm256_fmsub_ps(a, cos, _mm256_mul_ps(b, sin)));
            write(high, _mm256_fmadd_ps(b, cos, _mm256_mul_ps(a, sin)));
        }
    }
}
