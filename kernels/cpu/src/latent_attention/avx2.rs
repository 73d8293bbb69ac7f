//! All queries of a task go through the cache together, tile by tile: scores as tiles of the matrix product (up to 3 queries x 4 keys), the
//! running softmax, sums over the tile's rows.

use std::arch::x86_64::*;

use super::{Job, Task};
use crate::{
    avx2::{F32, exp, max, read, sum, write},
    heads::avx2::add_rows,
    matmul::avx2::tile,
};

/// Blocks of the cache per tile: with 16 positions each, a tile of rows of 576 values fits the second cache.
const TILE_BLOCKS: usize = 4;

/// # Safety
/// As `Kernel`, on a CPU with AVX2, FMA and F16C.
pub(crate) unsafe fn attend(job: &Job<'_>, task: &Task<'_>) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features; the caller owns the queries.
    unsafe { attend_tiles(job, task) }
}

/// What is known of a query's softmax after some tiles; its output so far is relative to `largest`, too.
#[derive(Clone, Copy)]
struct Running {
    largest: f32,
    total: f32,
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn attend_tiles(job: &Job<'_>, task: &Task<'_>) {
    let (width, tile) = (job.kv.shape.width(), TILE_BLOCKS * job.kv.shape.block_tokens);
    let limits: Vec<usize> = task.queries.clone().map(|query| job.limit(task, query)).collect(); // ascending
    let queries: Vec<f32> = task.queries.clone().flat_map(|query| job.query(task, query)).flatten().copied().collect(); // [queries, width]
    // SAFETY: the caller owns these queries, and each is borrowed once.
    let mut outs: Vec<&mut [f32]> = task.queries.clone().map(|query| unsafe { job.out(task, query) }).collect();
    outs.iter_mut().for_each(|out| out.fill(0.0));
    let mut running = vec![Running { largest: f32::NEG_INFINITY, total: 0.0 }; limits.len()];
    let mut scores = vec![0.0; limits.len() * tile]; // [queries, tile]

    for first in (0..limits.last().copied().unwrap_or(0)).step_by(tile) {
        let rows = tile_rows(job, task, first, tile);
        let begin = limits.partition_point(|&limit| limit <= first); // queries that see something of this tile
        let scores = &mut scores[begin * tile..];
        // SAFETY: every query and every row has `width` elements.
        unsafe { score_tile(&queries[begin * width..], &rows, job.queries.scale, scores, [width, tile]) }
        let seen = |query: usize| (limits[query] - first).min(tile);
        for (i, scores) in scores.chunks_exact_mut(tile).enumerate() {
            let query = begin + i;
            update(&mut running[query], &mut scores[..seen(query)], outs[query]);
        }
        let weights: Vec<&[f32]> = scores.chunks_exact(tile).enumerate().map(|(i, scores)| &scores[..seen(begin + i)]).collect();
        // SAFETY: the rows have at least `rank` elements, which the outputs have, and reach beyond every limit.
        unsafe { add_rows::<F32>(&mut outs[begin..], &weights, &rows) }
    }
    for (out, running) in outs.iter_mut().zip(&running) {
        multiply(out, 1.0 / running.total);
    }
}

/// The rows of the tile that begins at position `first`: whole blocks, up to the last that the task sees.
fn tile_rows(job: &Job<'_>, task: &Task<'_>, first: usize, tile: usize) -> Vec<*const u8> {
    let block_tokens = job.kv.shape.block_tokens;
    let end = job.limit(task, task.queries.end - 1).next_multiple_of(block_tokens).min(first + tile);
    (first..end).map(|position| job.key(task, position).as_ptr().cast()).collect()
}

/// `scores[q, k] = queries[q] · rows[k] * scale`, `queries` `[queries, width]`, `scores` `[queries, tile]`.
///
/// # Safety
/// Every row has `width` readable elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn score_tile(queries: &[f32], rows: &[*const u8], scale: f32, scores: &mut [f32], [width, tile_width]: [usize; 2]) {
    let scale = _mm_set1_ps(scale);
    for (keys_index, keys) in rows.as_chunks::<4>().0.iter().enumerate() {
        for (queries, scores) in queries.chunks(3 * width).zip(scores.chunks_mut(3 * tile_width)) {
            let query = |i: usize| queries[i * width..].as_ptr();
            let mut sums = [_mm_setzero_ps(); 3];
            // SAFETY: every query and every key has `width` elements.
            unsafe {
                match queries.len() / width {
                    1 => sums[..1].copy_from_slice(&tile::<F32, 1, false>([query(0)], *keys, width, 0)),
                    2 => sums[..2].copy_from_slice(&tile::<F32, 2, false>([query(0), query(1)], *keys, width, 0)),
                    _ => sums = tile::<F32, 3, false>([query(0), query(1), query(2)], *keys, width, 0),
                }
            }
            for (scores, sum) in scores.chunks_exact_mut(tile_width).zip(sums) {
                let out = &mut scores[keys_index * 4..][..4];
                // SAFETY: four values into four.
                unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm_mul_ps(sum, scale)) }
            }
        }
    }
}

/// Takes the scores of a tile into a query's softmax: they become weights relative to the largest score so far, and so does what was before.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn update(running: &mut Running, scores: &mut [f32], out: &mut [f32]) {
    let (whole, rest) = scores.as_chunks_mut::<8>();
    let mut largest = _mm256_set1_ps(running.largest);
    for scores in &*whole {
        largest = _mm256_max_ps(largest, read(scores));
    }
    let largest = rest.iter().copied().fold(max(largest), f32::max);
    if largest > running.largest {
        let scale = _mm256_cvtss_f32(exp(_mm256_set1_ps(running.largest - largest)));
        running.total *= scale;
        multiply(out, scale);
        running.largest = largest;
    }

    let largest = _mm256_set1_ps(running.largest);
    let mut total = _mm256_setzero_ps();
    for scores in &mut *whole {
        let weights = exp(_mm256_sub_ps(read(scores), largest));
        total = _mm256_add_ps(total, weights);
        write(scores, weights);
    }
    running.total += sum(total);
    if !rest.is_empty() {
        let weights = exp(_mm256_sub_ps(read(rest), largest));
        write(rest, weights);
        running.total += rest.iter().sum::<f32>();
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply(values: &mut [f32], factor: f32) {
    let factor = _mm256_set1_ps(factor);
    for values in values.chunks_mut(8) {
        let product = _mm256_mul_ps(read(values), factor);
        write(values, product);
    }
}
