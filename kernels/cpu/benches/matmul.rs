//! How close the matrix product comes to what the machine can do: memory reads for one row, multiply-adds for many.
//!
//! Limits and kernels are measured in the same run, in turns, the best of several rounds each, and reported as ratios: the machine drifts
//! more than kernels differ.
//! `cargo bench -p cpu [-- THREADS]`

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use cpu::{Cpu, Dtype, Matrix};

fn main() {
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(0);
    let cpu = match Cpu::new(threads) {
        Ok(cpu) => cpu,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(64);
        }
    };
    println!("{cpu:?}");
    one_row(&cpu);
    many_rows(&cpu);
}

/// Terms of a sum: the width of the 1.3B model.
const K: usize = 2048;
/// Bytes of weights that one sample of little arithmetic goes through; samples take turns in a buffer that no cache holds.
const SAMPLE: usize = 8 << 20;
const BUFFER: usize = 256 << 20;
/// Operations of one sample of much arithmetic.
const SAMPLE_FLOPS: usize = 1_000_000_000;

fn one_row(cpu: &Cpu) {
    println!("\none row, sums of {K}: GB/s of weights (ratio to plain reading in the same run)");
    let data = vec![1u8; BUFFER];
    for (name, dtype) in [("f32", Dtype::F32), ("bf16", Dtype::BF16), ("f16", Dtype::F16)] {
        let (x, mut y) = (vec![1.0; K], vec![0.0; SAMPLE / K / dtype.size()]);
        let (mut limit, mut speed) = (0.0f64, 0.0f64);
        for (round, bytes) in data.chunks_exact(SAMPLE).enumerate() {
            // Each reads what the other has read longest ago.
            limit = limit.max(measure(SAMPLE, || read_all(bytes, cpu.threads())));
            let bytes = &data[(round * SAMPLE + BUFFER / 2) % BUFFER..][..SAMPLE];
            speed = speed.max(measure(SAMPLE, || product(cpu, bytes, dtype, &x, &mut y)));
        }
        println!("  {name:5} {speed:7.1}  limit {limit:7.1}  ratio {:.2}", speed / limit);
    }
}

fn many_rows(cpu: &Cpu) {
    println!("\nmany rows, sums of {K}: GFLOP/s (ratio to the lower of bare multiply-adds and plain reading in the same run)");
    let data = vec![1u8; BUFFER];
    for (name, dtype) in [("f32", Dtype::F32), ("bf16", Dtype::BF16)] {
        for rows in [2, 4, 8, 16, 64, 512] {
            let row = K * dtype.size();
            let size = SAMPLE.min(SAMPLE_FLOPS / (2 * rows * K) * row) / row * row;
            let flops = size / row * 2 * rows * K;
            let (x, mut y) = (vec![1.0; rows * K], vec![0.0; rows * (size / row)]);
            let (mut arithmetic, mut memory, mut speed) = (0.0f64, 0.0f64, 0.0f64);
            for (round, bytes) in data.chunks_exact(SAMPLE).enumerate() {
                arithmetic = arithmetic.max(multiply_adds(cpu.threads()));
                memory = memory.max(measure(SAMPLE / dtype.size() * 2 * rows, || read_all(bytes, cpu.threads())));
                let bytes = &data[(round * SAMPLE + BUFFER / 2) % BUFFER..][..size];
                speed = speed.max(measure(flops, || product(cpu, bytes, dtype, &x, &mut y)));
            }
            let ratio = speed / arithmetic.min(memory);
            println!("  {name:5} {rows:4} rows {speed:7.1}  multiply-adds {arithmetic:7.1}  reading {memory:7.1}  ratio {ratio:.2}");
        }
    }
}

/// The rows of `x` times the matrix that `bytes` hold.
fn product(cpu: &Cpu, bytes: &[u8], dtype: Dtype, x: &[f32], y: &mut [f32]) {
    cpu.matmul(x, &Matrix::new(bytes, dtype, bytes.len() / dtype.size() / K, K), None, y);
    black_box(y);
}

/// Billions of `units` per second.
fn measure(units: usize, work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    units as f64 / begin.elapsed().max(Duration::from_nanos(1)).as_secs_f64() / 1e9
}

/// Reads everything once, every thread a part.
fn read_all(bytes: &[u8], threads: usize) {
    std::thread::scope(|scope| {
        for part in bytes.chunks(bytes.len().div_ceil(threads)) {
            scope.spawn(move || {
                let (words, _) = part.as_chunks::<64>();
                let sum = words.iter().fold([0u64; 8], |mut sum, word| {
                    for (sum, bytes) in sum.iter_mut().zip(word.as_chunks::<8>().0) {
                        *sum ^= u64::from_ne_bytes(*bytes);
                    }
                    sum
                });
                black_box(sum);
            });
        }
    });
}

/// Billions of floating-point operations per second of independent multiply-adds in registers.
fn multiply_adds(threads: usize) -> f64 {
    const ROUNDS: usize = 2_000_000;
    measure(threads * ROUNDS * 12 * 8 * 2, || {
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| black_box(multiply_adds_here(ROUNDS)));
            }
        });
    })
}

fn multiply_adds_here(rounds: usize) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if cpu::Isa::Avx2.is_available() {
        // SAFETY: the CPU has AVX2 and FMA.
        return unsafe { multiply_adds_avx2(rounds) };
    }
    // Without vectors the ratio says little; keep the two multiplications and additions.
    (0..rounds * 96).fold(0.0, |sum, i| sum + black_box(i as f32) * 1e-9)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_adds_avx2(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let factor = _mm256_set1_ps(black_box(0.999_999));
    let mut sums = [_mm256_set1_ps(black_box(1.0)); 12];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, factor);
        }
    }
    let total = sums.into_iter().fold(_mm256_setzero_ps(), |a, b| _mm256_add_ps(a, b));
    _mm256_cvtss_f32(total)
}
