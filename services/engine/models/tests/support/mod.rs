//! What the tests of the language side share: fixtures, golden tensors, and driving a model the way a scheduler would.

#![allow(dead_code, clippy::unwrap_used)]

pub mod golden;
pub mod naive;
pub mod naive_deepseek;
pub mod naive_flow;
pub mod naive_pixels;
pub mod naive_sam;
pub mod original;
pub mod writer;
pub mod writer_deepseek;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use backend_native::{Cpu, Isa, Native};
use checkpoint::Checkpoint;
use layers::{BLOCK_TOKENS, BlockId, Head, LanguageModel, NoObserver, Observer, RowInput, Slice, Step, StepOutput};

/// A folder of tests/fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures").join(name)
}

/// A model with a small cache on the best instruction set of this machine, two threads.
pub fn load(dir: &Path) -> Box<dyn LanguageModel> {
    load_with(dir, Isa::detect(), 2)
}

/// A model on a given instruction set and number of threads.
pub fn load_with(dir: &Path, isa: Isa, threads: usize) -> Box<dyn LanguageModel> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let backend = Native::on(Cpu::with_isa(isa, threads).unwrap());
    models::load_language_on(&Arc::new(backend), &checkpoint, &models::LoadOptions { kv_blocks: KV_BLOCKS, threads }).unwrap()
}

pub const KV_BLOCKS: usize = 64;

/// A chunk that holds every prompt.
pub const WHOLE: usize = 1 << 20;

/// A sequence as a scheduler sees it.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub inputs: Vec<RowInput>,
    /// How many of the inputs are in the cache.
    pub done: usize,
    pub blocks: Vec<BlockId>,
    pub head: Head,
}

impl Sequence {
    pub fn new(inputs: Vec<RowInput>, blocks: Vec<BlockId>, head: Head) -> Self {
        Self { inputs, done: 0, blocks, head }
    }

    /// Text, in neighbouring blocks from the start of the cache.
    pub fn tokens(ids: &[u32]) -> Self {
        Self::new(tokens(ids), (0..KV_BLOCKS as u32).collect(), Head::Text)
    }

    /// As many positions as fit the block table.
    pub fn capacity(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS
    }
}

pub fn tokens(ids: &[u32]) -> Vec<RowInput> {
    ids.iter().copied().map(RowInput::Token).collect()
}

/// One step over `count` further inputs of every sequence given; logits where a sequence has come to its end.
pub fn advance(model: &mut dyn LanguageModel, sequences: &mut [(&mut Sequence, usize)], observer: &mut dyn Observer) -> StepOutput {
    let mut step = Step::default();
    for (sequence, count) in &mut *sequences {
        let first = step.rows.len();
        let end = (sequence.done + *count).min(sequence.inputs.len());
        step.rows.extend_from_slice(&sequence.inputs[sequence.done..end]);
        step.slices.push(Slice {
            rows: first..step.rows.len(),
            start: sequence.done,
            shift: 0,
            blocks: sequence.blocks[..end.div_ceil(BLOCK_TOKENS)].to_vec(),
            head: (end == sequence.inputs.len()).then_some(sequence.head),
            may_lose_experts: false,
        });
        sequence.done = end;
    }
    model.forward(&step, observer).unwrap()
}

/// Computes all inputs in chunks; the logits after the last one.
pub fn prefill(model: &mut dyn LanguageModel, sequence: &mut Sequence, chunk: usize, observer: &mut dyn Observer) -> Vec<f32> {
    loop {
        let mut output = advance(model, &mut [(sequence, chunk)], observer);
        if let Some(logits) = output.logits.remove(0) {
            return logits;
        }
    }
}

/// Feeds one more input; the logits after it.
pub fn decode(model: &mut dyn LanguageModel, sequence: &mut Sequence, input: RowInput) -> Vec<f32> {
    decode_seen(model, sequence, input, &mut NoObserver)
}

fn decode_seen(model: &mut dyn LanguageModel, sequence: &mut Sequence, input: RowInput, observer: &mut dyn Observer) -> Vec<f32> {
    sequence.inputs.push(input);
    advance(model, &mut [(sequence, 1)], observer).logits.remove(0).unwrap()
}

/// Greedy continuation: the ids (the first from the prefill) and the logits that each id but the last led to.
pub fn generate(model: &mut dyn LanguageModel, sequence: &mut Sequence, chunk: usize, steps: usize) -> (Vec<u32>, Vec<f32>) {
    generate_seen(model, sequence, chunk, steps, &mut NoObserver)
}

/// As [`generate`]; the observer sees what comes after the prefill.
pub fn generate_seen(
    model: &mut dyn LanguageModel,
    sequence: &mut Sequence,
    chunk: usize,
    steps: usize,
    observer: &mut dyn Observer,
) -> (Vec<u32>, Vec<f32>) {
    let mut last = prefill(model, sequence, chunk, &mut NoObserver);
    let (mut ids, mut logits) = (vec![argmax(&last)], Vec::new());
    for _ in 0..steps {
        last = decode_seen(model, sequence, RowInput::Token(*ids.last().unwrap()), observer);
        ids.push(argmax(&last));
        logits.extend_from_slice(&last);
    }
    (ids, logits)
}

pub fn argmax(logits: &[f32]) -> u32 {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32
}

/// Keeps everything that it is shown; rows of later steps follow those of earlier ones.
#[derive(Debug, Default)]
pub struct Recorder {
    pub tensors: BTreeMap<String, Vec<f32>>,
}

impl Observer for Recorder {
    fn active(&self) -> bool {
        true
    }

    fn tensor(&mut self, name: &str, values: &[f32], width: usize) {
        assert!(values.len().is_multiple_of(width), "{name}: {} values in rows of {width}", values.len());
        self.tensors.entry(name.to_owned()).or_default().extend_from_slice(values);
    }
}

/// Fails, naming the place, when two tensors are further apart than `tolerance`.
pub fn assert_close(what: &str, actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "{what}: number of values");
    let worst = actual.iter().zip(expected).map(|(a, e)| (a - e).abs()).enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    let (place, distance) = worst.unwrap();
    println!("{what}: {distance:.1e} off, tolerance {tolerance:.0e}");
    assert!(distance <= tolerance, "{what}: value {place} is {distance:e} off, tolerance {tolerance:e}");
}
