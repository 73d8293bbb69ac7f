//! Four running sums of eight squares each; the mean in f32.

use std::arch::x86_64::*;

use crate::avx2::{read, sum, write};

pub(crate) fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        // SAFETY: the table that holds this function is only handed out on a CPU with these features.
        unsafe { normalise(row, weight, eps) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn normalise(row: &mut [f32], weight: &[f32], eps: f32) {
    let mut sums = [_mm256_setzero_ps(); 4];
    for chunk in row.chunks(32) {
        for (piece, sum) in chunk.chunks(8).zip(&mut sums) {
            let v = read(piece);
            *sum = _mm256_fmadd_ps(v, v, *sum);
        }
    }
    let squares = sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    let scale = _mm256_set1_ps(1.0 / (squares / row.len() as f32 + eps).sqrt());
    for (v, w) in row.chunks_mut(8).zip(weight.chunks(8)) {
        let y = _mm256_mul_ps(read(w), _mm256_mul_ps(read(v), scale));
        write(v, y);
    }
}
