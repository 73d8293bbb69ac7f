//! The words of Janua: requests, prompts, sampling parameters and outputs as plain types, valid by construction.
//!
//! Nothing here knows the wire, a model or a runtime. `wire` builds these types from messages and refuses what is invalid;
//! after that no stage checks again.

mod error;
mod job;
mod latent;
mod model;
mod output;
mod prompt;
mod request;
mod sampling;

pub use error::Invalid;
pub use job::{FlowState, Job, Mode};
pub use latent::{Drawing, Latent};
pub use model::{Canvas, CodeGrid, LatentGrid, ModelCard};
pub use output::{Event, FinishReason, Logprob, TokenLogprobs};
pub use prompt::{Embeddings, Prompt, Segment};
pub use request::{Input, Message, OutputKind, Part, Role};
pub use sampling::{Constraint, ImageFormat, ImageSampling, Sampling, Solver};
