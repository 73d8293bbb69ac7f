//! Every kernel against the scalar reference over random shapes, and the promise that results do not depend on company.

mod heads;
mod latent_attention;

use cpu::{Cpu, Dtype, HeadRows, Isa, KvShape, KvSlice, Matrix, PagedKv, Pairs, Queries, Rotation};
use half::{bf16, f16};
use proptest::prelude::*;

use crate::{heads::Heads, latent_attention::Latent};

const SCALAR: Isa = Isa::Scalar;

fn cpu(isa: Isa, threads: usize) -> Cpu {
    Cpu::with_isa(isa, threads).expect("only called for available instruction sets")
}

/// The instruction sets of this machine beside the reference.
fn variants() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|&isa| isa != SCALAR && isa.is_available())
}

/// A small generator, so that big inputs need not be drawn number by number: uniform in -1..1.
fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Weights as bytes that begin `offset` bytes into the returned buffer.
fn weights(dtype: Dtype, values: &[f32], offset: usize) -> Vec<u8> {
    let mut bytes = vec![0; offset];
    for &value in values {
        match dtype {
            Dtype::F32 => bytes.extend(value.to_le_bytes()),
            Dtype::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            Dtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
        }
    }
    bytes
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::BF16), Just(Dtype::F16)]
}

/// Sizes around the blocks and tiles of the kernels, and everything below.
fn k_sizes() -> impl Strategy<Value = usize> {
    prop_oneof![1..40usize, 500..530usize, 1020..1030usize]
}

fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32) -> Result<(), TestCaseError> {
    prop_assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        prop_assert!((a - e).abs() <= tolerance, "element {i}: {a} instead of {e}, tolerance {tolerance}");
    }
    Ok(())
}

/// A matrix product with everything that it takes.
#[derive(Debug, Clone)]
struct Product {
    rows: usize,
    n: usize,
    k: usize,
    dtype: Dtype,
    offset: usize,
    bias: bool,
    seed: u64,
}

prop_compose! {
    fn products()(rows in 1..24usize, n in 1..23usize, k in k_sizes(), dtype in dtypes(), offset in 0..5usize, bias: bool, seed: u64) -> Product {
        Product { rows, n, k, dtype, offset, bias, seed }
    }
}

impl Product {
    fn x(&self) -> Vec<f32> {
        values(self.seed, self.rows * self.k)
    }

