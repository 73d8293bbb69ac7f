//! What the engine needs of structured output, without knowing tokens or grammars.

use std::fmt;

use domain::{Constraint, Invalid};

/// Makes guides. One per model; shared by all jobs.
pub trait Guides: fmt::Debug + Send + Sync {
    /// A guide for a text that has not begun. `eos_token_ids` end it; the guide allows them exactly where the constraint lets the text end.
    ///
    /// Called where a job is submitted, never on the engine thread: this may take long.
    fn guide(&self, constraint: &Constraint, eos_token_ids: &[u32]) -> Result<Box<dyn Guide>, GuideError>;
}

/// Keeps one output to its constraint. Its state depends on the tokens accepted so far and on nothing else.
pub trait Guide: fmt::Debug + Send {
    /// Set the logits of tokens that must not come next to negative infinity. Fails when no token is left.
    ///
    /// Called on the engine thread once per output, while every other job waits: a tenth of a millisecond is good.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Go on behind a token. Fails when it must not come next.
    fn accept(&mut self, id: u32) -> Result<(), String>;

    /// Whether nothing may follow: the text is complete.
    fn is_finished(&self) -> bool;
}

/// Why there is no guide for a constraint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuideError {
    /// The constraint makes no sense, or is more than is taken.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// No constraint can be served, whatever it says.
    #[error("{0}")]
    Unable(String),
}
