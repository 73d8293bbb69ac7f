//! A model small enough to be worked out by hand, which notices every mistake in block tables and positions.
//!
//! What it keeps per position is a hash of everything before it, read back through the block table, and of the input and position
//! themselves; its logits are drawn from the last such hash. A wrong block, a stale block or a wrong position changes the output.

#![allow(clippy::unwrap_used, dead_code)]

use std::{
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use domain::{
    Canvas, CodeGrid, Constraint, Embeddings, Event, FinishReason, ImageSampling, Invalid, Job, Mode, ModelCard, Prompt, Sampling, Segment,
};
use futures::StreamExt;
use layers::{BLOCK_TOKENS, BlockId, EngineError, FlowModel, Head, LanguageModel, Observer, RowInput, Slice, Step, StepOutput};
use sched::{Engine, EngineConfig, Guide, GuideError, Guides, JobError, JobStream, sampler};

pub const VOCABULARY: usize = 50;
pub const CODES: usize = 24;
pub const WIDTH: usize = 2;
/// Inputs on which the toy refuses the step, crashes, or yields NaN.
pub const FAIL: u32 = 47;
pub const CRASH: u32 = 48;
pub const NAN: u32 = 49;
/// Tokens below this do no harm.
pub const HARMLESS: u32 = 47;

pub struct Toy {
    card: ModelCard,
    cells: Vec<[u64; BLOCK_TOKENS]>,
    pub watch: Arc<Watch>,
    /// What makes it draw by a flow.
    pub flow: Option<Box<dyn FlowModel + Send>>,
    /// Keeps its hidden states to itself.
    pub mute: bool,
}

/// What tests see of the model at work, and how they hold it up.
#[derive(Debug, Default)]
pub struct Watch {
    steps: Mutex<Vec<Vec<Slice>>>,
    /// Steps that may still begin; `None`: any number.
    permits: Mutex<Option<usize>>,
    changed: Condvar,
}

impl Watch {
    /// Every step so far, as it was asked for.
    pub fn steps(&self) -> Vec<Vec<Slice>> {
        self.steps.lock().unwrap().clone()
    }

    /// Allow `count` more steps, and no others until the next call.
    pub fn allow(&self, count: usize) {
        let mut permits = self.permits.lock().unwrap();
        *permits = Some(permits.unwrap_or(0) + count);
        self.changed.notify_all();
    }

    /// Allow everything.
    pub fn open(&self) {
        *self.permits.lock().unwrap() = None;
        self.changed.notify_all();
    }

    fn enter(&self, step: &Step) {
        self.steps.lock().unwrap().push(step.slices.clone());
        let permits = self.permits.lock().unwrap();
        let mut permits = self.changed.wait_while(permits, |permits| *permits == Some(0)).unwrap();
        if let Some(count) = permits.as_mut() {
            *count -= 1;
        }
    }
}

impl Toy {
    pub fn new(blocks: usize) -> Self {
        let card = ModelCard {
            family: "toy".into(),
            context_length: 4096,
            vocabulary_size: VOCABULARY,
            hidden_size: WIDTH,
            canvas: Some(Canvas::Codes(CodeGrid { rows: 3, columns: 7, codebook_size: CODES })),
            tokens_per_image: None,
            default_sampling: Sampling::default(),
            default_image_sampling: ImageSampling::default(),
        };
        Self { card, cells: vec![[0; BLOCK_TOKENS]; blocks], watch: Arc::default(), flow: None, mute: false }
    }

    /// A toy that cannot draw and sees `context` positions.
    pub fn text_only(blocks: usize, context: usize) -> Self {
        let mut toy = Self::new(blocks);
        toy.card.canvas = None;
        toy.card.context_length = context;
        toy
    }

    /// A toy that draws maps on `canvas` by a flow.
    pub fn flowing(blocks: usize, canvas: Canvas, flow: Box<dyn FlowModel + Send>) -> Self {
        let mut toy = Self::new(blocks);
        toy.card.canvas = Some(canvas);
        toy.flow = Some(flow);
        toy
    }
}

impl LanguageModel for Toy {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn kv_block_bytes(&self) -> usize {
        BLOCK_TOKENS * 8
    }

    fn kv_blocks(&self) -> usize {
        self.cells.len()
    }

    fn forward(&mut self, step: &Step, _observer: &mut dyn Observer) -> Result<StepOutput, EngineError> {
        self.watch.enter(step);
        check(step);
        for row in &step.rows {
            match row {
                RowInput::Token(FAIL) => return Err(EngineError::Compute("the toy dislikes this token".into())),
                RowInput::Token(CRASH) => panic!("the toy broke"),
                _ => {}
            }
        }
        let mut output = StepOutput::default();
        for slice in &step.slices {
            let rows = &step.rows[slice.rows.clone()];
            let states = self.slice(slice, rows);
            let logits = slice.head.filter(|head| *head != Head::Hidden);
            output.logits.push(logits.map(|head| logits_of(states[states.len() - 1], head, rows.last().unwrap())));
            let shown = slice.head == Some(Head::Hidden) && !self.mute;
            output.hidden.push(shown.then(|| states.into_iter().flat_map(hidden).collect()));
        }
        Ok(output)
    }

    fn flow(&self) -> Option<&dyn FlowModel> {
        self.flow.as_ref().map(|flow| &**flow as &dyn FlowModel)
    }
}

/// Numbers of a hash, in -1..1.
pub fn hidden(state: u64) -> [f32; WIDTH] {
    std::array::from_fn(|i| (mix(state, 77 + i as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0)
}

impl Toy {
    /// The state after every row.
    fn slice(&mut self, slice: &Slice, rows: &[RowInput]) -> Vec<u64> {
        let place = |position: usize| (slice.blocks[position / BLOCK_TOKENS] as usize, position % BLOCK_TOKENS);
        let mut state = 0;
        for position in 0..slice.start {
            let (block, offset) = place(position);
            state = mix(state, self.cells[block][offset]);
        }
        let mut states = Vec::new();
        for (position, row) in (slice.start..).zip(rows) {
            let (block, offset) = place(position);
            let cell = mix(state, mix((position + slice.shift) as u64, input(row)));
            self.cells[block][offset] = cell;
            state = mix(state, cell);
            states.push(state);
        }
        states
    }
}

/// The step API's own rules, and that nobody writes what another sequence reads.
fn check(step: &Step) {
    let mut next = 0;
    for (i, slice) in step.slices.iter().enumerate() {
        assert_eq!(slice.rows.start, next, "slices cover the rows in order");
        assert!(!slice.rows.is_empty());
        next = slice.rows.end;
        assert_eq!(slice.blocks.len(), slice.end().div_ceil(BLOCK_TOKENS));
        let written: &[BlockId] = &slice.blocks[slice.start / BLOCK_TOKENS..];
        for (j, other) in step.slices.iter().enumerate() {
            assert!(i == j || !other.blocks.iter().any(|block| written.contains(block)), "two sequences in one block");
        }
    }
    assert_eq!(next, step.rows.len());
}

pub fn input(row: &RowInput) -> u64 {
    match row {
        RowInput::Token(id) => 1_000 + u64::from(*id),
        RowInput::Code(code) => 2_000 + u64::from(*code),
        RowInput::Embedding { values, row } => {
            values[row * WIDTH..(row + 1) * WIDTH].iter().fold(3_000, |hash, value| mix(hash, u64::from(value.to_bits())))
        }
    }
}

fn logits_of(state: u64, head: Head, last: &RowInput) -> Vec<f32> {
    let (count, salt) = match head {
        Head::Text => (VOCABULARY, 1),
        Head::Image => (CODES, 2),
        Head::Hidden => panic!("hidden states have no logits"),
    };
    let nan = matches!(last, RowInput::Token(NAN));
    let logit = |i: u64| match head {
        _ if nan => f32::NAN,
        // What makes the toy stumble is never drawn.
        Head::Text if i >= u64::from(HARMLESS) => -1e9,
        _ => (mix(mix(state, salt), i) >> 40) as f32 / (1 << 21) as f32 - 4.0,
    };
    (0..count as u64).map(logit).collect()
}

pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.rotate_left(23) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A constraint that can be checked by hand. `modulus,length`: output `i` leaves the remainder `i` modulo `modulus` (or is end-of-sentence,
/// where `i` is even), and `length` outputs complete the text.
#[derive(Debug)]
pub struct Rhymes;

#[derive(Debug)]
struct Rhyme {
    modulus: u32,
    length: u32,
    eos_token_ids: Vec<u32>,
    accepted: u32,
}

pub fn rhyme(modulus: u32, length: u32) -> Option<Constraint> {
    Some(Constraint::Regex(format!("{modulus},{length}")))
}

impl Guides for Rhymes {
    fn guide(&self, constraint: &Constraint, eos_token_ids: &[u32]) -> Result<Box<dyn Guide>, GuideError> {
        let Constraint::Regex(text) = constraint else { return Err(GuideError::Unable("no rhyme".into())) };
        let invalid = || Invalid::new(constraint.field(), "no rhyme");
        let (modulus, length) = text.split_once(',').ok_or_else(invalid)?;
        let number = |text: &str| text.parse::<u32>().map_err(|_| invalid());
        Ok(Box::new(Rhyme { modulus: number(modulus)?, length: number(length)?, eos_token_ids: eos_token_ids.to_vec(), accepted: 0 }))
    }
}

impl Rhyme {
    fn allows(&self, id: u32) -> bool {
        match self.eos_token_ids.contains(&id) {
            true => self.accepted.is_multiple_of(2),
            false => self.modulus > 0 && id % self.modulus == self.accepted % self.modulus,
        }
    }
}

impl Guide for Rhyme {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        assert!(!self.is_finished(), "asked behind the end");
        let ruled_out = (0..).zip(logits).filter(|(id, _)| !self.allows(*id));
        ruled_out.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
        if self.modulus == 0 { Err("nothing rhymes".into()) } else { Ok(()) }
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        if !self.allows(id) || self.is_finished() {
            return Err(format!("{id} does not rhyme"));
        }
        self.accepted += 1;
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.accepted == self.length
    }
}

/// What a job must yield: the plain loop over a plain list, without blocks, batches or caches.
pub fn expected(job: &Job) -> Vec<u32> {
    let mut conditional = rows(&job.prompt);
    let mut emitted = Vec::new();
    match &job.mode {
        Mode::Text { sampling, eos_token_ids } => {
            let ids = conditional.iter().filter_map(|row| if let RowInput::Token(id) = row { Some(*id) } else { None });
            let mut history = sampler::History::new(sampling, ids.collect::<Vec<_>>());
            let mut guide = sampling.constraint.as_ref().map(|constraint| Rhymes.guide(constraint, eos_token_ids).unwrap());
            while emitted.len() < sampling.max_tokens.unwrap() as usize && !guide.as_ref().is_some_and(|guide| guide.is_finished()) {
                let mut logits = whole(&conditional, Head::Text);
                if let Some(guide) = &mut guide {
                    guide.mask(&mut logits).unwrap();
                }
                let (id, _) = sampler::text(&mut logits, sampling, &history, emitted.len() as u64).unwrap();
                if let Some(guide) = &mut guide {
                    guide.accept(id).unwrap();
                }
                emitted.push(id);
                history.push(sampling, id);
                conditional.push(RowInput::Token(id));
                if eos_token_ids.contains(&id) && !sampling.ignore_eos {
                    break;
                }
            }
        }
        Mode::Image { unconditional, sampling } => {
            let mut unconditional = rows(unconditional);
            while emitted.len() < 21 {
                let (mut c, u) = (whole(&conditional, Head::Image), whole(&unconditional, Head::Image));
                let code = sampler::code(&mut c, &u, sampling, emitted.len() as u64).unwrap();
                emitted.push(code);
                conditional.push(RowInput::Code(code));
                unconditional.push(RowInput::Code(code));
            }
        }
        Mode::Flow { .. } => panic!("a flow emits maps, see the tests of flows"),
    }
    emitted
}

fn whole(rows: &[RowInput], head: Head) -> Vec<f32> {
    let state = rows.iter().enumerate().fold(0, |state, (position, row)| mix(state, mix(state, mix(position as u64, input(row)))));
    logits_of(state, head, rows.last().unwrap())
}

pub fn rows(prompt: &Prompt) -> Vec<RowInput> {
    let segment = |segment: &Segment| match segment {
        Segment::Tokens(ids) => ids.iter().map(|&id| RowInput::Token(id)).collect::<Vec<_>>(),
        Segment::Embeddings(e) => (0..e.rows()).map(|row| RowInput::Embedding { values: e.values.clone(), row }).collect(),
    };
    prompt.segments.iter().flat_map(segment).collect()
}

/// `length` tokens that depend on `seed`; equal seeds share beginnings.
pub fn ids(seed: u64, length: usize) -> Vec<u32> {
    (0..length as u64).map(|i| (mix(seed, i) % u64::from(HARMLESS)) as u32).collect()
}

pub fn picture(seed: f32, rows: usize) -> Segment {
    Segment::Embeddings(Embeddings { width: WIDTH, values: (0..rows * WIDTH).map(|i| seed + i as f32).collect() })
}

pub fn text(prompt: Prompt, sampling: Sampling) -> Job {
    Job { prompt, mode: Mode::Text { sampling, eos_token_ids: vec![3] }, emitted: Vec::new() }
}

/// `count` outputs of a prompt of `length` tokens, drawn at temperature 1.
pub fn plain(seed: u64, length: usize, count: u32) -> Job {
    text(Prompt::tokens(ids(seed, length)), Sampling { max_tokens: Some(count), seed, ignore_eos: true, ..Sampling::default() })
}

pub fn drawing(seed: u64, length: usize) -> Job {
    let unconditional = Prompt::tokens(vec![5; length]);
    let sampling = ImageSampling { seed, ..ImageSampling::default() };
    Job { prompt: Prompt::tokens(ids(seed, length)), mode: Mode::Image { unconditional, sampling }, emitted: Vec::new() }
}

/// An engine over a toy. Bind the watch after the engine: it lets the model go when a test fails, so that the engine can stop.
pub fn start(blocks: usize, config: EngineConfig) -> (Engine, Watcher) {
    start_toy(Toy::new(blocks), config)
}

/// As [`start`], over this toy.
pub fn start_toy(toy: Toy, config: EngineConfig) -> (Engine, Watcher) {
    let watch = Watcher(toy.watch.clone());
    (Engine::start(Box::new(toy), config).with_guides(Arc::new(Rhymes)), watch)
}

pub struct Watcher(Arc<Watch>);

impl std::ops::Deref for Watcher {
    type Target = Watch;

    fn deref(&self) -> &Watch {
        &self.0
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// All that a job says.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub ids: Vec<u32>,
    pub cached: u32,
    pub end: Result<FinishReason, JobError>,
}

pub async fn outcome(mut stream: JobStream) -> Outcome {
    let (mut ids, mut cached) = (Vec::new(), None);
    loop {
        match stream.next().await.expect("a stream ends with a last word") {
            Ok(Event::Prefilled { cached_tokens, .. }) => assert_eq!(cached.replace(cached_tokens), None, "announced twice"),
            Ok(Event::Output { id, .. }) => {
                assert!(cached.is_some(), "output before the announcement");
                ids.push(id);
            }
            Ok(Event::Degraded(_)) => panic!("nothing was lost"),
            Ok(Event::Flow { .. }) => panic!("a step of a flow in the answer to another job"),
            Ok(Event::Finished(reason)) => return Outcome { ids, cached: cached.unwrap(), end: Ok(reason) },
            Err(error) => return Outcome { ids, cached: cached.unwrap_or(0), end: Err(error) },
        }
    }
}

pub fn run(engine: &Engine, job: Job) -> Outcome {
    futures::executor::block_on(outcome(engine.submit(job).unwrap()))
}

pub fn run_all(engine: &Engine, jobs: &[Job]) -> Vec<Outcome> {
    let streams: Vec<_> = jobs.iter().map(|job| outcome(engine.submit(job.clone()).unwrap())).collect();
    futures::executor::block_on(futures::future::join_all(streams))
}

/// Wait for a condition; the limit is only there so that a broken test ends.
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let limit = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < limit, "waited in vain until {what}");
        std::thread::yield_now();
    }
}

/// Wait until no job is left, and check that every block is accounted for.
pub fn assert_all_blocks_back(engine: &Engine) {
    wait_until("all blocks are back", || {
        let stats = engine.stats();
        stats.running + stats.waiting == 0 && stats.free_blocks + stats.cached_blocks == stats.blocks
    });
}
