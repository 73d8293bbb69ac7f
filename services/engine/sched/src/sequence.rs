use std::sync::Arc;

use domain::{Prompt, Segment};
use layers::{BLOCK_TOKENS, BlockId, Head, RowInput, Slice};

use crate::{
    pool::BlockPool,
    prefix::{self, BlockKey, Chain},
};

/// Inputs of one sequence and the blocks that hold what has been computed of them.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Input of every known position: the prompt, then the outputs fed back.
    inputs: Vec<RowInput>,
    /// Names of full blocks; absent when the prefix cache is off.
    chain: Option<Chain>,
    /// Blocks of positions 0 onward; empty while the sequence waits.
    blocks: Vec<BlockId>,
    /// Positions whose values are in the blocks.
    computed: usize,
    /// Leading blocks that need no naming: shared ones, and own ones named already.
    named: usize,
    /// What is computed again and again behind the prompt, in sequences of a flow.
    tail: Option<Tail>,
    /// Whether positions may be computed without an expert that nobody can compute.
    may_lose_experts: bool,
}

/// The part of a sequence behind its prompt that holds one set of rows after the other.
#[derive(Debug, Clone, Copy)]
struct Tail {
    /// Where it begins: the length of the prompt.
    start: usize,
    /// Positions.
    rows: usize,
    /// Added to the rotary position of its rows.
    shift: usize,
}

impl Sequence {
    /// A sequence that knows its prompt and has computed nothing.
    pub fn new(prompt: &Prompt, prefix_cache: bool) -> Self {
        let mut sequence = Self {
            inputs: Vec::with_capacity(prompt.len()),
            chain: prefix_cache.then(Chain::new),
            blocks: Vec::new(),
            computed: 0,
            named: 0,
            tail: None,
            may_lose_experts: false,
        };
        for segment in &prompt.segments {
            match segment {
                Segment::Tokens(ids) => ids.iter().for_each(|&id| sequence.push_token(id)),
                Segment::Embeddings(embeddings) => sequence.push_embeddings(embeddings),
            }
        }
        sequence
    }

    /// A sequence whose prompt will be followed by sets of `rows` rows, whose rotary positions are `shift` higher than their places.
    pub fn with_tail(prompt: &Prompt, rows: usize, shift: usize, prefix_cache: bool) -> Self {
        Self { tail: Some(Tail { start: prompt.len(), rows, shift }), ..Self::new(prompt, prefix_cache) }
    }

    /// The same sequence, whose positions may be computed without an expert that nobody can compute.
    pub fn allowing_loss(self) -> Self {
        Self { may_lose_experts: true, ..self }
    }

    /// A position lost an expert: from here on, blocks get no name, because nobody who asks for one would expect such contents.
    pub fn taint(&mut self) {
        self.chain = None;
    }

    /// Put rows `[rows, hidden]` in the place of those behind the prompt. They never get a name: nobody else has them.
    pub fn replace_tail(&mut self, values: &Arc<[f32]>) {
        let Some(Tail { start, rows, .. }) = self.tail else { return };
        self.drop_tail();
        self.inputs.reserve(rows);
        self.inputs.extend((0..rows).map(|row| RowInput::Embedding { values: values.clone(), row }));
        self.computed = self.computed.min(start);
    }

    fn drop_tail(&mut self) {
        if let Some(tail) = self.tail {
            self.inputs.truncate(tail.start);
        }
    }

    /// Whether the next input stands behind the prompt, in a sequence of a flow.
    pub fn is_in_tail(&self) -> bool {
        self.tail.is_some_and(|tail| self.computed >= tail.start)
    }

    /// Known positions that can be computed in one slice: not across the end of the prompt where another shift begins.
    pub fn run(&self) -> usize {
        let end = self.tail.map(|tail| tail.start).filter(|&start| self.computed < start);
        end.unwrap_or(self.inputs.len()) - self.computed
    }

    /// Append a text token.
    pub fn push_token(&mut self, id: u32) {
        self.inputs.push(RowInput::Token(id));
        if let Some(chain) = &mut self.chain {
            chain.token(id);
        }
    }

    /// Append a VQ code.
    pub fn push_code(&mut self, code: u32) {
        self.inputs.push(RowInput::Code(code));
        if let Some(chain) = &mut self.chain {
            chain.code(code);
        }
    }

