//! Sums of weighted rows: 3 outputs x 32 elements stay in registers while all rows go by.

use std::arch::x86_64::*;

use super::Job;
use crate::{
    Dtype,
    avx2::{BF16, F16, F32, load, load_part, read, size, write},
};

/// Outputs that share a pass over the rows.
const TILE_OUTPUTS: usize = 3;

/// # Safety
/// As `Kernel`, on a CPU with AVX2, FMA and F16C.
pub(crate) unsafe fn transposed(job: &Job<'_>, head: usize) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features; the caller owns the head.
    unsafe {
        match job.part(head).dtype() {
            Dtype::F32 => transposed_of::<F32>(job, head),
            Dtype::BF16 => transposed_of::<BF16>(job, head),
            Dtype::F16 => transposed_of::<F16>(job, head),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn transposed_of<const DTYPE: u8>(job: &Job<'_>, head: usize) {
    let w = job.part(head);
    let rows: Vec<*const u8> = (0..w.rows()).map(|row| w.row(row).as_ptr()).collect();
    let weights: Vec<&[f32]> = (0..job.rows()).map(|row| job.x(row, head)).collect();
    // SAFETY: the caller owns this head of every row, and each is borrowed once.
    let mut outs: Vec<&mut [f32]> = (0..job.rows()).map(|row| unsafe { job.y(row, head) }).collect();
    outs.iter_mut().for_each(|out| out.fill(0.0));
    // SAFETY: the rows have as many elements as the outputs, and every output has one weight per row.
    unsafe { add_rows::<DTYPE>(&mut outs, &weights, &rows) }
}

/// `outs[o] += sum over i of weights[o][i] * rows[i]`: for every element the rows in order, and then their sum to the output, whatever the other
/// outputs. Long sums that come in many calls so keep their precision.
///
/// # Safety
/// All outputs have one length, and every row as many readable elements at least; no output has more weights than there are rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn add_rows<const DTYPE: u8>(outs: &mut [&mut [f32]], weights: &[&[f32]], rows: &[*const u8]) {
    let width = outs.first().map_or(0, |out| out.len());
    let mut begin = 0;
    while begin < width {
        let step = match width - begin {
            32.. => 32,
            8.. => 8,
            rest => rest,
        };
        for (outs, weights) in outs.chunks_mut(TILE_OUTPUTS).zip(weights.chunks(TILE_OUTPUTS)) {
            // SAFETY: `begin + step` elements are in every output and row.
            unsafe {
                match step {
                    32 => tile_of::<DTYPE, 4>(outs, weights, rows, begin),
                    8 => tile_of::<DTYPE, 1>(outs, weights, rows, begin),
                    _ => outs.iter_mut().zip(weights).for_each(|(out, weights)| add_rest::<DTYPE>(&mut out[begin..], weights, rows, begin)),
                }
            }
        }
        begin += step;
    }
}

/// `REGISTERS * 8` elements from `begin` on of up to three outputs.
///
/// # Safety
/// As `add_rows`; these elements are in every output and row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_of<const DTYPE: u8, const REGISTERS: usize>(outs: &mut [&mut [f32]], weights: &[&[f32]], rows: &[*const u8], begin: usize) {
    // SAFETY: passed on from the caller.
    unsafe {
        match (outs, weights) {
            ([a], [u]) => add_tile::<DTYPE, 1, REGISTERS>([a], [u], rows, begin),
            ([a, b], [u, v]) => add_tile::<DTYPE, 2, REGISTERS>([a, b], [u, v], rows, begin),
            ([a, b, c], [u, v, w]) => add_tile::<DTYPE, 3, REGISTERS>([a, b, c], [u, v, w], rows, begin),
            _ => unreachable!("one to three outputs, each with its weights"),
        }
    }
}

/// # Safety
/// As `tile_of`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_tile<const DTYPE: u8, const OUTPUTS: usize, const REGISTERS: usize>(
    outs: [&mut [f32]; OUTPUTS],
    weights: [&[f32]; OUTPUTS],
    rows: &[*const u8],
    begin: usize,
) {
    let mut sums = [[_mm256_setzero_ps(); REGISTERS]; OUTPUTS];
    // Outputs may end at different rows: first those that all have, then the rest of each.
    let shared = weights.iter().map(|weights| weights.len()).min().unwrap_or(0);
    for (i, row) in rows[..shared].iter().enumerate() {
        // SAFETY: the row has `begin + REGISTERS * 8` elements.
        let values = unsafe { load_row::<DTYPE, REGISTERS>(row.add(begin * size(DTYPE))) };
        for (sums, weights) in sums.iter_mut().zip(weights) {
            // SAFETY: every output has `shared` weights.
            add_row(sums, unsafe { *weights.get_unchecked(i) }, &values);
        }
    }
    for ((sums, weights), out) in sums.iter_mut().zip(weights).zip(outs) {
        for (weight, row) in weights.iter().zip(rows).skip(shared) {
            // SAFETY: the row has `begin + REGISTERS * 8` elements.
            add_row(sums, *weight, &unsafe { load_row::<DTYPE, REGISTERS>(row.add(begin * size(DTYPE))) });
        }
        for (out, sum) in out[begin..].chunks_exact_mut(8).zip(sums) {
            let total = _mm256_add_ps(read(out), *sum);
            write(out, total);
        }
    }
}

/// # Safety
/// `row` points to `REGISTERS * 8` readable elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_row<const DTYPE: u8, const REGISTERS: usize>(row: *const u8) -> [__m256; REGISTERS] {
    let mut values = [_mm256_setzero_ps(); REGISTERS];
    for (r, values) in values.iter_mut().enumerate() {
        // SAFETY: `r * 8 + 8` elements are in the row.
        *values = unsafe { load::<DTYPE>(row.add(r * 8 * size(DTYPE))) };
    }
    values
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_row<const REGISTERS: usize>(sums: &mut [__m256; REGISTERS], weight: f32, values: &[__m256; REGISTERS]) {
    let weight = _mm256_set1_ps(weight);
    for (sum, values) in sums.iter_mut().zip(values) {
        *sum = _mm256_fmadd_ps(weight, *values, *sum);
    }
}

/// The last elements of one output, fewer than eight.
///
/// # Safety
/// Every row has `begin + out.len()` readable elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_rest<const DTYPE: u8>(out: &mut [f32], weights: &[f32], rows: &[*const u8], begin: usize) {
    let mut sum = _mm256_setzero_ps();
    for (weight, row) in weights.iter().zip(rows) {
        // SAFETY: the row has as many elements from `begin` on as `out`.
        let values = unsafe { load_part::<DTYPE>(row.add(begin * size(DTYPE)), out.len()) };
        sum = _mm256_fmadd_ps(_mm256_set1_ps(*weight), values, sum);
    }
    let total = _mm256_add_ps(read(out), sum);
    write(out, total);
}