    fn run(&self, cpu: &Cpu, x: &[f32]) -> Vec<f32> {
        let bytes = weights(self.dtype, &values(self.seed ^ 1, self.n * self.k), self.offset);
        let w = Matrix::new(&bytes[self.offset..], self.dtype, self.n, self.k);
        let bias = values(self.seed ^ 2, self.n);
        let mut y = vec![f32::NAN; x.len() / self.k * self.n];
        cpu.matmul(x, &w, self.bias.then_some(bias.as_slice()), &mut y);
        y
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn matmul_agrees_with_the_reference(product in products()) {
        let expected = product.run(&cpu(SCALAR, 1), &product.x());
        for isa in variants() {
            let actual = product.run(&cpu(isa, 1), &product.x());
            assert_close(&actual, &expected, 4e-7 * product.k as f32 + 1e-6)?;
        }
    }

    #[test]
    fn matmul_gives_a_row_the_same_bits_alone_and_in_company(product in products(), more in 0..150usize) {
        let product = Product { rows: product.rows + more, ..product };
        for isa in variants().chain([SCALAR]) {
            let cpu = cpu(isa, 1);
            let x = product.x();
            let together = product.run(&cpu, &x);
            for (row, expected) in x.chunks(product.k).zip(together.chunks(product.n)) {
                prop_assert_eq!(&product.run(&cpu, row), expected);
            }
        }
    }

    #[test]
    fn elementwise_operations_agree_with_the_reference(rows in 1..6usize, width in 1..70usize, seed: u64, spread in 0.1..30.0f32) {
        let x: Vec<_> = values(seed, rows * width).into_iter().map(|v| v * spread).collect();
        let y = values(seed ^ 1, rows * width);
        for isa in variants() {
            let both = |operation: &dyn Fn(&Cpu, &mut [f32])| {
                [SCALAR, isa].map(|isa| {
                    let mut x = x.clone();
                    operation(&cpu(isa, 1), &mut x);
                    x
                })
            };
            let [expected, actual] = both(&|cpu, x| cpu.add(x, &y));
            prop_assert_eq!(actual, expected);
            let [expected, actual] = both(&|cpu, x| cpu.silu_mul(x, &y));
            assert_close(&actual, &expected, 1e-6 * spread)?;
            let [expected, actual] = both(&|cpu, x| cpu.gelu(x));
            assert_close(&actual, &expected, 2e-7 * spread + 1e-7)?;
            let [expected, actual] = both(&|cpu, x| cpu.softmax(x, width));
            assert_close(&actual, &expected, 1.2e-6)?;
            let [expected, actual] = both(&|cpu, x| cpu.rms_norm(x, &y[..width], 1e-6));
            assert_close(&actual, &expected, 1e-5)?;
        }
    }

    #[test]
    fn rope_agrees_with_the_reference(rows in 1..5usize, heads in 1..4usize, half in 1..20usize, seed: u64) {
        let angles = values(seed, rows * half);
        let cos: Vec<_> = angles.iter().map(|a| (a * 9.0).cos()).collect();
        let sin: Vec<_> = angles.iter().map(|a| (a * 9.0).sin()).collect();
        let head_dim = half * 2;
        let rotated = |isa, pairs, mut x: Vec<f32>| {
            cpu(isa, 1).rope(&mut x, &Rotation { pairs, cos: &cos, sin: &sin, head_dim });
            x
        };
        // Neighbours are halves under another name: what one does to the de-interleaved head, the other does in place.
        let apart = |x: &[f32]| -> Vec<f32> {
            x.chunks(head_dim).flat_map(|head| head.iter().step_by(2).chain(head.iter().skip(1).step_by(2))).copied().collect()
        };
        let x = values(seed ^ 1, rows * heads * head_dim);
        prop_assert_eq!(apart(&rotated(SCALAR, Pairs::Neighbours, x.clone())), rotated(SCALAR, Pairs::Halves, apart(&x)));
        for isa in variants() {
            for pairs in [Pairs::Halves, Pairs::Neighbours] {
                assert_close(&rotated(isa, pairs, x.clone()), &rotated(SCALAR, pairs, x.clone()), 3e-7)?;
            }
        }
    }

    #[test]
    fn gather_converts_exactly(table_rows in 1..9usize, width in 1..40usize, dtype in dtypes(), offset in 0..5usize, picks in prop::collection::vec(0..9u32, 0..20), seed: u64) {
        let table = values(seed, table_rows * width);
        let bytes = weights(dtype, &table, offset);
        let matrix = Matrix::new(&bytes[offset..], dtype, table_rows, width);
        let ids: Vec<_> = picks.into_iter().map(|id| id % table_rows as u32).collect();
        let round = |v: f32| match dtype {
            Dtype::F32 => v,
            Dtype::BF16 => bf16::from_f32(v).to_f32(),
            Dtype::F16 => f16::from_f32(v).to_f32(),
        };
        let expected: Vec<_> = ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).map(|&v| round(v)).collect();
        for isa in variants().chain([SCALAR]) {
            let mut y = vec![f32::NAN; ids.len() * width];
            cpu(isa, 1).gather(&matrix, &ids, &mut y);
            prop_assert_eq!(&y, &expected);
        }
    }
}

/// Sequences with a cache of their own blocks, scattered.
#[derive(Debug, Clone)]
struct Attention {
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    /// Positions before the slice, and rows in it, for every sequence.
    sequences: Vec<(usize, usize)>,
    seed: u64,
}

prop_compose! {
    fn attentions()(
        kv_heads in 1..4usize, group in 1..5usize, head_dim in prop_oneof![1..30usize, 60..70usize, Just(128usize)],
        sequences in prop::collection::vec((0..70usize, 1..40usize), 1..4), seed: u64,
    ) -> Attention {
        Attention { kv_heads, group, head_dim, sequences, seed }
    }
}

const BLOCK_TOKENS: usize = 16;

