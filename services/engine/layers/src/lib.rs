//! What model families are written in: the step they compute, the backend they compute on, and the layers they share.

pub mod error;
pub mod model;
pub mod step;

pub use error::EngineError;
pub use model::{LanguageModel, NoObserver, Observer};
pub use step::{BLOCK_TOKENS, BlockId, Head, RowInput, Slice, Step, StepOutput};
