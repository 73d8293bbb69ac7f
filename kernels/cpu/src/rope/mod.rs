//! Rotary position embedding: pairs of dimensions turn by the angles of their row (spec: language.md 1.3 and 2.3).

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use crate::{Cpu, team::Cost};

/// Which two dimensions of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// `(x[j], x[j + width / 2])`: rotate-half.
    Halves,
    /// `(x[2j], x[2j + 1])`.
    Neighbours,
}

/// Angles of some rows.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    pub pairs: Pairs,
    /// `[rows, head_dim / 2]`
    pub cos: &'a [f32],
    /// `[rows, head_dim / 2]`
    pub sin: &'a [f32],
    pub head_dim: usize,
}

/// Rotates all heads of one row: `fn(row, cos, sin)`, the angles those of the row.
pub(crate) type Kernel = fn(&mut [f32], &[f32], &[f32]);

impl Cpu {
    /// Rotates every head of every row of `x` `[rows, heads, head_dim]` in place by the row's angles. Tolerance between kernels: one rounding.
    pub fn rope(&self, x: &mut [f32], rotation: &Rotation<'_>) {
        let half = rotation.head_dim / 2;
        let rows = rotation.cos.len() / half;
        assert!(
            rotation.head_dim.is_multiple_of(2) && rotation.cos.len() == rows * half && rotation.sin.len() == rows * half,
            "angles of whole rows"
        );
        if rows == 0 {
            return;
        }
        let width = x.len() / rows;
        assert!(x.len() == rows * width && width.is_multiple_of(rotation.head_dim), "{} values in {rows} rows of whole heads", x.len());
        let kernel = match rotation.pairs {
            Pairs::Halves => self.kernels.rope,
            Pairs::Neighbours => self.kernels.rope_neighbours,
        };
        self.rows(x, width, Cost::elements(width), |first, x| {
            for (i, row) in x.chunks_exact_mut(width).enumerate() {
                let angles = (first + i) * half..(first + i + 1) * half;
                kernel(row, &rotation.cos[angles.clone()], &rotation.sin[angles]);
            }
        });
    }
}