impl Attention {
    fn shape(&self) -> KvShape {
        let blocks = self.sequences.iter().map(|(start, rows)| (start + rows).div_ceil(BLOCK_TOKENS)).sum::<usize>() + 2;
        KvShape { blocks, block_tokens: BLOCK_TOKENS, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Block tables that take the blocks of the cache from the end, sequences in turns.
    fn tables(&self) -> Vec<Vec<u32>> {
        let mut free: Vec<_> = (0..self.shape().blocks as u32).collect();
        let mut tables = vec![Vec::new(); self.sequences.len()];
        while let Some(i) = (0..tables.len())
            .filter(|&i| tables[i].len() * BLOCK_TOKENS < self.sequences[i].0 + self.sequences[i].1)
            .min_by_key(|&i| tables[i].len())
        {
            tables[i].push(free.pop().expect("there are blocks for all sequences"));
        }
        tables
    }

    fn slices<'a>(&self, tables: &'a [Vec<u32>]) -> Vec<KvSlice<'a>> {
        let mut next = 0;
        let slice = |(&(start, rows), blocks): (&(usize, usize), &'a Vec<u32>)| {
            next += rows;
            KvSlice { rows: next - rows..next, start, blocks }
        };
        self.sequences.iter().zip(tables).map(slice).collect()
    }

    fn rows(&self) -> usize {
        self.sequences.iter().map(|(_, rows)| rows).sum()
    }

    fn width(&self) -> usize {
        self.kv_heads * self.group * self.head_dim
    }

    fn queries(&self) -> Vec<f32> {
        values(self.seed, self.rows() * self.width()).into_iter().map(|v| v * 3.0).collect()
    }

    fn cache(&self) -> [Vec<f32>; 2] {
        let len = self.shape().len().expect("small");
        [values(self.seed ^ 1, len), values(self.seed ^ 2, len)]
    }

