//! Many jobs, one model: continuous batching over a paged KV cache.
//!
//! An [`Engine`] owns a [`layers::LanguageModel`] on a thread of its own and repeats four stages: take new jobs (`inbox`), choose the rows
//! of the next step (`scheduler`), compute them, then sample and deliver (`task`, `sampler`, `stream`). This crate knows sequences and
//! blocks, not tensors: what a block holds is the model's business.
//!
//! Invariant: what a job yields depends on the job and the model alone. What shares its batches, how its prompt is cut into chunks, what the
//! prefix cache holds, whether it was preempted, or resumed elsewhere through `emitted`, never changes its outputs.

mod config;
mod engine;
mod error;
mod inbox;
mod intake;
mod plan;
mod pool;
mod prefix;
pub mod sampler;
mod scheduler;
mod sequence;
mod stream;
mod task;
mod worker;

pub use config::{EngineConfig, EngineStats, MIN_BATCH_TOKENS};
pub use engine::Engine;
pub use error::{JobError, SubmitError};
pub use stream::{BUFFERED_EVENTS, JobStream};
