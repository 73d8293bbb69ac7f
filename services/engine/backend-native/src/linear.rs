use checkpoint::SharedTensor;
use cpu::{Dtype, Matrix};
use layers::EngineError;

/// A weight matrix `[out, in]` in its mapped file, and its bias as f32.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: SharedTensor,
    dtype: Dtype,
    rows: usize,
    columns: usize,
    pub(crate) bias: Option<Vec<f32>>,
}

impl Linear {
    /// Keeps the mapping; only the bias is copied. The kernels read any alignment.
    pub(crate) fn new(weight: SharedTensor, bias: Option<SharedTensor>) -> Result<Self, EngineError> {
        let dtype = match weight.dtype() {
            checkpoint::Dtype::F32 => Dtype::F32,
            checkpoint::Dtype::BF16 => Dtype::BF16,
            checkpoint::Dtype::F16 => Dtype::F16,
            other => return Err(EngineError::Checkpoint(format!("weights of type {other} cannot be computed with"))),
        };
        let &[rows, columns] = weight.shape() else {
            return Err(EngineError::Checkpoint(format!("a weight of shape {:?} is no matrix", weight.shape())));
        };
        if rows == 0 || columns == 0 {
            return Err(EngineError::Checkpoint(format!("a weight of shape {:?} is empty", weight.shape())));
        }
        Ok(Self { dtype, rows, columns, bias: bias.map(|bias| bias.to_f32()), weight })
    }

    pub(crate) fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.weight.bytes(), self.dtype, self.rows, self.columns)
    }
}
