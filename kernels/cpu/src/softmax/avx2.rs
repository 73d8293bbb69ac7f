//! Three passes, eight at a time: the largest, the exponentials and their sum, the scale.

use std::arch::x86_64::*;

use crate::avx2::{exp, max, read, sum, write};

pub(crate) fn softmax(x: &mut [f32]) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features.
    unsafe { softmax_eights(x) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn softmax_eights(x: &mut [f32]) {
    let mut largest = _mm256_set1_ps(f32::NEG_INFINITY);
    let (whole, rest) = x.as_chunks_mut::<8>();
    for x in &*whole {
        largest = _mm256_max_ps(largest, read(x));
    }
    let largest = _mm256_set1_ps(rest.iter().copied().fold(max(largest), f32::max));

    let mut total = _mm256_setzero_ps();
    for x in &mut *whole {
        let e = exp(_mm256_sub_ps(read(x), largest));
        total = _mm256_add_ps(total, e);
        write(x, e);
    }
    let mut total = sum(total);
    if !rest.is_empty() {
        let e = exp(_mm256_sub_ps(read(rest), largest));
        write(rest, e);
        total += rest.iter().sum::<f32>();
    }

    let scale = _mm256_set1_ps(1.0 / total);
    for x in x.chunks_mut(8) {
        let scaled = _mm256_mul_ps(read(x), scale);
        write(x, scaled);
    }
}
