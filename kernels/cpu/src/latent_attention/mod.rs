//! Causal attention over a paged cache of compressed keys and values: multi-head latent attention in its absorbed form (spec: language.md 2.5).
//!
//! The cache holds one row `[c ; k_pe]` per position, shared by all heads. With `score[p] = (q_c · c_p + q_pe · k_pe_p) * scale`,
//! `out[row, h] = sum over positions p <= position of row: softmax_p(score[p]) c_p`; the caller has brought the queries into the space of `c`
//! and brings the result out of it (`heads`).
//!
//! A query's result depends on itself and its cache alone: keys are taken in the order of their positions, in tiles that begin at fixed
//! positions, whatever the chunk, batch or number of threads. Contexts are long here, so scores are not kept: the softmax is carried from tile
//! to tile (the largest score so far, the sum and the output relative to it).

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use std::ops::Range;

use crate::{Cpu, KvSlice, team::Cost};

/// Size of the cache of one layer: `[blocks, block_tokens, rank + rope]`, f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentShape {
    pub blocks: usize,
    /// A multiple of four.
    pub block_tokens: usize,
    /// Width of `c`.
    pub rank: usize,
    /// Width of `k_pe`.
    pub rope: usize,
}

/// The cache of one layer.
#[derive(Debug, Clone, Copy)]
pub struct LatentKv<'a> {
    pub shape: LatentShape,
    pub rows: &'a [f32],
}

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct LatentQueries<'a> {
    /// `q_c` `[rows, heads, rank]`
    pub latent: &'a [f32],
    /// `q_pe` `[rows, heads, rope]`
    pub rotary: &'a [f32],
    pub heads: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// Most queries that share one pass over the cache: with rows of 576 values they and their outputs fit the second cache beside a tile.
const QUERIES_PER_TASK: usize = 24;

/// Queries that the kernels compute together; tasks are multiples of it.
const QUERIES_PER_TILE: usize = 3;

/// Some queries of a slice.
///
/// # Safety
/// No other thread may touch these queries' part of the output meanwhile.
pub(crate) type Kernel = unsafe fn(job: &Job<'_>, task: &Task<'_>);

/// One attention, all shapes checked.
pub(crate) struct Job<'a> {
    pub queries: &'a LatentQueries<'a>,
    pub kv: &'a LatentKv<'a>,
    out: *mut f32,
}

// SAFETY: `out` is the only field that is not shared data; whoever writes through it promises to keep to queries of its own (`Kernel`).
unsafe impl Sync for Job<'_> {}

/// A part of a job.
pub(crate) struct Task<'a> {
    slice: &'a KvSlice<'a>,
    /// Queries of the slice, counted by rows and then by heads.
    queries: Range<usize>,
}

impl LatentShape {
    /// Values per position.
    pub fn width(&self) -> usize {
        self.rank + self.rope
    }

    /// Values in the cache of one layer; `None` when that overflows.
    pub fn len(&self) -> Option<usize> {
        self.blocks.checked_mul(self.block_tokens)?.checked_mul(self.rank.checked_add(self.rope)?)
    }

    /// Whether the cache holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    fn check(&self, slice: &KvSlice<'_>) {
        assert!((slice.start + slice.rows.len()).div_ceil(self.block_tokens) <= slice.blocks.len(), "the block table is too short");
        assert!(slice.blocks.iter().all(|&block| (block as usize) < self.blocks), "a block outside the cache");
    }

    /// Where the row of a position of a slice lies.
    fn span(&self, slice: &KvSlice<'_>, position: usize) -> Range<usize> {
        let begin = (slice.blocks[position / self.block_tokens] as usize * self.block_tokens + position % self.block_tokens) * self.width();
        begin..begin + self.width()
    }
}