    fn run(&self, cpu: &Cpu, slices: &[KvSlice<'_>]) -> Vec<f32> {
        let [keys, values] = self.cache();
        let queries = self.queries();
        let mut out = vec![f32::NAN; queries.len()];
        let kv = PagedKv { shape: self.shape(), keys: &keys, values: &values };
        let queries = Queries { values: &queries, heads: self.kv_heads * self.group, scale: 1.0 / (self.head_dim as f32).sqrt() };
        cpu.attention(&queries, &kv, slices, &mut out);
        out
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn attention_agrees_with_the_reference(attention in attentions()) {
        let tables = attention.tables();
        let slices = attention.slices(&tables);
        let expected = attention.run(&cpu(SCALAR, 1), &slices);
        prop_assert!(expected.iter().all(|v| v.is_finite()));
        for isa in variants() {
            assert_close(&attention.run(&cpu(isa, 1), &slices), &expected, 3e-6)?;
        }
    }

    #[test]
    fn attention_gives_a_row_the_same_bits_alone_and_in_company(attention in attentions()) {
        let tables = attention.tables();
        let slices = attention.slices(&tables);
        for isa in variants().chain([SCALAR]) {
            let cpu = cpu(isa, 1);
            let together = attention.run(&cpu, &slices);
            for slice in &slices {
                for (i, row) in slice.rows.clone().enumerate() {
                    let alone = KvSlice { rows: row..row + 1, start: slice.start + i, blocks: slice.blocks };
                    let span = row * attention.width()..(row + 1) * attention.width();
                    prop_assert_eq!(&attention.run(&cpu, &[alone])[span.clone()], &together[span]);
                }
            }
        }
    }

    #[test]
    fn stored_keys_are_found_again(attention in attentions()) {
        let (shape, tables) = (attention.shape(), attention.tables());
        let slices = attention.slices(&tables);
        let width = shape.kv_heads * shape.head_dim;
        let new = values(attention.seed, attention.rows() * width);
        let mut cache = vec![f32::NAN; shape.len().expect("small")];
        cpu(SCALAR, 1).store_kv(&shape, &new, &slices, &mut cache);
        prop_assert_eq!(cache.iter().filter(|v| !v.is_nan()).count(), new.len());
        for slice in &slices {
            for (i, row) in slice.rows.clone().enumerate() {
                let (block, offset) = (slice.blocks[(slice.start + i) / BLOCK_TOKENS] as usize, (slice.start + i) % BLOCK_TOKENS);
                for head in 0..shape.kv_heads {
                    let at = ((block * shape.kv_heads + head) * BLOCK_TOKENS + offset) * shape.head_dim;
                    prop_assert_eq!(&cache[at..at + shape.head_dim], &new[row * width + head * shape.head_dim..][..shape.head_dim]);
                }
            }
        }
    }
}

/// Large enough that the work is spread over threads.
#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let product = Product { rows: 130, n: 301, k: 700, dtype: Dtype::BF16, offset: 1, bias: true, seed: 5 };
    let attention = Attention { kv_heads: 3, group: 2, head_dim: 64, sequences: vec![(300, 60), (5, 90), (400, 1)], seed: 6 };
    let tables = attention.tables();
    let slices = attention.slices(&tables);
    let latent = Latent { sequences: attention.clone(), heads: 5, rank: 100, rope: 12 };
    let heads = Heads { rows: 60, heads: HeadRows { heads: 7, period: 90, rows: 10..80 }, k: 530, dtype: Dtype::F16, offset: 1, seed: 10 };
    for isa in variants().chain([SCALAR]) {
        let run = |threads| {
            let cpu = cpu(isa, threads);
            let mut x = values(7, 600_000);
            cpu.gelu(&mut x);
            cpu.silu_mul(&mut x, &values(8, 600_000));
            cpu.rms_norm(&mut x, &values(9, 600), 1e-6);
            let of_heads = [false, true].map(|transposed| heads.run(&cpu, &heads.x(if transposed { 70 } else { 530 }), transposed));
            let attended = (attention.run(&cpu, &slices), latent.run(&cpu, &slices, |_| ()));
            (product.run(&cpu, &product.x()), attended, of_heads, x)
        };
        let alone = run(1);
        for threads in 2..5 {
            assert!(run(threads) == alone, "{isa} with {threads} threads");
        }
    }
}

/// Infinity and NaN must not be swallowed: the engine refuses logits that are not finite, and can only do so if they arrive there.
#[test]
fn what_is_not_finite_stays_so() {
    for isa in variants().chain([SCALAR]) {
        let cpu = cpu(isa, 1);
        let poisoned = || {
            let mut x = vec![1.0; 19];
            x[3] = f32::NAN;
            x
        };
        let mut x = poisoned();
        cpu.gelu(&mut x);
        assert!(x[3].is_nan(), "gelu, {isa}");
        let mut x = poisoned();
        cpu.silu_mul(&mut x, &[1.0; 19]);
        assert!(x[3].is_nan(), "silu_mul, {isa}");
        let mut x = poisoned();
        cpu.rms_norm(&mut x, &[1.0; 19], 1e-6);
        assert!(x.iter().all(|v| v.is_nan()), "rms_norm, {isa}");
        let mut x = poisoned();
        cpu.softmax(&mut x, 19);
        assert!(x[3].is_nan(), "softmax, {isa}");
        let mut y = vec![0.0; 2];
        let bytes = weights(Dtype::F32, &[1.0; 38], 0);
        cpu.matmul(&poisoned(), &Matrix::new(&bytes, Dtype::F32, 2, 19), None, &mut y);
        assert!(y.iter().all(|v| v.is_nan()), "matmul, {isa}");
        let heads = HeadRows { heads: 1, period: 2, rows: 0..2 };
        let mut y = vec![0.0; 2];
        cpu.heads(&poisoned(), &Matrix::new(&bytes, Dtype::F32, 2, 19), &heads, &mut y);
        assert!(y.iter().all(|v| v.is_nan()), "heads, {isa}");
        let mut y = vec![0.0; 19];
        cpu.heads_transposed(&[1.0, f32::NAN], &Matrix::new(&bytes, Dtype::F32, 2, 19), &heads, &mut y);
        assert!(y.iter().all(|v| v.is_nan()), "heads_transposed, {isa}");
    }
}

#[test]
fn an_instruction_set_is_forced_by_name_or_refused() {
    assert_eq!("scalar".parse(), Ok(Isa::Scalar));
    let refused = "avx9".parse::<Isa>().expect_err("no such thing").to_string();
    assert!(refused.contains("JANUA_ISA") && refused.contains("avx9") && refused.contains("scalar"), "{refused}");
}
