//! Rows of a weight matrix as f32: the embedding table, norm weights, biases.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
pub(crate) mod scalar;

use crate::{Cpu, Matrix, team::Cost};

impl Cpu {
    /// `y[i] = table[ids[i]]`, converted. `table` `[n, width]`, `y` `[ids, width]`. Exact. Panics on an id that is not a row.
    pub fn gather(&self, table: &Matrix<'_>, ids: &[u32], y: &mut [f32]) {
        let width = table.columns();
        assert_eq!(y.len(), ids.len() * width, "{} rows of {width}", ids.len());
        self.rows(y, width, Cost::elements(width), |first, rows| {
            for (row, &id) in rows.chunks_exact_mut(width).zip(&ids[first..]) {
                (self.kernels.widen)(table.dtype(), table.row(id as usize), row);
            }
        });
    }
}
