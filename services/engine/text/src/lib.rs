//! Text to token ids and back, for one checkpoint: its tokenizer, its chat template, its special tokens.
//!
//! Every special token is found by its string, since the same id means different things in different checkpoints. What a client writes in a
//! conversation can never become a special token; only the checkpoint's template and this crate put those in.
//!
//! | File | Holds |
//! |---|---|
//! | `codec.rs` | [`TextCodec`]: loading, encode, decode |
//! | `prepare.rs` | a request's input as token ids and picture slots |
//! | `template.rs`, `turns.rs` | the chat template, and what takes its place in families that publish none |
//! | `guard.rs` | keeps content from forming special tokens |
//! | `tokens.rs` | the special tokens by name |
//! | `detokenizer.rs`, `stops.rs` | decoding a stream, with stop strings |
//! | `vocabulary.rs` | the bytes of every token |

mod codec;
mod detokenizer;
mod error;
mod guard;
mod prepare;
mod stops;
mod template;
mod tokens;
mod turns;
mod vocabulary;

pub use codec::TextCodec;
pub use detokenizer::{Detokenized, Detokenizer};
pub use error::TextError;
pub use prepare::{Prepared, PreparedSegment};
