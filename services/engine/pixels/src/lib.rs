//! Pictures in and out: files to RGB, RGB to the tensors a vision tower takes, pixels to files.
//!
//! | File | Holds |
//! |---|---|
//! | `decode/` | PNG, JPEG and WebP to 8-bit RGB, within [`Limits`] |
//! | `resize.rs` | 8-bit resampling, bit for bit as Pillow does it |
//! | `processor.rs` | [`Processor`]: `preprocessor_config.json` applied to a picture |
//! | `encode.rs` | 8-bit RGB to PNG or WebP with metadata |
//!
//! Everything here may be handed bytes from strangers: nothing panics, and memory is bounded by [`Limits`] before it is taken.

mod decode;
mod encode;
mod error;
mod processor;
mod resize;

pub use decode::{Limits, Rgb, decode};
pub use encode::{encode, media_type};
pub use error::PixelError;
pub use processor::{Plane, Processed, Processor};
