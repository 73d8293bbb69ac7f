//! Eight at a time.

use std::arch::x86_64::*;

use crate::avx2::{exp, read, write};

pub(crate) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features.
    unsafe { silu_mul_eights(gate, up) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn silu_mul_eights(gate: &mut [f32], up: &[f32]) {
    let one = _mm256_set1_ps(1.0);
    for (gate, up) in gate.chunks_mut(8).zip(up.chunks(8)) {
        let x = read(gate);
        let silu = _mm256_div_ps(x, _mm256_add_ps(one, exp(_mm256_sub_ps(_mm256_setzero_ps(), x))));
        write(gate, _mm256_mul_ps(silu, read(up)));
    }
}
