use std::time::Duration;

use domain::Invalid;
use tonic::{Code, Status};

/// When a client that was refused for lack of room may come again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why a request is not answered, or not to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("model: {name:?} is not served here; known: {known}")]
    UnknownModel { name: String, known: String },
    #[error("all {running} places are taken and {waiting} requests wait already")]
    Overloaded { running: usize, waiting: usize },
    #[error("the deadline passed before the answer was complete")]
    Deadline,
    #[error("the client is gone")]
    ClientGone,
    /// What a stage answered, in its own words.
    #[error("{stage}: {}", status.message())]
    Stage { stage: &'static str, status: Status },
    /// A stage broke the contract of its messages.
    #[error("{stage} answered against the contract: {reason}")]
    Contract { stage: &'static str, reason: String },
}

impl Error {
    /// The one place where an error becomes a gRPC code.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::UnknownModel { .. } => Code::NotFound,
            Self::Overloaded { .. } => Code::ResourceExhausted,
            Self::Deadline => Code::DeadlineExceeded,
            Self::ClientGone => Code::Cancelled,
            Self::Stage { status, .. } => status.code(),
            Self::Contract { .. } => Code::Internal,
        }
    }

    pub(crate) fn contract(stage: &'static str, reason: impl ToString) -> Self {
        Self::Contract { stage, reason: reason.to_string() }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(invalid) => wire::invalid(&invalid),
            Error::Overloaded { .. } => wire::retry_later(error.to_string(), RETRY_AFTER),
            // Details (retry hints, fields) stay as the stage gave them.
            Error::Stage { stage, status } => {
                Self::with_details(status.code(), format!("{stage}: {}", status.message()), status.details().to_vec().into())
            }
            other => Self::new(other.code(), other.to_string()),
        }
    }
}
