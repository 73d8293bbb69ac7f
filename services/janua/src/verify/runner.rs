use std::collections::BTreeMap;

use domain::{Prompt, Segment};
use layers::{BLOCK_TOKENS, BlockId, EngineError, FlowModel, Head, LanguageModel, NoObserver, Observer, RowInput, Slice, Step};

/// Rows per prefill chunk. Servers take larger ones; this one is smaller than any prompt worth comparing and no multiple of a KV block,
/// so that the borders of chunks and blocks fall in all kinds of places.
const CHUNK: usize = 13;

/// Drives a model step by step, as the scheduler does, and keeps what it shows on the way.
pub struct Runner {
    model: Box<dyn LanguageModel>,
    free: Vec<BlockId>,
}

/// A sequence in the model's KV cache.
pub struct Sequence {
    blocks: Vec<BlockId>,
    length: usize,
}

/// Tensors that a model showed, rows appended in the order of positions.
#[derive(Debug, Default)]
pub struct Seen {
    pub tensors: BTreeMap<String, Vec<f32>>,
}

impl Observer for Seen {
    fn active(&self) -> bool {
        true
    }

    fn tensor(&mut self, name: &str, values: &[f32], _width: usize) {
        self.tensors.entry(name.to_owned()).or_default().extend_from_slice(values);
    }
}

impl Runner {
    /// A runner on an empty KV cache.
    pub fn new(model: Box<dyn LanguageModel>) -> Self {
        // Every other block first: sequences lie in pieces, as they do on a server that has been running for a while.
        let blocks = 0..model.kv_blocks() as BlockId;
        let (even, odd): (Vec<_>, Vec<_>) = blocks.partition(|block| block % 2 == 0);
        Self { model, free: [even, odd].concat() }
    }

    /// A new sequence with room for `positions`.
    pub fn sequence(&mut self, positions: usize) -> Result<Sequence, EngineError> {
        let wanted = positions.div_ceil(BLOCK_TOKENS);
        if self.free.len() < wanted {
            return Err(EngineError::Step(format!("{positions} positions need {wanted} KV blocks, {} are free", self.free.len())));
        }
        Ok(Sequence { blocks: self.free.split_off(self.free.len() - wanted), length: 0 })
    }

    /// Gives the blocks of a sequence back.
    pub fn release(&mut self, sequence: Sequence) {
        self.free.extend(sequence.blocks);
    }

    /// Computes a prompt in chunks. Returns the logits of its last position.
    pub fn prefill(
        &mut self,
        sequence: &mut Sequence,
        rows: &[RowInput],
        head: Head,
        seen: &mut dyn Observer,
    ) -> Result<Vec<f32>, EngineError> {
        let mut last = Vec::new();
        for chunk in rows.chunks(CHUNK) {
            last = self.step(&mut [(&mut *sequence, chunk)], head, seen)?.pop().unwrap_or_default();
        }
        Ok(last)
    }

    /// Computes rows of several sequences in one step. Returns the logits of the last row of each.
    pub fn step(
        &mut self,
        work: &mut [(&mut Sequence, &[RowInput])],
        head: Head,
        seen: &mut dyn Observer,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let mut step = Step::default();
        for (sequence, rows) in work.iter_mut() {
            let first = step.rows.len();
            step.rows.extend_from_slice(rows);
            let blocks = sequence.blocks.clone();
            step.slices.push(Slice {
                rows: first..step.rows.len(),
                start: sequence.length,
                shift: 0,
                blocks,
                head: Some(head),
                may_lose_experts: false,
            });
            sequence.length += rows.len();
        }
        // It may wait for experts elsewhere, which no runtime must be kept waiting for.
        let output = tokio::task::block_in_place(|| self.model.forward(&step, seen))?;
        Ok(output.logits.into_iter().map(Option::unwrap_or_default).collect())
    }

    /// Computes rows behind a sequence in chunks, as if they stood `shift` positions higher, and forgets them. Returns their hidden states
    /// after the last norm, `[rows, hidden]`.
    pub fn hidden(&mut self, sequence: &Sequence, rows: &[RowInput], shift: usize) -> Result<Vec<f32>, EngineError> {
        let (mut hidden, mut start) = (Vec::new(), sequence.length);
        for chunk in rows.chunks(CHUNK) {
            let slice = Slice {
                rows: 0..chunk.len(),
                start,
                shift,
                blocks: sequence.blocks.clone(),
                head: Some(Head::Hidden),
                may_lose_experts: false,
            };
            let output = self.model.forward(&Step { rows: chunk.to_vec(), slices: vec![slice] }, &mut NoObserver)?;
            hidden.extend(output.hidden.into_iter().flatten().flatten());
            start += chunk.len();
        }
        Ok(hidden)
    }

    /// What makes the model one that draws by a flow.
    pub fn flow(&self) -> Result<&dyn FlowModel, EngineError> {
        self.model.flow().ok_or_else(|| EngineError::Step("the model does not draw by a flow".into()))
    }
}

/// One row per position of a prompt.
pub fn rows(prompt: &Prompt) -> Vec<RowInput> {
    let segment = |segment: &Segment| -> Vec<RowInput> {
        match segment {
            Segment::Tokens(ids) => ids.iter().map(|&id| RowInput::Token(id)).collect(),
            Segment::Embeddings(embeddings) => {
                (0..embeddings.rows()).map(|row| RowInput::Embedding { values: embeddings.values.clone(), row }).collect()
            }
        }
    };
    prompt.segments.iter().flat_map(segment).collect()
}
