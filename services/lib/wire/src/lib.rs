//! Wire messages to domain types and back: the only crate that knows both.
//!
//! Everything that comes from outside is checked here, once; each refusal is a [`domain::Invalid`] that names the field.
//! Functions, not `From`: neither side's type belongs to this crate, and a parse that can fail should read like one.

pub mod activations;
pub mod images;
pub mod input;
pub mod language;
pub mod latent;
pub mod model;
pub mod sampling;
pub mod status;
pub mod tokenizer;
pub mod vision;

pub use status::{invalid, retry_later, violation};
