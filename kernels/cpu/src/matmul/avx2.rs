//! Tiles of up to 3 rows x 4 columns, one register of eight running sums each.
//!
//! ```text
//! for every block of k:
//!     sums[r][c][lane] += x[r][k + lane] * w[c][k + lane]      for k in steps of 8, zeros past the end
//!     y[r][c] += across(sums[r][c])
//! ```
//!
//! 12 sums + 3 activations + 1 weight fill the 16 registers; 12 multiplications for 7 loads keep both multipliers busy.

use std::{arch::x86_64::*, ops::Range};

use super::{BLOCK_K, Job, Kernel, TILE_COLUMNS};
use crate::{
    Dtype,
    avx2::{BF16, F16, F32, load, load_part, size, sum4},
};

pub(crate) const KERNEL: Kernel = Kernel { pack, columns };

/// Up to this many rows, weights are widened anew for every tile: cheaper than a detour through memory.
pub(crate) const DIRECT_ROWS: usize = 9;

/// Rows of a tile.
const TILE_ROWS: usize = 3;

/// Rows of `x` that are run through before the next four weight rows are fetched: 192 KiB of `x`, which fit the second cache.
const BLOCK_ROWS: usize = 96;

/// `x` `[rows, k]` as `[k / BLOCK_K, rows, BLOCK_K]` with the last block cut to the next multiple of eight: whatever `k`, rows of a block
/// lie together and do not compete for the same lines of the cache.
fn pack(x: &[f32], k: usize) -> Vec<f32> {
    let rows = x.len() / k;
    if rows <= DIRECT_ROWS {
        return Vec::new();
    }
    let mut packed = Vec::with_capacity(rows * k.next_multiple_of(8));
    for begin in (0..k).step_by(BLOCK_K) {
        let length = BLOCK_K.min(k - begin);
        for row in x.chunks_exact(k) {
            packed.extend_from_slice(&row[begin..begin + length]);
            packed.resize(packed.len().next_multiple_of(8), 0.0);
        }
    }
    packed
}