    fn push_embeddings(&mut self, embeddings: &domain::Embeddings) {
        let rows = 0..embeddings.rows();
        self.inputs.extend(rows.clone().map(|row| RowInput::Embedding { values: embeddings.values.clone(), row }));
        if let Some(chain) = &mut self.chain {
            let picture = prefix::digest(embeddings);
            rows.for_each(|row| chain.embedding(&picture, row));
        }
    }

    /// Known positions that are still to be computed.
    pub fn remaining(&self) -> usize {
        self.inputs.len() - self.computed
    }

    /// Positions computed or found in the prefix cache.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Blocks that the known positions, and those behind the prompt of a flow, need beyond those held.
    pub fn missing_blocks(&self) -> usize {
        let length = self.tail.map_or(self.inputs.len(), |tail| tail.start + tail.rows);
        length.div_ceil(BLOCK_TOKENS) - self.blocks.len()
    }

    /// Names of the blocks that the prefix cache may supply, in order. The last position is always left to compute, since its logits are
    /// wanted.
    fn sharable(&self) -> &[BlockKey] {
        let blocks = (self.inputs.len() - 1) / BLOCK_TOKENS;
        self.chain.as_ref().map_or(&[], |chain| &chain.keys()[..blocks.min(chain.keys().len())])
    }

    /// Name of the first block that the prefix cache could supply but does not have.
    pub fn first_miss(&self, pool: &BlockPool) -> Option<BlockKey> {
        self.sharable().iter().find(|key| !pool.holds(key)).copied()
    }

    /// Name of the full block that is being computed now, or will be next.
    pub fn next_name(&self) -> Option<BlockKey> {
        self.chain.as_ref()?.keys().get(self.named).copied()
    }

    /// Take from the prefix cache what it has of the beginning.
    pub fn attach_prefix(&mut self, pool: &mut BlockPool) {
        debug_assert!(self.blocks.is_empty());
        self.blocks = self.sharable().iter().map_while(|key| pool.share(key)).collect();
        self.named = self.blocks.len();
        self.computed = self.blocks.len() * BLOCK_TOKENS;
    }

    /// Take the missing blocks; the caller has made sure that they are available.
    pub fn allocate_missing(&mut self, pool: &mut BlockPool) {
        for _ in 0..self.missing_blocks() {
            let block = pool.allocate().expect("the scheduler checked that enough blocks are available");
            self.blocks.push(block);
        }
    }

    /// Give every block back; the inputs stay known and can be computed again.
    pub fn release(&mut self, pool: &mut BlockPool) {
        self.blocks.drain(..).rev().for_each(|block| pool.release(block));
        self.computed = 0;
        self.named = 0;
        self.drop_tail();
    }

    /// The next `count` inputs.
    pub fn next_inputs(&self, count: usize) -> &[RowInput] {
        &self.inputs[self.computed..self.computed + count]
    }

    /// The next `count` inputs as a slice of a step in which they begin at row `first_row`.
    pub fn slice(&self, count: usize, first_row: usize, head: Option<Head>) -> Slice {
        let used = (self.computed + count).div_ceil(BLOCK_TOKENS);
        let shift = self.tail.filter(|tail| self.computed >= tail.start).map_or(0, |tail| tail.shift);
        Slice {
            rows: first_row..first_row + count,
            start: self.computed,
            shift,
            blocks: self.blocks[..used].to_vec(),
            head,
            may_lose_experts: self.may_lose_experts,
        }
    }

    /// The next `count` positions have been computed: name the blocks that are full now.
    pub fn advance(&mut self, count: usize, pool: &mut BlockPool) {
        self.computed += count;
        let Some(chain) = &self.chain else { return };
        let full = (self.computed / BLOCK_TOKENS).min(chain.keys().len());
        for index in self.named..full {
            pool.name(self.blocks[index], chain.keys()[index]);
        }
        self.named = self.named.max(full);
    }
}

#[cfg(test)]
mod tests {
    use domain::Embeddings;

    use super::*;

    fn compute(sequence: &mut Sequence, pool: &mut BlockPool) -> usize {
        sequence.attach_prefix(pool);
        let cached = sequence.computed();
        sequence.allocate_missing(pool);
        sequence.advance(sequence.remaining(), pool);
        cached
    }