impl Job<'_> {
    /// Number of positions that a query of a slice sees: its own and all before it.
    pub fn limit(&self, task: &Task<'_>, query: usize) -> usize {
        task.slice.start + query / self.queries.heads + 1
    }

    /// `[c ; k_pe]` of a position.
    pub fn key(&self, task: &Task<'_>, position: usize) -> &[f32] {
        &self.kv.rows[self.kv.shape.span(task.slice, position)]
    }

    /// `q_c` and `q_pe` of a query.
    pub fn query(&self, task: &Task<'_>, query: usize) -> [&[f32]; 2] {
        let LatentShape { rank, rope, .. } = self.kv.shape;
        let at = task.slice.rows.start * self.queries.heads + query;
        [&self.queries.latent[at * rank..(at + 1) * rank], &self.queries.rotary[at * rope..(at + 1) * rope]]
    }

    /// # Safety
    /// No other thread touches the output of this query, and only one such borrow lives at a time.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn out(&self, task: &Task<'_>, query: usize) -> &mut [f32] {
        let rank = self.kv.shape.rank;
        let begin = (task.slice.rows.start * self.queries.heads + query) * rank;
        assert!(begin + rank <= self.queries.latent.len(), "a head of a row of the queries");
        // SAFETY: the output has the size of `q_c`, the span lies inside it, and the caller has it for itself.
        unsafe { std::slice::from_raw_parts_mut(self.out.add(begin), rank) }
    }
}

impl Cpu {
    /// Attention of all rows of all slices: `out` `[rows, heads, rank]`; rows of no slice stay as they are.
    ///
    /// Slices have rows of their own. Panics when shapes do not fit. Tolerance between kernels: 3e-6 of the largest value.
    pub fn latent_attention(&self, queries: &LatentQueries<'_>, kv: &LatentKv<'_>, slices: &[KvSlice<'_>], out: &mut [f32]) {
        let shape = &kv.shape;
        assert!(queries.heads > 0 && shape.rank > 0 && shape.block_tokens.is_multiple_of(4), "queries over a cache of the shape {shape:?}");
        assert!(Some(kv.rows.len()) == shape.len(), "a cache of the shape {shape:?}");
        let rows = out.len() / (queries.heads * shape.rank);
        let fits = |values: usize, width: usize| values == rows * queries.heads * width;
        assert!(
            fits(out.len(), shape.rank) && fits(queries.latent.len(), shape.rank) && fits(queries.rotary.len(), shape.rope),
            "queries of whole rows"
        );
        let mut next = 0;
        for slice in slices {
            shape.check(slice);
            assert!(next <= slice.rows.start && slice.rows.end <= rows, "slices in order, with rows of their own");
            next = slice.rows.end;
        }
        let job = Job { queries, kv, out: out.as_mut_ptr() };
        let tasks = split(queries.heads, slices, self.threads());
        let scores: usize = tasks.iter().map(|task| task.queries.len() * job.limit(task, task.queries.end - 1)).sum();
        self.team.run(tasks.len(), Cost::new(2 * scores * (shape.width() + shape.rank), 0), |index| {
            // SAFETY: tasks differ in queries, and `out` is borrowed mutably for the whole operation.
            unsafe { (self.kernels.latent_attention)(&job, &tasks[index]) }
        });
    }

    /// Writes `c` `[rows, rank]` and `k_pe` `[rows, rope]` of all slices to the cache of one layer.
    pub fn store_latent(&self, shape: &LatentShape, [latent, rotary]: [&[f32]; 2], slices: &[KvSlice<'_>], cache: &mut [f32]) {
        let LatentShape { rank, rope, .. } = *shape;
        for slice in slices {
            shape.check(slice);
            for (i, row) in slice.rows.clone().enumerate() {
                let (c, k_pe) = cache[shape.span(slice, slice.start + i)].split_at_mut(rank);
                c.copy_from_slice(&latent[row * rank..(row + 1) * rank]);
                k_pe.copy_from_slice(&rotary[row * rope..(row + 1) * rope]);
            }
        }
    }
}

/// Cuts the queries of all slices into tasks: large enough to share passes over the cache, small enough for all threads to have some.
fn split<'a>(heads: usize, slices: &'a [KvSlice<'a>], threads: usize) -> Vec<Task<'a>> {
    let queries: usize = slices.iter().map(|slice| slice.rows.len() * heads).sum();
    let step = queries.div_ceil(threads).next_multiple_of(QUERIES_PER_TILE).min(QUERIES_PER_TASK);
    let mut tasks = Vec::new();
    for slice in slices {
        let end = slice.rows.len() * heads;
        tasks.extend((0..end).step_by(step.max(1)).map(|begin| Task { slice, queries: begin..(begin + step).min(end) }));
    }
    tasks
}
