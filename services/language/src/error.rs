use std::time::Duration;

use domain::Invalid;
use sched::{JobError, SubmitError};
use tonic::{Code, Status};

/// What a client that found the queue full is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why a generation did not start or did not finish.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("{0}")]
    QueueFull(String),
    /// The engine is gone, or a part of the model is: another instance may go on, or this one later.
    #[error("{0}")]
    Unavailable(String),
    #[error("{0}")]
    Compute(String),
}

impl Error {
    /// The one place where an error becomes a gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::QueueFull(_) => Code::ResourceExhausted,
            Self::Unavailable(_) => Code::Unavailable,
            Self::Compute(_) => Code::Internal,
        }
    }
}

impl From<SubmitError> for Error {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { .. } => Self::QueueFull(error.to_string()),
            SubmitError::TooLong { .. } => Self::Invalid(Invalid::new("prompt", error.to_string())),
            SubmitError::Invalid(invalid) => Self::Invalid(invalid),
            SubmitError::Unguided(_) => Self::Compute(error.to_string()),
            SubmitError::Stopped => Self::Unavailable(error.to_string()),
        }
    }
}

impl From<JobError> for Error {
    fn from(error: JobError) -> Self {
        match error {
            JobError::Stopped | JobError::Unavailable(_) => Self::Unavailable(error.to_string()),
            JobError::Compute(reason) => Self::Compute(reason),
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(invalid) => wire::invalid(&invalid),
            Error::QueueFull(message) => wire::retry_later(message, RETRY_AFTER),
            other => Self::new(other.code(), other.to_string()),
        }
    }
}
