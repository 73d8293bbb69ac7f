//! The handle that all operations hang on.

use std::fmt;

use crate::{
    Isa, UnknownIsa,
    isa::Kernels,
    team::{Cost, Team},
};

/// An instruction set and a team of threads; the receiver of every operation.
///
/// Build it once per process or model. Operations share it freely; two of them at a time share its threads.
pub struct Cpu {
    pub(crate) kernels: &'static Kernels,
    pub(crate) team: Team,
}

impl Cpu {
    /// The instruction set of the environment or the best one, with `threads` threads (0: one per core that the process may use).
    pub fn new(threads: usize) -> Result<Self, UnknownIsa> {
        let isa = Isa::from_environment()?;
        Ok(Self::with_isa(isa, threads).unwrap_or_else(|| Self::scalar(threads)))
    }

    /// A given instruction set; `None` where the CPU lacks it.
    pub fn with_isa(isa: Isa, threads: usize) -> Option<Self> {
        Some(Self { kernels: isa.kernels()?, team: Team::new(threads) })
    }

    /// The reference kernels.
    fn scalar(threads: usize) -> Self {
        Self { kernels: Isa::Scalar.kernels().expect("every CPU runs plain Rust"), team: Team::new(threads) }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.kernels.isa
    }

    /// Number of threads that large operations are spread over, the caller included.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// Runs `kernel` on pieces of `values` of whole rows, in parallel when there is enough to do. `cost` is that of one row.
    pub(crate) fn rows(&self, values: &mut [f32], width: usize, cost: Cost, kernel: impl Fn(usize, &mut [f32]) + Sync) {
        assert!(width > 0 && values.len().is_multiple_of(width), "{} values are not rows of {width}", values.len());
        let rows = values.len() / width;
        let rows_per_task = self.team.share(rows, 1);
        self.team.chunks(values, rows_per_task * width, cost.times(rows), |index, chunk| kernel(index * rows_per_task, chunk));
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cpu").field("isa", &self.isa()).field("threads", &self.threads()).finish()
    }
}
