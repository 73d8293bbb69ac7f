//! A model folder in the Hugging Face layout: `config.json`, other small JSON files, and weights in safetensors files.
//!
//! Weight files are mapped into memory and never copied as a whole. Everything that the headers say is checked against the files when the
//! folder is opened, so a [`TensorView`] always lies inside its file. Every error is one line that names the file, tensor or field.
//!
//! | File | Holds |
//! |---|---|
//! | `folder.rs` | [`Checkpoint`]: the folder, its JSON files and the table of all tensors |
//! | `weights.rs` | one mapped file |
//! | `header.rs` | the safetensors header, parsed and checked |
//! | `tensor.rs` | views of tensors, shared tensors, conversion to f32 |
//! | `scan.rs` | reading all weights once, refusing NaN and infinity |

mod dtype;
mod error;
mod folder;
mod header;
mod json;
mod scan;
mod tensor;
mod weights;

pub use dtype::Dtype;
pub use error::CheckpointError;
pub use folder::Checkpoint;
pub use json::read_json;
pub use tensor::{Location, SharedTensor, TensorView};
