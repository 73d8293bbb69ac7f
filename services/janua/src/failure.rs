use std::fmt::Display;
use std::io;

use tonic::{Code, Status};

/// A comparison or a check came out badly.
pub const COMPARISON: u8 = 1;
/// A flag, a configuration value or a combination of them is wrong (`EX_USAGE`).
pub const USAGE: u8 = 64;
/// The server refused the request (`EX_DATAERR`).
pub const REFUSED: u8 = 65;
/// A file or folder cannot be used (`EX_NOINPUT`).
pub const NO_INPUT: u8 = 66;
/// Nobody answers at the address (`EX_UNAVAILABLE`).
pub const UNAVAILABLE: u8 = 69;
/// Something that should not happen did (`EX_SOFTWARE`).
pub const SOFTWARE: u8 = 70;
/// The server is too busy or too slow just now (`EX_TEMPFAIL`).
pub const TRY_LATER: u8 = 75;

/// Why the program ends early: one line for stderr and an exit code after `sysexits.h`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: u8,
    message: String,
}

impl Failure {
    /// A failure that prints `message`; a line break in it becomes a space.
    pub fn new(code: u8, message: impl Display) -> Self {
        let line = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Self { code, message: line }
    }

    /// Wrong flags or configuration.
    pub fn usage(message: impl Display) -> Self {
        Self::new(USAGE, message)
    }

    /// An unusable file or folder.
    pub fn input(message: impl Display) -> Self {
        Self::new(NO_INPUT, message)
    }

    /// A defect, or a machine that does not do what it always does.
    pub fn software(message: impl Display) -> Self {
        Self::new(SOFTWARE, message)
    }

    /// An error of the standard output; `None` when the reader has simply gone away, as `head` does.
    pub fn output(error: &io::Error) -> Option<Self> {
        (error.kind() != io::ErrorKind::BrokenPipe).then(|| Self::software(format!("cannot write the answer: {error}")))
    }

    /// The answer of the server at `address`.
    pub fn status(status: &Status, address: &str) -> Self {
        let message = status.message();
        match status.code() {
            Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => Self::new(REFUSED, message),
            Code::NotFound => Self::new(REFUSED, format!("{message} (see `janua chat --list --server {address}`)")),
            Code::Unavailable => Self::new(UNAVAILABLE, format!("{message} (server {address})")),
            Code::ResourceExhausted | Code::DeadlineExceeded => Self::new(TRY_LATER, format!("{message}: try again later")),
            code => Self::software(format!("{code}: {message} (server {address})")),
        }
    }
}

/// An error and everything behind it as one sentence: `outer: cause: cause of the cause`, none of them twice.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let sentence = inner.to_string();
        if !text.contains(&sentence) {
            text.push_str(": ");
            text.push_str(&sentence);
        }
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line() {
        assert_eq!(Failure::input("no such\n  file").to_string(), "no such file");
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        assert_eq!(Failure::output(&io::Error::from(io::ErrorKind::BrokenPipe)), None);
        assert!(Failure::output(&io::Error::from(io::ErrorKind::StorageFull)).is_some());
    }

    #[test]
    fn statuses_have_their_codes() {
        let rows = [
            (Code::InvalidArgument, REFUSED),
            (Code::NotFound, REFUSED),
            (Code::Unavailable, UNAVAILABLE),
            (Code::ResourceExhausted, TRY_LATER),
            (Code::DeadlineExceeded, TRY_LATER),
            (Code::Internal, SOFTWARE),
        ];
        for (code, expected) in rows {
            assert_eq!(Failure::status(&Status::new(code, "why"), "http://x").code, expected, "{code}");
        }
    }
}
