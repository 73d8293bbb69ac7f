use cpu::{Cpu, KvSlice, LatentKv, LatentQueries, LatentShape};
use proptest::prelude::*;

use crate::{Attention, BLOCK_TOKENS, SCALAR, assert_close, attentions, cpu, values, variants};

/// The sequences of an attention, over a compressed cache.
#[derive(Debug, Clone)]
pub struct Latent {
    pub sequences: Attention,
    pub heads: usize,
    pub rank: usize,
    pub rope: usize,
}

prop_compose! {
    fn latents()(
        sequences in attentions(), heads in 1..8usize, rank in prop_oneof![1..40usize, Just(64usize), 90..110usize], rope in 1..20usize,
    ) -> Latent {
        Latent { sequences, heads, rank, rope }
    }
}

impl Latent {
    fn shape(&self) -> LatentShape {
        LatentShape { blocks: self.sequences.shape().blocks, block_tokens: BLOCK_TOKENS, rank: self.rank, rope: self.rope }
    }

    /// Values of `width` for every row and head.
    fn queries(&self, seed: u64, width: usize) -> Vec<f32> {
        values(self.sequences.seed ^ seed, self.sequences.rows() * self.heads * width).into_iter().map(|v| v * 3.0).collect()
    }

    pub fn run(&self, cpu: &Cpu, slices: &[KvSlice<'_>], spoil: impl FnOnce(&mut [f32])) -> Vec<f32> {
        let mut rows = values(self.sequences.seed ^ 1, self.shape().len().expect("small"));
        spoil(&mut rows);
        let (latent, rotary) = (self.queries(3, self.rank), self.queries(4, self.rope));
        let scale = 1.0 / ((self.rank + self.rope) as f32).sqrt();
        let mut out = vec![f32::NAN; latent.len()];
        let queries = LatentQueries { latent: &latent, rotary: &rotary, heads: self.heads, scale };
        cpu.latent_attention(&queries, &LatentKv { shape: self.shape(), rows: &rows }, slices, &mut out);
        out
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn latent_attention_agrees_with_the_reference(latent in latents()) {
        let tables = latent.sequences.tables();
        let slices = latent.sequences.slices(&tables);
        let expected = latent.run(&cpu(SCALAR, 1), &slices, |_| ());
        prop_assert!(expected.iter().all(|v| v.is_finite()));
        for isa in variants() {
            assert_close(&latent.run(&cpu(isa, 1), &slices, |_| ()), &expected, 3e-6)?;
        }
    }

    #[test]
    fn latent_attention_gives_a_row_the_same_bits_alone_and_in_company(latent in latents(), threads in 1..5usize) {
        let tables = latent.sequences.tables();
        let slices = latent.sequences.slices(&tables);
        let width = latent.heads * latent.rank;
        for isa in variants().chain([SCALAR]) {
            let together = latent.run(&cpu(isa, threads), &slices, |_| ());
            for slice in &slices {
                for (i, row) in slice.rows.clone().enumerate() {
                    let alone = KvSlice { rows: row..row + 1, start: slice.start + i, blocks: slice.blocks };
                    let span = row * width..(row + 1) * width;
                    prop_assert_eq!(&latent.run(&cpu(isa, 1), &[alone], |_| ())[span.clone()], &together[span]);
                }
            }
        }
    }

    /// What lies in the cache after a row's own position is of another time or sequence: it may be anything.
    #[test]
    fn latent_attention_sees_no_later_position(latent in latents()) {
        let tables = latent.sequences.tables();
        let slices = latent.sequences.slices(&tables);
        let spoil = |rows: &mut [f32]| {
            for slice in &slices {
                let end = slice.start + slice.rows.len();
                for position in end..slice.blocks.len() * BLOCK_TOKENS {
                    let at = (slice.blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS) * latent.shape().width();
                    rows[at..at + latent.shape().width()].fill(f32::NAN);
                }
            }
        };
        for isa in variants().chain([SCALAR]) {
            prop_assert_eq!(latent.run(&cpu(isa, 1), &slices, spoil), latent.run(&cpu(isa, 1), &slices, |_| ()));
        }
    }

    #[test]
    fn stored_latents_are_found_again(latent in latents()) {
        let (shape, tables) = (latent.shape(), latent.sequences.tables());
        let slices = latent.sequences.slices(&tables);
        let rows = latent.sequences.rows();
        let (c, k_pe) = (values(latent.sequences.seed, rows * shape.rank), values(latent.sequences.seed ^ 9, rows * shape.rope));
        let mut cache = vec![f32::NAN; shape.len().expect("small")];
        cpu(SCALAR, 1).store_latent(&shape, [&c, &k_pe], &slices, &mut cache);
        prop_assert_eq!(cache.iter().filter(|v| !v.is_nan()).count(), c.len() + k_pe.len());
        for slice in &slices {
            for (i, row) in slice.rows.clone().enumerate() {
                let (block, offset) = (slice.blocks[(slice.start + i) / BLOCK_TOKENS] as usize, (slice.start + i) % BLOCK_TOKENS);
                let found = &cache[(block * BLOCK_TOKENS + offset) * shape.width()..][..shape.width()];
                prop_assert_eq!(&found[..shape.rank], &c[row * shape.rank..][..shape.rank]);
                prop_assert_eq!(&found[shape.rank..], &k_pe[row * shape.rope..][..shape.rope]);
            }
        }
    }
}

/// A query, a key or a value that is no number must reach the rows that see it, in the first tile of the cache or in a later one.
#[test]
fn latent_attention_passes_on_what_is_not_finite() {
    let sequences = Attention { kv_heads: 1, group: 1, head_dim: 1, sequences: vec![(90, 30)], seed: 3 };
    let latent = Latent { sequences, heads: 2, rank: 9, rope: 3 };
    let tables = latent.sequences.tables();
    let slices = latent.sequences.slices(&tables);
    for isa in variants().chain([SCALAR]) {
        for position in [0, 70, 100] {
            for (place, bad) in [(0, f32::NAN), (8, f32::INFINITY), (10, f32::NAN)] {
                let at = (tables[0][position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS) * 12 + place;
                let out = latent.run(&cpu(isa, 1), &slices, |rows| rows[at] = bad);
                for (row, out) in out.chunks(18).enumerate() {
                    let (seen, finite) = (90 + row >= position, out.iter().all(|v| v.is_finite()));
                    assert_eq!(finite, !seen, "{bad} at {place} of position {position}, row {row}, {isa}");
                }
            }
        }
    }
}
