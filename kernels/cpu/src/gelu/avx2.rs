//! erf from two polynomials: in `z²` below one, in `1/z` times `e^(-z²)` above.

use std::{arch::x86_64::*, f32::consts::FRAC_2_SQRT_PI};

use crate::avx2::{exp, polynomial, read, write};

/// erf(z) / z as a polynomial of z², 0 <= z <= 1: interpolated at Chebyshev nodes, error of erf below 1.3e-7 in f32.
const NEAR: [f32; 7] = [FRAC_2_SQRT_PI, -0.376_126_26, 0.112_835_94, -0.026_854_211, 0.005_189_087_2, -0.000_801_686_43, 7.875_875e-5];

/// erfc(z) * e^(z²) as a polynomial of 1/z, 1 <= z <= 4: likewise, error of erf below 6e-8. Beyond 4, erf is 1 in f32.
const FAR: [f32; 8] =
    [0.000_381_532_3, 0.557_292_64, 0.053_599_495, -0.513_899_15, 0.589_897_16, -0.368_562_55, 0.128_479_45, -0.019_605_03];

pub(crate) fn gelu(x: &mut [f32]) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features.
    unsafe { gelu_eights(x) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn gelu_eights(x: &mut [f32]) {
    let half = _mm256_set1_ps(0.5);
    for x in x.chunks_mut(8) {
        let v = read(x);
        let erf = erf(_mm256_mul_ps(v, _mm256_set1_ps(std::f32::consts::FRAC_1_SQRT_2)));
        let v = _mm256_mul_ps(_mm256_mul_ps(half, v), _mm256_add_ps(_mm256_set1_ps(1.0), erf));
        write(x, v);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn erf(x: __m256) -> __m256 {
    let sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0));
    let z = _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
    let near = _mm256_mul_ps(z, polynomial(_mm256_mul_ps(z, z), NEAR));
    // The clamps return their second argument when one is NaN, so NaN stays NaN.
    let z = _mm256_min_ps(_mm256_set1_ps(4.0), _mm256_max_ps(_mm256_set1_ps(1.0), z));
    let tail =
        _mm256_mul_ps(exp(_mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(z, z))), polynomial(_mm256_div_ps(_mm256_set1_ps(1.0), z), FAR));
    let far = _mm256_sub_ps(_mm256_set1_ps(1.0), tail);
    let is_far = _mm256_cmp_ps::<_CMP_GT_OQ>(z, _mm256_set1_ps(1.0));
    _mm256_or_ps(_mm256_blendv_ps(near, far, is_far), sign)
}
