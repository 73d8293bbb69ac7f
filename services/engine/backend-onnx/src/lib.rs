//! The one door to ONNX Runtime: graphs are built here, node by node, from the tensors of a checkpoint, and run on the CPU.
//!
//! | File | Holds |
//! |---|---|
//! | `graph.rs` | [`Graph`]: nodes, inputs, outputs, weights that stay in their mapped file |
//! | `ops.rs` | the layers that vision models are made of, as methods of [`Graph`] |
//! | `session.rs` | [`Session`]: a graph compiled by the runtime, and its runs |
//! | `runtime.rs` | the shared library: found, loaded and initialised once |
//! | `gen/onnx.rs` | the ONNX messages, generated from `proto/onnx.proto` (Apache-2.0, from the ONNX project) |

mod graph;
mod ops;
mod runtime;
mod session;

/// The messages of an ONNX model file.
#[allow(clippy::all, missing_docs)]
mod onnx {
    include!("gen/onnx.rs");
}

pub use graph::{Dim, Graph, Value};
pub use ops::Activation;
pub use runtime::{LIBRARY_VARIABLE, runtime_version};
pub use session::{Input, Output, RUN_SETTINGS, SETTINGS, Session, SessionOptions};
