//! One forward pass over a mixture of prefill chunks and decode rows of many sequences.

use std::{ops::Range, sync::Arc};

/// Positions per block of the paged KV cache.
pub const BLOCK_TOKENS: usize = 16;

/// Index of a block in the paged KV cache.
pub type BlockId = u32;

/// Rows of many sequences, computed together.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// The input of every row; slices refer to ranges of it.
    pub rows: Vec<RowInput>,
    /// One entry per sequence in the step. Their `rows` are disjoint, in order, and cover all of `rows`.
    pub slices: Vec<Slice>,
}

/// What stands at one position.
#[derive(Debug, Clone)]
pub enum RowInput {
    /// A text token, through the embedding table.
    Token(u32),
    /// A VQ code, through the generation embedding and its aligner.
    Code(u32),
    /// Row `row` of a `[rows, hidden]` matrix, as it is.
    Embedding { values: Arc<[f32]>, row: usize },
}

/// The part of a step that belongs to one sequence.
#[derive(Debug, Clone)]
pub struct Slice {
    /// Rows of the step.
    pub rows: Range<usize>,
    /// Position in the sequence of the first row; positions before it are in the KV cache already.
    pub start: usize,
    /// Added to the position of every row for its rotary angle: the sequence is as if so many positions that it does not see lay before
    /// its first row. 0 for nearly all.
    pub shift: usize,
    /// Block table: position `p` lives in block `blocks[p / BLOCK_TOKENS]` at offset `p % BLOCK_TOKENS`. Covers every row of the slice.
    pub blocks: Vec<BlockId>,
    /// What is wanted: a head's logits for the last row, the hidden states of all rows, or nothing (in the middle of a prefill).
    pub head: Option<Head>,
    /// Whether a row may be computed without an expert that nobody can compute. Otherwise the step fails.
    pub may_lose_experts: bool,
}

/// An output head, or what stands for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Head {
    /// Text tokens: `lm_head`.
    Text,
    /// VQ codes: the generation head.
    Image,
    /// No head: the hidden states of every row of the slice after the last norm.
    Hidden,
}

/// What a step yields.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    /// For every slice, in order: logits of its last row, if it asked for them.
    pub logits: Vec<Option<Vec<f32>>>,
    /// For every slice, in order: hidden states of all its rows, `[rows, hidden]`, if it asked for them.
    pub hidden: Vec<Option<Vec<f32>>>,
    /// For every slice, in order: how many of its rows lost an expert.
    pub lost: Vec<usize>,
}

impl Slice {
    /// Number of positions of the sequence after this step.
    pub fn end(&self) -> usize {
        self.start + self.rows.len()
    }

    /// Rotary positions of the rows.
    pub fn positions(&self) -> Range<usize> {
        self.start + self.shift..self.end() + self.shift
    }
}
