//! How close the matrix product comes to what the machine can do: memory reads for one row, multiply-adds for many.
//!
//! Limits and kernels are measured in the same run, in turns, and reported as ratios: the machine drifts more than kernels differ.
//! `cargo bench -p cpu [-- THREADS]`

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use cpu::{Cpu, Dtype, Matrix};

const ROUNDS: usize = 7;

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

/// Weights of a layer of the 1.3B model, several times over so that no cache holds them.
const N: usize = 5504;
const K: usize = 2048;

fn one_row(cpu: &Cpu) {
    println!("\none row: weights {N} x {K}, GB/s (ratio to plain reading in the same run)");
    let data = vec![1u8; 256 << 20];
    let read = |bytes: &[u8]| measure(bytes.len(), || read_all(bytes, cpu.threads()));
    for (name, dtype) in [("f32", Dtype::F32), ("bf16", Dtype::BF16), ("f16", Dtype::F16)] {
        let size = N * K * dtype.size();
        let x = vec![1.0; K];
        let mut y = vec![0.0; N];
        let (mut limits, mut speeds) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            limits.push(read(&data));
            speeds.push(measure(data.len() / size * size, || {
                for bytes in data.chunks_exact(size) {
                    cpu.matmul(&x, &Matrix::new(bytes, dtype, N, K), None, black_box(&mut y));
                }
            }));
        }
        let (limit, speed) = (median(limits), median(speeds));
        println!("  {name:5} {speed:7.1}  limit {limit:7.1}  ratio {:.2}", speed / limit);
    }
}

fn many_rows(cpu: &Cpu) {
    println!("\nmany rows: weights {N} x {K}, GFLOP/s (ratio to bare multiply-adds in the same run)");
    for (name, dtype) in [("f32", Dtype::F32), ("bf16", Dtype::BF16)] {
        let bytes = vec![0u8; N * K * dtype.size()];
        let w = Matrix::new(&bytes, dtype, N, K);
        for rows in [4, 8, 16, 64, 512] {
            let x = vec![1.0; rows * K];
            let mut y = vec![0.0; rows * N];
            let (mut limits, mut speeds) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                limits.push(multiply_adds(cpu.threads()));
                speeds.push(measure(2 * rows * N * K, || cpu.matmul(&x, &w, None, black_box(&mut y))));
            }
            let (limit, speed) = (median(limits), median(speeds));
            println!("  {name:5} {rows:4} rows {speed:7.1}  limit {limit:7.1}  ratio {:.2}", speed / limit);
        }
    }
}

/// Billions of `units` per second.
fn measure(units: usize, work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    units as f64 / begin.elapsed().max(Duration::from_nanos(1)).as_secs_f64() / 1e9
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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
    const ROUNDS: usize = 8_000_000;
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
