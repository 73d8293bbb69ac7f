//! Registers of eight: eight pairs of halves, four of neighbours.

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

pub(crate) fn rope_neighbours(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features.
    unsafe { rope_fours(row, cos, sin) }
}

/// Four pairs at a time, which fill one register.
#[target_feature(enable = "avx2,fma,f16c")]
fn rope_fours(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    let twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    for head in row.chunks_exact_mut(2 * cos.len()) {
        for ((pairs, cos), sin) in head.chunks_mut(8).zip(cos.chunks(4)).zip(sin.chunks(4)) {
            let (x, cos, sin) = (read(pairs), read(cos), read(sin));
            let swapped = _mm256_permute_ps::<0b10_11_00_01>(x);
            let turned = _mm256_mul_ps(swapped, _mm256_permutevar8x32_ps(sin, twice));
            // Even places: x * cos - neighbour * sin; odd places: x * cos + neighbour * sin.
            write(pairs, _mm256_fmaddsub_ps(x, _mm256_permutevar8x32_ps(cos, twice), turned));
        }
    }
}
