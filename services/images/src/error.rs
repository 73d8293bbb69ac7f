use std::time::Duration;

use domain::Invalid;
use layers::EngineError;
use pixels::PixelError;
use tonic::{Code, Status};

/// How long a client that found the queue full should wait: about one picture.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Why no picture is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("{0} pictures are waiting for the decoder already")]
    Busy(usize),
    #[error(transparent)]
    Decode(#[from] EngineError),
    #[error("the picture cannot be encoded: {0}")]
    Encode(#[from] PixelError),
    #[error("the decoder stopped: {0}")]
    Stopped(String),
}

impl Error {
    /// The one place where an error becomes a gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::Busy(_) => Code::ResourceExhausted,
            Self::Decode(_) | Self::Encode(_) | Self::Stopped(_) => Code::Internal,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(invalid) => wire::invalid(&invalid),
            Error::Busy(_) => wire::retry_later(error.to_string(), RETRY_AFTER),
            other => Self::new(other.code(), other.to_string()),
        }
    }
}
