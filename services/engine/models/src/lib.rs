//! Model families: one file per family, chosen by what `config.json` says.
//!
//! | File | Holds |
//! |---|---|
//! | `registry.rs` | which family a checkpoint is of; [`load_language`] and [`card`] |
//! | `text_config.rs` | the llama part of a configuration, completed and checked |
//! | `generation.rs` | sampling defaults of `generation_config.json` |
//! | `llama.rs` | DeepSeek LLM: the decoder that the other families share |
//! | `janus.rs` | Janus: the decoder with a second embedding and a second head for VQ codes |

mod generation;
mod janus;
mod llama;
mod registry;
mod text_config;

pub use registry::{LoadOptions, card, kv_block_bytes, load_language, load_language_on};

// The vision side (siglip.rs, vq.rs) is declared below this line.