/// # Safety
/// As `Kernel::columns`, on a CPU with AVX2, FMA and F16C.
unsafe fn columns(job: &Job<'_>, columns: Range<usize>) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features; the caller owns the columns.
    unsafe {
        match job.w.dtype() {
            Dtype::F32 => columns_of::<F32>(job, columns),
            Dtype::BF16 => columns_of::<BF16>(job, columns),
            Dtype::F16 => columns_of::<F16>(job, columns),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn columns_of<const DTYPE: u8>(job: &Job<'_>, columns: Range<usize>) {
    // SAFETY: passed on from the caller.
    unsafe {
        if job.packed.is_empty() {
            direct::<DTYPE>(job, columns);
        } else {
            through_panels::<DTYPE>(job, columns);
        }
    }
}

/// Few rows: every weight is read once from memory and at most a few times more from the first cache.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn direct<const DTYPE: u8>(job: &Job<'_>, columns: Range<usize>) {
    let k = job.w.columns();
    for column in columns.clone().step_by(TILE_COLUMNS) {
        let width = TILE_COLUMNS.min(columns.end - column);
        let w: [&[u8]; TILE_COLUMNS] = std::array::from_fn(|c| job.w.row(column + c.min(width - 1)));
        for begin in (0..k).step_by(BLOCK_K) {
            let length = BLOCK_K.min(k - begin);
            let weights = w.map(|row| row[begin * size(DTYPE)..].as_ptr());
            for row in (0..job.rows).step_by(TILE_ROWS) {
                let x = &job.x[row * k + begin..];
                let place = Place { row, column, width, first: begin == 0 };
                // SAFETY: rows of `x` are `k` apart and hold `length` elements from `begin`; so do the weight rows; the caller owns the columns.
                unsafe {
                    match row {
                        0 => tiles::<DTYPE, true>(job, &place, x, k, weights, length),
                        _ => tiles::<DTYPE, false>(job, &place, x, k, weights, length),
                    }
                }
            }
        }
        // SAFETY: the caller owns the columns.
        unsafe { add_bias(job, 0..job.rows, column..column + width) }
    }
}

/// Many rows: four weight rows at a time are widened into a panel, which all rows of a block then use.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn through_panels<const DTYPE: u8>(job: &Job<'_>, columns: Range<usize>) {
    let k = job.w.columns();
    let mut panel = [0.0f32; TILE_COLUMNS * BLOCK_K];
    for first_row in (0..job.rows).step_by(BLOCK_ROWS) {
        let rows = first_row..(first_row + BLOCK_ROWS).min(job.rows);
        for begin in (0..k).step_by(BLOCK_K) {
            let length = BLOCK_K.min(k - begin);
            let padded = length.next_multiple_of(8);
            let block = &job.packed[begin * job.rows..][..padded * job.rows]; // [rows, padded]
            for column in columns.clone().step_by(TILE_COLUMNS) {
                let width = TILE_COLUMNS.min(columns.end - column);
                for c in 0..TILE_COLUMNS {
                    let row = &job.w.row(column + c.min(width - 1))[begin * size(DTYPE)..];
                    // SAFETY: the row holds `length` elements from `begin`, the panel row `padded` of them.
                    unsafe { widen::<DTYPE>(row.as_ptr(), length, &mut panel[c * padded..(c + 1) * padded]) }
                    fetch(row.as_ptr().wrapping_add(TILE_COLUMNS * k * size(DTYPE)), length * size(DTYPE));
                }
                let weights = std::array::from_fn(|c| panel[c * padded..].as_ptr().cast());
                for row in rows.clone().step_by(TILE_ROWS) {
                    let place = Place { row, column, width, first: begin == 0 };
                    // SAFETY: rows of the block and of the panel hold `padded` elements; the caller owns the columns.
                    unsafe { tiles::<F32, false>(job, &place, &block[row * padded..], padded, weights, padded) }
                }
            }
        }
        // SAFETY: the caller owns the columns.
        unsafe { add_bias(job, rows, columns.clone()) }
    }
}

/// Where a tile's sums go.
struct Place {
    row: usize,
    column: usize,
    /// Columns that exist; the tile computes four.
    width: usize,
    /// Whether the sums are the first of their elements, rather than to be added.
    first: bool,
}

/// One tile of up to three rows, as many as there are from `place.row` on.
///
/// # Safety
/// `x` holds those rows, `stride` apart, `length` elements each; every pointer of `w` has `length` elements; the caller owns the columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tiles<const DTYPE: u8, const FETCH: bool>(
    job: &Job<'_>,
    place: &Place,
    x: &[f32],
    stride: usize,
    w: [*const u8; 4],
    length: usize,
) {
    let row = |r: usize| x[r * stride..].as_ptr();
    let ahead = if FETCH { TILE_COLUMNS * job.w.columns() * size(DTYPE) } else { 0 };
    // SAFETY: passed on from the caller.
    unsafe {
        match job.rows - place.row {
            1 => store(job, place, tile::<DTYPE, 1, FETCH>([row(0)], w, length, ahead)),
            2 => store(job, place, tile::<DTYPE, 2, FETCH>([row(0), row(1)], w, length, ahead)),
            _ => store(job, place, tile::<DTYPE, 3, FETCH>([row(0), row(1), row(2)], w, length, ahead)),
        }
    }
}

