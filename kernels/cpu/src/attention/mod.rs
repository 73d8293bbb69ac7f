//! Causal attention of some rows over a paged KV cache, prefill chunks and decode rows alike.
//!
//! `out[row, h] = sum over positions p <= position of row: softmax_p(q[row, h] · K[p, g] * scale) V[p, g]`, with `g = h / (heads / kv_heads)`
//! (spec: language.md 1.2: query heads of a group are neighbours).
//!
//! A row's result depends on its own query and cache alone: keys are taken in the order of their positions, whatever the chunk or batch
//! it comes in. The scores of a row are kept whole (two passes), so the softmax is exact.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use std::ops::Range;

use crate::{Cpu, team::Cost};

/// Size of the cache of one layer: keys and values are each `[blocks, kv_heads, block_tokens, head_dim]`, f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub blocks: usize,
    /// A multiple of four.
    pub block_tokens: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// The cache of one layer.
#[derive(Debug, Clone, Copy)]
pub struct PagedKv<'a> {
    pub shape: KvShape,
    pub keys: &'a [f32],
    pub values: &'a [f32],
}

/// Rows of one sequence.
#[derive(Debug, Clone)]
pub struct KvSlice<'a> {
    /// Rows of the queries (and of the output).
    pub rows: Range<usize>,
    /// Position in the sequence of the first row.
    pub start: usize,
    /// Position `p` lives in block `blocks[p / block_tokens]` at offset `p % block_tokens`.
    pub blocks: &'a [u32],
}

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// `[rows, heads, head_dim]`
    pub values: &'a [f32],
    pub heads: usize,
    /// Factor of `q · k`.
    pub scale: f32,
}

/// Query rows times heads of a group that share one pass over keys and values.
const QUERIES_PER_TASK: usize = 24;

/// One key-value head of some rows of a slice.
///
/// # Safety
/// No other thread may touch these rows and heads of the output meanwhile.
pub(crate) type Kernel = unsafe fn(job: &Job<'_>, task: &Task<'_>);

/// One attention, all shapes checked.
pub(crate) struct Job<'a> {
    pub queries: &'a Queries<'a>,
    pub kv: &'a PagedKv<'a>,
    out: *mut f32,
}

// SAFETY: `out` is the only field that is not shared data; whoever writes through it promises to keep to rows and heads of its own (`Kernel`).
unsafe impl Sync for Job<'_> {}

/// A part of a job.
pub(crate) struct Task<'a> {
    pub slice: &'a KvSlice<'a>,
    /// Rows of the step, inside the slice's.
    pub rows: Range<usize>,
    pub kv_head: usize,
}

impl KvShape {
    /// Values in the keys (and in the values) of one layer; `None` when that overflows.
    pub fn len(&self) -> Option<usize> {
        self.blocks.checked_mul(self.kv_heads)?.checked_mul(self.block_tokens)?.checked_mul(self.head_dim)
    }

    /// Whether the cache holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// The `[block_tokens, head_dim]` values of a block and head.
    pub(crate) fn span(&self, block: u32, kv_head: usize) -> Range<usize> {
        let size = self.block_tokens * self.head_dim;
        let begin = (block as usize * self.kv_heads + kv_head) * size;
        begin..begin + size
    }
}

impl KvSlice<'_> {
    fn check(&self, shape: &KvShape) {
        assert!((self.start + self.rows.len()).div_ceil(shape.block_tokens) <= self.blocks.len(), "the block table is too short");
        assert!(self.blocks.iter().all(|&block| (block as usize) < shape.blocks), "a block outside the cache");
    }
}

impl Task<'_> {
    /// Number of positions that row `row` sees: its own and all before it.
    pub fn limit(&self, row: usize) -> usize {
        self.slice.start + (row - self.slice.rows.start) + 1
    }

    /// The blocks that the last row sees.
    pub fn blocks(&self, block_tokens: usize) -> &[u32] {
        &self.slice.blocks[..self.limit(self.rows.end - 1).div_ceil(block_tokens)]
    }
}

