use checkpoint::CheckpointError;

/// Why a step or a load could not be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The checkpoint lacks something or contradicts itself; the message names file and tensor or field.
    #[error("{0}")]
    Checkpoint(String),
    /// The caller broke the contract of the step API.
    #[error("step: {0}")]
    Step(String),
    /// The numbers went wrong (NaN or infinity) or a runtime failed; the message names the place.
    #[error("compute: {0}")]
    Compute(String),
    /// Whoever computes a part of the model cannot be reached now; the message names the part. The same step may succeed later.
    #[error("{0}")]
    Unavailable(String),
}

impl From<CheckpointError> for EngineError {
    fn from(error: CheckpointError) -> Self {
        Self::Checkpoint(error.to_string())
    }
}
