use std::ops::Range;

use checkpoint::SharedTensor;
use cpu::{Cpu, KvSlice, LatentQueries, Queries};
use layers::{Attend, Backend, EngineError, HeadRows, KvShape, Pairs, Rotation, Slice};

use crate::{Kv, Linear, Tensor};

/// The kernels of this CPU as a backend.
#[derive(Debug)]
pub struct Native {
    cpu: Cpu,
}

impl Native {
    /// With the best instruction set (or the one that the environment forces) and `threads` threads (0: one per core).
    pub fn new(threads: usize) -> Result<Self, EngineError> {
        Ok(Self::on(Cpu::new(threads).map_err(|error| EngineError::Compute(error.to_string()))?))
    }

    /// On given kernels.
    pub fn on(cpu: Cpu) -> Self {
        Self { cpu }
    }

    /// The kernels.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }
}

impl Backend for Native {
    type Tensor = Tensor;
    type Linear = Linear;
    type Kv = Kv;

    fn linear(&self, weight: SharedTensor, bias: Option<SharedTensor>) -> Result<Linear, EngineError> {
        Linear::new(weight, bias)
    }

    fn vector(&self, values: SharedTensor) -> Result<Tensor, EngineError> {
        let values = values.to_f32();
        let width = values.len();
        Ok(Tensor::new(values, width))
    }

    fn kv(&self, shape: &KvShape) -> Result<Kv, EngineError> {
        Kv::new(shape)
    }

    fn upload(&self, values: Vec<f32>, width: usize) -> Result<Tensor, EngineError> {
        Ok(Tensor::new(values, width))
    }

    fn download(&self, x: &Tensor) -> Result<Vec<f32>, EngineError> {
        Ok(x.values.clone())
    }

    fn give_up(&self, x: Tensor) -> Result<Vec<f32>, EngineError> {
        Ok(x.values)
    }

    fn embed(&self, table: &Linear, ids: &[u32]) -> Result<Tensor, EngineError> {
        let table = table.matrix();
        let mut y = Tensor::zeros(ids.len(), table.columns());
        self.cpu.gather(&table, ids, &mut y.values);
        Ok(y)
    }

    fn apply(&self, linear: &Linear, x: &Tensor) -> Result<Tensor, EngineError> {
        let matrix = linear.matrix();
        let mut y = Tensor::zeros(x.rows(), matrix.rows());
        self.cpu.matmul(&x.values, &matrix, linear.bias.as_deref(), &mut y.values);
        Ok(y)
    }

    fn apply_heads(&self, linear: &Linear, heads: &HeadRows, x: &Tensor) -> Result<Tensor, EngineError> {
        let mut y = Tensor::zeros(x.rows(), heads.heads * heads.rows.len());
        self.cpu.heads(&x.values, &linear.matrix(), &head_rows(heads), &mut y.values);
        Ok(y)
    }

    fn apply_heads_transposed(&self, linear: &Linear, heads: &HeadRows, x: &Tensor) -> Result<Tensor, EngineError> {
        let matrix = linear.matrix();
        let mut y = Tensor::zeros(x.rows(), heads.heads * matrix.columns());
        self.cpu.heads_transposed(&x.values, &matrix, &head_rows(heads), &mut y.values);
        Ok(y)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor, EngineError> {
        let mut y = x.clone();
        self.cpu.rms_norm(&mut y.values, &weight.values, eps);
        Ok(y)
    }

    fn silu_mul(&self, mut gate: Tensor, up: &Tensor) -> Result<Tensor, EngineError> {
        self.cpu.silu_mul(&mut gate.values, &up.values);
        Ok(gate)
    }

    fn gelu(&self, mut x: Tensor) -> Result<Tensor, EngineError> {
        self.cpu.gelu(&mut x.values);
        Ok(x)
    }

    fn add(&self, mut x: Tensor, y: &Tensor) -> Result<Tensor, EngineError> {
        self.cpu.add(&mut x.values, &y.values);
        Ok(x)
    }

    fn rope(&self, mut x: Tensor, rotation: &Rotation<Tensor>) -> Result<Tensor, EngineError> {
        let pairs = match rotation.pairs {
            Pairs::Halves => cpu::Pairs::Halves,
            Pairs::Neighbours => cpu::Pairs::Neighbours,
        };
        let Rotation { cos, sin, head_dim, .. } = rotation;
        self.cpu.rope(&mut x.values, &cpu::Rotation { pairs, cos: &cos.values, sin: &sin.values, head_dim: *head_dim });
        Ok(x)
    }

    fn attention(&self, attend: &Attend<'_>, [q, k, v]: [Tensor; 3], kv: &mut Kv) -> Result<Tensor, EngineError> {
        let slices: Vec<_> = attend.slices.iter().map(kv_slice).collect();
        let kv = kv.heads()?;
        self.cpu.store_kv(&kv.shape, &k.values, &slices, &mut kv.keys);
        self.cpu.store_kv(&kv.shape, &v.values, &slices, &mut kv.values);
        let mut out = Tensor::zeros(q.rows(), q.width);
        let queries = Queries { values: &q.values, heads: attend.heads, scale: attend.scale };
        self.cpu.attention(&queries, &kv.paged(), &slices, &mut out.values);
        Ok(out)
    }

    fn latent_attention(
        &self,
        attend: &Attend<'_>,
        [latent, rotary]: [Tensor; 2],
        [c, k_pe]: [Tensor; 2],
        kv: &mut Kv,
    ) -> Result<Tensor, EngineError> {
        let slices: Vec<_> = attend.slices.iter().map(kv_slice).collect();
        let kv = kv.latent()?;
        self.cpu.store_latent(&kv.shape, [&c.values, &k_pe.values], &slices, &mut kv.rows);
        let mut out = Tensor::zeros(latent.rows(), latent.width);
        let queries = LatentQueries { latent: &latent.values, rotary: &rotary.values, heads: attend.heads, scale: attend.scale };
        self.cpu.latent_attention(&queries, &kv.paged(), &slices, &mut out.values);
        Ok(out)
    }

    fn columns(&self, x: &Tensor, period: usize, part: Range<usize>) -> Result<Tensor, EngineError> {
        Ok(x.columns(period, part))
    }

    fn gather(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor, EngineError> {
        Ok(Tensor::new(rows.iter().flat_map(|&row| x.row(row)).copied().collect(), x.width))
    }

    fn scatter(&self, mut x: Tensor, rows: &[usize], y: &Tensor) -> Result<Tensor, EngineError> {
        for (from, &to) in rows.iter().enumerate() {
            x.row_mut(to).copy_from_slice(y.row(from));
        }
        Ok(x)
    }

    fn scatter_add(&self, mut x: Tensor, rows: &[usize], weights: &[f32], y: &Tensor) -> Result<Tensor, EngineError> {
        for (from, (&to, weight)) in rows.iter().zip(weights).enumerate() {
            x.row_mut(to).iter_mut().zip(y.row(from)).for_each(|(x, y)| *x += weight * y);
        }
        Ok(x)
    }
}

fn head_rows(heads: &HeadRows) -> cpu::HeadRows {
    cpu::HeadRows { heads: heads.heads, period: heads.period, rows: heads.rows.clone() }
}

fn kv_slice(slice: &Slice) -> KvSlice<'_> {
    KvSlice { rows: slice.rows.clone(), start: slice.start, blocks: &slice.blocks }
}
