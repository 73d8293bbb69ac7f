//! `y = x · wᵀ (+ bias)`: f32 activations, weights in f32, bf16 or f16 as they lie in the file, f32 sums.
//!
//! The order of additions for `y[m, n]` is part of the contract of an implementation: it may depend on `k` only, so that a row gives the same
//! bits alone (decode) and among hundreds (prefill). The implementations cut `k` into blocks of [`BLOCK_K`] and add the blocks' sums in order.
//!
//! | Rows of `x` | AVX2 does |
//! |---|---|
//! | few (up to [`avx2::DIRECT_ROWS`]) | reads each weight once, widens it in registers: as fast as memory |
//! | many | widens four weight rows at a time into a panel that stays in the first cache, tiles of 3 x 4 sums |
//!
//! Tolerance against the scalar reference: `k` roundings of the largest partial sum, in practice about `4e-7 * sum(|x| * |w|)`.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use std::ops::Range;

use crate::{Cpu, Matrix, team::Cost};

/// Terms of a dot product that are summed before the sum joins the total.
pub(crate) const BLOCK_K: usize = 512;

/// Columns of `y` that are computed together.
pub(crate) const TILE_COLUMNS: usize = 4;

/// How an instruction set multiplies.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Rearranges `x` `[rows, k]` for many uses; empty when the kernel reads `x` as it is.
    pub pack: fn(x: &[f32], k: usize) -> Vec<f32>,
    /// Computes a range of columns of `y` for all rows. The range begins at a multiple of [`TILE_COLUMNS`].
    ///
    /// # Safety
    /// No other thread may touch these columns of `y` meanwhile.
    pub columns: unsafe fn(job: &Job<'_>, columns: Range<usize>),
}

/// One multiplication, all shapes checked.
pub(crate) struct Job<'a> {
    /// `[rows, k]`
    pub x: &'a [f32],
    /// What `Kernel::pack` made of `x`.
    pub packed: Vec<f32>,
    /// `[n, k]`
    pub w: Matrix<'a>,
    /// `[n]`
    pub bias: Option<&'a [f32]>,
    pub rows: usize,
    y: *mut f32,
    /// Elements from one row of `y` to the next.
    stride: usize,
}

// SAFETY: `y` is the only field that is not shared data; whoever writes through it promises to keep to columns of its own (`Kernel::columns`).
unsafe impl Sync for Job<'_> {}

impl<'a> Job<'a> {
    /// The product of `x` and `w` into rows that are `stride` elements apart.
    pub fn new(kernel: &Kernel, x: &'a [f32], w: Matrix<'a>, bias: Option<&'a [f32]>, y: *mut f32, stride: usize) -> Self {
        let k = w.columns();
        Self { x, packed: (kernel.pack)(x, k), w, bias, rows: x.len() / k, y, stride }
    }

    /// The `n` elements of row `row` of `y`.
    ///
    /// # Safety
    /// `row < rows`; whoever reads or writes through the pointer keeps to columns of its own.
    #[inline(always)]
    pub unsafe fn row(&self, row: usize) -> *mut f32 {
        // SAFETY: `y` has `rows` rows of `n` elements, `stride` apart.
        unsafe { self.y.add(row * self.stride) }
    }
}

impl Cpu {
    /// `y[m, n] = sum over k of x[m, k] * w[n, k]`, plus `bias[n]` when there is one.
    ///
    /// `x` `[m, k]`, `w` `[n, k]`, `bias` `[n]`, `y` `[m, n]`. Panics when the lengths do not fit.
    pub fn matmul(&self, x: &[f32], w: &Matrix<'_>, bias: Option<&[f32]>, y: &mut [f32]) {
        let (n, k) = (w.rows(), w.columns());
        let rows = x.len() / k;
        assert!(x.len() == rows * k && y.len() == rows * n, "x {} and y {} with a {n} x {k} matrix", x.len(), y.len());
        assert!(bias.is_none_or(|bias| bias.len() == n), "bias of another size than {n}");
        let kernel = &self.kernels.matmul;
        let job = Job::new(kernel, x, *w, bias, y.as_mut_ptr(), n);
        let share = self.team.share(n, TILE_COLUMNS);
        let cost = Cost::new(2 * rows * n * k, n * k * w.dtype().size());
        self.team.run(n.div_ceil(share), cost, |task| {
            let columns = task * share..((task + 1) * share).min(n);
            // SAFETY: tasks have disjoint ranges of columns, and `y` is borrowed mutably for the whole operation.
            unsafe { (kernel.columns)(&job, columns) }
        });
    }
}
