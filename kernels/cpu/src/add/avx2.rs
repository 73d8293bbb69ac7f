//! Eight at a time.

use std::arch::x86_64::*;

use crate::avx2::{read, write};

pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features.
    unsafe { add_eights(x, y) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn add_eights(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.chunks_mut(8).zip(y.chunks(8)) {
        let sum = _mm256_add_ps(read(x), read(y));
        write(x, sum);
    }
}
