//! Tokenizers of the fixtures, and a model that says anything.
#![allow(dead_code)] // each test program uses a part

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use constraint::Grammars;
use domain::{Constraint, Sampling};
use sched::{Guide, GuideError, Guides, sampler};
use text::TextCodec;

/// End-of-sentence of both tokenizers.
pub const EOS: u32 = 481;
/// Rows of a model: more than there are tokens, as in every checkpoint of the family.
pub const ROWS: usize = 640;

pub struct Bench {
    pub grammars: Grammars,
    pub codec: TextCodec,
}

#[derive(Debug)]
pub struct Drawn {
    pub ids: Vec<u32>,
    pub text: String,
    /// Whether it ended by itself.
    pub complete: bool,
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures")).join(name)
}

/// The tokenizers of the `llama` and `janus` fixtures.
pub fn benches() -> &'static [Bench] {
    static BENCHES: OnceLock<Vec<Bench>> = OnceLock::new();
    let bench = |name| Bench { grammars: Grammars::of(&fixture(name)), codec: TextCodec::load_dir(&fixture(name)).unwrap() };
    BENCHES.get_or_init(|| ["llama", "janus"].map(bench).into())
}

pub fn json(schema: &str) -> Constraint {
    Constraint::JsonSchema(schema.to_owned())
}

pub fn regex(regex: &str) -> Constraint {
    Constraint::Regex(regex.to_owned())
}

pub fn lark(grammar: &str) -> Constraint {
    Constraint::Lark(grammar.to_owned())
}

impl Bench {
    pub fn guide(&self, constraint: &Constraint) -> Result<Box<dyn Guide>, GuideError> {
        self.grammars.guide(constraint, &[EOS])
    }

    /// The tokens that may come next.
    pub fn allowed(&self, guide: &mut dyn Guide) -> Vec<u32> {
        let mut logits = vec![0.0; ROWS];
        guide.mask(&mut logits).unwrap();
        (0..).zip(logits).filter(|(_, logit)| *logit == 0.0).map(|(id, _)| id).collect()
    }

    /// What a random model says: greedily for even seeds, drawn for odd ones.
    pub fn draw(&self, constraint: &Constraint, seed: u64, limit: usize) -> Drawn {
        self.resume(constraint, seed, limit, &[])
    }

    /// The same, by a worker that is told what another one has emitted.
    pub fn resume(&self, constraint: &Constraint, seed: u64, limit: usize, emitted: &[u32]) -> Drawn {
        let mut guide = self.guide(constraint).unwrap();
        let mut ids = emitted.to_vec();
        emitted.iter().for_each(|id| guide.accept(*id).unwrap());
        let sampling = Sampling { temperature: (seed % 2) as f32, seed, ..Sampling::default() };
        while ids.len() < limit && !guide.is_finished() {
            let mut logits = logits(seed, ids.len());
            guide.mask(&mut logits).unwrap();
            let (id, _) = sampler::text(&mut logits, &sampling, &sampler::History::default(), ids.len() as u64).unwrap();
            guide.accept(id).unwrap();
            ids.push(id);
        }
        let text = self.codec.decode(&ids, true);
        Drawn { text, complete: guide.is_finished(), ids }
    }

    /// Token ids of `text` without control tokens and without the added tokens that stand for single bytes.
    pub fn plain(&self, text: &str) -> Vec<u32> {
        let ids = self.codec.encode(text, false);
        if self.codec.decode(&ids, true) == text { ids } else { self.bytes(text) }
    }

    /// One token per byte.
    pub fn bytes(&self, text: &str) -> Vec<u32> {
        let id = |byte: u8| (0..480).find(|id| self.codec.token_bytes(*id).as_deref() == Some(&[byte])).unwrap();
        text.bytes().map(id).collect()
    }
}

/// Logits of a model that has learned nothing: they depend on the seed and the position.
fn logits(seed: u64, position: usize) -> Vec<f32> {
    let mix = |a: u64, b: u64| {
        let x = (a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (x ^ (x >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb) ^ (x >> 32)
    };
    let state = mix(seed.wrapping_add(1), position as u64 + 1);
    (0..ROWS as u64).map(|id| (mix(state, id) >> 40) as f32 / (1 << 21) as f32).collect()
}
