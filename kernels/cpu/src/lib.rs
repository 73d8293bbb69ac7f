//! Kernels for the CPU: pure compute over slices, no I/O, no allocation of weights, no knowledge of models.
//!
//! Every operation is a method of [`Cpu`], which holds what was decided once at start: the instruction set and the team of threads.
//! An operation is a folder: `mod.rs` states the contract, `scalar.rs` is the reference, one more file per instruction set.
//!
//! **Results do not depend on company.** What is computed for one row is bit for bit the same whether the row comes alone or among
//! others, and whatever the number of threads: the order of additions for an output element is fixed by the element alone.

mod add;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod cpu;
mod gelu;
mod heads;
mod isa;
mod latent_attention;
mod matmul;
mod matrix;
mod rms_norm;
mod rope;
mod silu_mul;
mod softmax;
mod team;
mod widen;

pub use attention::{KvShape, KvSlice, PagedKv, Queries};
pub use cpu::Cpu;
pub use heads::HeadRows;
pub use isa::{ISA_VARIABLE, Isa, UnknownIsa};
pub use latent_attention::{LatentKv, LatentQueries, LatentShape};
pub use matrix::{Dtype, Matrix};
pub use rope::{Pairs, Rotation};
