use std::time::Duration;

use domain::Invalid;
use tonic::{Code, Status};

/// What a client that found the queue full is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why a picture was not painted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("{0} pictures wait already")]
    QueueFull(usize),
    /// The decoder or the file format failed on codes that they should take.
    #[error("{0}")]
    Compute(String),
}

impl Error {
    /// The one place where an error becomes a gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::QueueFull(_) => Code::ResourceExhausted,
            Self::Compute(_) => Code::Internal,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(invalid) => wire::invalid(&invalid),
            Error::QueueFull(_) => wire::retry_later(error.to_string(), RETRY_AFTER),
            Error::Compute(_) => Self::new(error.code(), error.to_string()),
        }
    }
}
