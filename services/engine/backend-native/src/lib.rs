//! The backend that computes on the CPU with our own kernels: f32 activations, weights as they lie in the mapped file.
//!
//! | File | Holds |
//! |---|---|
//! | `native.rs` | [`Native`]: every operation of [`layers::Backend`] as one kernel call |
//! | `tensor.rs` | activations |
//! | `linear.rs` | weights, mapped |
//! | `kv.rs` | the paged cache of one layer |

mod kv;
mod linear;
mod native;
mod tensor;

pub use cpu::{Cpu, ISA_VARIABLE, Isa, UnknownIsa};
pub use kv::{CompressedKv, HeadsKv, Kv};
pub use linear::Linear;
pub use native::Native;
pub use tensor::Tensor;