impl Job<'_> {
    /// Heads per key-value head.
    pub fn group(&self) -> usize {
        self.queries.heads / self.kv.shape.kv_heads
    }

    /// Where head `group` of `kv_head` of a row lies in queries and output.
    pub fn span(&self, row: usize, kv_head: usize, group: usize) -> Range<usize> {
        let head_dim = self.kv.shape.head_dim;
        let begin = (row * self.queries.heads + kv_head * self.group() + group) * head_dim;
        begin..begin + head_dim
    }

    /// # Safety
    /// No other thread touches this head of this row, and only one such borrow lives at a time.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn out(&self, row: usize, kv_head: usize, group: usize) -> &mut [f32] {
        let span = self.span(row, kv_head, group);
        assert!(span.end <= self.queries.values.len(), "a head of a row of the queries");
        // SAFETY: the output has the size of the queries, the span lies inside it, and the caller has it for itself.
        unsafe { std::slice::from_raw_parts_mut(self.out.add(span.start), span.len()) }
    }
}

impl Cpu {
    /// Attention of all rows of all slices. `out` has the shape of the queries, `[rows, heads, head_dim]`; rows of no slice stay as they are.
    ///
    /// Slices have rows of their own. Panics when shapes do not fit. Tolerance between kernels: 2e-6 of the largest value.
    pub fn attention(&self, queries: &Queries<'_>, kv: &PagedKv<'_>, slices: &[KvSlice<'_>], out: &mut [f32]) {
        let shape = &kv.shape;
        let width = queries.heads * shape.head_dim;
        assert!(
            queries.heads > 0 && queries.heads.is_multiple_of(shape.kv_heads) && shape.block_tokens.is_multiple_of(4),
            "heads in whole groups"
        );
        assert!(Some(kv.keys.len()) == shape.len() && Some(kv.values.len()) == shape.len(), "a cache of the shape {shape:?}");
        assert!(queries.values.len() == out.len() && out.len().is_multiple_of(width), "rows of {width}");
        let job = Job { queries, kv, out: out.as_mut_ptr() };
        let mut tasks = Vec::new();
        let mut next = 0;
        for slice in slices {
            slice.check(shape);
            assert!(next <= slice.rows.start && slice.rows.end <= out.len() / width, "slices in order, with rows of their own");
            next = slice.rows.end;
            split(&job, slice, &mut tasks);
        }
        let scores = tasks.iter().map(|task| task.rows.len() * job.group() * task.limit(task.rows.end - 1)).sum::<usize>();
        self.team.run(tasks.len(), Cost::new(4 * scores * shape.head_dim, 0), |index| {
            // SAFETY: tasks differ in rows or heads, and `out` is borrowed mutably for the whole operation.
            unsafe { (self.kernels.attention)(&job, &tasks[index]) }
        });
    }

    /// Writes keys and values `[rows, kv_heads, head_dim]` of all slices to the cache of one layer.
    pub fn store_kv(&self, shape: &KvShape, new: &[f32], slices: &[KvSlice<'_>], cache: &mut [f32]) {
        let head_dim = shape.head_dim;
        let width = shape.kv_heads * head_dim;
        for slice in slices {
            slice.check(shape);
            for (i, row) in new[slice.rows.start * width..slice.rows.end * width].chunks_exact(width).enumerate() {
                let position = slice.start + i;
                let offset = position % shape.block_tokens * head_dim;
                for (kv_head, values) in row.chunks_exact(head_dim).enumerate() {
                    let begin = shape.span(slice.blocks[position / shape.block_tokens], kv_head).start + offset;
                    cache[begin..begin + head_dim].copy_from_slice(values);
                }
            }
        }
    }
}

/// Cuts a slice into tasks.
fn split<'a>(job: &Job<'_>, slice: &'a KvSlice<'a>, tasks: &mut Vec<Task<'a>>) {
    let step = (QUERIES_PER_TASK / job.group()).max(1);
    for begin in slice.rows.clone().step_by(step) {
        let rows = begin..(begin + step).min(slice.rows.end);
        tasks.extend((0..job.kv.shape.kv_heads).map(|kv_head| Task { slice, rows: rows.clone(), kv_head }));
    }
}
