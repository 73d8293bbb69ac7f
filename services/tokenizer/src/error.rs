use domain::Invalid;
use text::TextError;
use tonic::{Code, Status};

/// Why a text is not encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The checkpoint's files fail on a request that they should take.
    #[error(transparent)]
    Checkpoint(TextError),
    #[error("the encoder stopped: {0}")]
    Stopped(String),
}

impl Error {
    /// The one place where an error becomes a gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::Checkpoint(_) | Self::Stopped(_) => Code::Internal,
        }
    }
}

impl From<TextError> for Error {
    fn from(error: TextError) -> Self {
        match error {
            TextError::Invalid(invalid) => Self::Invalid(invalid),
            other => Self::Checkpoint(other),
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(invalid) => wire::invalid(&invalid),
            other => Self::new(other.code(), other.to_string()),
        }
    }
}