    /// Positions found in the cache by `second` after `first` was computed and released.
    fn cached_after(first: &Prompt, second: &Prompt) -> usize {
        let mut pool = BlockPool::new(64);
        let mut sequence = Sequence::new(first, true);
        compute(&mut sequence, &mut pool);
        sequence.release(&mut pool);
        let mut sequence = Sequence::new(second, true);
        let cached = compute(&mut sequence, &mut pool);
        sequence.release(&mut pool);
        assert_eq!(pool.available(), 64);
        cached
    }

    fn picture(seed: f32, rows: usize) -> Segment {
        Segment::Embeddings(Embeddings { width: 2, values: (0..rows * 2).map(|i| seed + i as f32).collect() })
    }

    #[test]
    fn equal_beginnings_are_found_block_by_block() {
        let ids = |n: u32| (0..n).collect::<Vec<_>>();
        let changed = |n: u32, at: usize| {
            let mut ids = ids(n);
            ids[at] = 999;
            ids
        };
        let rows = [
            (ids(40), ids(40), 32),
            (ids(40), ids(33), 32),
            (ids(32), ids(32), 16), // the last position is always computed
            (ids(33), ids(100), 32),
            (ids(40), changed(40, 20), 16),
            (ids(40), changed(40, 0), 0),
            (ids(16), ids(16), 0),
            (ids(1), ids(1), 0),
        ];
        for (first, second, expected) in rows {
            assert_eq!(cached_after(&Prompt::tokens(first.clone()), &Prompt::tokens(second.clone())), expected, "{first:?} {second:?}");
        }
    }

    #[test]
    fn pictures_are_told_apart_by_their_values() {
        let prompt = |seed, rows| Prompt { segments: vec![Segment::Tokens(vec![1, 2]), picture(seed, rows), Segment::Tokens(vec![3; 20])] };
        assert_eq!(cached_after(&prompt(0.0, 20), &prompt(0.0, 20)), 32);
        assert_eq!(cached_after(&prompt(0.0, 20), &prompt(0.5, 20)), 0);
        assert_eq!(cached_after(&prompt(0.0, 20), &prompt(0.0, 21)), 0);
    }

    #[test]
    fn codes_and_tokens_of_the_same_number_differ() {
        let mut pool = BlockPool::new(8);
        let mut tokens = Sequence::new(&Prompt::tokens(vec![7; 17]), true);
        compute(&mut tokens, &mut pool);
        let mut codes = Sequence::new(&Prompt::tokens(vec![7]), true);
        (0..16).for_each(|_| codes.push_code(7));
        assert_eq!(compute(&mut codes, &mut pool), 0);
    }

    /// What stands behind the prompt of a flow is computed over and over in the same blocks, under no name; the prompt keeps its own.
    #[test]
    fn a_tail_is_replaced_and_never_named() {
        let mut pool = BlockPool::new(16);
        let prompt = Prompt::tokens(vec![7; 20]);
        let mut sequence = Sequence::with_tail(&prompt, 30, 5, true);
        assert_eq!((sequence.missing_blocks(), sequence.run(), sequence.is_in_tail()), (4, 20, false));
        for round in 0..3 {
            sequence.replace_tail(&vec![round as f32; 60].into());
            if round == 0 {
                assert_eq!(compute_run(&mut sequence, &mut pool), (20, 0));
            }
            assert_eq!(compute_run(&mut sequence, &mut pool), (30, 5));
            assert_eq!((sequence.remaining(), sequence.missing_blocks(), pool.free()), (0, 0, 12));
        }
        sequence.release(&mut pool);
        assert_eq!((sequence.remaining(), pool.cached(), pool.free()), (20, 1, 15), "one block is full of the prompt");
        sequence.attach_prefix(&mut pool);
        assert_eq!((sequence.computed(), sequence.run()), (16, 4));
    }

    /// Computes up to the end of the prompt or of the tail; how many rows, with which shift.
    fn compute_run(sequence: &mut Sequence, pool: &mut BlockPool) -> (usize, usize) {
        sequence.allocate_missing(pool);
        let (rows, shift) = (sequence.run(), sequence.slice(sequence.run(), 0, None).shift);
        sequence.advance(rows, pool);
        (rows, shift)
    }

    #[test]
    fn without_the_cache_nothing_is_kept() {
        let mut pool = BlockPool::new(4);
        let mut sequence = Sequence::new(&Prompt::tokens(vec![7; 40]), false);
        assert_eq!(compute(&mut sequence, &mut pool), 0);
        sequence.release(&mut pool);
        assert_eq!((pool.free(), pool.cached()), (4, 0));
    }
}
