//! What latent attention costs at the sizes of V2-Lite: attention over the compressed cache, and the heads' way into its space and out of it.
//!
//! Every instruction set of the machine, GFLOP/s, the best of several rounds.
//! `cargo bench -p cpu --bench latent [-- THREADS]`

use std::{hint::black_box, time::Instant};

use cpu::{Cpu, Dtype, HeadRows, Isa, KvSlice, LatentKv, LatentQueries, LatentShape, Matrix};

const HEADS: usize = 16;
const RANK: usize = 512;
const ROPE: usize = 64;
/// Rows of the key's part and of the value's part of a head.
const HEAD_DIM: usize = 128;
const BLOCK_TOKENS: usize = 16;

fn main() {
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(0);
    for cpu in Isa::ALL.into_iter().filter_map(|isa| Cpu::with_isa(isa, threads)) {
        println!("{cpu:?}");
        for (rows, context) in [(1, 1024), (1, 8192), (8, 1024), (128, 1024)] {
            println!("  attention {rows:4} rows after {context:5} positions {:7.1}", attention(&cpu, rows, context));
        }
        for rows in [1, 8, 128] {
            let [into, out_of] = heads(&cpu, rows);
            println!("  heads     {rows:4} rows, in {into:7.1}, out {out_of:7.1}");
        }
    }
}

fn attention(cpu: &Cpu, rows: usize, context: usize) -> f64 {
    let blocks = (context + rows).div_ceil(BLOCK_TOKENS);
    let shape = LatentShape { blocks, block_tokens: BLOCK_TOKENS, rank: RANK, rope: ROPE };
    let cache = vec![0.01; blocks * BLOCK_TOKENS * shape.width()];
    let (latent, rotary) = (vec![0.1; rows * HEADS * RANK], vec![0.1; rows * HEADS * ROPE]);
    let table: Vec<u32> = (0..blocks as u32).rev().collect();
    let slices = [KvSlice { rows: 0..rows, start: context, blocks: &table }];
    let queries = LatentQueries { latent: &latent, rotary: &rotary, heads: HEADS, scale: 0.1 };
    let mut out = vec![0.0; latent.len()];
    best(2 * rows * HEADS * context * (2 * RANK + ROPE), || {
        cpu.latent_attention(&queries, &LatentKv { shape, rows: &cache }, &slices, &mut out);
        black_box(&mut out);
    })
}

fn heads(cpu: &Cpu, rows: usize) -> [f64; 2] {
    let bytes = vec![0x3c; HEADS * 2 * HEAD_DIM * RANK * 2]; // 0.0115 in bf16: products are no subnormals
    let w = Matrix::new(&bytes, Dtype::BF16, HEADS * 2 * HEAD_DIM, RANK);
    let part = |rows| HeadRows { heads: HEADS, period: 2 * HEAD_DIM, rows };
    let (mut narrow, mut wide) = (vec![0.1; rows * HEADS * HEAD_DIM], vec![0.1; rows * HEADS * RANK]);
    let flops = 2 * rows * HEADS * HEAD_DIM * RANK;
    let into = best(flops, || cpu.heads_transposed(black_box(&narrow), &w, &part(0..HEAD_DIM), &mut wide));
    let out_of = best(flops, || cpu.heads(black_box(&wide), &w, &part(HEAD_DIM..2 * HEAD_DIM), &mut narrow));
    [into, out_of]
}

/// Billions of `flops` per second in the best of several rounds.
fn best(flops: usize, mut work: impl FnMut()) -> f64 {
    const ROUNDS: usize = 7;
    let round = |_| {
        let begin = Instant::now();
        work();
        flops as f64 / begin.elapsed().as_secs_f64() / 1e9
    };
    (0..ROUNDS).map(round).fold(0.0, f64::max)
}
