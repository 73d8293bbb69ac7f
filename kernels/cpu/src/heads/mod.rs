//! Every head through rows of its own in one matrix: with `w_h` `[rows, in]` the rows of head `h`,
//!
//! * [`Cpu::heads`]: `y[m, h] = x[m, h] · w_hᵀ`, from `in` to `rows` values;
//! * [`Cpu::heads_transposed`]: `y[m, h] = x[m, h] · w_h`, from `rows` to `in` values.
//!
//! Latent attention needs both: `kv_b_proj` holds `W_UK` and `W_UV` of every head (spec: language.md 2.5).
//!
//! The order of additions depends on the sizes of the matrix alone: that of `matmul` for the first, rows of `w_h` in order for the second.
//! Tolerance against the scalar reference: as `matmul`.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use std::ops::Range;

use crate::{Cpu, Matrix, matmul, team::Cost};

/// Whose rows are whose: head `h` has the rows `h * period + rows.start .. h * period + rows.end` of the matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadRows {
    pub heads: usize,
    pub period: usize,
    pub rows: Range<usize>,
}

/// Computes one head of all rows of `y`.
///
/// # Safety
/// No other thread may touch this head of `y` meanwhile.
pub(crate) type Kernel = unsafe fn(job: &Job<'_>, head: usize);

/// One multiplication with the transposed rows, all shapes checked.
pub(crate) struct Job<'a> {
    /// `[rows, heads, n]`
    x: &'a [f32],
    w: Matrix<'a>,
    heads: &'a HeadRows,
    /// `[rows, heads, k]`
    y: *mut f32,
}

// SAFETY: `y` is the only field that is not shared data; whoever writes through it promises to keep to a head of its own (`Kernel`).
unsafe impl Sync for Job<'_> {}

impl HeadRows {
    /// The rows of head `head` of `w`, `[n, k]`.
    fn part<'a>(&self, w: &Matrix<'a>, head: usize) -> Matrix<'a> {
        let begin = head * self.period;
        w.part(begin + self.rows.start..begin + self.rows.end)
    }

    fn check(&self, w: &Matrix<'_>) {
        let inside = !self.rows.is_empty() && self.rows.end <= self.period && self.heads > 0;
        assert!(inside && self.heads.checked_mul(self.period) == Some(w.rows()), "{self:?} of a matrix of {} rows", w.rows());
    }
}

impl Job<'_> {
    /// Rows of `x` and `y`.
    pub fn rows(&self) -> usize {
        self.x.len() / (self.heads.heads * self.heads.rows.len())
    }

    /// `[n]`
    pub fn x(&self, row: usize, head: usize) -> &[f32] {
        let n = self.heads.rows.len();
        &self.x[(row * self.heads.heads + head) * n..][..n]
    }

    /// The matrix of a head, `[n, k]`.
    pub fn part(&self, head: usize) -> Matrix<'_> {
        self.heads.part(&self.w, head)
    }

    /// # Safety
    /// No other thread touches this head of this row, and only one such borrow lives at a time.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn y(&self, row: usize, head: usize) -> &mut [f32] {
        assert!(row < self.rows() && head < self.heads.heads, "a head of a row");
        let k = self.w.columns();
        // SAFETY: `y` has that many rows and heads of `k` elements, and the caller has this one for itself.
        unsafe { std::slice::from_raw_parts_mut(self.y.add((row * self.heads.heads + head) * k), k) }
    }
}

impl Cpu {
    /// `y[m, h] = x[m, h] · w_hᵀ`: `x` `[m, heads, k]` -> `y` `[m, heads, n]`, `w_h` `[n, k]`. Panics when the lengths do not fit.
    pub fn heads(&self, x: &[f32], w: &Matrix<'_>, heads: &HeadRows, y: &mut [f32]) {
        let (n, k) = (heads.rows.len(), w.columns());
        let rows = self.head_rows(w, heads, [x.len(), heads.heads * k], [y.len(), heads.heads * n]);
        let kernel = &self.kernels.matmul;
        let y = Shared(y.as_mut_ptr());
        self.team.run(heads.heads, head_cost(w, heads, rows), |head| {
            let x: Vec<f32> = x.chunks_exact(heads.heads * k).flat_map(|row| &row[head * k..(head + 1) * k]).copied().collect(); // [m, k]
            // SAFETY: the first row of this head; rows are `heads * n` apart.
            let y = unsafe { y.at(head * n) };
            let job = matmul::Job::new(kernel, &x, heads.part(w, head), None, y, heads.heads * n);
            // SAFETY: tasks have heads of their own, and `y` is borrowed mutably for the whole operation.
            unsafe { (kernel.columns)(&job, 0..n) }
        });
    }

    /// `y[m, h] = x[m, h] · w_h`: `x` `[m, heads, n]` -> `y` `[m, heads, k]`, `w_h` `[n, k]`. Panics when the lengths do not fit.
    pub fn heads_transposed(&self, x: &[f32], w: &Matrix<'_>, heads: &HeadRows, y: &mut [f32]) {
        let (n, k) = (heads.rows.len(), w.columns());
        let rows = self.head_rows(w, heads, [x.len(), heads.heads * n], [y.len(), heads.heads * k]);
        let job = Job { x, w: *w, heads, y: y.as_mut_ptr() };
        self.team.run(heads.heads, head_cost(w, heads, rows), |head| {
            // SAFETY: tasks have heads of their own, and `y` is borrowed mutably for the whole operation.
            unsafe { (self.kernels.heads_transposed)(&job, head) }
        });
    }

    /// The number of rows of `x` and `y`, each given as length and width.
    fn head_rows(&self, w: &Matrix<'_>, heads: &HeadRows, x: [usize; 2], y: [usize; 2]) -> usize {
        heads.check(w);
        let rows = x[0] / x[1];
        assert!(x[0] == rows * x[1] && y[0] == rows * y[1], "x {} and y {} in {rows} rows of {} and {}", x[0], y[0], x[1], y[1]);
        rows
    }
}

fn head_cost(w: &Matrix<'_>, heads: &HeadRows, rows: usize) -> Cost {
    let weights = heads.heads * heads.rows.len() * w.columns();
    Cost::new(2 * rows * weights, weights * w.dtype().size())
}

/// The output, of which every task writes another part.
struct Shared(*mut f32);

// SAFETY: tasks write to heads of their own.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// `offset` lies inside the output.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: passed on from the caller.
        unsafe { self.0.add(offset) }
    }
}
