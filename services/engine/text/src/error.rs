use std::path::{Path, PathBuf};

use checkpoint::CheckpointError;
use domain::Invalid;

/// Why a tokenizer cannot be loaded or a request cannot be encoded. `Display` is one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// The request asks for something that this checkpoint or any other cannot take.
    #[error("{0}")]
    Invalid(#[from] Invalid),
    /// A file of the folder is missing or wrong.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// A JSON file of the folder cannot be read.
    #[error("{0}")]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer lacks a token that the model needs.
    #[error("{}: missing token {token}, which {need}", path.display())]
    MissingToken { path: PathBuf, token: String, need: String },
    /// The checkpoint's template failed on a conversation that it should take.
    #[error("chat template: {0}")]
    Template(String),
    /// The tokenizer failed on a text.
    #[error("tokenizer: {0}")]
    Encode(String),
}

impl TextError {
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_path_buf(), reason: reason.into() }
    }
}

/// A message of another library on one line.
pub(crate) fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