/// The sums over `length` terms of `ROWS` rows with four columns, in the one order that all paths share.
///
/// With `FETCH`, what lies `ahead` bytes after the weights is called into the cache: rows end too soon for the hardware to do that by itself.
///
/// # Safety
/// Every pointer has `length` readable elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn tile<const DTYPE: u8, const ROWS: usize, const FETCH: bool>(
    x: [*const f32; ROWS],
    w: [*const u8; 4],
    length: usize,
    ahead: usize,
) -> [__m128; ROWS] {
    let mut sums = [[_mm256_setzero_ps(); 4]; ROWS];
    let line = 64 / size(DTYPE); // elements
    let mut k = 0;
    while k + line <= length {
        if FETCH {
            for w in w {
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(k * size(DTYPE) + ahead).cast());
            }
        }
        for step in (0..line).step_by(8) {
            // SAFETY: `k + step + 8 <= length`.
            unsafe { add_eight::<DTYPE, ROWS>(&mut sums, x, w, k + step) }
        }
        k += line;
    }
    while k + 8 <= length {
        // SAFETY: `k + 8 <= length`.
        unsafe { add_eight::<DTYPE, ROWS>(&mut sums, x, w, k) }
        k += 8;
    }
    if k < length {
        let mut xs = [_mm256_setzero_ps(); ROWS];
        for r in 0..ROWS {
            // SAFETY: `length - k` elements are left.
            xs[r] = unsafe { load_part::<F32>(x[r].add(k).cast(), length - k) };
        }
        for c in 0..4 {
            // SAFETY: `length - k` elements are left.
            let weight = unsafe { load_part::<DTYPE>(w[c].add(k * size(DTYPE)), length - k) };
            for r in 0..ROWS {
                sums[r][c] = _mm256_fmadd_ps(xs[r], weight, sums[r][c]);
            }
        }
    }
    let mut across = [_mm_setzero_ps(); ROWS];
    for r in 0..ROWS {
        across[r] = sum4(sums[r]);
    }
    across
}

/// The terms `k .. k + 8` of all sums of a tile.
///
/// # Safety
/// Every pointer has `k + 8` readable elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_eight<const DTYPE: u8, const ROWS: usize>(
    sums: &mut [[__m256; 4]; ROWS],
    x: [*const f32; ROWS],
    w: [*const u8; 4],
    k: usize,
) {
    let mut xs = [_mm256_setzero_ps(); ROWS];
    for r in 0..ROWS {
        // SAFETY: the caller promises the elements.
        xs[r] = unsafe { load::<F32>(x[r].add(k).cast()) };
    }
    for c in 0..4 {
        // SAFETY: the caller promises the elements.
        let weight = unsafe { load::<DTYPE>(w[c].add(k * size(DTYPE))) };
        for r in 0..ROWS {
            sums[r][c] = _mm256_fmadd_ps(xs[r], weight, sums[r][c]);
        }
    }
}

/// Writes or adds a tile's sums.
///
/// # Safety
/// The place lies inside `y` and the caller owns its columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store<const ROWS: usize>(job: &Job<'_>, place: &Place, sums: [__m128; ROWS]) {
    for (r, sums) in sums.into_iter().enumerate() {
        // SAFETY: `width` columns from `place.column` on exist in this row and are the caller's; four values fit the array.
        unsafe {
            let y = job.row(place.row + r).add(place.column);
            if place.width == TILE_COLUMNS {
                let before = if place.first { _mm_setzero_ps() } else { _mm_loadu_ps(y) };
                _mm_storeu_ps(y, _mm_add_ps(before, sums));
            } else {
                let mut values = [0.0; TILE_COLUMNS];
                _mm_storeu_ps(values.as_mut_ptr(), sums);
                for (c, &value) in values[..place.width].iter().enumerate() {
                    *y.add(c) = if place.first { 0.0 } else { *y.add(c) } + value;
                }
            }
        }
    }
}

/// # Safety
/// The caller owns the columns.
unsafe fn add_bias(job: &Job<'_>, rows: Range<usize>, columns: Range<usize>) {
    let Some(bias) = job.bias else { return };
    for row in rows {
        for column in columns.clone() {
            // SAFETY: inside `y`, and the caller owns the columns.
            unsafe { *job.row(row).add(column) += bias[column] }
        }
    }
}

/// Calls `bytes` from `p` on into the second cache; `p` need not be valid.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fetch(p: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(line).cast());
    }
}

/// # Safety
/// `p` has `length` readable elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen<const DTYPE: u8>(p: *const u8, length: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let left = length - i * 8;
        // SAFETY: `left` elements are left, and `out` takes eight.
        unsafe {
            let p = p.add(i * 8 * size(DTYPE));
            let values = if left >= 8 { load::<DTYPE>(p) } else { load_part::<DTYPE>(p, left) };
            _mm256_storeu_ps(out.as_mut_ptr(), values);
        }
    }
}
