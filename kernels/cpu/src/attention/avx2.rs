//! One pass over the keys, block by block, for all rows and heads of a group; softmax; one pass over the values.
//!
//! Scores are tiles of the matrix product (up to 3 queries x 4 keys); the sums over values take 64 dimensions at a time in registers.

use std::arch::x86_64::*;

use super::{Job, Task};
use crate::{
    avx2::{F32, load, load_part, read, write},
    matmul::avx2::tile,
    softmax::avx2::softmax_eights,
};

/// # Safety
/// As `Kernel`, on a CPU with AVX2, FMA and F16C.
pub(crate) unsafe fn attend(job: &Job<'_>, task: &Task<'_>) {
    // SAFETY: the table that holds this function is only handed out on a CPU with these features; the caller owns rows and heads.
    unsafe { attend_blocks(job, task) }
}

/// A query of a task: a row and a head of the group.
struct Query {
    row: usize,
    group: usize,
    /// Positions it sees.
    limit: usize,
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn attend_blocks(job: &Job<'_>, task: &Task<'_>) {
    let block_tokens = job.kv.shape.block_tokens;
    let blocks = task.blocks(block_tokens);
    let stride = blocks.len() * block_tokens;
    let queries: Vec<_> =
        task.rows.clone().flat_map(|row| (0..job.group()).map(move |group| Query { row, group, limit: task.limit(row) })).collect();
    let mut scores = vec![0.0; queries.len() * stride]; // [queries, positions]

    for (i, &block) in blocks.iter().enumerate() {
        let keys = &job.kv.keys[job.kv.shape.span(block, task.kv_head)];
        score_block(job, task.kv_head, &queries, keys, &mut scores[i * block_tokens..], stride);
    }
    for (query, scores) in queries.iter().zip(scores.chunks_exact_mut(stride)) {
        softmax_eights(&mut scores[..query.limit]);
        // SAFETY: the caller owns these rows and heads.
        unsafe { job.out(query.row, task.kv_head, query.group) }.fill(0.0);
    }
    for (i, &block) in blocks.iter().enumerate() {
        let values = &job.kv.values[job.kv.shape.span(block, task.kv_head)];
        for (query, scores) in queries.iter().zip(scores.chunks_exact(stride)) {
            let weights = &scores[i * block_tokens..query.limit.clamp(i * block_tokens, (i + 1) * block_tokens)];
            // SAFETY: the caller owns these rows and heads, and the borrow ends with the call.
            let out = unsafe { job.out(query.row, task.kv_head, query.group) };
            add_weighted(out, weights, values);
        }
    }
}

/// Scores of all queries against one block of keys `[block_tokens, head_dim]`; those past a query's limit are not meant to be read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn score_block(job: &Job<'_>, kv_head: usize, queries: &[Query], keys: &[f32], scores: &mut [f32], stride: usize) {
    let head_dim = job.kv.shape.head_dim;
    let scale = _mm_set1_ps(job.queries.scale);
    for (tile_index, key) in keys.chunks_exact(4 * head_dim).enumerate() {
        let keys = [0, 1, 2, 3].map(|k| key[k * head_dim..].as_ptr().cast());
        for (chunk_index, chunk) in queries.chunks(3).enumerate() {
            let query = |i: usize| job.queries.values[job.span(chunk[i].row, kv_head, chunk[i].group)].as_ptr();
            let mut sums = [_mm_setzero_ps(); 3];
            // SAFETY: every query and every key has `head_dim` elements.
            unsafe {
                match chunk.len() {
                    1 => sums[..1].copy_from_slice(&tile::<F32, 1, false>([query(0)], keys, head_dim, 0)),
                    2 => sums[..2].copy_from_slice(&tile::<F32, 2, false>([query(0), query(1)], keys, head_dim, 0)),
                    _ => sums = tile::<F32, 3, false>([query(0), query(1), query(2)], keys, head_dim, 0),
                }
            }
            for (i, &sum) in sums[..chunk.len()].iter().enumerate() {
                let out = &mut scores[(chunk_index * 3 + i) * stride + tile_index * 4..][..4];
                // SAFETY: four values into four.
                unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm_mul_ps(sum, scale)) }
            }
        }
    }
}

/// `out += weights · values`, the rows of `values` being as long as `out`; rows in order for every element.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_weighted(out: &mut [f32], weights: &[f32], values: &[f32]) {
    let head_dim = out.len();
    let mut begin = 0;
    while begin < head_dim {
        let values = &values[begin..];
        let out = &mut out[begin..];
        begin += match out.len() {
            64.. => add_weighted_registers::<8>(out, weights, values, head_dim),
            16.. => add_weighted_registers::<2>(out, weights, values, head_dim),
            8.. => add_weighted_registers::<1>(out, weights, values, head_dim),
            _ => add_weighted_rest(out, weights, values, head_dim),
        };
    }
}

/// The first `REGISTERS * 8` elements; returns how many these are.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_weighted_registers<const REGISTERS: usize>(out: &mut [f32], weights: &[f32], values: &[f32], stride: usize) -> usize {
    let mut sums = [_mm256_setzero_ps(); REGISTERS];
    for (sum, out) in sums.iter_mut().zip(out.chunks_exact(8)) {
        *sum = read(out);
    }
    for (i, &weight) in weights.iter().enumerate() {
        let weight = _mm256_set1_ps(weight);
        let row = &values[i * stride..][..REGISTERS * 8];
        for (r, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `r * 8 + 8` elements are in the row.
            *sum = _mm256_fmadd_ps(weight, unsafe { load::<F32>(row.as_ptr().add(r * 8).cast()) }, *sum);
        }
    }
    for (sum, out) in sums.into_iter().zip(out.chunks_exact_mut(8)) {
        write(out, sum);
    }
    REGISTERS * 8
}

/// Fewer than eight elements; returns how many these are.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_weighted_rest(out: &mut [f32], weights: &[f32], values: &[f32], stride: usize) -> usize {
    let mut sum = read(out);
    for (i, &weight) in weights.iter().enumerate() {
        let row = &values[i * stride..][..out.len()];
        // SAFETY: the row has as many elements as `out`.
        let value = unsafe { load_part::<F32>(row.as_ptr().cast(), row.len()) };
        sum = _mm256_fmadd_ps(_mm256_set1_ps(weight), value, sum);
    }
    write(out, sum);
    out.len()
}
