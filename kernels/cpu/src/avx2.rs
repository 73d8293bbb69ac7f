//! What the AVX2 kernels share: loading eight values of any type, sums across a register, the exponential.
//!
//! All functions need AVX2, FMA and F16C; they are reached only through the table that `isa.rs` hands out on such a CPU.

use std::arch::x86_64::*;

/// f32 weights, as a const generic parameter.
pub(crate) const F32: u8 = 0;
/// bf16 weights.
pub(crate) const BF16: u8 = 1;
/// f16 weights.
pub(crate) const F16: u8 = 2;

/// Bytes per element of a type.
pub(crate) const fn size(dtype: u8) -> usize {
    if dtype == F32 { 4 } else { 2 }
}

/// Eight elements at any alignment, as f32.
///
/// # Safety
/// `p` points to eight readable elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn load<const DTYPE: u8>(p: *const u8) -> __m256 {
    // SAFETY: the caller promises eight elements of two or four bytes; none of these loads needs alignment.
    unsafe {
        match DTYPE {
            F32 => _mm256_loadu_ps(p.cast()),
            BF16 => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))),
            _ => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
        }
    }
}

/// The first `count` (below eight) elements, zeros after them.
///
/// # Safety
/// `p` points to `count` readable elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn load_part<const DTYPE: u8>(p: *const u8, count: usize) -> __m256 {
    let mut buffer = [0u8; 32];
    // SAFETY: `count` elements are readable and, being fewer than eight, fit the buffer of eight of the widest type.
    unsafe {
        std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), count * size(DTYPE));
        load::<DTYPE>(buffer.as_ptr())
    }
}

/// The first eight elements of `values`, or all of them followed by zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn read(values: &[f32]) -> __m256 {
    // SAFETY: as many elements are read as the slice has.
    unsafe {
        match values.len() {
            8.. => load::<F32>(values.as_ptr().cast()),
            count => load_part::<F32>(values.as_ptr().cast(), count),
        }
    }
}

/// The inverse of [`read`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn write(values: &mut [f32], x: __m256) {
    let mut buffer = [0.0; 8];
    // SAFETY: eight elements are written to a slice or buffer of at least eight.
    unsafe {
        match values.len() {
            8.. => _mm256_storeu_ps(values.as_mut_ptr(), x),
            count => {
                _mm256_storeu_ps(buffer.as_mut_ptr(), x);
                values.copy_from_slice(&buffer[..count]);
            }
        }
    }
}

/// The sums across four registers. The order is fixed: neighbours, then pairs, then halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn sum4(a: [__m256; 4]) -> __m128 {
    let pairs = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs))
}

/// The sum across one register, in the order of [`sum4`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn sum(a: __m256) -> f32 {
    _mm_cvtss_f32(sum4([a; 4]))
}

/// The largest of one register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn max(a: __m256) -> f32 {
    let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
}

/// `c[0] + x * (c[1] + x * (...))`
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn polynomial<const N: usize>(x: __m256, c: [f32; N]) -> __m256 {
    let mut value = _mm256_set1_ps(c[N - 1]);
    for &coefficient in c[..N - 1].iter().rev() {
        value = _mm256_fmadd_ps(value, x, _mm256_set1_ps(coefficient));
    }
    value
}

/// `e^x` to about one unit in the last place, for x clamped to -87..88 (the range of normal f32); NaN stays NaN.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn exp(x: __m256) -> __m256 {
    // The clamps return their second argument when one is NaN.
    let x = _mm256_max_ps(_mm256_set1_ps(-87.0), _mm256_min_ps(_mm256_set1_ps(88.0), x));
    // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, the first exact in few bits, so that r keeps its precision.
    let n =
        _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(x, _mm256_set1_ps(std::f32::consts::LOG2_E)));
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN_2_HIGH), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN_2_LOW), r);
    // The Taylor series: its eighth term is below 6e-9.
    let e = polynomial(r, [1.0, 1.0, 1.0 / 2.0, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0]);
    let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
    _mm256_mul_ps(e, _mm256_castsi256_ps(power))
}

/// ln 2 cut to 9 bits: times any exponent it is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
/// What was cut off.
const LN_2_LOW: f32 = (std::f64::consts::LN_2 - 355.0 / 512.0) as f32;
