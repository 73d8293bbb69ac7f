use domain::Invalid;

use crate::GuideError;

/// Why a job was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many jobs wait as may.
    #[error("the queue is full: {limit} jobs are waiting")]
    QueueFull { limit: usize },
    /// Prompt and shortest possible output do not fit, in the model's context or in the KV cache.
    #[error("the prompt takes {prompt} positions and its output at least {output}, but only {context} are there")]
    TooLong { prompt: usize, output: usize, context: usize },
    /// The job contradicts itself or the model.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The job has a constraint, and constraints cannot be served.
    #[error("constraints cannot be served: {0}")]
    Unguided(String),
    /// The engine has been stopped, or its model has crashed.
    #[error("the engine has stopped")]
    Stopped,
}

impl From<GuideError> for SubmitError {
    fn from(error: GuideError) -> Self {
        match error {
            GuideError::Invalid(invalid) => Self::Invalid(invalid),
            GuideError::Unable(reason) => Self::Unguided(reason),
        }
    }
}

/// Why a job ended without finishing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// The engine was stopped, or its model has crashed in another job's step.
    #[error("the engine has stopped")]
    Stopped,
    /// A part of the model that is computed elsewhere cannot be reached. The job may be done again later, or elsewhere.
    #[error("{0}")]
    Unavailable(String),
    /// The model failed on this job, or its logits were no numbers.
    #[error("{0}")]
    Compute(String),
}
