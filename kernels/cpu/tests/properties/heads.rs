use cpu::{Cpu, Dtype, HeadRows, Matrix};
use half::{bf16, f16};
use proptest::prelude::*;

use crate::{SCALAR, assert_close, cpu, dtypes, k_sizes, values, variants, weights};

/// Heads with rows of their own in one matrix.
#[derive(Debug, Clone)]
pub struct Heads {
    pub rows: usize,
    pub heads: HeadRows,
    pub k: usize,
    pub dtype: Dtype,
    pub offset: usize,
    pub seed: u64,
}

prop_compose! {
    fn heads()(
        rows in 1..16usize, heads in 1..6usize, before in 0..5usize, n in 1..20usize, after in 0..5usize, k in k_sizes(), dtype in dtypes(),
        offset in 0..5usize, seed: u64,
    ) -> Heads {
        Heads { rows, heads: HeadRows { heads, period: before + n + after, rows: before..before + n }, k, dtype, offset, seed }
    }
}

impl Heads {
    fn n(&self) -> usize {
        self.heads.rows.len()
    }

    /// Inputs `[rows, heads, width]`.
    pub fn x(&self, width: usize) -> Vec<f32> {
        values(self.seed, self.rows * self.heads.heads * width)
    }

    /// Every head's matrix and the output of `x` through it, or back through it.
    pub fn run(&self, cpu: &Cpu, x: &[f32], transposed: bool) -> Vec<f32> {
        let rows = self.heads.heads * self.heads.period;
        let bytes = weights(self.dtype, &values(self.seed ^ 1, rows * self.k), self.offset);
        let w = Matrix::new(&bytes[self.offset..], self.dtype, rows, self.k);
        let (from, to) = if transposed { (self.n(), self.k) } else { (self.k, self.n()) };
        let mut y = vec![f32::NAN; x.len() / from * to];
        match transposed {
            true => cpu.heads_transposed(x, &w, &self.heads, &mut y),
            false => cpu.heads(x, &w, &self.heads, &mut y),
        }
        y
    }

    /// What head `head` of row `row` must be, summed in f64.
    fn expected(&self, x: &[f32], [row, head]: [usize; 2], transposed: bool) -> Vec<f32> {
        let all = values(self.seed ^ 1, self.heads.heads * self.heads.period * self.k);
        let round = |v: f32| match self.dtype {
            Dtype::F32 => v,
            Dtype::BF16 => bf16::from_f32(v).to_f32(),
            Dtype::F16 => f16::from_f32(v).to_f32(),
        };
        let weight = |n: usize, k: usize| f64::from(round(all[(head * self.heads.period + self.heads.rows.start + n) * self.k + k]));
        let width = if transposed { self.n() } else { self.k };
        let x = &x[(row * self.heads.heads + head) * width..][..width];
        let sum = |terms: &mut dyn Iterator<Item = f64>| terms.sum::<f64>() as f32;
        match transposed {
            true => (0..self.k).map(|k| sum(&mut x.iter().enumerate().map(|(n, x)| f64::from(*x) * weight(n, k)))).collect(),
            false => (0..self.n()).map(|n| sum(&mut x.iter().enumerate().map(|(k, x)| f64::from(*x) * weight(n, k)))).collect(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn heads_have_rows_of_their_own(case in heads(), transposed: bool) {
        let (from, to) = if transposed { (case.n(), case.k) } else { (case.k, case.n()) };
        let x = case.x(from);
        for isa in variants().chain([SCALAR]) {
            let y = case.run(&cpu(isa, 1), &x, transposed);
            for row in 0..case.rows {
                for head in 0..case.heads.heads {
                    let actual = &y[(row * case.heads.heads + head) * to..][..to];
                    assert_close(actual, &case.expected(&x, [row, head], transposed), 4e-7 * from as f32 + 1e-6)?;
                }
            }
        }
    }

    #[test]
    fn heads_give_a_row_the_same_bits_alone_and_in_company(case in heads(), transposed: bool) {
        let (from, to) = if transposed { (case.n(), case.k) } else { (case.k, case.n()) };
        let x = case.x(from);
        for isa in variants().chain([SCALAR]) {
            let cpu = cpu(isa, 1);
            let together = case.run(&cpu, &x, transposed);
            for (row, expected) in x.chunks(case.heads.heads * from).zip(together.chunks(case.heads.heads * to)) {
                prop_assert_eq!(&case.run(&cpu, row, transposed), expected);
            }
        }
    }
}
