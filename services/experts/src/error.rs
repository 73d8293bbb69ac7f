use domain::Invalid;
use placement::ExpertRange;
use proto::v1::expert_failure::Reason;
use tonic::{Code, Status};

/// Why a batch has no outputs. The stream that it came over goes on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("expert {expert} is not held by shard {shard}")]
    NotHeld { expert: usize, shard: ExpertRange },
    #[error("{0} batches wait already")]
    Busy(usize),
    #[error("{0}")]
    Compute(String),
}

impl Failure {
    /// What the caller is told.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Invalid(_) => Reason::Invalid,
            Self::NotHeld { .. } => Reason::NotHeld,
            Self::Busy(_) => Reason::Busy,
            Self::Compute(_) => Reason::Compute,
        }
    }

    /// What the batch's span is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::NotHeld { .. } => Code::FailedPrecondition,
            Self::Busy(_) => Code::ResourceExhausted,
            Self::Compute(_) => Code::Internal,
        }
    }
}

/// Nothing is computed here any more: another replica may.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the experts {shard} of {model} have stopped")]
pub struct Stopped {
    pub model: String,
    pub shard: ExpertRange,
}

impl From<Stopped> for Status {
    fn from(stopped: Stopped) -> Self {
        Self::unavailable(stopped.to_string())
    }
}
