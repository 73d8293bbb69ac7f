//! Refusals as gRPC statuses with machine-readable details.

use std::time::Duration;

use domain::Invalid;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// `INVALID_ARGUMENT` with the field in the message and in a `google.rpc.BadRequest` detail.
pub fn invalid(error: &Invalid) -> Status {
    let mut details = ErrorDetails::new();
    details.add_bad_request_violation(&error.field, &error.reason);
    Status::with_error_details(Code::InvalidArgument, error.to_string(), details)
}

/// The field and the reason in a status made by [`invalid`], here or by another service.
pub fn violation(status: &Status) -> Option<Invalid> {
    let violation = status.get_details_bad_request()?.field_violations.into_iter().next()?;
    Some(Invalid::new(violation.field, violation.description))
}

/// `RESOURCE_EXHAUSTED` with a `google.rpc.RetryInfo` detail.
pub fn retry_later(message: impl Into<String>, after: Duration) -> Status {
    let mut details = ErrorDetails::new();
    details.set_retry_info(Some(after));
    Status::with_error_details(Code::ResourceExhausted, message, details)
}
